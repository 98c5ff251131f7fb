"""Samplers of groups of clients that take turns."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from fedjax_sim.core import Participation, Sampler, validate
from fedjax_sim.sampling.draws import (
  binomial_sizes,
  generator,
  without_replacement,
)


def cyclic(num_clients: int, clients_per_round: int) -> Sampler:
  """Take all clients in one order, again and again.

  The seed shuffles the clients and deals them into ceil(num_clients /
  clients_per_round) groups, whose sizes differ by one at most; groups take
  turns. So nobody is left out, all take part equally often, and no cohort is
  larger than clients_per_round.

  Args:
    num_clients: the population.
    clients_per_round: the most of a round.

  Raises:
    TypeError, ValueError: clients_per_round is not within 1..num_clients.
  """
  return _turns(num_clients, clients_per_round, reshuffled=False)


def cyclic_poisson(
  num_clients: int, clients_per_round: float, groups: int
) -> Sampler:
  """Let groups take turns, and draw each client of a group independently.

  Amplification of banded noise assumes this (arXiv 2306.08153, algorithm 2).
  The seed deals the clients into groups whose sizes differ by one at most. In
  its group's turn every client takes part with the same probability,
  clients_per_round * groups / num_clients.

  Args:
    num_clients: the population.
    clients_per_round: the mean cohort size, over all groups.
    groups: how many.

  Raises:
    TypeError, ValueError: groups is not within 1..num_clients, or
      clients_per_round not within (0, num_clients / groups].
  """
  num_clients = validate.integer("num_clients", num_clients)
  groups = validate.integer("groups", groups, le=num_clients)
  expected = validate.number(
    "server.clients_per_round", clients_per_round, gt=0.0
  )
  rate = expected / (num_clients / groups)
  if rate > 1:
    raise ValueError(
      f"server.clients_per_round={clients_per_round} exceeds the"
      f" {num_clients / groups:g} of {num_clients} training clients in each of"
      f" groups={groups} groups; give less, or fewer groups."
    )
  group = _groups(num_clients, groups)

  def sample(seed: int, round_: int) -> np.ndarray:
    rng = generator(seed, round_)
    members = group(seed, round_)
    size = int(rng.binomial(len(members), rate))
    return members[without_replacement(rng, len(members), size)]

  return Sampler(
    sample=sample,
    sizes=binomial_sizes(-(-num_clients // groups), rate),
    expected=expected,
    participation=Participation(rate, period=groups, independent=True),
  )


def shuffled(num_clients: int, clients_per_round: int) -> Sampler:
  """Take all clients again and again, each time in a new order.

  As `cyclic`, but whenever all have taken part they are shuffled and dealt to
  the groups anew. Nobody takes part twice before all others did once.

  Args:
    num_clients: the population.
    clients_per_round: the most of a round.

  Raises:
    TypeError, ValueError: clients_per_round is not within 1..num_clients.
  """
  return _turns(num_clients, clients_per_round, reshuffled=True)


def _turns(num_clients: int, most: int, *, reshuffled: bool) -> Sampler:
  """Return a sampler of turns of as few groups as hold at most so many."""
  num_clients = validate.integer("num_clients", num_clients)
  size = validate.integer("server.clients_per_round", most, le=num_clients)
  period = -(-num_clients // size)
  return Sampler(
    sample=_groups(num_clients, period, reshuffled=reshuffled),
    sizes=(-(-num_clients // period),),
    expected=num_clients / period,
    participation=None if reshuffled else Participation(1.0, period),
  )


def _groups(
  num_clients: int, groups: int, *, reshuffled: bool = False
) -> Callable[[int, int], np.ndarray]:
  """Return (seed, round) -> the sorted ids of the group whose turn it is.

  Args:
    num_clients: the population.
    groups: whose sizes differ by one at most.
    reshuffled: deal the clients anew whenever all groups had their turn.
  """

  @functools.lru_cache(maxsize=4)  # seeds
  def dealt(seed: int, time: int) -> list[np.ndarray]:
    order = generator(seed, time, stream=1).permutation(num_clients)
    return [np.sort(ids) for ids in np.array_split(order, groups)]

  def group(seed: int, round_: int) -> np.ndarray:
    time, turn = divmod(round_, groups)
    return dealt(seed, time if reshuffled else 0)[turn].copy()

  return group
