"""Time and memory of hypergradients on digits, forward and reverse.

    python -m benchmarks.hypergradients

One line for each way: the seconds of a call after the first, the shortest of
nine, and the bytes that XLA says it needs, arguments included. An MLP with 64
hidden units, 10 of 50 clients a round, 2 epochs of batches of 8; `run` is a run
of the rounds and the evaluation, without a derivative.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import jax

import fedjax_sim as fs
from fedjax_sim.data import load_digits
from fedjax_sim.models.mlp import mlp
from fedjax_sim.simulation.dispatch import PlannedRounds

NAMES = (
  "server.learning_rate",
  "server.momentum",
  "client.learning_rate",
  "client.momentum",
)


def seconds(function: Callable[[], object], calls: int = 9) -> float:
  """Return the shortest time of a call, after a first one."""
  function()
  times = []
  for _ in range(calls):
    began = time.perf_counter()
    jax.block_until_ready(function())
    times.append(time.perf_counter() - began)
  return min(times)


def simulator(hidden: int, rounds: int) -> fs.Simulator:
  """Return the run on one device."""
  data = load_digits(num_clients=50, alpha=0.5)
  task = mlp(data.example_shape, data.num_classes, (hidden,))
  return fs.Simulator(
    task=task,
    algorithm=fs.algorithms.fedavg.fedavg(
      task,
      fs.optimizer("sgd", learning_rate=0.05, momentum=0.1),
      fs.optimizer("sgd", learning_rate=1.0, momentum=0.5),
    ),
    data=data,
    sampler=fs.sampling.uniform(50, 10),
    batching=fs.LocalBatching(batch_size=8, epochs=2),
    runtime=fs.Runtime(
      lanes=10, devices=1, rounds_per_dispatch=rounds, donate=False
    ),
  )


def main(arguments: Sequence[str] | None = None) -> None:
  """Measure and print."""
  parser = argparse.ArgumentParser(prog="benchmarks.hypergradients")
  parser.add_argument("--rounds", type=int, nargs="+", default=[5, 20])
  parser.add_argument("--hidden", type=int, default=64)
  args = parser.parse_args(arguments)
  for rounds in args.rounds:
    run = simulator(args.hidden, rounds)
    ways = [("forward", of, True) for of in (NAMES[:1], NAMES[:2], NAMES)] + [
      ("reverse", of, again)
      for of in (NAMES[:2], ("weights",))
      for again in (True, False)
    ]
    planned = run.plan(0, rounds)

    def once(
      run: fs.Simulator = run, planned: PlannedRounds = planned
    ) -> object:
      return run.evaluate(run.dispatch(run.init(), planned).state)

    base = seconds(once)
    print(f"{rounds} rounds, run: {base:.3f} s")
    for mode, of, again in ways:
      function = fs.hypergradient_function(
        run, rounds, of=of, mode=mode, rematerialize=again
      )
      spent = seconds(function)
      size = 50 if of == ("weights",) else len(of)
      kept = "" if again else ", all kept"
      print(
        f"{rounds} rounds, {mode}, {size} numbers{kept}: {spent:.3f} s,"
        f" {spent / base:.1f} runs, {function.device_bytes / 1e6:.2f} MB"
      )


if __name__ == "__main__":
  main()
