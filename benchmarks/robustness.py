r"""Which aggregators withstand which attacks?

    python -m benchmarks.robustness --studydir=studies/robustness \
      --plot=robustness.png

Handwritten digits (`configs/digits_fedavg.py`), 20 of 100 clients a round, all
of which weigh the same; a share of each cohort, drawn anew, attacks. Every
aggregator is told how many those are, where it takes such a number. Test
accuracy after the last round, in percent, as mean and standard error over the
seeds, which draw parameters, cohorts and attackers; all share one partition. A
second table has the success rate of backdoors.

It is a study: seeds are rows of one program, and a study that was stopped goes
on where it was.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from absl import app, flags, logging
from matplotlib.figure import Figure

from benchmarks.points import studied
from benchmarks.seeds import told
from fedjax_sim import setup as one_device_a_core
from fedjax_sim.attacks import ATTACKS
from fedjax_sim.config import flags as configs

FRACTION = flags.DEFINE_float("fraction", 0.2, "of each cohort attacks")
ROUNDS = flags.DEFINE_integer("rounds", 100, "of every run")
COHORT = flags.DEFINE_integer("clients_per_round", 20, "of every run")
SEEDS = flags.DEFINE_integer("seeds", 3, "how many seeds")
ALPHA = flags.DEFINE_float("alpha", 1.0, "of the Dirichlet partition")
FOLDER = flags.DEFINE_string("studydir", None, "of the study; None: forgotten")
PLOT = flags.DEFINE_string("plot", None, "where the heat map goes")
AGGREGATORS = flags.DEFINE_list("aggregators", None, "which; all by default")
CHOSEN = flags.DEFINE_list("attacks", None, "which; all by default")

NONE = "none"
ALONG = "adaptive_inner_product"  # with the other objective
METRIC, SUCCESS = "test/accuracy", "test/attack_success"
# Where a default is too weak, or too strong, to tell aggregators apart.
OPTIONS: Mapping[str, Mapping[str, Any]] = {
  "backdoor": {"boost": 5.0},
  "ipm": {"epsilon": 2.0},
  "sign_flip": {"scale": 4.0},
}


def aggregators(attackers: int) -> dict[str, dict[str, Any]]:
  """Return the aggregators: name -> fields of the config."""
  f = {"aggregator.f": attackers}
  return {
    "weighted_mean": {},
    "median": {},
    "trimmed_mean": {"aggregator.number": attackers},
    "krum": f,
    "multi_krum": f,
    "bulyan": f,
    "geometric_median": {},
    "centered_clipping": {"aggregator.radius": 1.0},
    "norm_bounding": {},
    "dnc": f,
    "bucketing": {"aggregator.inner": "median"},
  }


def attacks() -> dict[str, dict[str, Any]]:
  """Return the attacks: name -> fields of the config."""
  found: dict[str, dict[str, Any]] = {NONE: {}}
  shown: dict[str, tuple[str, Mapping[str, Any]]]
  shown = {name: (name, OPTIONS.get(name, {})) for name in sorted(ATTACKS)}
  shown[ALONG] = "adaptive", {"objective": "inner_product"}
  for title, (name, options) in shown.items():
    found[title] = {
      "attack.name": name,
      "attack.fraction": FRACTION.value,
      "attack.selection": "round",
      **{f"attack.{k}": v for k, v in options.items()},
    }
  return found


def chosen(
  kind: str, all_: Mapping[str, dict[str, Any]], names: Sequence[str] | None
) -> dict[str, dict[str, Any]]:
  """Return those of these names.

  Raises:
    UsageError: there is none of that name.
  """
  names = [*all_] if names is None else names
  for name in names:
    if name not in all_:
      raise app.UsageError(f"--{kind}={name}: give some of {', '.join(all_)}.")
  return {name: all_[name] for name in names}


def run(folder: str) -> dict[tuple[str, str], list[dict[str, float]]]:
  """Run the study; return (attack, aggregator) -> last metrics, by seed."""
  attackers = int(FRACTION.value * COHORT.value + 1e-9)
  rows = chosen("aggregators", aggregators(attackers), AGGREGATORS.value)
  columns = chosen("attacks", attacks(), CHOSEN.value)
  config = configs.load(
    "configs/digits_fedavg.py",
    {
      "data.alpha": str(ALPHA.value),
      "data.unseen_clients": "0",
      "algorithm.weighting": "uniform",
      "server.rounds": str(ROUNDS.value),
      "server.eval_every": str(ROUNDS.value),
      "server.clients_per_round": str(COHORT.value),
      "trackers.tensorboard": "None",
    },
  )
  cells = {
    (attack, name): {"aggregator.name": name, **given, **fields}
    for attack, fields in columns.items()
    for name, given in rows.items()
  }
  study, names = studied(config, folder, cells, range(SEEDS.value), METRIC)
  finished = {one["name"] for one in study.runs if one["status"] == "finished"}
  return {
    cell: [study.last(name) if name in finished else {} for name in runs]
    for cell, runs in names.items()
  }


def table(
  found: Mapping[tuple[str, str], Sequence[Mapping[str, float]]], metric: str
) -> str:
  """Return a Markdown table of percents: a row an attack."""
  aggregators = [*dict.fromkeys(name for _, name in found)]
  lines = [
    f"| {metric}, % | {' | '.join(aggregators)} |",
    f"| --- |{' --- |' * len(aggregators)}",
  ]
  for attack in dict.fromkeys(attack for attack, _ in found):
    cells = []
    for name in aggregators:
      runs = found[attack, name]
      values = [100 * run[metric] for run in runs if metric in run]
      lost = len(runs) - len(values)
      cells.append(
        (told(values, 1) if values else "") + f" ({lost} lost)" * (lost > 0)
      )
    if any(
      metric in run for name in aggregators for run in found[attack, name]
    ):
      lines.append(f"| {attack} | {' | '.join(cells)} |")
  return "\n".join(lines)


def draw(
  found: Mapping[tuple[str, str], Sequence[Mapping[str, float]]], path: str
) -> None:
  """Draw mean accuracies as a heat map; runs that diverged count as 0."""
  columns = [*dict.fromkeys(attack for attack, _ in found)]
  rows = [*dict.fromkeys(name for _, name in found)]
  mean = lambda runs: np.mean([run.get(METRIC, 0.0) for run in runs])
  grid = np.array([[mean(found[c, r]) for c in columns] for r in rows])
  figure = Figure(figsize=(1.5 + 0.75 * len(columns), 1 + 0.42 * len(rows)))
  axes = figure.add_subplot()
  axes.imshow(grid, vmin=0, vmax=1, aspect="auto", cmap="viridis")
  axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
  axes.set_yticks(range(len(rows)), rows)
  for i, j in np.ndindex(*grid.shape):
    color = "black" if grid[i, j] > 0.6 else "white"
    text = f"{grid[i, j]:.2f}"
    axes.text(j, i, text, ha="center", va="center", color=color, fontsize=8)
  axes.set_title(f"Test accuracy, {FRACTION.value:g} of each cohort attacks")
  with mpl.rc_context({"svg.hashsalt": "fixed"}):
    figure.savefig(path, dpi=150, bbox_inches="tight")


def main(argv: list[str]) -> None:
  """Run the study, print the tables and draw the picture."""
  del argv
  logging.set_verbosity(logging.WARNING)
  one_device_a_core()
  with tempfile.TemporaryDirectory() as forgotten:
    found = run(FOLDER.value or forgotten)
  print(table(found, METRIC))
  if any(SUCCESS in run for runs in found.values() for run in runs):
    print(f"\n{table(found, SUCCESS)}")
  if PLOT.value is not None:
    draw(found, PLOT.value)


if __name__ == "__main__":
  app.run(main)
