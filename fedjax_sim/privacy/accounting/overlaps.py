"""Whether cohorts are drawn anew, or have too much in common.

Of cohorts that are drawn by themselves, each client being in each with a
probability of at most `rate`, three things are followed: how often every client
takes part, how many of a cohort were in the one that came so many before it,
summed over all cohorts, and the same of every two cohorts alone. The first two
are bets against the promise whose expected gain is never positive, so they may
be looked at after every cohort, and one that ever wins 1 / alarm times its
stake is seen with a probability of at most `alarm` (Ville 1939; Howard et al.
2020, "Time-uniform Chernoff bounds", arXiv 1808.03204). Clients of a cohort may
exclude each other, as in draws without replacement (Hoeffding 1963, section 6).
"""

from __future__ import annotations

import functools

import numpy as np

LAGS = 64  # cohorts that one is compared with
ALARM = 1e-12  # of each of three tests
_MOST = 8192  # clients of a cohort that are compared, about
_BETS = np.array([0.8, 0.5, 0.2, 0.03])  # that a chance is rate**bet instead


class Overlaps:
  """Tests of whether cohorts are drawn independently, one after another.

  Args:
    num_clients: the population.
    rate: the largest probability of a client, within (0, 1).
    period: groups take turns: clients are in one of so many cohorts at most.
  """

  def __init__(self, num_clients: int, rate: float, period: int = 1):
    self._rate, self._period = rate, period
    # Of large cohorts, the clients whose ids this divides are compared.
    self._step = int(num_clients * rate / period / _MOST) + 1
    some = -(-num_clients // self._step)
    self._sizes: list[int] = []
    self._lags = np.arange(1, LAGS + 1)
    self._times = np.zeros(num_clients, np.int32)
    self._last = np.zeros(some, np.int32)
    # Bit k: whether a client took part k turns before its last time.
    self._history = np.zeros(some, np.uint64)
    self._common = np.zeros(LAGS)
    self._before = np.zeros(LAGS)

  def see(self, ids: np.ndarray) -> str | None:
    """Count one more cohort, and test all so far.

    Args:
      ids: who takes part, shape=(cohort,), int64, no duplicates.

    Returns:
      What cannot be by chance, in words; None: nothing.
    """
    now, period = len(self._sizes), self._period
    turns = now // period + 1
    self._times[ids] += 1
    some = ids[ids % self._step == 0] // self._step
    self._sizes.append(len(some))
    ago = self._lags[: turns - 1]  # turns
    last = max(now - period * LAGS, now % period)
    before = np.array(self._sizes[last:now:period][::-1], int)
    common = self._shared(now, some)[: len(ago)]
    self._common[: len(ago)] += common
    self._before[: len(ago)] += before
    if len(ids):
      most = ids[self._times[ids].argmax()]
      gain = self._gain(self._times[most], turns)
      if gain > np.log(len(self._times) / ALARM):
        times = self._times[most]
        return f"client {most} takes part in {times} of its {turns} turns"
    gains = self._gain(self._common, self._before)
    lag = int(gains.argmax())
    if gains[lag] > np.log(LAGS / ALARM):
      share = self._common[lag] / self._before[lag]
      return (
        f"clients take part again {_later(period * (lag + 1))} with probability"
        f" {share:.3g}"
      )
    # The i-th cohort has 1 / (i (i + 1)) of the alarm, which is 1 in all.
    limit = np.log(LAGS / ALARM) + np.log(now + 1.0) + np.log(now + 2.0)
    # No client that is in both adds more than this to a bound: mostly, there is
    # no need to compute them.
    if common.max(initial=0) * -np.log(self._rate) <= limit:
      return None
    wrong = np.flatnonzero(self._surprise(common, before) > limit)
    if len(wrong):
      return (
        f"{common[wrong[0]]} of {before[wrong[0]]} clients of a cohort take"
        f" part again {_later(period * ago[wrong[0]])}"
      )
    return None

  def _shared(self, now: int, ids: np.ndarray) -> np.ndarray:
    """Count who was in each of the last cohorts; shape=(LAGS,), int64."""
    gap = (now - self._last[ids]) // self._period
    shift = np.clip(gap - 1, 0, LAGS - 1).astype(np.uint64)
    history = np.where(gap <= LAGS, self._history[ids] << shift, np.uint64(0))
    self._history[ids] = (history << np.uint64(1)) | np.uint64(1)
    self._last[ids] = now
    octets = history.astype("<u8").view(np.uint8).reshape(-1, LAGS // 8)
    bits = np.unpackbits(octets, axis=1, bitorder="little")
    return bits.sum(axis=0, dtype=np.int64)

  @functools.cached_property
  def _factors(self) -> tuple[np.ndarray, np.ndarray]:
    """Logarithms of what bets multiply by: a client takes part, or does not."""
    chance = self._rate**_BETS
    return np.log(chance / self._rate), np.log((1 - chance) / (1 - self._rate))

  def _gain(self, count: np.ndarray, trials: np.ndarray | int) -> np.ndarray:
    """Return the logarithm of what the best bet has won; shape as `count`."""
    count = np.asarray(count)[..., None]
    rest = np.asarray(trials)[..., None] - count
    won, lost = self._factors
    best: np.ndarray = (count * won + rest * lost).max(axis=-1)
    return best - np.log(len(_BETS))

  def _surprise(self, common: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Return minus the logarithm of Chernoff's bound of so large an overlap."""
    share = common / np.maximum(before, 1)
    rest = 1 - share
    tiny = np.finfo(float).tiny
    divergence = share * np.log(np.maximum(share, tiny) / self._rate)
    divergence += rest * np.log(np.maximum(rest, tiny) / (1 - self._rate))
    return np.where(share > self._rate, before * divergence, 0.0)


def _later(cohorts: int) -> str:
  return f"{cohorts} cohorts later" if cohorts > 1 else "in the next cohort"
