r"""A study against the same runs by shell, and in a script.

    FEDJAX_SIM_DATA=DIR python -m benchmarks.studies --turns=3
    python -m benchmarks.studies --vary=client.learning_rate=0.01,0.03,0.1 \
      --vary=algorithm.name=fedavg,fedprox,scaffold --seeds=5 \
      --config=configs/ecg_cnn.py --set=server.rounds=10 --shell=3 --warm=3

By default 16 rates with 4 seeds of `configs/mnist_lr_fedavg.py`: 64 runs of 100
rounds, with their evaluations. In turns, each in processes of its own:

- `study`: `fedjax-sim study`, from its start to its report; of that, its
  training is the rounds and evaluations alone;
- `shell`: `fedjax-sim run`, so many of the same runs, one after the other;
- `warm`: so many of the same runs in one process on one device, which has run
  one before: nothing is built or compiled again, and nothing is written.

What `shell` and `warm` take is multiplied to the number of runs of the study.
Then the rows of the study are compared with those of the warm runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.turns import rotated
from fedjax_sim.core.files import write_json
from fedjax_sim.reporting import read_metrics

CONFIG = "configs/mnist_lr_fedavg.py"
VARY = ("client.learning_rate=log(0.003,0.3,16)",)


def main(arguments: Sequence[str] | None = None) -> None:
  """Print a line a turn, then the medians, as Markdown."""
  args = _parsed(arguments)
  if args.warm_of is not None:
    _warm(Path(args.warm_of), args.warm)
    return
  with tempfile.TemporaryDirectory() as scratch:
    turns = [_turn(args, Path(scratch) / str(i), i) for i in range(args.turns)]
  names = [key for key in turns[0] if " / " in key]
  print("\n| time / of the study | median | least | greatest |")
  print("| --- | --- | --- | --- |")
  for name in names:
    ratios = [turn[name] for turn in turns]
    cells = statistics.median(ratios), min(ratios), max(ratios)
    print(f"| {name} |" + "|".join(f" {x:.1f} " for x in cells) + "|")
  if args.json:
    write_json(Path(args.json), {"turns": turns})


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--config", default=CONFIG)
  parser.add_argument("--vary", action="append", help="as of the command")
  parser.add_argument("--set", action="append", default=[], help="FIELD=VALUE")
  parser.add_argument("--seeds", default="4")
  parser.add_argument("--shell", type=int, default=4, help="runs to measure")
  parser.add_argument("--warm", type=int, default=16, help="runs to measure")
  parser.add_argument("--turns", type=int, default=3)
  parser.add_argument("--json", help="file to write")
  parser.add_argument("--warm_of", help=argparse.SUPPRESS)
  return parser.parse_args(arguments)


def _turn(args: argparse.Namespace, folder: Path, turn: int) -> dict[str, Any]:
  """Measure each way once, and return seconds and ratios."""
  folder.mkdir()
  study = folder / "study"
  flags = [f"--config={args.config}"] + [f"--config.{x}" for x in args.set]
  varied = [f"--vary={x}" for x in args.vary or VARY]
  command = [sys.executable, "-m", "fedjax_sim"]

  def run_study() -> float:
    began = time.perf_counter()
    _call([*command, "study", *flags, *varied, f"--seeds={args.seeds}",
           f"--studydir={study}"])  # fmt: skip
    return time.perf_counter() - began

  # The other ways take the study's configs, so the first study is not counted
  # where it does not come first.
  if rotated(("study", "shell", "warm"), turn)[0] != "study":
    run_study()
    study = study.rename(folder / "kept")
  kept = study
  ways: Mapping[str, Callable[[], float]] = {
    "study": run_study,
    "shell": lambda: _shell(command, kept, folder, args.shell),
    "warm": lambda: _warm_seconds(kept, args.warm),
  }
  seconds: dict[str, float] = {}
  for name in rotated(ways, turn):
    if name == "study" and kept != folder / "study":
      study = folder / "study"
    seconds[name] = ways[name]()
  runs = len(json.loads((kept / "study.json").read_bytes())["runs"])
  trained = sum(
    json.loads(file.read_bytes())["wall_seconds"]
    for file in study.glob("runs/*/summary.json")
  )
  found: dict[str, Any] = {
    "runs": runs,
    "seconds": seconds,
    "shell / study": seconds["shell"] * runs / args.shell / seconds["study"],
    "warm / study": seconds["warm"] * runs / args.warm / seconds["study"],
    "warm / training of the study": seconds["warm"]
    * runs
    / args.warm
    / trained,
    "greatest difference": _difference(kept, kept / "warm.json"),
  }
  print(json.dumps(found), flush=True)
  return found


def _call(command: Sequence[str]) -> str:
  done = subprocess.run(command, check=True, capture_output=True, text=True)
  return done.stdout


def _configs(study: Path, count: int) -> list[tuple[str, dict[str, Any]]]:
  """Return the names and configs of some runs, evenly spread over all."""
  runs = json.loads((study / "study.json").read_bytes())["runs"]
  chosen = np.linspace(0, len(runs) - 1, count).round().astype(int)
  names = [runs[i]["name"] for i in chosen]
  read = lambda name: (study / "runs" / name / "config.json").read_bytes()
  return [(name, json.loads(read(name))) for name in names]


def _shell(
  command: Sequence[str], study: Path, folder: Path, count: int
) -> float:
  """Return the seconds of some runs by the command line."""
  files = []
  for name, config in _configs(study, count):
    config["runtime"]["devices"] = None  # as a user would: on all of them
    file = folder / f"{name}.py"
    file.write_text(
      "import json\n\nfrom ml_collections import ConfigDict\n\n\n"
      "def get_config():\n"
      f"  return ConfigDict(json.loads({json.dumps(config)!r}))\n"
    )
    files.append(file)
  began = time.perf_counter()
  for file in files:
    workdir = folder / f"{file.stem}-{time.time_ns()}"
    _call([*command, "run", f"--config={file}", f"--workdir={workdir}"])
  return time.perf_counter() - began


def _warm_seconds(study: Path, count: int) -> float:
  """Return the seconds of some warm runs, in a process of their own."""
  _call(
    [sys.executable, "-m", "benchmarks.studies", f"--warm={count}",
     f"--warm_of={study}"]
  )  # fmt: skip
  found = json.loads((study / "warm.json").read_bytes())
  return float(found["seconds"])


def _warm(study: Path, count: int) -> None:
  """Run some runs after one that is not counted; write rows and seconds."""
  from ml_collections import ConfigDict

  import fedjax_sim
  from fedjax_sim.config import build
  from fedjax_sim.config.build.parts import Parts, program_of

  fedjax_sim.setup()
  parts = Parts()
  made: dict[Any, Any] = {}
  rows: dict[str, Any] = {}
  seconds = 0.0
  for name, config in _configs(study, count):
    experiment = build.build(ConfigDict(config), parts)
    own = experiment.simulator
    # Of each program the first simulator runs all, so that it compiles once;
    # only the seed makes another one.
    key = program_of(own), own.seed
    if key not in made:
      made[key] = own
      _rows(own, experiment.timetable, own.hparams)
    began = time.perf_counter()
    rows[name] = _rows(made[key], experiment.timetable, own.hparams)
    seconds += time.perf_counter() - began
  write_json(study / "warm.json", {"seconds": seconds, "rows": rows})


def _rows(simulator: Any, timetable: Any, hparams: Any) -> list[dict[str, Any]]:
  """Run to the end, with the evaluations of a run; return its metrics."""
  rows = []
  for out in simulator.run(
    simulator.init(hparams),
    timetable.rounds,
    stops=timetable.stops,
    hparams=hparams,
  ):
    rows += out.rows
    sets = timetable.evaluated(int(rows[-1]["round"]))
    if sets:
      rows[-1] |= simulator.evaluate(out.state, sets)
  return rows


def _difference(study: Path, warm: Path) -> float:
  """Return the greatest difference of a metric of a row and its single run."""
  greatest = 0.0
  for name, rows in json.loads(warm.read_bytes())["rows"].items():
    found = read_metrics(study / "runs" / name / "metrics.jsonl")
    for row, other in zip(found, rows, strict=True):
      for key, value in other.items():
        if value is not None and "bytes" not in key:
          greatest = max(greatest, abs(row[key] - value))
  return greatest


if __name__ == "__main__":
  main()
