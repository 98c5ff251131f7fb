"""Who takes part in a round: pure functions of (seed, round), on the host.

A sampler states beforehand how large a cohort can get, since a compiled round
has static shapes.
"""

from __future__ import annotations

import numpy as np

from fedjax_sim.core import Participation, Sampler, validate
from fedjax_sim.sampling.draws import (
  binomial_sizes,
  generator,
  without_replacement,
)


def uniform(
  num_clients: int, clients_per_round: int, min_clients: int | None = None
) -> Sampler:
  """Draw clients uniformly, without replacement.

  Args:
    num_clients: the population.
    clients_per_round: how many; or the most, with `min_clients`.
    min_clients: the number of clients is drawn in every round, uniformly from
      `min_clients` to `clients_per_round`; None: always `clients_per_round`.

  Raises:
    TypeError, ValueError: clients_per_round is not within 1..num_clients, or
      min_clients not within 1..clients_per_round.
  """
  num_clients = validate.integer("num_clients", num_clients)
  size = validate.integer("server.clients_per_round", clients_per_round)
  if size > num_clients:
    raise ValueError(
      f"server.clients_per_round={size} exceeds the {num_clients} training"
      f" clients; give at most {num_clients}."
    )
  lowest = (
    size
    if min_clients is None
    else validate.integer("min_clients", min_clients, le=size)
  )

  def sample(seed: int, round_: int) -> np.ndarray:
    rng = generator(seed, round_)
    count = size if lowest == size else int(rng.integers(lowest, size + 1))
    return without_replacement(rng, num_clients, count)

  fixed = Participation(size / num_clients) if lowest == size else None
  return Sampler(
    sample=sample,
    sizes=(size,),
    expected=(lowest + size) / 2,
    participation=fixed,
  )


def poisson(
  num_clients: int, clients_per_round: float, population: int | None = None
) -> Sampler:
  """Draw each client by itself, with rate clients_per_round / population.

  Amplification by subsampling assumes this. A cohort varies, and may be empty.

  Args:
    num_clients: how many clients there are.
    clients_per_round: the mean cohort size of such a population.
    population: a number chosen in advance, without regard to how many clients
      there are: then one client more or less changes nobody else's
      probability. None: `num_clients`.

  Raises:
    TypeError, ValueError: clients_per_round is not within (0, population].
  """
  num_clients = validate.integer("num_clients", num_clients)
  of = num_clients
  if population is not None:
    of = validate.integer("population", population)
  wanted = validate.number(
    "server.clients_per_round", clients_per_round, gt=0.0, le=of
  )
  rate = wanted / of

  def sample(seed: int, round_: int) -> np.ndarray:
    rng = generator(seed, round_)
    return without_replacement(
      rng, num_clients, int(rng.binomial(num_clients, rate))
    )

  return Sampler(
    sample=sample,
    sizes=binomial_sizes(num_clients, rate),
    expected=wanted if population is None else num_clients * rate,
    participation=Participation(rate, 1, True, population),
  )
