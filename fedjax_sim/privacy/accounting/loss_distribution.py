"""The distribution of a privacy loss on a grid, composed with itself.

As in dp-accounting, whose composition works out its truncation, its transform
and a sum over all losses anew for every number of releases. Here what does not
depend on that number is kept, so that a run can ask after every round.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from fedjax_sim.privacy import library

_TRUNCATED = 1e-15  # mass that a composition may leave out
_ORDERS = np.concatenate([np.arange(-20, 0), np.arange(1, 21)])


class LossDistribution:
  """Losses at whole multiples of an interval, and a chance of an infinite one.

  The masses are those of Connect the Dots (Doroshenko et al. 2022, arXiv
  2207.04380, algorithm 1): of all losses on the grid whose divergences are no
  less than the given ones, those with the least.

  Args:
    interval: between two losses.
    lowest: the first loss, over the interval.
    deltas: shape=(losses,), float64, two or more; the divergence at each loss:
      what delta is where epsilon is the loss.
  """

  def __init__(self, interval: float, lowest: int, deltas: np.ndarray):
    falls = np.diff(np.minimum.accumulate(deltas))
    inner = falls[1:] - math.exp(interval) * falls[:-1]
    ends = (
      1 - deltas[0] + falls[0] / math.expm1(interval),
      falls[-1] / math.expm1(-interval),
    )
    masses = np.concatenate([ends[:1], inner / math.expm1(interval), ends[1:]])
    self._masses = np.maximum(masses, 0)
    self._interval, self._lowest = interval, lowest
    self._infinite = float(deltas[-1])
    # Chernoff's bounds of where a sum of losses may be.
    self._orders = _ORDERS / len(masses)
    places = np.arange(len(masses))
    self._log_moments = np.array(
      [
        library("scipy.special").logsumexp(order * places, b=self._masses)
        for order in self._orders
      ]
    )
    self._spectra: dict[int, np.ndarray] = {}

  def epsilon(self, count: int, delta: float) -> float:
    """Return the least epsilon >= 0 of `count` releases for this delta."""
    if self._infinite_after(count) > delta:
      return math.inf
    return self.composed(count).epsilon(delta)

  def _infinite_after(self, count: int) -> float:
    return _TRUNCATED - math.expm1(count * math.log1p(-self._infinite))

  def composed(self, count: int) -> Composition:
    """Return the losses of `count` releases together."""
    size = len(self._masses)
    bounds = (
      count * self._log_moments + math.log(2 / _TRUNCATED)
    ) / self._orders
    upper, lower = self._orders > 0, self._orders < 0
    end = min(count * (size - 1), math.ceil(bounds[upper].min()))
    start = max(0, math.floor(bounds[lower].max()))
    length = end - start + 1
    # Powers of two, so that few transforms are kept.
    points = 2 ** math.ceil(math.log2(max(length, size)))
    fft = library("scipy.fft")
    if points not in self._spectra:
      self._spectra[points] = fft.rfft(self._masses, points)
    around = fft.irfft(self._spectra[points] ** count, points)
    masses = np.roll(around, -start)[:length]  # places are modulo `points`
    return Composition(
      interval=self._interval,
      first=count * self._lowest + start,
      masses=np.maximum(masses, 0),
      infinite=self._infinite_after(count),
    )


class Composition(NamedTuple):
  """The losses of several releases together.

  Attributes:
    interval: between two losses.
    first: the first of them, over the interval.
    masses: shape=(losses,), float64; their chances.
    infinite: the chance of an infinite loss.
  """

  interval: float
  first: int
  masses: np.ndarray
  infinite: float

  def joined(self, other: Composition) -> Composition:
    """Return the losses together with other releases' of the same interval."""
    masses = library("scipy.signal").fftconvolve(self.masses, other.masses)
    return Composition(
      interval=self.interval,
      first=self.first + other.first,
      masses=np.maximum(masses, 0),
      infinite=self.infinite + other.infinite,
    )

  def epsilon(self, delta: float) -> float:
    """Return the least epsilon >= 0 for this delta."""
    if self.infinite > delta:
      return math.inf
    nonnegative = max(0, -self.first)
    first, masses = self.first + nonnegative, self.masses[nonnegative:]
    if not len(masses):
      return 0.0
    # above[i]: of the losses from i on; below[i]: the same of the other
    # federation, times exp(loss i); their difference is delta at loss i.
    above = self.infinite + np.cumsum(masses[::-1])[::-1]
    decay = math.exp(-self.interval)
    below = library("scipy.signal").lfilter([1], [1, -decay], masses[::-1])
    below = below[::-1]
    too_much = np.flatnonzero(above[:-1] - below[:-1] > delta)
    least = int(too_much[-1]) + 1 if len(too_much) else 0
    share = float((above[least] - delta) / below[least])
    if share <= 0:
      return 0.0
    return max(0.0, (first + least) * self.interval + math.log(share))
