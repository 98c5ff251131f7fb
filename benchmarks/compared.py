"""A process that measures one revision, whenever it is its turn.

`benchmarks.compare` starts two of them, `python -m benchmarks.compared CASE`,
with the same copy of `benchmarks` and each with another `fedjax_sim` in its
path. A line on the standard input asks for a turn, and a line of JSON on the
standard output is the answer; the first one says what can be asked for. What it
takes from `fedjax_sim` is what `benchmarks.cases` takes and what scripts call:
`Simulator.plan`, `dispatch`, `evaluate`, and the command line.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

TURNS = 7  # unless it takes long
# With these a command does without its own cache of compiled programs.
_OF_JAX = ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE")


class Turn(NamedTuple):
  """What one turn found.

  Attributes:
    seconds: of the clock.
    cpu_seconds: of all processors.
    digest: of the result, which equal revisions share.
    result: a number of the result by which unequal ones can be judged.
  """

  seconds: float
  cpu_seconds: float
  digest: str
  result: float


class Measured(NamedTuple):
  """A case, built and ready.

  Attributes:
    calls: name -> what takes a turn; in this order within a turn.
    turns: that are taken where no number is asked for.
    machine: as `benchmarks.machine` describes it; None: it was not asked.
  """

  calls: Mapping[str, Callable[[], Turn]]
  turns: int = TURNS
  machine: Mapping[str, Any] | None = None


# --- commands -----------------------------------------------------------------


def start(root: Path, small: bool) -> Measured:
  """Run `configs/digits_fedavg.py`, as a user does."""
  config = "configs/digits_fedavg.py" + ":smoke" * small
  return _command(root, ["run", f"--config={config}"], "workdir", TURNS)


def study(root: Path, small: bool) -> Measured:
  """Run a study of 8 runs of `configs/digits_fedavg.py`, as a user does."""
  options = [
    "--config=configs/digits_fedavg.py",
    f"--config.server.rounds={2 if small else 20}",
    "--vary=client.learning_rate=log(0.03,0.3,4)",
    f"--seeds={1 if small else 2}",
  ]
  return _command(root, ["study", *options], "studydir", 3)


def _command(
  root: Path, arguments: list[str], folder: str, turns: int
) -> Measured:
  """Return turns with an empty compilation cache, and with what they left.

  A revision that keeps no compiled programs by itself takes as long with both.
  """
  # Where this process runs all is removed once all is compared.
  scratch, number = Path(tempfile.mkdtemp(dir=Path.cwd())), 0
  cache = scratch / "cache"

  def call() -> Turn:
    nonlocal number
    number += 1
    made = scratch / f"{arguments[0]}-{number}"
    environment = {
      # matplotlib's list of fonts is no part of this.
      "MPLCONFIGDIR": str(scratch / "matplotlib"),
      **{k: v for k, v in os.environ.items() if k not in _OF_JAX},
      "PYTHONPATH": str(root),
      "XDG_CACHE_HOME": str(cache),
    }
    began, used = time.perf_counter(), _children_seconds()
    done = subprocess.run(
      [sys.executable, "-m", "fedjax_sim.cli.main", *arguments,
       f"--{folder}={made}"],
      cwd=root,
      env=environment,
      capture_output=True,
      text=True,
      check=False,
    )  # fmt: skip
    seconds = time.perf_counter() - began
    spent = _children_seconds() - used
    if done.returncode:
      lines = done.stderr.strip().splitlines() or ["no output"]
      raise RuntimeError(f"fedjax-sim {arguments[0]} failed: {lines[-1]}")
    summaries = [
      json.loads(file.read_bytes())
      for file in sorted(made.glob("**/summary.json"))
    ]
    shutil.rmtree(made)
    told = "".join(summary["params_digest"] for summary in summaries)
    losses = [summary["train/loss"] for summary in summaries]
    return Turn(seconds, spent, _sha(told.encode()), float(np.mean(losses)))

  def cold() -> Turn:
    shutil.rmtree(cache, ignore_errors=True)
    cache.mkdir()
    return call()

  return Measured({"cold": cold, "warm": call}, turns)


def _children_seconds() -> float:
  used = resource.getrusage(resource.RUSAGE_CHILDREN)
  return used.ru_utime + used.ru_stime


# --- within this process ------------------------------------------------------


def engine(name: str, small: bool) -> Measured:
  """Run rounds of a case of `benchmarks.cases` on one device, and on all."""
  import jax

  from benchmarks import cases
  from benchmarks.rounds import ENGINES, Engine

  case = _case(name, small)
  data = cases.dataset(case)
  task = case.model(case.example_shape, case.num_classes)
  calls = {}
  for label, devices in ENGINES.items():
    if label == "all" and jax.device_count() == 1:
      continue
    simulator = cases.simulator(case, task, data, devices=devices)
    running = Engine(simulator, case.rounds, case.dispatches)
    calls[label] = _rounds(running, simulator)
  return Measured(calls, case.most_pairs, _machine())


def _rounds(running: Any, simulator: Any) -> Callable[[], Turn]:
  def turn() -> Turn:
    used = time.process_time()
    seconds = running.seconds()
    spent = time.process_time() - used
    params = simulator.algorithm.variables(running.state.server).params
    return Turn(seconds, spent, *_told(params))

  return turn


def planning(small: bool) -> Measured:
  """Plan rounds of 10 of 1,000 clients, and of 1,000 of 100,000."""
  from benchmarks import cases

  calls = {}
  for name in ("lr", "lr_large"):
    # Plans do not depend on what an example is.
    case = replace(_case(name, small), example_shape=(1,))
    data = cases.dataset(case)
    task = case.model(case.example_shape, case.num_classes)
    simulator = cases.simulator(case, task, data, devices=1, lanes=1)
    calls[name] = _plans(simulator, case.rounds)
  return Measured(calls, machine=_machine())


def _plans(simulator: Any, rounds: int, times: int = 10) -> Callable[[], Turn]:
  done = 0

  def turn() -> Turn:
    nonlocal done
    began, used = time.perf_counter(), time.process_time()
    for _ in range(times):
      planned = simulator.plan(done, rounds)
      done += rounds
    seconds = time.perf_counter() - began
    spent = time.process_time() - used
    return Turn(seconds, spent, *_told(planned.cohorts))

  return turn


def evaluation(small: bool) -> Measured:
  """Evaluate a state on a test set and on clients, for LR and the CNN."""
  from benchmarks import cases

  calls = {}
  # Clients, and evaluations of a turn.
  for name, num_clients, times in (("lr", 1000, 5), ("cnn", 20, 1)):
    case = replace(_case(name, small), num_clients=num_clients)
    data = cases.dataset(case)
    data = replace(data, unseen=data.train, test=data.train.examples)
    task = case.model(case.example_shape, case.num_classes)
    simulator = cases.simulator(case, task, data, devices=None)
    calls[name] = _evaluations(simulator, times)
  return Measured(calls, machine=_machine())


def _evaluations(simulator: Any, times: int) -> Callable[[], Turn]:
  state = simulator.init()

  def turn() -> Turn:
    began, used = time.perf_counter(), time.process_time()
    for _ in range(times):
      row = simulator.evaluate(state)
    seconds = time.perf_counter() - began
    spent = time.process_time() - used
    told = json.dumps(dict(row), sort_keys=True, default=float)
    return Turn(seconds, spent, _sha(told.encode()), float(row["test/loss"]))

  return turn


def _case(name: str, small: bool) -> Any:
  from benchmarks import cases

  case = cases.CASES[name]
  return cases.smoke(case) if small else case


def _machine() -> Mapping[str, Any]:
  from benchmarks import machine

  return machine.describe()


def _told(tree: Any) -> tuple[str, float]:
  """Return the SHA-256 of a tree of arrays, and its length in float64.

  The length says how far apart trees are whose arrays lie otherwise.
  """
  import jax

  leaves = [np.asarray(x) for x in jax.tree.leaves(jax.device_get(tree))]
  total = hashlib.sha256()
  for leaf in leaves:
    total.update(f"{leaf.dtype.name}{leaf.shape}".encode() + leaf.tobytes())
  squares = sum(float(np.square(x.astype(np.float64)).sum()) for x in leaves)
  return total.hexdigest(), math.sqrt(squares)


def _sha(told: bytes) -> str:
  return hashlib.sha256(told).hexdigest()


# --- the process --------------------------------------------------------------

OTHERS: Mapping[str, Callable[[bool], Measured]] = {
  "planning": planning,
  "evaluation": evaluation,
}
COMMANDS: Mapping[str, Callable[[Path, bool], Measured]] = {
  "start": start,
  "study": study,
}


def built(name: str, root: Path, small: bool) -> Measured:
  """Return a case, ready to be measured.

  Args:
    name: of the case.
    root: folder that `fedjax_sim` has to be of.
    small: as little as a test needs.

  Raises:
    ImportError: `fedjax_sim` is of another folder.
  """
  if name in COMMANDS:
    return COMMANDS[name](root, small)
  import fedjax_sim

  found = Path(fedjax_sim.__file__).resolve().parents[1]
  if found != root.resolve():
    raise ImportError(f"fedjax_sim is {found}'s, not {root}'s")
  fedjax_sim.setup()
  return OTHERS[name](small) if name in OTHERS else engine(name, small)


def main() -> None:
  """Build a case, take a turn that does not count, and answer."""
  parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
  parser.add_argument("case")
  parser.add_argument("--root", type=Path, required=True)
  parser.add_argument("--small", action="store_true")
  args = parser.parse_args()
  with _answers() as answer:
    try:
      measured = built(args.case, args.root, args.small)
      for call in measured.calls.values():
        call()
      answer(
        calls=list(measured.calls),
        turns=measured.turns,
        machine=measured.machine,
      )
      for line in sys.stdin:
        answer(**measured.calls[line.strip()]()._asdict())
    except Exception as error:  # another revision may lack anything
      lines = str(error).strip().splitlines() or [""]
      answer(error=f"{type(error).__name__}: {lines[0]}")
      raise


@contextlib.contextmanager
def _answers() -> Iterator[Callable[..., None]]:
  """Keep the standard output for answers; what else prints goes to errors."""
  with os.fdopen(os.dup(1), "w") as out:
    os.dup2(2, 1)

    def answer(**told: Any) -> None:
      out.write(json.dumps(told) + "\n")
      out.flush()

    yield answer


if __name__ == "__main__":
  main()
