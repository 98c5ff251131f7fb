"""Leave-one-out of patients: one study against single runs by hand.

python -m benchmarks.leave_out --rounds=20 --singles=3 --turns=2

The study leaves out each of the 48 patients of configs/ecg_cnn.py by itself.
By hand, a run is a process of `fedjax-sim run`, with all devices, and with what
was compiled before it in JAX's cache (set JAX_COMPILATION_CACHE_DIR); or, as a
lower bound, a call in a process that is up and has run once. A few are timed,
spread over the patients, and 49 of their mean is what all would take. Study and
single runs take turns. Rows are compared with their runs by hand on one device,
and these with runs on all devices, which differ by the order of sums alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

import fedjax_sim as fs
from benchmarks.turns import rotated
from fedjax_sim import distributed
from fedjax_sim.config import flags
from fedjax_sim.run import experiment
from fedjax_sim.run.opened import OpenedRun

CONFIG = "configs/ecg_cnn.py"


def main() -> None:
  """Print times and the largest differences."""
  parser = argparse.ArgumentParser()
  parser.add_argument("--rounds", type=int, default=20)
  parser.add_argument("--singles", type=int, default=3)
  parser.add_argument("--turns", type=int, default=2)
  options = parser.parse_args()
  fields = {
    "server.rounds": str(options.rounds),
    "server.eval_every": str(options.rounds),
  }
  distributed.setup()
  seconds: dict[str, list[float]] = {"study": [], "process": [], "call": []}
  with tempfile.TemporaryDirectory() as name:
    root = Path(name)
    _call(fields, {}, root / "warm")  # fills the cache
    for turn in range(options.turns):
      for what in rotated(seconds, turn):
        folder = root / f"{what}{turn}"
        if what == "study":
          began = time.perf_counter()
          _study(fields, folder)
          seconds[what].append(time.perf_counter() - began)
          continue
        run = _process if what == "process" else _call
        for patient in _patients(options.singles):
          began = time.perf_counter()
          left = {"server.leave_out": str(patient)}
          run(fields, left, folder / str(patient))
          seconds[what].append(time.perf_counter() - began)
      _compare(root / f"study{turn}", root / f"call{turn}", options.singles)
  study = np.mean(seconds["study"])
  print("study:", [round(s, 1) for s in seconds["study"]], "s")
  for what in ("process", "call"):
    one = np.mean(seconds[what])
    print(
      f"a run by hand, {what}: {one:.2f} s"
      f" ({min(seconds[what]):.2f} to {max(seconds[what]):.2f}), 49 of them"
      f" {49 * one:.0f} s: {49 * one / study:.2f} times the study"
    )


def _patients(count: int) -> list[int]:
  """Return patients to leave out by hand, spread over all."""
  return [i * 47 // max(count - 1, 1) for i in range(count)]


def _study(fields: dict[str, str], folder: Path) -> None:
  config = flags.load(CONFIG, fields)
  fs.study(config, folder, vary={"leave_out": "clients()"})


def _call(fields: dict[str, str], left: dict[str, str], folder: Path) -> None:
  experiment.run(flags.load(CONFIG, {**fields, **left}), folder)


def _process(
  fields: dict[str, str], left: dict[str, str], folder: Path
) -> None:
  changes = [f"--config.{k}={v}" for k, v in {**fields, **left}.items()]
  command = ["run", f"--config={CONFIG}", f"--workdir={folder}", *changes]
  subprocess.run(
    [sys.executable, "-m", "fedjax_sim", *command],
    check=True,
    capture_output=True,
  )


def _compare(study: Path, singles: Path, count: int) -> None:
  """Print how far rows are from their runs by hand."""
  for patient in _patients(count):
    run = f"{patient + 1:03}"  # 000 leaves nobody out
    config = json.loads((study / "runs" / run / "config.json").read_bytes())
    one = singles / f"{patient}-one"
    experiment.run(ConfigDict(config), one)
    row, by_hand = fs.load(study, run=run), fs.load(one)
    parallel = fs.load(singles / str(patient))
    values = [
      opened.metrics["seen/accuracy"][-1] for opened in (row, by_hand, parallel)
    ]
    told = ", ".join(f"{value:.6f}" for value in values)
    print(
      f"without patient {patient}: parameters of row and run on one device"
      f" differ by {_gap(row, by_hand):.1e}, those of runs on one device and on"
      f" all by {_gap(by_hand, parallel):.1e}; seen/accuracy {told}",
      flush=True,
    )


def _gap(a: OpenedRun, b: OpenedRun) -> float:
  """Return the norm of the difference of parameters, relative to theirs."""
  flat = lambda run: np.concatenate(
    [np.ravel(leaf) for leaf in jax.tree.leaves(run.params)]
  )
  x, y = flat(a), flat(b)
  return float(np.linalg.norm(x - y) / np.linalg.norm(y))


if __name__ == "__main__":
  main()
