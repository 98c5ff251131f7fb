"""Clients whose training takes several rounds, for asynchronous algorithms.

Nguyen et al. 2022, "Federated learning with buffered asynchronous aggregation"
(arXiv 2106.06639), draw how long a client trains from a half-normal
distribution. A client that started tau rounds ago holds the model of that time,
version tau of what the server broadcasts.
"""

from __future__ import annotations

import numpy as np

from fedjax_sim.core import Sampler, validate
from fedjax_sim.sampling.draws import generator
from fedjax_sim.sampling.uniform import uniform

_DURATIONS = 3  # the stream of the draws


def delayed(sampler: Sampler, versions: int, scale: float = 1.0) -> Sampler:
  """Return the sampler with clients that hold older versions of the model.

  In every round each client's training has taken floor(|z|) rounds, with z
  normal of mean 0 and standard deviation `scale`, whoever else takes part; at
  most as many as there were, and versions - 1.

  Args:
    sampler: who takes part.
    versions: how many versions are in flight, the newest included, >= 1, as
      the algorithm has them.
    scale: standard deviation, in rounds, >= 0; 0 lets all hold the newest.

  Raises:
    TypeError, ValueError: an argument is no such number.

  Example:
    delayed(uniform(100, 10), versions=4, scale=2.0)
  """
  versions = validate.integer("versions", versions)
  scale = validate.number("scale", scale, ge=0)

  def held(seed: int, round_: int, ids: np.ndarray) -> np.ndarray:
    count = int(ids.max(initial=-1)) + 1  # so that a client's draw is its own
    draws = generator(seed, round_, stream=_DURATIONS).standard_normal(count)
    rounds = np.floor(np.abs(scale * draws[ids])).astype(np.int64)
    return np.minimum(rounds, min(versions - 1, round_))

  return sampler._replace(versions=held)


def in_flight(
  num_clients: int,
  clients_per_round: int,
  versions: int = 2,
  scale: float = 1.0,
) -> Sampler:
  """Return uniform cohorts of clients that hold older versions of the model.

  Args:
    num_clients: the population.
    clients_per_round: cohort size; FedBuff's buffer K.
    versions: how many versions are in flight, the newest included, as the
      algorithm has them; >= 1.
    scale: standard deviation of the rounds that a client's training takes, >=
      0; 0 lets all hold the newest version.

  Raises:
    TypeError, ValueError: an argument is out of range.
  """
  return delayed(uniform(num_clients, clients_per_round), versions, scale)
