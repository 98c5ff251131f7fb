"""Robust aggregators in plain numpy, float64, as their papers have them.

Functions of updates `x`, shape=(clients, coordinates), and weights `w`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np


def trimmed_mean(x, w, fraction=0.1, number=None):
  cut = int(np.floor(fraction * len(x) + 1e-9)) if number is None else number
  cut = min(cut, (len(x) - 1) // 2)
  return np.sort(x, axis=0)[cut : len(x) - cut].mean(axis=0)


def tolerated(f, n, slope, offset):
  """f, or what so few clients allow."""
  most = max((n - offset) // slope, 0)
  return most if f is None else min(f, most)


def krum_scores(x, f):
  """The sum of squared distances from the nearest n - f - 2 others."""
  scores = []
  for i in range(len(x)):
    far = [np.sum((x[i] - x[j]) ** 2) for j in range(len(x)) if j != i]
    scores.append(sum(sorted(far)[: max(len(x) - f - 2, 1)]))
  return np.array(scores)


def multi_krum(x, w, f=None, m=None):
  f = tolerated(f, len(x), 2, 3)
  most = max(len(x) - f - 2, 1)
  m = most if m is None else min(m, most)
  return x[np.argsort(krum_scores(x, f), kind="stable")[:m]].mean(axis=0)


def krum(x, w, f=None):
  return multi_krum(x, w, f, 1)


def bulyan(x, w, f=None):
  f = tolerated(f, len(x), 4, 3)
  left = list(range(len(x)))
  selected: list[int] = []
  while len(selected) < len(x) - 2 * f:
    best = left[int(np.argmin(krum_scores(x[left], f)))]
    selected.append(best)
    left.remove(best)
  chosen = x[selected]
  gap = np.abs(chosen - np.median(chosen, axis=0))
  order = np.argsort(gap, axis=0)[: len(selected) - 2 * f]
  return np.take_along_axis(chosen, order, axis=0).mean(axis=0)


def norm_bounding(x, w, factor=1.0):
  norms = np.linalg.norm(x, axis=1)
  bound = factor * np.sort(norms)[(len(x) - 1) // 2]
  scale = [min(1, bound / norm) if norm > 0 else 1 for norm in norms]
  return np.average(x * np.array(scale)[:, None], axis=0, weights=w)


def geometric_median(x, w, smoothing=1e-6, steps=10):
  v = norm_bounding(x, w)
  for _ in range(steps):
    near = w / np.maximum(smoothing, np.linalg.norm(x - v, axis=1))
    v = near @ x / near.sum()
  return v


def centered_clipping(x, w, radius=10.0, center=0.0):
  apart = x - center
  norms = np.maximum(np.linalg.norm(apart, axis=1), 1e-300)
  return center + (apart * np.minimum(1, radius / norms)[:, None]).mean(axis=0)


def dnc(x, w, f=None, fraction=1.0):
  f = tolerated(f, len(x), 2, 1)
  centered = x - x.mean(axis=0)
  top = np.linalg.svd(centered, full_matrices=False)[2][0]
  order = np.argsort((centered @ top) ** 2, kind="stable")
  return x[order[: max(len(x) - int(fraction * f), 1)]].mean(axis=0)


REFERENCE: dict[str, Callable[..., Any]] = {
  function.__name__: function
  for function in (
    *(bulyan, centered_clipping, dnc, geometric_median, krum, multi_krum),
    *(norm_bounding, trimmed_mean),
  )
}
