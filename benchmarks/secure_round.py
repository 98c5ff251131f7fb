"""What secure aggregation adds to a round: its time over that of a plain one.

Digits, an MLP, 20 clients a round:

    python -m benchmarks.secure_round
"""

from __future__ import annotations

import statistics
import time

import jax

from fedjax_sim.config import default_config
from fedjax_sim.config.build import build

ROUNDS, REPEATS = 20, 5


def seconds(aggregator: str, **parameters: float) -> float:
  """Return the median time of a round."""
  config = default_config()
  config.model.name = "mlp"
  config.server.clients_per_round = 20
  config.aggregator.name = aggregator
  config.runtime.lanes = 1
  config.runtime.devices = 1
  config.runtime.rounds_per_dispatch = ROUNDS
  config.server.eval_every = ROUNDS
  config.runtime.checkpoint_every = ROUNDS
  for field, value in parameters.items():
    config.aggregator[field] = value
  simulator = build(config).simulator
  planned = simulator.plan(0, ROUNDS)
  taken = []
  for _ in range(REPEATS + 1):  # the first one compiles
    state = simulator.init()
    start = time.perf_counter()
    out = simulator.dispatch(state, planned)
    jax.block_until_ready(out.state)
    taken.append((time.perf_counter() - start) / len(out.rows))
  return statistics.median(taken[1:])


def main() -> None:
  """Print a table."""
  plain = seconds("weighted_mean")
  print(f"plain {1000 * plain:.2f} ms")
  for neighbors in (2, 8, 32):
    for dropout in (0.0, 0.1):
      took = seconds(
        "secure_mean", clip=1.0, neighbors=neighbors, dropout=dropout
      )
      print(
        f"neighbors={neighbors} dropout={dropout} {1000 * took:.2f} ms,"
        f" ratio {took / plain:.2f}"
      )
  noisy = seconds("secure_mean", clip=1.0, noise_multiplier=1.0)
  print(f"neighbors=8 noise {1000 * noisy:.2f} ms, ratio {noisy / plain:.2f}")


if __name__ == "__main__":
  main()
