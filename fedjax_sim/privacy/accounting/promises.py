"""Whether a sampler keeps what it promises of how often a client takes part.

An epsilon holds only if `Sampler.participation` is true. In every round of a
private run (`Witness`) nobody may come back too soon, turns are fixed, and
cohorts of a fixed size have it; no client may take part far too often, and no
cohort have far too much in common with one of the 64 before it (`overlaps`).

Before a run (`check_draws`) up to 128 of its first turns are looked at in this
way, and up to 512 draws with other seeds, half of them of the first four turns
and some of seeds that follow the run's: how often each client takes part, in
all and in each of those turns; what cohorts of other seeds have in common; how
often clients take part twice in a row, and together with those at several
distances; whether halves of independent clients have to do with each other.

A sampler that keeps its promise is refused with a probability below 1e-9 a run.
What so few draws do not show is the author's word: a chance that is off by a
few per cent; a few clients' single rounds after the first four turns; cycles of
more than 64 turns or 31 seeds; a few fixed cohorts that are small; small groups
that take part together, in no order; and what a sampler does for seeds and in
rounds that are not drawn.
"""

from __future__ import annotations

import math
from typing import NamedTuple, NoReturn

import numpy as np

from fedjax_sim.core import Participation, Sampler, validate
from fedjax_sim.privacy import library
from fedjax_sim.privacy.accounting.overlaps import LAGS, Overlaps

_ALARM = 1e-10  # of each of eight tests, besides those of `overlaps`
_MOST_TRIALS, _LEAST_TRIALS = 256, 32
_ROUNDS, _IDS = 2048, 4_000_000  # to draw in all, about
_PAIRED = 2048  # clients of a draw that are looked at in pairs, about
_FIRST = 4  # turns of a run that many seeds draw
_REHEARSED = 2 * LAGS  # turns of the run's own seed


class Witness:
  """A check of the rounds that are drawn against what a sampler promises.

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
    self._overlaps: Overlaps | None = None
    if promised is not None and promised.rate < 1:
      self._overlaps = Overlaps(
        self._num_clients, promised.rate, promised.period
      )

  def check(self, round_: int, ids: np.ndarray) -> None:
    """Check a round; first draw and check the last ones before it, unless seen.

    Args:
      round_: rounds done before.
      ids: who takes part, shape=(cohort,), int64, no duplicates.

    Raises:
      ValueError: the promise is broken; names round and client.
    """
    promised = self._sampler.participation
    assert promised is not None
    if round_ != self._next:
      turns = LAGS if promised.rate < 1 else 1
      self._forget(max(0, round_ - turns * promised.period))
      for earlier in range(self._next, round_):
        drawn = self._sampler.sample(self._seed, earlier)
        self._look(earlier, validate.cohort(drawn, self._num_clients))
    self._look(round_, ids)

  def _look(self, round_: int, ids: np.ndarray) -> None:
    """Check a round, and test what is a matter of chance."""
    self.see(round_, ids)
    found = self._overlaps.see(ids) if self._overlaps is not None else None
    if found is not None:
      promised = self._sampler.participation
      assert promised is not None
      _refuse(promised, f"by round {round_ + 1} {found}")

  def see(self, round_: int, ids: np.ndarray) -> None:
    """Check what must hold in a round that follows those seen so far."""
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
  """Counts over draws, each of as many rounds as there are turns.

  Attributes:
    draws: how many; every second one follows the one before it.
    each: shape=(clients,), int64; in how many draws each client takes part.
    twice: clients in both of two draws that follow each other.
    together: shape=(distances, 2), int64; pairs of clients in the same draw
      whose ids are so far apart, for two ways to make pairs.
    pairs: shape=(distances, 2), int64; how many pairs all draws could have.
    distances: shape=(distances,), int64; of ids.
    halves: shape=(ways, 2, draws), int64; clients of one half, and of the
      other, for several ways to split them.
  """

  draws: int
  each: np.ndarray
  twice: int
  together: np.ndarray
  pairs: np.ndarray
  distances: np.ndarray
  halves: np.ndarray


def check_draws(
  sampler: Sampler, num_clients: int, rounds: int, seed: int = 0
) -> None:
  """Test what a sampler promises about chances, on draws with many seeds.

  Args:
    sampler: who takes part.
    num_clients: the population.
    rounds: about how many the run has; draws are of some of them.
    seed: the run's.

  Raises:
    ValueError: the promise is broken, or who takes part is no function of seed
      and round.
  """
  promised = sampler.participation
  if promised is None or (promised.rate == 1 and not promised.independent):
    return  # nothing is a matter of chance
  _rehearse(sampler, num_clients, rounds, seed)
  counts = _counted(sampler, num_clients, rounds, seed)
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
  for distance, *ways in zip(
    counts.distances, counts.together, counts.pairs, strict=True
  ):
    for together, pairs in zip(*ways, strict=True):
      if pairs and _more(together, pairs, rate**2) < _ALARM / counts.pairs.size:
        _refuse(
          promised,
          f"clients with ids {distance} apart take part together more often"
          f" than by chance, with probability {together / pairs:.3g}",
        )
  if promised.independent and any(
    _associated(*halves) < _ALARM for halves in counts.halves
  ):
    _refuse(
      promised,
      "how many of one half of the clients take part has to do with how many"
      " of the other half do",
    )


def _rehearse(
  sampler: Sampler, num_clients: int, rounds: int, seed: int
) -> None:
  """Check the first rounds of a run, as the run itself will do."""
  promised = sampler.participation
  assert promised is not None
  few = int(_IDS / 4 / (num_clients * promised.rate / promised.period))
  most = min(_REHEARSED * promised.period, _ROUNDS, few)
  witness = Witness(sampler, num_clients, seed)
  for round_ in range(min(rounds, max(most, _FIRST * promised.period))):
    cohort = validate.cohort(sampler.sample(seed, round_), num_clients)
    witness.check(round_, cohort)


def _trials(
  rng: np.random.Generator, most: int, rounds: int, period: int, seed: int
) -> list[tuple[int, int]]:
  """Return each trial's seed and first round; it has two draws of a period.

  Half of the trials are of the first turns of a run: some with seeds that
  follow the run's own, the rest with seeds that are none of these, lest the
  same cohort be drawn twice.
  """
  others = rng.integers(most, 2**32 - most, most)
  seeds = [(seed + int(other)) % 2**32 for other in others]
  begins = rng.integers(0, max(rounds, 1), most).tolist()
  for trial in range(most // 2):
    of, begin = divmod(trial, _FIRST // 2)
    begins[trial] = 2 * begin * period
    if trial < most // 4:
      seeds[trial] = (seed + of) % 2**32
    elif begin:
      seeds[trial] = seeds[trial - 1]
  return list(zip(seeds, begins, strict=True))


def _counted(
  sampler: Sampler, num_clients: int, rounds: int, seed: int
) -> _Counts:
  """Return counts over draws with many seeds, of rounds up to about so many."""
  promised = sampler.participation
  assert promised is not None
  rate, period = promised.rate, promised.period
  most = min(_ROUNDS // period, int(_IDS / (num_clients * rate)))
  most = min(max(most, _LEAST_TRIALS), _MOST_TRIALS)
  rng = np.random.default_rng(0)
  ways = _ways(rng, num_clients)
  trials = _trials(rng, most, rounds, period, seed)
  distances = _distances(rng, num_clients)
  firsts = np.minimum(num_clients - distances, int(_PAIRED / rate) + 1)
  each = np.zeros(num_clients, np.int64)
  halves = np.zeros((len(ways), 2, 2 * most), np.int64)
  together = np.zeros((len(distances), 2), np.int64)
  twice = 0
  turns = [Overlaps(num_clients, rate) for _ in range(_FIRST + 1)]
  for trial, (of, begin) in enumerate(trials):
    witness = Witness(sampler, num_clients, of)
    before = np.zeros(0, np.int64)
    _check_repeats(sampler, of, begin)
    for draw in (2 * trial, 2 * trial + 1):
      parts = []
      for round_ in range(begin, begin + period):
        cohort = validate.cohort(sampler.sample(of, round_), num_clients)
        witness.see(round_, cohort)
        parts.append(cohort)
      ids = np.sort(np.concatenate(parts))
      if rate < 1:
        first = trial < most // 2
        turn = begin // period if first else _FIRST
        found = turns[turn].see(ids)
        if found is not None:
          where = f"turn {turn + 1}" if first else "rounds"
          _refuse(promised, f"in {where} of several seeds {found}")
      begin += period
      each[ids] += 1
      twice += len(np.intersect1d(ids, before, assume_unique=True))
      together += _together(ids, num_clients, distances, firsts)
      for way, one in enumerate(ways):
        among = int(one[ids].sum())
        halves[way, :, draw] = among, len(ids) - among
      before = ids
  pairs = 2 * most * _alternating(firsts, distances)
  return _Counts(2 * most, each, twice, together, pairs, distances, halves)


def _distances(rng: np.random.Generator, num_clients: int) -> np.ndarray:
  """Return distances of ids: small ones, fractions of all, random ones."""
  small = np.arange(1, 9)
  random = rng.integers(1, max(num_clients, 2), 5)
  distances = np.unique(np.concatenate([small, num_clients // small, random]))
  return distances[(distances > 0) & (distances < num_clients)]


def _alternating(counts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
  """Return how many of 0..counts - 1 are in even and in odd blocks.

  Blocks are `lengths` long. Clients i and i + length, with i in even blocks
  alone, are disjoint pairs.
  """
  twos, rest = np.divmod(counts, 2 * lengths)
  odd = twos * lengths + np.maximum(rest - lengths, 0)
  return np.stack([counts - odd, odd], axis=-1)


def _together(
  ids: np.ndarray, num_clients: int, distances: np.ndarray, firsts: np.ndarray
) -> np.ndarray:
  """Count pairs i and i + distance among sorted ids, with i < first."""
  there = np.zeros(num_clients, bool)
  there[ids] = True
  counts = np.zeros((len(distances), 2), np.int64)
  for row, (distance, first) in enumerate(zip(distances, firsts, strict=True)):
    some = ids[: np.searchsorted(ids, first)]
    some = some[there[some + distance]]
    odd = int((some // distance % 2).sum())
    counts[row] = len(some) - odd, odd
  return counts


def _check_repeats(sampler: Sampler, seed: int, round_: int) -> None:
  """Refuse a sampler whose cohort changes when it is drawn again."""
  one, other = (np.asarray(sampler.sample(seed, round_)) for _ in range(2))
  if not np.array_equal(one, other):
    raise ValueError(
      f"sampler.name: round {round_ + 1} of seed {seed} is another one when"
      " it is drawn again; let Sampler.sample follow from seed and round alone."
    )


def _refuse(promised: Participation, found: str) -> NoReturn:
  told = ", ".join(
    f"{field}={value:.6g}" if field == "rate" else f"{field}={value}"
    for field, value in promised._asdict().items()
    if value is not None
  )
  raise ValueError(
    f"sampler.name: Sampler.participation promises {told}, but {found};"
    " promise what is drawn, or None, for which no epsilon is told."
  )


def _ways(rng: np.random.Generator, num_clients: int) -> list[np.ndarray]:
  """Return halves of the clients: every other one, the first, random ones."""
  ids, order = np.arange(num_clients), rng.permutation(num_clients)
  half = num_clients // 2
  return [ids % 2 == 0, ids < half, order < half]


def _divergence(share: float, chance: float) -> float:
  """Return the Kullback-Leibler divergence of one coin from another."""
  entropy = library("scipy.special").rel_entr
  return float(entropy(share, chance) + entropy(1 - share, 1 - chance))


def _more(count: int, trials: int, chance: float) -> float:
  """Bound the probability of so large a count (Hoeffding 1963, theorem 1).

  It holds for independent draws, and for those without replacement.
  """
  share = count / trials
  if share <= chance:
    return 1.0
  return math.exp(-trials * _divergence(share, chance))


def _less(count: int, trials: int, chance: float) -> float:
  """Bound the probability of so small a count."""
  return _more(trials - count, trials, 1 - chance)


def _least(count: int, trials: int) -> float:
  """Return the least chance with which so large a count is not improbable."""
  share = count / trials
  bound = math.log(1 / _ALARM) / trials
  excess = lambda chance: _divergence(share, chance) - bound
  if share == 0 or excess(1e-12) <= 0:
    return 0.0
  return float(library("scipy.optimize").brentq(excess, 1e-12, share))


def _associated(one: np.ndarray, other: np.ndarray) -> float:
  """Return the p-value of Fisher's exact test that two counts are unrelated."""
  large, larger = _large(one), _large(other)
  table = [
    [int((large & larger).sum()), int((large & ~larger).sum())],
    [int((~large & larger).sum()), int((~large & ~larger).sum())],
  ]
  return float(library("scipy.stats").fisher_exact(table)[1])


def _large(counts: np.ndarray) -> np.ndarray:
  """Return which counts are above a limit that about half of them exceed."""
  limits = np.unique(counts)
  shares = (counts[None] > limits[:, None]).mean(axis=1)
  return counts > limits[np.abs(shares - 0.5).argmin()]
