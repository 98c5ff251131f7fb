"""Who takes part in a round: pure functions of (seed, round), on the host.

A sampler states beforehand how large a cohort can get, since a compiled round
has static shapes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from fedjax_sim.core import Purpose, validate

_RARE = 20  # a cohort is small if the population is so many times as large
_TRIES = 8


class Participation(NamedTuple):
  """What a sampler promises of how often a client takes part.

  Privacy accountants build on it, so a private run holds it against what is
  drawn (`privacy.accounting.promises`). Who takes part depends on the seed, the
  round and the number of clients alone, never on what clients hold.

  Attributes:
    rate: the probability that a client takes part in its turn, drawn anew in
      every turn; 1: it may take part in all of them, or in fewer.
    period: of so many consecutive rounds a client takes part in one at most.
      With a rate below 1, its turns are fixed: one round in so many.
    independent: whether every client takes part or not by itself, whoever else
      there is; otherwise, with a rate below 1, a cohort is drawn uniformly
      among those whose turn it is, and has a fixed size.
    population: how many clients `rate` was chosen for, in advance, however many
      there are; None: it follows from their number, which counts as public.
  """

  rate: float
  period: int = 1
  independent: bool = False
  population: int | None = None


class Sampler(NamedTuple):
  """A way to draw cohorts.

  Attributes:
    sample: (seed, round) -> ids; shape=(cohort,), int64, no duplicates.
    sizes: increasing cohort sizes to compile for, at most three; a cohort
      never exceeds the last.
    expected: the mean cohort size.
    versions: (seed, round, ids) -> which version of the broadcast each holds,
      shape=(cohort,), int64; see `Client.version`.
    participation: what it promises; None: nothing, and no accountant can say
      what an epsilon would be.
  """

  sample: Callable[[int, int], np.ndarray]
  sizes: tuple[int, ...]
  expected: float
  versions: Callable[[int, int, np.ndarray], np.ndarray] = (
    lambda seed, round_, ids: np.zeros_like(ids)
  )
  participation: Participation | None = None


def generator(seed: int, round_: int, stream: int = 0) -> np.random.Generator:
  """The generator of the draws of one round, the same on every machine.

  Args:
    seed: the run's.
    round_: rounds done before.
    stream: what it is for: 0, who takes part; 1, an order; 2, an assignment.
  """
  key = np.array([seed, int(Purpose.SAMPLING)], np.uint64)
  counter = np.array([0, 0, stream, round_], np.uint64)
  return np.random.Generator(np.random.Philox(key=key, counter=counter))


def without_replacement(
  rng: np.random.Generator, num_clients: int, size: int
) -> np.ndarray:
  """So many of 0..num_clients - 1, increasing, all sets as likely; int64."""
  return np.sort(rng.choice(num_clients, size, replace=False, shuffle=False))


def uniform(
  num_clients: int, clients_per_round: int, least: int | None = None
) -> Sampler:
  """A number of clients a round, uniformly, without replacement.

  Args:
    num_clients: the population.
    clients_per_round: how many; or the most, with `least`.
    least: every round draws how many, from `least` to `clients_per_round`,
      all as likely; None: always `clients_per_round`.

  Raises:
    TypeError, ValueError: clients_per_round is not within 1..num_clients, or
      least not within 1..clients_per_round.
  """
  num_clients = validate.whole("num_clients", num_clients)
  size = validate.whole("server.clients_per_round", clients_per_round)
  if size > num_clients:
    raise ValueError(
      f"server.clients_per_round={size} exceeds the {num_clients} training"
      f" clients; give at most {num_clients}."
    )
  field = "server.least_clients_per_round"
  lowest = size if least is None else validate.whole(field, least, most=size)

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
  """Every client by itself, with probability clients_per_round / population.

  What amplification by subsampling assumes. A cohort varies, and may be empty.

  Args:
    num_clients: how many clients there are.
    clients_per_round: the mean cohort size of such a population.
    population: a number chosen in advance, without regard to how many clients
      there are: then one client more or less changes nobody else's
      probability. None: `num_clients`.

  Raises:
    TypeError, ValueError: clients_per_round is not within (0, population].
  """
  num_clients = validate.whole("num_clients", num_clients)
  of = num_clients
  if population is not None:
    of = validate.whole("server.sampling_population", population)
  wanted = validate.real(
    "server.clients_per_round", clients_per_round, above=0.0, most=of
  )
  rate = wanted / of

  def sample(seed: int, round_: int) -> np.ndarray:
    rng = generator(seed, round_)
    return without_replacement(
      rng, num_clients, int(rng.binomial(num_clients, rate))
    )

  return Sampler(
    sample=sample,
    sizes=_binomial_sizes(num_clients, rate),
    expected=wanted if population is None else num_clients * rate,
    participation=Participation(rate, 1, True, population),
  )


def _binomial_sizes(most: int, rate: float) -> tuple[int, ...]:
  """Sizes to compile for, of cohorts that are binomial(most, rate)."""
  mean = most * rate
  deviation = math.sqrt(mean * (1 - rate))
  # Nearly every cohort fits the first size, the second is for the rest of a
  # lifetime, and the third is certain.
  sizes = {
    min(most, math.ceil(mean + 4 * deviation) + 1),
    min(most, math.ceil(mean + 12 * deviation) + 8),
    most,
  }
  return tuple(sorted(sizes))


def cyclic(num_clients: int, clients_per_round: int) -> Sampler:
  """Everybody in one order, again and again.

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
  """Groups take turns; of the one whose turn it is, each client by itself.

  What amplification of banded noise assumes (arXiv 2306.08153, algorithm 2).
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
  num_clients = validate.whole("num_clients", num_clients)
  groups = validate.whole("server.sampling_groups", groups, most=num_clients)
  expected = validate.real(
    "server.clients_per_round", clients_per_round, above=0.0
  )
  rate = expected / (num_clients / groups)
  if rate > 1:
    raise ValueError(
      f"server.clients_per_round={clients_per_round} exceeds the"
      f" {num_clients / groups:g} of {num_clients} training clients in each of"
      f" server.sampling_groups={groups} groups; give less, or fewer groups."
    )
  group = _groups(num_clients, groups)

  def sample(seed: int, round_: int) -> np.ndarray:
    rng = generator(seed, round_)
    members = group(seed, round_)
    size = int(rng.binomial(len(members), rate))
    return members[without_replacement(rng, len(members), size)]

  return Sampler(
    sample=sample,
    sizes=_binomial_sizes(-(-num_clients // groups), rate),
    expected=expected,
    participation=Participation(rate, period=groups, independent=True),
  )


def shuffled(num_clients: int, clients_per_round: int) -> Sampler:
  """Everybody once, in an order that is another one each time.

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
  """As few groups as there can be of at most so many take turns."""
  num_clients = validate.whole("num_clients", num_clients)
  size = validate.whole("server.clients_per_round", most, most=num_clients)
  period = -(-num_clients // size)
  return Sampler(
    sample=_groups(num_clients, period, reshuffled=reshuffled),
    sizes=(-(-num_clients // period),),
    expected=num_clients / period,
    participation=None if reshuffled else Participation(1.0, period),
  )


def by_size(
  num_clients: int, clients_per_round: int, sizes: np.ndarray
) -> Sampler:
  """Clients one after the other, in proportion to their examples.

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
  num_clients = validate.whole("num_clients", num_clients)
  size = validate.whole(
    "server.clients_per_round", clients_per_round, most=num_clients
  )
  sizes = np.asarray(sizes)
  if sizes.shape != (num_clients,) or sizes.min() < 1:
    raise ValueError(
      f"sizes has shape {sizes.shape} for {num_clients} clients, or one below"
      " 1; give every client its number of examples."
    )
  ends = np.cumsum(sizes, dtype=np.int64)

  def rest(rng: np.random.Generator, drawn: np.ndarray) -> np.ndarray:
    """All others, in the order of such draws (Efraimidis, Spirakis 2006)."""
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


def _groups(
  num_clients: int, groups: int, *, reshuffled: bool = False
) -> Callable[[int, int], np.ndarray]:
  """(seed, round) -> the sorted ids of the group whose turn it is.

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


SAMPLERS: dict[str, Callable[..., Sampler]] = {
  "uniform": uniform,
  "poisson": poisson,
  "cyclic": cyclic,
  "cyclic_poisson": cyclic_poisson,
  "shuffled": shuffled,
  "by_size": by_size,
}
