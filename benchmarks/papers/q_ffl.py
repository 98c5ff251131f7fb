"""q-FFL: accuracy of the devices of synthetic(1, 1), without and with q = 1.

Li et al. 2020, "Fair resource allocation in federated learning" (arXiv
1905.10497), table 1, rows "Synthetic". 100 devices, of which 10 take part,
drawn in proportion to their examples; one epoch in batches of 10 with rate 0.1.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.papers.figure import Figure, Row, Scale, train
from fedjax_sim.config import default_config

ACCURACY = "seen/accuracy"
ROUNDS = 4000
PRINTED = {
  0.0: ("80.8 +- 0.9", "18.8 +- 5.0", "100.0 +- 0.0", "724 +- 72"),
  1.0: ("79.0 +- 1.2", "31.1 +- 1.8", "100.0 +- 0.0", "472 +- 14"),
}


def rows(folder: Path, scale: Scale) -> list[Row]:
  """Train with both q, each seed on data of its own."""
  config = default_config()
  config.data.name = "synthetic"
  config.data.num_clients = 100
  config.model.name = "logistic_regression"
  config.algorithm.name = "q_fedavg"
  config.sampler.name = "by_size"
  config.client.learning_rate = 0.1
  config.client.batch_size = 10
  config.client.max_examples = 200
  config.server.rounds = ROUNDS
  config.server.eval_every = max(1, ROUNDS // 4)
  config.runtime.lanes = 1
  points = [
    {"algorithm.q": q, "data.seed": seed}
    for q in PRINTED
    for seed in range(scale.seeds)
  ]
  done = train(config, folder, points, [0], scale, f"{ACCURACY}/mean")
  found = []
  for i, (q, printed) in enumerate(PRINTED.items()):
    mine = range(i * scale.seeds, (i + 1) * scale.seeds)
    of = lambda name: [
      done.last(p, f"{ACCURACY}/{name}")[0]
      for p in mine  # noqa: B023
    ]
    values = (
      ("average", of("mean")),
      ("worst 10 %", of("lowest10")),
      ("best 10 %", of("highest10")),
      ("variance", [std**2 for std in of("std")]),
    )
    found += [
      Row(f"q = {q:g}, {name}", text, ours, 0 if name == "variance" else 1)
      for (name, ours), text in zip(values, printed, strict=True)
    ]
  return found


FIGURE = Figure(
  "Li et al. 2020, 1905.10497, table 1, Synthetic",
  rows,
  "five draws of the data instead of five splits of one; 4,000 rounds instead"
  " of 20,000, with at most 200 examples of a device in each",
)
