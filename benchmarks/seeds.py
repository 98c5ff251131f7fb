"""Variants of an experiment over several seeds: mean and standard error."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from fedjax_sim import Simulator
from fedjax_sim.simulation.dispatch import Row


def compare(
  variants: Mapping[str, Callable[[int], float]], seeds: int
) -> dict[str, list[float]]:
  """Run every variant with the seeds 0, 1, ..., and print what each gives.

  Args:
    variants: name -> function of a seed.
    seeds: how many.

  Returns:
    name -> the values, one a seed.
  """
  values: dict[str, list[float]] = {name: [] for name in variants}
  for seed in range(seeds):
    for name, variant in variants.items():
      values[name].append(variant(seed))
      print(f"seed {seed}, {name}: {values[name][-1]:.4f}", flush=True)
  return values


def told(values: Sequence[float], digits: int = 4) -> str:
  """Return mean and standard error, "0.9471 +- 0.0006"; of one value +- 0.

  The error is that of the mean: the sample's standard deviation, with n - 1,
  over the root of n. Both have so many `digits` after the point.
  """
  error = np.std(values, ddof=1) / np.sqrt(len(values)) if values[1:] else 0
  return f"{np.mean(values):.{digits}f} +- {error:.{digits}f}"


def trained(simulator: Simulator, rounds: int) -> Row:
  """Run so many rounds, and return the evaluation after them."""
  state = simulator.init()
  for out in simulator.run(state, rounds):
    state = out.state
  return simulator.evaluate(state)
