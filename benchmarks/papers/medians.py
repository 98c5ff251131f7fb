"""Median and trimmed mean: logistic regression on MNIST, false labels.

Yin et al. 2018, "Byzantine-robust distributed learning: towards optimal
statistical rates" (arXiv 1803.01498), table 2: 40 machines share MNIST, all of
them send full gradients, and 5 % have labels 9 - y. The trimmed mean leaves out
5 % at each end. Neither step size nor number of steps are in the paper; here
the rate is 1, at which full gradients overshoot, as at 0.1 attackers do next to
nothing, and settings are compared at the first step at which the mean without
attackers has the paper's 88.0.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.papers.figure import Figure, Row, Scale, train
from fedjax_sim.config import default_config

METRIC = "test/accuracy"
ATTACK = {"attack.name": "label_flip", "attack.fraction": 0.05}
TRIMMED = {"aggregator.name": "trimmed_mean", "aggregator.fraction": 0.05}
SETTINGS = (  # what, printed, point
  ("mean, no attackers", "88.0", {"aggregator.name": "weighted_mean"}),
  ("mean", "76.8", {"aggregator.name": "weighted_mean", **ATTACK}),
  ("median", "87.2", {"aggregator.name": "median", **ATTACK}),
  ("trimmed mean", "86.9", {**TRIMMED, **ATTACK}),
)


def rows(folder: Path, scale: Scale) -> list[Row]:
  """Train the four settings; compare when the first one is at 88.0."""
  config = default_config()
  config.data.name = "mnist"
  config.data.num_clients = 40
  config.data.partition = "iid"
  config.model.name = "logistic_regression"
  config.algorithm.name = "fedsgd"
  config.algorithm.weighting = "uniform"
  config.server.learning_rate = 1.0
  config.server.clients_per_round = 40
  config.server.rounds = 35
  config.runtime.lanes = 1
  points = [point for _, _, point in SETTINGS]
  done = train(config, folder, points, range(scale.seeds), scale, METRIC)
  curves = np.array([done.curves(p, METRIC) for p in range(len(points))])
  reached = np.flatnonzero(curves[0].mean(axis=0) >= 0.88)
  at = int(reached[0]) if len(reached) else -1
  return [
    Row(what, text, [*(100 * curves[p, :, at])])
    for p, (what, text, _) in enumerate(SETTINGS)
  ]


FIGURE = Figure(
  "Yin et al. 2018, 1803.01498, table 2",
  rows,
  "the rate, and the steps by the first number",
)
