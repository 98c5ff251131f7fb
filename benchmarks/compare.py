"""The working tree against another revision, in turns.

    python -m benchmarks.compare --against=main
    python -m benchmarks.compare --against=HEAD~3 --cases=lr,start --turns=15

What is not committed is measured, too. Each revision has a process of its own
for each case, with the same measuring code, the working tree's, and its own
`fedjax_sim`. Both compile first; then they take turns, first the one and then
the other, and the other way around in the next turn. A ratio says how many
times as fast the working tree is: its median over turns, the least and the
greatest, and `faster` or `slower` if all of at least 6 turns agree, which those
of two equal revisions do once in 32 times, and of 7 once in 64.

Cases are those of `benchmarks.engine` (rounds on one device and on all), and

- `start`: `fedjax-sim run` on the digits, with an empty compilation cache, and
  with what that left there;
- `study`: `fedjax-sim study` of 8 runs, likewise;
- `planning`: rounds of 10 of 1,000 clients, and of 1,000 of 100,000;
- `evaluation`: on a test set and on clients, of LR and the CNN.

A case that one of the revisions cannot run, as its API is another one, costs a
line. The other revision lies in a worktree of git's in a temporary folder.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import cases, revision, show
from benchmarks.compared import COMMANDS, OTHERS
from benchmarks.revision import RevisionError, Tree
from benchmarks.turns import rotated
from fedjax_sim.core.files import write_json

ROOT = Path(__file__).resolve().parents[1]
NAMES = (*cases.CASES, *COMMANDS, *OTHERS)
DEFAULT = ("lr", "cnn", "lstm", *COMMANDS, *OTHERS)
THEIRS, OURS = "theirs", "ours"
LEAST_TURNS = 6  # fewer agree by chance too often

Answer = Mapping[str, Any]


class FailedError(RuntimeError):
  """A revision cannot run a case; the message is one line."""


class Spread(NamedTuple):
  """Ratios of turns: how many times as fast the working tree is.

  Attributes:
    median: of all turns.
    least: of them.
    greatest: of them.
    verdict: "faster" or "slower" if all of at least `LEAST_TURNS` agree.
  """

  median: float
  least: float
  greatest: float
  verdict: str


def spread(theirs: Sequence[float], ours: Sequence[float]) -> Spread:
  """Return how many times as fast the working tree is.

  Args:
    theirs: seconds of the other revision, one a turn.
    ours: seconds of the working tree in the same turns.
  """
  ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
  least, greatest = min(ratios), max(ratios)
  verdict = "faster" if least > 1 else "slower" if greatest < 1 else ""
  if len(ratios) < LEAST_TURNS:
    verdict = ""
  return Spread(statistics.median(ratios), least, greatest, verdict)


def compared(turns: Sequence[Mapping[str, Answer]]) -> dict[str, Any]:
  """Return all that is reported of one kind of turn.

  Args:
    turns: side -> its answer, a turn each.
  """
  of = lambda side, key: [turn[side][key] for turn in turns]
  both = lambda key: {side: of(side, key) for side in (THEIRS, OURS)}
  seconds, cpu_seconds = both("seconds"), both("cpu_seconds")
  digests, results = both("digest"), both("result")
  return {
    "seconds": seconds,
    "cpu_seconds": cpu_seconds,
    "time": spread(**seconds)._asdict(),
    "cpu_time": spread(**cpu_seconds)._asdict(),
    "equal": digests[THEIRS] == digests[OURS],
    "difference": max(
      abs(a - b) / (max(abs(a), abs(b)) or 1.0)
      for a, b in zip(results[THEIRS], results[OURS], strict=True)
    ),
  }


def take_turns(
  sides: Mapping[str, Callable[[str], Answer]],
  calls: Sequence[str],
  turns: int,
) -> dict[str, dict[str, Any]]:
  """Return what is reported of each call, measured in turns.

  Args:
    sides: THEIRS and OURS -> what has a call made, and returns its answer.
    calls: in this order within a turn.
    turns: how often each is made.
  """
  found: dict[str, list[dict[str, Answer]]] = {call: [] for call in calls}
  for turn in range(turns):
    for call in calls:
      order = rotated((THEIRS, OURS), turn)
      found[call].append({side: sides[side](call) for side in order})
  return {call: compared(answers) for call, answers in found.items()}


# --- processes ----------------------------------------------------------------


class Worker:
  """A process of `benchmarks.compared`.

  Args:
    side: THEIRS or OURS.
    tree: whose `fedjax_sim` it measures.
    case: what it measures.
    folder: that holds the measuring code, and where it may write.
    small: as little as a test needs.
  """

  def __init__(
    self, side: str, tree: Tree, case: str, folder: Path, small: bool
  ):
    self._name = tree.name
    self._errors = folder / f"{case}-{side}.txt"
    path = os.pathsep.join([str(folder), str(tree.root)])
    command = [sys.executable, "-m", "benchmarks.compared", case]
    shared = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # a GPU
    with self._errors.open("w") as errors:
      self._process = subprocess.Popen(
        [*command, f"--root={tree.root}", *["--small"] * small],
        cwd=folder,
        env=shared | dict(os.environ) | {"PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        start_new_session=True,  # with Ctrl-C it is this process that ends it
      )

  def answer(self) -> Answer:
    """Wait for an answer, and return it.

    Raises:
      FailedError: it is an error, or the process has ended.
    """
    out = self._process.stdout
    line = out.readline() if out else ""
    if not line:
      status = self._process.wait()
      written = self._errors.read_text(errors="replace").strip().splitlines()
      last = f": {written[-1]}" if written else ""
      raise FailedError(
        f"{self._name}: its process ended with status {status}{last}"
      )
    told: dict[str, Any] = json.loads(line)
    if "error" in told:
      raise FailedError(f"{self._name}: {told['error']}")
    return told

  def call(self, name: str) -> Answer:
    """Have a call made, and return its answer.

    Raises:
      FailedError: it failed.
    """
    given = self._process.stdin
    if given is None:
      raise AssertionError("the process has no standard input")
    with contextlib.suppress(BrokenPipeError):  # `answer` says so
      given.write(f"{name}\n")
      given.flush()
    return self.answer()

  def close(self) -> None:
    """End the process, and those that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
      os.killpg(self._process.pid, signal.SIGKILL)
    self._process.communicate()


@contextlib.contextmanager
def _workers(
  trees: Mapping[str, Tree], case: str, folder: Path, small: bool
) -> Iterator[dict[str, Worker]]:
  """Have a worker for each side."""
  workers: dict[str, Worker] = {}
  try:
    for side, tree in trees.items():
      workers[side] = Worker(side, tree, case, folder, small)
    yield workers
  finally:
    for worker in workers.values():
      worker.close()


def measure(
  trees: Mapping[str, Tree],
  case: str,
  folder: Path,
  small: bool,
  turns: int | None,
) -> tuple[dict[str, Any], Any]:
  """Return what is reported of a case, and the machine, as far as it is known.

  Args:
    trees: side -> files.
    case: its name.
    folder: that holds the measuring code.
    small: as little as a test needs.
    turns: how many; None: the case says it.

  Raises:
    FailedError: one of both cannot run it; the message has a line for each.
  """
  with _workers(trees, case, folder, small) as workers:
    ready: dict[str, Answer] = {}
    reasons = []
    for side, worker in workers.items():
      try:
        ready[side] = worker.answer()
      except FailedError as error:
        reasons.append(str(error))
    if reasons:
      raise FailedError("\n".join(reasons))
    ours = ready[OURS]
    calls = {side: worker.call for side, worker in workers.items()}
    count = ours["turns"] if turns is None else turns
    return take_turns(calls, ours["calls"], count), ours["machine"]


def main(arguments: Sequence[str] | None = None) -> None:
  """Compare, print a table, and write JSON if asked to."""
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.compare",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    "--against", required=True, metavar="REVISION", help="as git names it"
  )
  parser.add_argument(
    "--cases",
    default=",".join(DEFAULT),
    help=f"comma-separated, of {', '.join(NAMES)}; by default %(default)s",
  )
  parser.add_argument(
    "--turns", type=int, help="by default 7; 3 of a study and of ResNet-18"
  )
  parser.add_argument("--scale", choices=("full", "smoke"), default="full")
  parser.add_argument("--json", type=Path, help="file to write")
  flags = parser.parse_args(arguments)
  names = flags.cases.split(",")
  for name in names:
    if name not in NAMES:
      parser.error(f"--cases: {name!r} is none of {', '.join(NAMES)}")
  if flags.turns is not None and flags.turns < 1:
    parser.error("--turns: give at least 1")
  small = flags.scale == "smoke"
  try:
    ours = revision.working(ROOT)
    with (
      revision.scratch() as scratch,
      revision.checked_out(ROOT, flags.against, scratch / "revision") as theirs,
    ):
      measuring = scratch / "measuring"
      shutil.copytree(
        ROOT / "benchmarks",
        measuring / "benchmarks",
        ignore=shutil.ignore_patterns("__pycache__"),
      )
      trees = {THEIRS: theirs, OURS: ours}
      report = _compare(trees, names, measuring, small, flags)
  except RevisionError as error:
    parser.error(str(error))
  except KeyboardInterrupt:
    sys.exit(130)
  if not report["cases"]:
    sys.exit(1)


def _compare(
  trees: Mapping[str, Tree],
  names: Sequence[str],
  folder: Path,
  small: bool,
  flags: argparse.Namespace,
) -> dict[str, Any]:
  """Return the report, which is shown and written case by case."""
  report: dict[str, Any] = {
    "machine": None,
    **{
      side: {"name": t.name, "commit": t.commit, "changed": t.changed}
      for side, t in trees.items()
    },
    "cases": {},
    "failed": {},
  }
  for name in names:
    try:
      found, machine = measure(trees, name, folder, small, flags.turns)
    except FailedError as error:
      report["failed"][name] = str(error).splitlines()
      show.progress(f"{name}: failed")
    else:
      report["cases"][name] = found
      report["machine"] = report["machine"] or machine
      show.progress(f"{name}: done")
    if flags.json:  # what is there if a later one is interrupted
      write_json(flags.json, report)
  show.comparison(report)
  return report


if __name__ == "__main__":
  main()
