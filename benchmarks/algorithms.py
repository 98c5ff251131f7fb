r"""All algorithms on data that differ from client to client.

    FEDJAX_SIM_DATA=DIR python -m benchmarks.algorithms --to=DIR
    python -m benchmarks.algorithms --data=digits,synthetic --seeds=2 \
      --rounds=20 --algorithms=fedavg,scaffold,feddyn

For each data set two studies, in `--to`. The first tunes: each algorithm with
each rate of the client, on seeds and held-out examples of its own. The second
trains each with its best rate on `--seeds` seeds. What is compared is accuracy
on examples held out inside clients, each client with its own model where the
algorithm gives it one. Then rounds of each are timed, in turns with FedAvg's.

A table for each data set has a row for each algorithm: accuracy, mean
and standard error over the seeds; mean accuracy of the lowest tenth of the
clients; the rate, with a star if it is the least or greatest that was tried;
and what it takes to get to 95 % of the best algorithm's accuracy, empty if most
seeds never do: rounds, MB down and up, and time, in rounds of FedAvg, or of the
first algorithm where it is left out. Another table has the accuracies of all.

- `digits`: scikit-learn's digits over 100 clients by a Dirichlet distribution
  with alpha 0.1, a perceptron;
- `ecg`: 48 patients, a 1-D CNN, 30 rounds;
- `mnist`: MNIST over 100 clients by a Dirichlet distribution with alpha 0.3, a
  perceptron;
- `synthetic`: synthetic(1, 1) over 30 clients of very different sizes, logistic
  regression.

Numbers of algorithms are their papers' defaults, but for the client's rate and
those in `COMPARED`; the server's rate is 1, or the algorithm's own. Left out
are algorithms without a cohort (`centralized`, `gossip`), with examples on the
server, which the others would have to do without (`fltrust`, `fedlaw`), of
adapters and of unlabeled examples, what no model here has layers for (`fedbn`),
and what is no classifier.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

import fedjax_sim as fs
from benchmarks.points import studied
from benchmarks.round_costs import timed_in_turns
from fedjax_sim.config import default_config
from fedjax_sim.config.build import build
from fedjax_sim.config.flags import overridden
from fedjax_sim.core import validate
from fedjax_sim.studies.comparison import Reached, SettingResult
from fedjax_sim.studies.points import text_of

Key = tuple[str, float]  # name in `COMPARED`, rate

METRIC = "seen/accuracy"
TUNING_SEED = 1000
_PRIVATE = "algorithm.private"


def _named(name: str, **fields: Any) -> dict[str, Any]:
  options = {f"algorithm.{k}": v for k, v in fields.items()}
  return {"algorithm.name": name, **options}


COMPARED: Mapping[str, Mapping[str, Any]] = {
  **{
    name: _named(name)
    for name in (
      *("agnostic", "apfl", "dga", "ditto", "fedadagrad", "fedadam"),
      *("fedavg", "fedavgm", "feddyn", "fedexp", "fedlin", "fednova"),
      *("fedprox", "fedshuffle", "fedyogi", "hierarchical", "per_fedavg"),
      *("moon", "pfedme", "q_fedavg", "reptile", "scaffold"),
    )
  },
  "fedavg_uniform": _named("fedavg", weighting="uniform"),
  "fedbuff": {**_named("fedbuff"), "sampler.name": "in_flight"},
  "fedem": {**_named("fedem"), "model.mixture": 3},
  "fedper": _named("fedper", private=None),
  "fedrep": _named("fedrep", private=None),
  "ifca": _named("ifca", clusters=3),
  "lg_fedavg": _named("lg_fedavg", private=None),
  # (1 - beta) is the weight of a new gradient in Mime.
  "mime": {**_named("mime"), "client.momentum": 0.9},
  "mime_lite": {**_named("mime_lite"), "client.momentum": 0.9},
  "scaffold_1": _named("scaffold", option="I"),
}


class Problem(NamedTuple):
  """What algorithms are compared on.

  Attributes:
    config: data and model, the clients' batches and epochs.
    rates: of the clients.
    layers: paths of the model's first and last layer; none if it has but one.
    rounds: of every run.
  """

  config: Callable[[], ConfigDict]
  rates: Sequence[float]
  layers: tuple[str, str] | None = None
  rounds: int = 60


def _problem(
  data: Mapping[str, Any], model: str, batch_size: int, epochs: int
) -> Callable[[], ConfigDict]:
  def config() -> ConfigDict:
    made = default_config()
    made.data.update(data)
    made.data.heldout_fraction = 0.2
    made.model.name = model
    made.client.batch_size = batch_size
    made.client.epochs = epochs
    made.server.clients_per_round = 10
    made.runtime.lanes = 1
    return made

  return config


_DIRICHLET = {"num_clients": 100, "partition": "dirichlet"}
PROBLEMS: Mapping[str, Problem] = {
  "digits": Problem(
    _problem({"name": "digits", **_DIRICHLET, "alpha": 0.1}, "mlp", 8, 5),
    (0.01, 0.03, 0.1, 0.3),
    ("layers/0/", "layers/1/"),
  ),
  "ecg": Problem(
    _problem({"name": "ecg"}, "ecg_cnn", 20, 1),
    (0.01, 0.03, 0.1, 0.3),
    ("conv1/", "dense2/"),
    rounds=30,
  ),
  "mnist": Problem(
    _problem({"name": "mnist", **_DIRICHLET, "alpha": 0.3}, "mlp", 20, 1),
    (0.01, 0.03, 0.1, 0.3),
    ("layers/0/", "layers/1/"),
  ),
  "synthetic": Problem(
    _problem(
      {"name": "synthetic", "num_clients": 30, "alpha": 1.0, "beta": 1.0},
      *("logistic_regression", 10, 5),
    ),
    (0.001, 0.003, 0.01, 0.03, 0.1),
  ),
}


class Measured(NamedTuple):
  """What an algorithm reaches on a data set.

  Attributes:
    rate: the client's, that was chosen.
    at_edge: that no smaller, or no greater one, was tried.
    mean, error: of the accuracy over the seeds; NaN if every seed diverged.
    lost: seeds that diverged.
    lowest: mean accuracy of the lowest tenth of the clients, over the seeds.
    reached: the target: rounds and bytes.
    cost: time of a round over that of FedAvg's.
  """

  rate: float
  at_edge: bool
  mean: float
  error: float
  lost: int
  lowest: float
  reached: Reached
  cost: float


def main(arguments: Sequence[str] | None = None) -> None:
  """Tune, compare, time; print the table and draw the plot."""
  args = _parsed(arguments)
  fs.setup()
  found = {}
  with tempfile.TemporaryDirectory() as scratch:
    for data in args.data:
      folder = Path(args.to or scratch) / data
      found[data] = measured(args, data, folder)
      print("\n".join(["", f"{data}:", "", *table(found[data])]), flush=True)
  print("\n".join(["", *overview(found)]))
  if args.plot:
    draw(found, args.plot)


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  listed = lambda text: text.split(",")
  parser.add_argument("--data", type=listed, default=[*PROBLEMS])
  parser.add_argument("--algorithms", type=listed, default=sorted(COMPARED))
  parser.add_argument("--rates", type=listed, help="of the clients")
  parser.add_argument(
    "--rounds", type=int, help="instead of the data sets' own"
  )
  parser.add_argument("--seeds", type=int, default=5)
  parser.add_argument("--tuning_seeds", type=int, default=1)
  parser.add_argument("--turns", type=int, default=5, help="of the timing")
  parser.add_argument("--to", help="folder to keep the studies in")
  parser.add_argument("--plot", help="file for the plot")
  args = parser.parse_args(arguments)
  for data in args.data:
    validate.one_of("data", data, PROBLEMS)
  for name in args.algorithms:
    validate.one_of("algorithms", name, COMPARED)
  return args


def fields_of(name: str, problem: Problem) -> dict[str, Any] | None:
  """Return the fields of an algorithm; None if the model has no such layers."""
  fields = dict(COMPARED[name])
  if problem.layers is None:
    return None if _PRIVATE in fields or name == "moon" else fields
  if _PRIVATE in fields:
    fields[_PRIVATE] = (problem.layers[0 if name == "lg_fedavg" else 1],)
  return fields


def measured(
  args: argparse.Namespace, data: str, folder: Path
) -> dict[str, Measured]:
  """Return what each algorithm reaches on a data set.

  Args:
    args: of the command.
    data: name of the data set.
    folder: where the studies go.
  """
  problem = PROBLEMS[data]
  config = problem.config()
  rounds = args.rounds or problem.rounds
  config.server.rounds = rounds
  config.server.eval_every = max(1, rounds // 20)
  variants = {
    name: fields
    for name in args.algorithms
    if (fields := fields_of(name, problem)) is not None
  }
  tuning = config.copy_and_resolve_references()
  tuning.data.seed = 1  # which examples are held out, and how they are dealt
  sizes = build(tuning).simulator.data.train.sizes
  steps = tuning.client.epochs * np.ceil(sizes / tuning.client.batch_size)
  rates = [float(r) for r in args.rates or problem.rates]
  # A step of FedShuffle's clients is divided by their number of steps; nine
  # steps out of ten of Mime's are momentum.
  factors = {"fedshuffle": steps.mean(), "mime": 0.1, "mime_lite": 0.1}
  grids = {
    name: [_rounded(rate * factors.get(name, 1.0)) for rate in rates]
    for name in variants
  }
  tuned = _studied(
    tuning,
    folder / "tuning",
    {(a, r): _point(f, r) for a, f in variants.items() for r in grids[a]},
    range(TUNING_SEED, TUNING_SEED + args.tuning_seeds),
  )
  best = {
    name: max(grid, key=lambda rate: _mean(tuned[name, rate].values))
    for name, grid in grids.items()
  }
  points = {(a, best[a]): _point(f, best[a]) for a, f in variants.items()}
  found = _studied(config, folder / "compared", points, range(args.seeds))
  first = "fedavg" if "fedavg" in variants else next(iter(variants))
  costs = timed_in_turns(
    {
      name: _timed(config, points[name, best[name]])
      for name in sorted(variants, key=lambda name: name != first)
    },
    args.turns,
  )
  return {
    name: _summed_up(
      result,
      rate=rate,
      at_edge=rate in (grids[name][0], grids[name][-1]),
      cost=statistics.median(costs[name]),
    )
    for (name, rate), result in found.items()
  }


def _rounded(rate: float) -> float:
  return float(f"{rate:.2g}")


def _mean(values: np.ndarray) -> float:
  return float(values.mean()) if len(values) else -math.inf


def _point(fields: Mapping[str, Any], rate: float) -> dict[str, Any]:
  return {**fields, "client.learning_rate": rate}


def _studied(
  config: ConfigDict,
  folder: Path,
  points: Mapping[Key, Mapping[str, Any]],
  seeds: Sequence[int],
) -> dict[Key, SettingResult]:
  """Return the results of a study of points: their key -> result."""
  _, names = studied(config, folder, points, seeds, METRIC)
  key_of = {name: key for key, runs in names.items() for name in runs}
  compared = fs.compare([folder], METRIC, to=folder / "comparison")
  found = {key_of[r.runs[0].folder.name]: r for r in compared.settings}
  return {key: found[key] for key in points}


def _timed(config: ConfigDict, point: Mapping[str, Any]) -> fs.Simulator:
  """Return a simulator of one device for a point of a study."""
  alone = config.copy_and_resolve_references()
  alone.runtime.devices = 1
  alone.runtime.rounds_per_dispatch = 4
  texts = {field: text_of(value) for field, value in point.items()}
  return build(overridden(alone, texts)).simulator


def _summed_up(
  result: SettingResult, *, rate: float, at_edge: bool, cost: float
) -> Measured:
  lowest = [
    run.rows[-1].get(f"{METRIC}/lowest10", math.nan)
    for run in result.runs
    if run.status == "finished"
  ]
  count = len(result.values)
  return Measured(
    rate=rate,
    at_edge=at_edge,
    mean=result.mean,
    error=result.std / math.sqrt(count) if count > 1 else 0.0,
    lost=len(result.runs) - count,
    lowest=float(np.mean(lowest)) if lowest else math.nan,
    reached=result.reached,
    cost=cost,
  )


def table(found: Mapping[str, Measured]) -> list[str]:
  """Return a Markdown table of one data set: a row an algorithm."""
  best = _best(found)
  lines = [
    "| algorithm | accuracy | lowest tenth | rate | rounds | MB | time |",
    f"| --- |{' ---: |' * 6}",
  ]
  for name, m in found.items():
    cells = [_told(m, best), f"{m.lowest:.3f}", f"{m.rate:g}" + "*" * m.at_edge]
    rounds = m.reached.rounds
    if math.isinf(rounds):
      cells += ["", "", ""]
    else:
      sent = (m.reached.bytes_down + m.reached.bytes_up) / 1e6
      cells += [f"{rounds:.0f}", f"{sent:.3g}", f"{rounds * m.cost:.0f}"]
    lines.append(f"| {name} | {' | '.join(cells)} |")
  return lines


def overview(found: Mapping[str, Mapping[str, Measured]]) -> list[str]:
  """Return a Markdown table of accuracies: a column a data set."""
  names = sorted({name for of in found.values() for name in of})
  best = {data: _best(of) for data, of in found.items()}
  lines = [
    f"| algorithm | {' | '.join(found)} |",
    f"| --- |{' ---: |' * len(found)}",
  ]
  for name in names:
    cells = [
      _told(of[name], best[data]) if name in of else ""
      for data, of in found.items()
    ]
    lines.append(f"| {name} | {' | '.join(cells)} |")
  return lines


def _best(found: Mapping[str, Measured]) -> float:
  """Return the best mean; NaN of runs that all diverged is none."""
  return max(
    (m.mean for m in found.values() if not math.isnan(m.mean)), default=0.0
  )


def _told(m: Measured, best: float) -> str:
  text = f"{m.mean:.4f} +- {m.error:.4f}" + f" ({m.lost} lost)" * (m.lost > 0)
  return f"**{text}**" if m.mean == best else text


def draw(
  found: Mapping[str, Mapping[str, Measured]], path: str | os.PathLike[str]
) -> None:
  """Draw accuracies with their errors, a panel a data set, as a PNG."""
  names = [*dict.fromkeys(name for of in found.values() for name in of)][::-1]
  figure = Figure(
    figsize=(2 + 3 * len(found), 1 + 0.25 * len(names)), layout="constrained"
  )
  panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
  for axes, (data, of) in zip(panels, found.items(), strict=True):
    if "fedavg" in of:
      axes.axvline(of["fedavg"].mean, color="0.6", lw=1)
    for name, m in of.items():
      if math.isfinite(m.mean):
        place = names.index(name)
        axes.errorbar(m.mean, place, xerr=m.error, fmt="o", ms=4, color="C0")
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xlabel(f"accuracy on {data}")
    axes.grid(alpha=0.3)
  figure.savefig(path, dpi=120)


if __name__ == "__main__":
  main()
