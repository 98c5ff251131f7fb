"""Where the time of a whole run goes, from the shell's start to its end.

    python -m benchmarks.startup --config=configs/digits_fedavg.py --turns=5

Runs of the command line, in turns, each in a process and a workdir of its own:
without a cache of compiled programs, with an empty one, and with one that an
earlier run has filled. `first result` is when the first row of metrics could
be written: after the first evaluation, or the first call. A part is the main
thread's time; what other threads compile meanwhile is in `all programs:
compiling`, the sum of what each program took, side by side or not.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import revision, show
from benchmarks.turns import rotated
from fedjax_sim.core.files import write_json

_ROOT = Path(__file__).resolve().parents[1]
MODES = ("no cache", "empty cache", "filled cache")
EVENTS = {  # of jax.monitoring
  "/jax/core/compile/jaxpr_trace_duration": "tracing",
  "/jax/core/compile/jaxpr_to_mlir_module_duration": "lowering",
  "/jax/core/compile/backend_compile_duration": "compiling",
}
MOST_PACKAGES = 12


def child(arguments: Sequence[str]) -> None:
  """Run the command line in this process; print its parts as JSON.

  Args:
    arguments: the seconds of `time.time` when the process was started, then
      those of the command line.
  """
  began, marks = float(arguments[0]), {"python": time.time()}
  from fedjax_sim.cli import main
  from fedjax_sim.cli.lasting import lasting

  with lasting():
    from fedjax_sim.config import completion, flags
    from fedjax_sim.run import experiment, loop

    del completion, flags
  marks["imports"] = time.time()
  import jax

  inside = dict.fromkeys(EVENTS.values(), 0.0)

  def listen(event: str, duration_secs: float, **_: Any) -> None:
    if event in EVENTS:
      inside[EVENTS[event]] += duration_secs

  jax.monitoring.register_event_duration_secs_listener(listen)
  run, count = experiment.run, loop.Loop._count_rounds
  first = list[float]()

  def timed(*given: Any, **named: Any) -> dict[str, Any]:
    marks["config"] = time.time()
    summary = run(*given, **named)
    marks["run"] = time.time()
    return summary

  def counted(self: Any, out: Any) -> None:
    first.append(time.time())
    count(self, out)

  experiment.run = timed
  loop.Loop._count_rounds = counted  # type: ignore[method-assign]
  code = main.main(list(arguments[1:]))
  if code:
    raise SystemExit(code)
  times = [began, *marks.values()]
  parts = {name: times[i + 1] - times[i] for i, name in enumerate(marks)}
  found = {
    "parts": parts,
    "inside": inside,
    "first": first[0] - began,
    "ended": time.time(),
  }
  print(json.dumps(found))


def measure(config: str, mode: str, folder: Path) -> dict[str, float]:
  """Return the seconds of a run's parts, its processor time and whole time.

  Args:
    config: the config file.
    mode: one of `MODES`; the cache is in the folder.
    folder: for the workdir, which must not be there, and the cache.
  """
  hidden = {"JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE"}
  environment = {k: v for k, v in os.environ.items() if k not in hidden}
  environment["XDG_CACHE_HOME"] = str(folder / mode)
  workdir = folder / f"run-{time.time_ns()}"
  flags = [f"--config={config}", f"--workdir={workdir}"]
  if mode == "no cache":
    flags.append("--no-compilation-cache")
  code = (
    "import sys; from benchmarks import startup; startup.child(sys.argv[1:])"
  )
  before = _processor_seconds()
  began = time.time()
  done = subprocess.run(
    [sys.executable, "-c", code, str(began), "run", *flags],
    capture_output=True,
    text=True,
    check=False,
    cwd=_ROOT,
    env=environment,
  )
  ended = time.time()
  if done.returncode:
    sys.exit(f"the run failed:\n{done.stderr.rstrip()}")
  found = json.loads(done.stdout.splitlines()[-1])
  summary = json.loads((workdir / "summary.json").read_text())
  parts = dict(found["parts"])
  phases = {k: v for k, v in summary["phase_seconds"].items() if v >= 0.0005}
  report = parts.pop("run") - summary["wall_seconds"]
  return {
    **parts,
    **{f"run: {name}": seconds for name, seconds in phases.items()},
    "run: report": report,
    "end of the process": ended - found["ended"],
    "whole": ended - began,
    "first result": found["first"],
    "processor": _processor_seconds() - before,
    **{f"all programs: {k}": v for k, v in found["inside"].items()},
  }


def _processor_seconds() -> float:
  used = resource.getrusage(resource.RUSAGE_CHILDREN)
  return used.ru_utime + used.ru_stime


def imports(config: str, folder: Path) -> dict[str, float]:
  """Return package -> seconds of its own modules' imports, the most first."""
  flags = [f"--config={config}", f"--workdir={folder / 'imports'}"]
  done = subprocess.run(
    [sys.executable, "-X", "importtime", "-m", "fedjax_sim", "run", *flags],
    capture_output=True,
    text=True,
    check=True,
    cwd=_ROOT,
    env={**os.environ, "XDG_CACHE_HOME": str(folder / MODES[-1])},
  )
  return by_package(done.stderr)


def by_package(text: str) -> dict[str, float]:
  """Return package -> seconds, the most first, of `python -X importtime`."""
  total = collections.defaultdict[str, float](float)
  line = re.compile(r"^import time:\s+(\d+) \|\s+\d+ \|\s+(\w+)", re.MULTILINE)
  for microseconds, package in line.findall(text):
    total[package] += int(microseconds) / 1e6
  return dict(sorted(total.items(), key=lambda item: -item[1]))


def main(arguments: Sequence[str] | None = None) -> None:
  """Measure, print tables, and write JSON if asked to."""
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.startup",
    description="Where the time of a whole run goes.",
  )
  parser.add_argument("--config", default="configs/digits_fedavg.py")
  parser.add_argument("--turns", type=int, default=5, help="that count")
  parser.add_argument("--json", help="file to write")
  given = parser.parse_args(arguments)
  if given.turns < 1:
    parser.error("--turns: give at least 1")
  rows: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
  with revision.scratch() as folder:
    measure(given.config, MODES[-1], folder)  # fills the cache, and Python's
    for turn in range(given.turns):
      for mode in rotated(MODES, turn):
        if mode == "empty cache":
          for file in (folder / mode).rglob("*-*"):
            file.unlink()
        rows[mode].append(measure(given.config, mode, folder))
    packages = imports(given.config, folder)
  medians = {
    mode: {
      part: statistics.median(row.get(part, 0.0) for row in found)
      for part in found[0]
    }
    for mode, found in rows.items()
  }
  names = dict.fromkeys(part for found in medians.values() for part in found)
  show.table(
    f"{given.config}: seconds, medians of {given.turns} runs",
    ["part", *MODES],
    [
      [part, *(f"{medians[mode].get(part, 0.0):.2f}" for mode in MODES)]
      for part in names
    ],
  )
  most = list(packages.items())[:MOST_PACKAGES]
  show.table(
    f"imports, {sum(packages.values()):.2f} s in all",
    ["package", "seconds"],
    [[package, f"{seconds:.2f}"] for package, seconds in most],
  )
  if given.json:
    write_json(
      given.json, {"runs": rows, "medians": medians, "imports": packages}
    )


if __name__ == "__main__":
  main()
