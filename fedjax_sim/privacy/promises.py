"""Whether a sampler keeps what it promises of how often a client takes part.

An epsilon holds only if `Sampler.participation` is true. What has to be so in
every round is looked at in every round (`Witness`): nobody comes back too soon,
turns are fixed, cohorts of a fixed size have it. What is a matter of chance is
tested before a run (`check_draws`), on draws with many seeds: how often each
client takes part, and whether it does so by itself. A sampler that keeps its
promise is refused with a probability below 1e-9; one that breaks it by little
may pass, since no test of a few hundred draws sees that.
"""

from __future__ import annotations

import math
from typing import NamedTuple, NoReturn

import numpy as np

from fedjax_sim import validate
from fedjax_sim.privacy import library
from fedjax_sim.sampling import Participation, Sampler

_ALARM = 1e-10  # of each of eight tests
_MOST_TRIALS, _LEAST_TRIALS = 256, 32
_ROUNDS, _IDS = 2048, 4_000_000  # to draw in all, about


class Witness:
  """Holds the rounds that are drawn against what has to be so in each.

  Args:
    sampler: one that promises something.
    num_clients: the population.
    seed: the run's.
  """

  def __init__(self, sampler: Sampler, num_clients: int, seed: int):
    self._sampler, self._seed = sampler, seed
    self._num_clients = num_clients
    self._forget(0)

  def _forget(self, next_: int) -> None:
    self._next = next_
    promised = self._sampler.participation
    if promised is not None and promised.period > 1:
      self._last = np.full(self._num_clients, -1, np.int64)
    self._sizes: dict[int, int] = {}  # turn -> size

  def check(self, round_: int, ids: np.ndarray) -> None:
    """Looks at one round, and at those before that it has not seen.

    Args:
      round_: rounds done before.
      ids: who takes part, shape=(cohort,), int64, no duplicates.

    Raises:
      ValueError: the promise is broken; names round and client.
    """
    promised = self._sampler.participation
    assert promised is not None
    if round_ != self._next:
      # Turns that are fixed are so from the first round on.
      first = 0 if promised.rate < 1 else max(0, round_ - promised.period + 1)
      self._forget(first if promised.period > 1 else round_)
      for earlier in range(self._next, round_):
        self.see(earlier, self._sampler.sample(self._seed, earlier))
    self.see(round_, ids)

  def see(self, round_: int, ids: np.ndarray) -> None:
    """Looks at one round, which follows what it has seen."""
    promised = self._sampler.participation
    assert promised is not None
    rate, period, independent, _ = promised
    self._next = round_ + 1
    if rate < 1 and not independent:
      turn = round_ % period
      size = self._sizes.setdefault(turn, len(ids))
      if period == 1:
        size = round(rate * self._num_clients)
      if len(ids) != size:
        _refuse(
          promised,
          f"in round {round_ + 1} {len(ids)} clients take part and not {size},"
          " where the size should be fixed",
        )
    if period == 1:
      return
    gap = np.where(self._last[ids] < 0, period, round_ - self._last[ids])
    wrong = gap < period
    if rate < 1:
      wrong |= gap % period != 0
    if wrong.any():
      i = int(np.flatnonzero(wrong)[0])
      _refuse(
        promised,
        f"client {ids[i]} takes part in rounds {round_ + 1 - gap[i]} and"
        f" {round_ + 1}"
        + (", where turns should be fixed" if gap[i] > period else ""),
      )
    self._last[ids] = round_


class _Counts(NamedTuple):
  """What was counted in draws, each of as many rounds as there are turns.

  Attributes:
    draws: how many; one of odd place follows the one before.
    each: shape=(clients,), int64; in how many every client takes part.
    twice: clients in both of two that follow each other.
    together: neighbours of ids 2 i and 2 i + 1 in one.
    halves: shape=(ways, 2, draws), int64; clients of one half, and of the
      other, for several ways to split them.
  """

  draws: int
  each: np.ndarray
  twice: int
  together: int
  halves: np.ndarray


def check_draws(sampler: Sampler, num_clients: int, rounds: int) -> None:
  """Tests what a sampler promises of chances, on draws with many seeds.

  Args:
    sampler: who takes part.
    num_clients: the population.
    rounds: of the run, about, from which the drawn ones are.

  Raises:
    ValueError: the promise is broken, or who takes part is no function of seed
      and round.
  """
  promised = sampler.participation
  if promised is None or (promised.rate == 1 and not promised.independent):
    return  # nothing is a matter of chance
  counts = _counted(sampler, num_clients, rounds)
  draws, rate = counts.draws, promised.rate
  most, total = int(counts.each.argmax()), int(counts.each.sum())
  tail = library("scipy.stats").binom.sf(counts.each[most] - 1, draws, rate)
  if num_clients * tail < _ALARM:
    _refuse(
      promised,
      f"client {most} takes part in {counts.each[most]} of {draws} draws",
    )
  if _more(total, draws * num_clients, rate) < _ALARM:
    share = total / (draws * num_clients)
    _refuse(promised, f"a client takes part with probability {share:.3g}")
  places = draws // 2 * num_clients
  least = _least(total, draws * num_clients) ** 2
  for word, chance in (
    ("more", _more(counts.twice, places, rate**2)),
    ("less", _less(counts.twice, places, least)),
  ):
    if chance < _ALARM:
      _refuse(
        promised,
        f"clients take part twice in a row {word} often than by chance, with"
        f" probability {counts.twice / places:.3g}",
      )
  pairs = draws * (num_clients // 2)
  if pairs and _more(counts.together, pairs, rate**2) < _ALARM:
    _refuse(
      promised,
      "clients of neighbouring ids take part together more often than by"
      f" chance, with probability {counts.together / pairs:.3g}",
    )
  if promised.independent and any(
    _associated(*halves) < _ALARM for halves in counts.halves
  ):
    _refuse(
      promised,
      "how many of one half of the clients take part has to do with how many"
      " of the other half do",
    )


def _counted(sampler: Sampler, num_clients: int, rounds: int) -> _Counts:
  """Counts in draws with many seeds, from rounds up to about so many."""
  promised = sampler.participation
  assert promised is not None
  period = promised.period
  trials = min(_ROUNDS // period, int(_IDS / (num_clients * promised.rate)))
  trials = min(max(trials, _LEAST_TRIALS), _MOST_TRIALS)
  rng = np.random.default_rng(0)
  seeds = rng.integers(0, 2**32, trials).tolist()
  begins = rng.integers(0, max(rounds, 1), trials).tolist()
  ways = _ways(rng, num_clients)
  each = np.zeros(num_clients, np.int64)
  halves = np.zeros((len(ways), 2, 2 * trials), np.int64)
  twice = together = 0
  for trial, (seed, begin) in enumerate(zip(seeds, begins, strict=True)):
    witness = Witness(sampler, num_clients, seed)
    before = np.zeros(0, np.int64)
    _check_repeats(sampler, seed, begin)
    for draw in (2 * trial, 2 * trial + 1):
      parts = []
      for round_ in range(begin, begin + period):
        cohort = validate.cohort(sampler.sample(seed, round_), num_clients)
        witness.see(round_, cohort)
        parts.append(cohort)
      begin += period
      ids = np.sort(np.concatenate(parts))
      each[ids] += 1
      twice += len(np.intersect1d(ids, before, assume_unique=True))
      together += int(((np.diff(ids) == 1) & (ids[:-1] % 2 == 0)).sum())
      for way, one in enumerate(ways):
        among = int(one[ids].sum())
        halves[way, :, draw] = among, len(ids) - among
      before = ids
  return _Counts(2 * trials, each, twice, together, halves)


def _check_repeats(sampler: Sampler, seed: int, round_: int) -> None:
  """Refuses cohorts that are others when they are drawn again."""
  one, other = (np.asarray(sampler.sample(seed, round_)) for _ in range(2))
  if not np.array_equal(one, other):
    raise ValueError(
      f"server.sampling: round {round_ + 1} of seed {seed} is another one when"
      " it is drawn again; let Sampler.sample follow from seed and round alone."
    )


def _refuse(promised: Participation, found: str) -> NoReturn:
  told = ", ".join(
    f"{field}={value:.6g}" if field == "rate" else f"{field}={value}"
    for field, value in promised._asdict().items()
    if value is not None
  )
  raise ValueError(
    f"server.sampling: Sampler.participation promises {told}, but {found};"
    " promise what is drawn, or None, for which no epsilon is told."
  )


def _ways(rng: np.random.Generator, num_clients: int) -> list[np.ndarray]:
  """Halves of the clients: every other one, the first ones, some by chance."""
  ids, order = np.arange(num_clients), rng.permutation(num_clients)
  half = num_clients // 2
  return [ids % 2 == 0, ids < half, order < half]


def _divergence(share: float, chance: float) -> float:
  """Kullback-Leibler's, of one coin from another."""
  entropy = library("scipy.special").rel_entr
  return float(entropy(share, chance) + entropy(1 - share, 1 - chance))


def _more(count: int, trials: int, chance: float) -> float:
  """Bounds the probability of so large a count (Hoeffding 1963, theorem 1).

  It holds for draws by themselves, and for those without replacement.
  """
  share = count / trials
  if share <= chance:
    return 1.0
  return math.exp(-trials * _divergence(share, chance))


def _less(count: int, trials: int, chance: float) -> float:
  """Bounds the probability of so small a count."""
  return _more(trials - count, trials, 1 - chance)


def _least(count: int, trials: int) -> float:
  """The least probability with which a count as large is no wonder."""
  share = count / trials
  bound = math.log(1 / _ALARM) / trials
  excess = lambda chance: _divergence(share, chance) - bound
  if share == 0 or excess(1e-12) <= 0:
    return 0.0
  return float(library("scipy.optimize").brentq(excess, 1e-12, share))


def _associated(one: np.ndarray, other: np.ndarray) -> float:
  """Fisher's exact test of whether two counts are large in the same draws."""
  large, larger = _large(one), _large(other)
  table = [
    [int((large & larger).sum()), int((large & ~larger).sum())],
    [int((~large & larger).sum()), int((~large & ~larger).sum())],
  ]
  return float(library("scipy.stats").fisher_exact(table)[1])


def _large(counts: np.ndarray) -> np.ndarray:
  """Which counts are above a limit, which about half of them are."""
  limits = np.unique(counts)
  shares = (counts[None] > limits[:, None]).mean(axis=1)
  return counts > limits[np.abs(shares - 0.5).argmin()]
