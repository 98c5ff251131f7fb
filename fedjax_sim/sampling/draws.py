"""Random draws of ids, on the host."""

from __future__ import annotations

import math

import numpy as np

from fedjax_sim.core import Purpose


def generator(seed: int, round_: int, stream: int = 0) -> np.random.Generator:
  """Return the generator of a round's draws, the same on every machine.

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
  """Draw `size` of 0..num_clients - 1 uniformly; sorted, int64."""
  return np.sort(rng.choice(num_clients, size, replace=False, shuffle=False))


def binomial_sizes(most: int, rate: float) -> tuple[int, ...]:
  """Return sizes to compile for, of cohorts that are binomial(most, rate)."""
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
