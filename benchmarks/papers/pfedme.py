"""pFedMe against Per-FedAvg and FedAvg: logistic regression on MNIST.

Dinh et al. 2020, "Personalized federated learning with Moreau envelopes" (arXiv
2006.08848), the table with tuned parameters, MLR on MNIST: 20 clients with two
digits each, a quarter of whose images are held out; 5 take part, with 20 local
steps on batches of 20, for 800 rounds. The best accuracy of a run counts.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.papers.figure import Figure, Row, Scale, train
from fedjax_sim.config import default_config

GLOBAL, OWN = "test/accuracy", "seen/accuracy"
POINTS = (
  {
    "algorithm.name": "pfedme",
    "algorithm.lam": 15.0,
    "algorithm.inner_rate": 0.1,
    "client.learning_rate": 0.01,
    "server.learning_rate": 2.0,
  },
  {
    "algorithm.name": "per_fedavg",
    "algorithm.inner_rate": 0.03,
    "client.learning_rate": 0.003,
    "client.batch_size": 40,  # D and D' of 20 each
  },
  {"algorithm.name": "fedavg", "client.learning_rate": 0.02},
)
SETTINGS = (  # what, printed, point, metric
  ("pFedMe, personal models", "95.62 +- 0.04", 0, OWN),
  ("pFedMe, global model", "94.18 +- 0.06", 0, GLOBAL),
  ("Per-FedAvg", "94.37 +- 0.04", 1, OWN),
  ("FedAvg", "93.96 +- 0.02", 2, GLOBAL),
)


def rows(folder: Path, scale: Scale) -> list[Row]:
  """Train the three algorithms with the authors' numbers."""
  config = default_config()
  config.data.name = "benchmarks.papers.data:two_digits_each"
  config.model.name = "logistic_regression"
  config.model.init = "uniform"
  config.algorithm.weighting = "examples"
  config.client.batch_size = 20
  config.client.steps = 20
  config.server.rounds = 800
  config.server.clients_per_round = 5
  config.server.eval_every = 20
  config.runtime.lanes = 1
  done = train(config, folder, POINTS, range(scale.seeds), scale, OWN)
  return [
    Row(what, text, [100 * max(c) for c in done.curves(point, metric)], 2)
    for what, text, point, metric in SETTINGS
  ]


FIGURE = Figure(
  "Dinh et al. 2020, 2006.08848, tuned parameters, MNIST, MLR",
  rows,
  "clients train only when they are drawn, so personal models are older; a"
  " deal of the digits by chance",
)
