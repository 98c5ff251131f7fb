"""Cohorts without some clients, as if these had never taken part."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from fedjax_sim.core import Sampler, validate


def without(
  sampler: Sampler, clients: Collection[int], num_clients: int
) -> Sampler:
  """Return the sampler with some clients dropped from each of its cohorts.

  All others take part when they did before, so that two runs that differ in who
  is dropped share their cohorts but for that. A cohort may come out empty; such
  a round changes nothing. Nothing is promised to accountants: a cohort no
  longer has the size that was promised, and who is dropped may depend on what
  clients hold.

  A sampler that observes is refused: it never hears of those who are dropped,
  and would go on giving them places, which stay empty. In power of choice their
  loss stays infinite, so that they take the places of all others.

  Args:
    sampler: who takes part otherwise.
    clients: numbers of the clients that never take part, each once.
    num_clients: the population, with them.

  Raises:
    TypeError, ValueError: one is no client, or comes twice, or all are given;
      or the sampler observes.

  Example:
    without(uniform(48, 10), [7], 48)
  """
  field = f"server.leave_out={tuple(clients)}"
  dropped = np.zeros(num_clients, bool)
  for client in clients:
    number = validate.integer(
      "server.leave_out", client, ge=0, le=num_clients - 1
    )
    if dropped[number]:
      raise ValueError(f"{field}: client {number} comes twice; give it once.")
    dropped[number] = True
  if sampler.observe is not None:
    raise ValueError(
      f"{field}: sampler.name observes what clients report, and would keep the"
      " places of those who never do, left empty, from all others; take one"
      " such as 'uniform'."
    )
  if dropped.all():
    raise ValueError(
      f"{field} leaves out all {num_clients} clients, and none is left to"
      " train; keep one."
    )

  def sample(seed: int, round_: int) -> np.ndarray:
    ids = validate.cohort(sampler.sample(seed, round_), num_clients)
    return ids[~dropped[ids]]

  share = 1 - int(dropped.sum()) / num_clients
  return sampler._replace(
    sample=sample, expected=sampler.expected * share, participation=None
  )
