"""FedAvg: rounds to 97 % on MNIST with the 2NN.

McMahan et al. 2017, "Communication-efficient learning of deep networks from
decentralized data" (arXiv 1602.05629), table 1: two hidden layers of 200 units,
100 clients of 600 examples, C = 0.1, E = 1, B = 10, i.i.d. As there, a run's
curve is made monotonic and interpolated between rounds, and the rate is the
one of a grid that takes the fewest rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.papers.figure import Figure, Row, Scale, train
from fedjax_sim.config import default_config

TARGET = 0.97
RATES = (0.1, 0.2)
TUNING_SEED = 1000
METRIC = "test/accuracy"


def rows(folder: Path, scale: Scale) -> list[Row]:
  """Choose the rate with one seed, and train with the others."""
  config = default_config()
  config.data.name = "mnist"
  config.data.num_clients = 100
  config.data.partition = "iid"
  config.model.name = "mlp"
  config.model.hidden_sizes = (200, 200)
  config.client.batch_size = 10
  config.server.rounds = 60
  config.runtime.lanes = 1
  points = [{"client.learning_rate": rate} for rate in RATES]
  tuned = train(config, folder / "tuning", points, [TUNING_SEED], scale, METRIC)
  took = [rounds_to(tuned.curves(p, METRIC)[0]) for p in range(len(RATES))]
  best = [points[int(np.argmin(took))]]
  seeds = range(scale.seeds)
  done = train(config, folder / "best", best, seeds, scale, METRIC)
  ours = [rounds_to(curve) for curve in done.curves(0, METRIC)]
  rate = best[0]["client.learning_rate"]
  return [Row(f"2NN, i.i.d., rounds to 97 %, rate {rate:g}", "87", ours)]


def rounds_to(curve: Sequence[float], target: float = TARGET) -> float:
  """Return the rounds to a target, between two of them; infinity if never.

  Args:
    curve: accuracy after round 1, 2, ...
    target: which accuracy.
  """
  best = np.maximum.accumulate(curve)
  reached = np.flatnonzero(best >= target)
  if not len(reached):
    return float("inf")
  i = int(reached[0])
  if i == 0:
    return 1.0
  return i + float((target - best[i - 1]) / (best[i] - best[i - 1]))


FIGURE = Figure(
  "McMahan et al. 2017, 1602.05629, table 1",
  rows,
  "a grid of two rates; other initial parameters",
)
