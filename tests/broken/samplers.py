"""Samplers that do not keep to the contract."""

import numpy as np

from fedjax_sim.core import Participation, Sampler


def remembering(num_clients, clients_per_round) -> Sampler:
  """A generator that goes on from round to round."""
  rng = np.random.default_rng(0)
  sample = lambda seed, round_: rng.permutation(num_clients)[:clients_per_round]
  return Sampler(sample, (clients_per_round,), clients_per_round)


def twice(num_clients, clients_per_round) -> Sampler:
  """Clients are drawn with replacement."""

  def sample(seed, round_):
    rng = np.random.default_rng((seed, round_))
    return rng.integers(0, num_clients, clients_per_round)

  return Sampler(sample, (clients_per_round,), clients_per_round)


def _poisson(num_clients, clients_per_round):
  def sample(seed, round_):
    rng = np.random.default_rng((seed, round_))
    return np.flatnonzero(
      rng.random(num_clients) < clients_per_round / num_clients
    )

  return sample


def too_small(num_clients, clients_per_round) -> Sampler:
  """Cohorts of random sizes, larger than those that are compiled for."""
  sample = _poisson(num_clients, clients_per_round)
  return Sampler(sample, (clients_per_round,), clients_per_round)


def half(num_clients, clients_per_round) -> Sampler:
  """Promise half the chance with which clients take part."""
  return Sampler(
    _poisson(num_clients, clients_per_round),
    (num_clients,),
    clients_per_round,
    participation=Participation(
      rate=clients_per_round / num_clients / 2, independent=True
    ),
  )


def hiding(num_clients, clients_per_round) -> Sampler:
  """What is observed is kept beside the state, and lost with the process."""
  taken = np.zeros(num_clients, bool)

  def sample(seed, round_, state):
    rng = np.random.default_rng((seed, round_))
    order = rng.permutation(num_clients)
    return order[np.argsort(~taken[order], kind="stable")][:clients_per_round]

  def observe(state, round_, ids, present, values):
    taken[ids[present]] = True
    return state

  return Sampler(
    sample,
    (clients_per_round,),
    clients_per_round,
    init=lambda: np.zeros(1),
    observe=observe,
  )


def writing(num_clients, clients_per_round) -> Sampler:
  """What is observed is written into the state that was given."""

  def sample(seed, round_, taken):
    rng = np.random.default_rng((seed, round_))
    order = rng.permutation(num_clients)
    return order[np.argsort(~taken[order], kind="stable")][:clients_per_round]

  def observe(taken, round_, ids, present, values):
    taken[ids[present]] = True
    return taken

  return Sampler(
    sample,
    (clients_per_round,),
    clients_per_round,
    init=lambda: np.zeros(num_clients, bool),
    observe=observe,
  )
