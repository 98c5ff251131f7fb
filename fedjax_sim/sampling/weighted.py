"""Samplers that draw some clients more often."""

from __future__ import annotations

import numpy as np

from fedjax_sim.core import Sampler, validate
from fedjax_sim.sampling.draws import generator

_RARE = 20  # a cohort is small if the population is so many times as large
_TRIES = 8


def by_size(
  num_clients: int, clients_per_round: int, sizes: np.ndarray
) -> Sampler:
  """Draw clients one after the other, in proportion to their examples.

  Successive sampling: of those that were not drawn yet, each is next with a
  probability proportional to its examples. Of small cohorts a draw takes a time
  that depends on the cohort, not on the number of clients.

  Args:
    num_clients: the population.
    clients_per_round: how many.
    sizes: shape=(num_clients,), integer; examples of every client.

  Raises:
    TypeError, ValueError: clients_per_round is not within 1..num_clients, or a
      size is not 1 or more.
  """
  num_clients = validate.integer("num_clients", num_clients)
  size = validate.integer(
    "server.clients_per_round", clients_per_round, le=num_clients
  )
  sizes = np.asarray(sizes)
  if sizes.shape != (num_clients,) or sizes.min() < 1:
    raise ValueError(
      f"sizes has shape {sizes.shape} for {num_clients} clients, or one below"
      " 1; give every client its number of examples."
    )
  ends = np.cumsum(sizes, dtype=np.int64)

  def rest(rng: np.random.Generator, drawn: np.ndarray) -> np.ndarray:
    """Draw the clients still missing, at once (Efraimidis, Spirakis 2006)."""
    key = rng.exponential(size=num_clients) / sizes
    key[drawn] = np.inf
    missing = size - len(drawn)
    return np.argpartition(key, missing - 1)[:missing]

  def sample(seed: int, round_: int) -> np.ndarray:
    rng = generator(seed, round_)
    drawn = np.zeros(0, np.int64)
    for _ in range(_TRIES if size * _RARE <= num_clients else 0):
      rows = rng.integers(0, ends[-1], 2 * (size - len(drawn)))
      more = np.append(drawn, np.searchsorted(ends, rows, side="right"))
      first = np.unique(more, return_index=True)[1]
      drawn = more[np.sort(first)][:size]
      if len(drawn) == size:
        return np.sort(drawn)
    return np.sort(np.append(drawn, rest(rng, drawn)))

  return Sampler(sample=sample, sizes=(size,), expected=size)
