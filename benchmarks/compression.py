"""Bytes against accuracy: every compressor on digits, on both links.

    python -m benchmarks.compression --out=docs

An MLP of 4,810 parameters, 10 of 50 clients a round, `--rounds` rounds, and
`--seeds` seeds of the run. A Markdown table has, for each compressor at a few
settings, the bytes that a client sends or receives in a round, how many times
fewer these are, and the accuracy on the test set, its mean and standard error
over the seeds; DIR gets `compression.png`. Error feedback on the up-link sends
what clients keep, of whom one takes part in every fifth round on average.
"""

from __future__ import annotations

import argparse
import collections
import pathlib
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

import fedjax_sim as fs
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.core import Transform
from fedjax_sim.data import load_digits
from fedjax_sim.models.mlp import mlp
from fedjax_sim.reporting.figures.style import PALETTE
from fedjax_sim.transforms import (
  downlink,
  drive,
  eden,
  ef21,
  error_feedback,
  power_sgd,
  product_quantization,
  qsgd,
  quantize,
  random_k,
  rotated,
  signsgd,
  terngrad,
  top_k,
)

CLIENTS, COHORT = 50, 10
_MARKERS = "osv^D"  # within a family


class Variant(NamedTuple):
  """A run.

  Attributes:
    family: the compressor, which has one color.
    up: what happens to updates.
    down: what happens to what the server sends.
    aggregator: of the updates.
    server_rate: the server's learning rate.
  """

  family: str
  up: Sequence[Transform] = ()
  down: Sequence[Transform] = ()
  aggregator: str = "weighted_mean"
  server_rate: float = 1.0


def variants() -> dict[str, Variant]:
  """Return the runs by their names."""
  sent = Variant
  return {
    "none": sent("none"),
    "quantize 4 bits": sent("quantize", [quantize(0.5, 4)]),
    "qsgd 1 level": sent("qsgd", [qsgd(1)]),
    "qsgd 7 levels": sent("qsgd", [qsgd(7)]),
    "qsgd 127 levels": sent("qsgd", [qsgd(127)]),
    "terngrad": sent("terngrad", [terngrad()]),
    "signsgd, majority vote": sent(
      "signsgd", [signsgd()], aggregator="majority_vote", server_rate=0.01
    ),
    "signsgd scaled, feedback": sent(
      "signsgd", [error_feedback(signsgd(True))]
    ),
    "rotated 1 bit": sent("rotated", [rotated(1)]),
    "rotated 4 bits": sent("rotated", [rotated(4)]),
    "drive": sent("drive", [drive()]),
    "eden 2 bits": sent("eden", [eden(2)]),
    "eden 4 bits": sent("eden", [eden(4)]),
    "random_k 10 %": sent("random_k", [random_k(0.1)]),
    "top_k 10 %": sent("top_k", [top_k(0.1)]),
    "top_k 1 %": sent("top_k", [top_k(0.01)]),
    "top_k 1 %, feedback": sent("top_k", [error_feedback(top_k(0.01))]),
    "top_k 1 %, EF21": sent("top_k", [ef21(top_k(0.01))]),
    "power_sgd rank 1, feedback": sent(
      "power_sgd", [error_feedback(power_sgd(1))]
    ),
    "power_sgd rank 4, feedback": sent(
      "power_sgd", [error_feedback(power_sgd(4))]
    ),
    "product_quantization 16": sent(
      "product_quantization", [product_quantization(16)]
    ),
    "down: qsgd 7 levels": sent("qsgd", down=[qsgd(7)]),
    "down: eden 4 bits": sent("eden", down=[eden(4)]),
    "down: drive": sent("drive", down=[drive(unbiased=False)]),
    "down: top_k 10 %": sent("top_k", down=[top_k(0.1)]),
    "down: top_k 1 %": sent("top_k", down=[top_k(0.01)]),
    "down: power_sgd rank 4": sent("power_sgd", down=[power_sgd(4)]),
    "both: eden 4 bits": sent("eden", [eden(4)], [eden(4)]),
  }


class Measured(NamedTuple):
  """What a run sends and reaches.

  Attributes:
    up: bytes that a client sends in a round, after the first.
    down: bytes of a broadcast, after the first.
    accuracy: on the test set, seed by seed.
  """

  up: float
  down: float
  accuracy: list[float]


def measured(
  variant: Variant, rounds: int, seeds: int, hidden: int
) -> Measured:
  """Train one variant with some seeds."""
  data = load_digits(num_clients=CLIENTS, alpha=1.0)
  task = mlp(data.example_shape, data.num_classes, (hidden,))
  algorithm = fedavg(
    task,
    fs.optimizer("sgd", learning_rate=0.1),
    fs.optimizer("sgd", learning_rate=variant.server_rate),
  )
  if variant.down:
    algorithm = downlink(algorithm, variant.down)
  accuracy, up, down = [], [], []
  for seed in range(seeds):
    simulator = fs.Simulator(
      task=task,
      algorithm=algorithm,
      data=data,
      sampler=fs.sampling.uniform(CLIENTS, COHORT),
      batching=fs.LocalBatching(batch_size=8, epochs=2),
      aggregator=fs.aggregators.AGGREGATORS[variant.aggregator](),
      transforms=variant.up,
      seed=seed,
      runtime=fs.Runtime(lanes=1, devices=1, donate=False),
    )
    state = simulator.init()
    for out in simulator.run(state, rounds):
      state = out.state
      later = [row for row in out.rows if row["round"] > 1]
      up += [row["bytes_up"] / COHORT for row in later]
      whole = simulator.traffic.down
      down += [row.get("downlink/bytes", whole) for row in later]
    accuracy.append(float(simulator.evaluate(state)["test/accuracy"]))
  return Measured(float(np.mean(up)), float(np.mean(down)), accuracy)


def table(found: Mapping[str, Measured]) -> list[str]:
  """Return a Markdown table."""
  whole = found["none"]
  lines = [
    "| compressor | bytes up | fewer | bytes down | fewer | accuracy |",
    "| --- | --- | --- | --- | --- | --- |",
  ]
  for name, m in found.items():
    told = f"{np.mean(m.accuracy):.3f}"
    if len(m.accuracy) > 1:
      error = np.std(m.accuracy, ddof=1) / len(m.accuracy) ** 0.5
      told += f" ± {error:.3f}"
    lines.append(
      f"| {name} | {m.up:,.0f} | {whole.up / m.up:.1f} x | {m.down:,.0f} |"
      f" {whole.down / m.down:.1f} x | {told} |"
    )
  return lines


def draw(found: Mapping[str, Measured], path: pathlib.Path) -> None:
  """Draw a PNG of accuracy against bytes, a panel a link."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  known = variants()
  families = dict.fromkeys(known[name].family for name in found)
  colored = [family for family in families if family != "none"]
  figure = Figure(figsize=(13, 5), dpi=100, layout="constrained")
  FigureCanvasAgg(figure)
  for ax, link in zip(figure.subplots(1, 2), ("up", "down"), strict=True):
    ax.axhline(float(np.mean(found["none"].accuracy)), color="0.7", lw=1)
    seen = collections.Counter[str]()  # a family has a color
    for name, m in found.items():
      variant = known[name]
      if name != "none" and not (variant.up if link == "up" else variant.down):
        continue
      error = np.std(m.accuracy) / max(1, len(m.accuracy) - 1) ** 0.5
      fmt, color = "*", "black"
      if name != "none":
        again, hue = divmod(colored.index(variant.family), len(PALETTE))
        mark = seen[variant.family] + 3 * again  # where colors are used again
        fmt, color = _MARKERS[mark % len(_MARKERS)], PALETTE[hue]
      ax.errorbar(
        getattr(m, link),
        float(np.mean(m.accuracy)),
        float(error),
        fmt=fmt,
        color=color,
        label=name.removeprefix("down: "),
      )
      seen[variant.family] += 1
    ax.set_xscale("log")
    ax.set_xlabel(f"bytes {link}, a client and round")
    ax.set_ylabel("test accuracy")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
  figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> None:
  """Measure, print and draw."""
  parser = argparse.ArgumentParser(prog="benchmarks.compression")
  parser.add_argument("--rounds", type=int, default=60)
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--hidden", type=int, default=64)
  parser.add_argument("--only", default="", help="names that contain this")
  parser.add_argument("--out", default="", help="folder of the PNG")
  args = parser.parse_args(arguments)
  if jax.config.values["jax_compilation_cache_dir"] is None:
    # Runs that differ in their seed alone are compiled once.
    jax.config.update("jax_compilation_cache_dir", tempfile.mkdtemp())
  found = {}
  for name, variant in variants().items():
    if name != "none" and args.only not in name:
      continue
    began = time.perf_counter()
    found[name] = measured(variant, args.rounds, args.seeds, args.hidden)
    jax.clear_caches()
    print(f"{name}: {time.perf_counter() - began:.1f} s", flush=True)
  print("\n".join(["", *table(found)]))
  if args.out:
    folder = pathlib.Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    draw(found, folder / "compression.png")


if __name__ == "__main__":
  main()
