r"""The same federated training through other simulators, and through this one.

    python -m benchmarks.peers --peers=fedjax,pfl,flower --rounds=30
    python -m benchmarks.peers --case=mnist --flute=CHECKOUT \
      --python=python3.11,python3.12

FedAvg on the CPU: 10 clients a round drawn uniformly, one epoch of SGD, a mean
weighted by examples. By `--case`,

- `lr`: multinomial logistic regression, 784 x 10, rate 0.03, batches of 10;
  1,000 clients of lognormal sizes, with random data;
- `mnist`: the same on MNIST by a power law, and the outputs go through a
  sigmoid before the cross-entropy: FLUTE's benchmark `cv_lr_mnist`;
- `cnn`: the FEMNIST CNN without dropout, rate 0.02, batches of 20; 100 clients
  with 62 kinds of noisy pictures, 28 x 28;
- `lstm`: two layers of 256 on texts of 80 characters, rate 1, batches of 4; 100
  clients of a random language.

All begin with the same weights, and this simulator computes the final losses of
all. Every peer is installed from PyPI into a virtual environment of its own,
and trains by a script in `benchmarks/peers_` that uses it as its documentation
does; what a peer does otherwise than the others its script says. FLUTE is not
on PyPI: `--flute` is a checkout of github.com/microsoft/msrflute, in which
nothing is written. A peer that needs a newer Python takes the first of
`--python` that is.

A run's first rounds compile and load, so they do not count; of the others the
median does. The simulators take turns, a new process each time, another one
first in every turn. Of each run a line of JSON is printed, then a table of
times as ratios to fedjax_sim on one device in the same turn: medians, and the
least and greatest. What cannot be installed or run is in the table, too, with
the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import machine
from benchmarks.environments import (
  FLUTE,
  PEERS,
  FailedError,
  call,
  environment,
  python_for,
  versions,
)
from benchmarks.peer_cases import (
  CASES,
  TOLERANCE,
  WORK,
  evaluate,
  first_weights,
  layers_of,
)
from benchmarks.peer_data import DATA, find_data
from benchmarks.turns import rotated
from fedjax_sim.core.files import write_json
from fedjax_sim.distributed import cpu
from fedjax_sim.models.pytorch.layouts import from_torch, to_torch

WARMUP = 3  # rounds that do not count
SCRIPTS = Path(__file__).resolve().parent / "peers_"
ROOT = SCRIPTS.parent.parent
OURS = "fedjax_sim"
SMALLEST_ROUNDS = WARMUP + 1
OUR_PACKAGES = ("fedjax_sim", "jax", "flax", "numpy")


def train(
  script: str,
  interpreter: str | Path,
  packages: Sequence[str],
  *,
  data: Path,
  rounds: int,
  batching: Mapping[str, Any],
  env: Mapping[str, str],
  torch: bool,
  seconds: float,
) -> dict[str, Any]:
  """Train by a script of `peers_`, and measure it.

  Args:
    script: its name.
    interpreter: that runs it.
    packages: as in `Peer`.
    data: what `write_data` wrote.
    rounds: of training, more than `WARMUP`.
    batching: as `WORK`, and what else the script reads.
    env: of the process.
    torch: whether its weights are PyTorch's, by PyTorch's names.
    seconds: it may take.

  Raises:
    FailedError: the script failed, took too long or did not train.
  """
  found = versions(interpreter, packages, env)
  layers = layers_of(batching)
  begin: dict[str, Any] = first_weights(batching)
  if torch:
    begin = to_torch(begin, layers)
  with tempfile.TemporaryDirectory() as folder:
    first, out = Path(folder) / "first.npz", Path(folder) / "out.npz"
    np.savez(first, **begin)
    path = SCRIPTS / f"{script}.py"
    work = json.dumps({**batching, "first": str(first)})
    call(
      [interpreter, path, data, out, str(rounds), work],
      seconds=seconds,
      env={**env, "FLWR_HOME": folder},
    )
    with np.load(out) as file:
      result = dict(file)
  all_times, all_examples = result.pop("seconds"), result.pop("examples")
  times, examples = all_times[WARMUP:].tolist(), all_examples[WARMUP:].tolist()
  if len(times) != rounds - WARMUP or len(examples) != len(times):
    raise FailedError(f"{len(all_times)} rounds, not {rounds}")
  try:
    weights = from_torch(result, layers) if torch else result
    loss, accuracy = evaluate(data, weights, batching)
  except ValueError as error:  # some are missing, or not finite
    raise FailedError(str(error)) from error
  return {
    "seconds_per_round": statistics.median(times),
    "first_round_seconds": float(all_times[0]),
    "examples_per_second": statistics.median(
      count / time for count, time in zip(examples, times, strict=True)
    ),
    "clients_per_second": batching["cohort"] / statistics.median(times),
    "examples_per_round": statistics.mean(examples),
    "train_loss": loss,
    "train_accuracy": accuracy,
    "version": batching.get("version", found[packages[0]]),
    "trains_with": f"{packages[1]} {found[packages[1]]}",
    "versions": found,
  }


def ratios(
  runs: Sequence[Mapping[str, Any]], ours: Sequence[Mapping[str, Any]]
) -> dict[str, list[float]]:
  """Return the times of a round and of an example, as ratios to ours.

  Each is a ratio to our time in the same turn. Every simulator draws cohorts
  itself, so that rounds of one may have more examples than another's; therefore
  there is a ratio for an example, too.
  """
  pairs = list(zip(runs, ours, strict=True))
  return {
    "round": [
      a["seconds_per_round"] / b["seconds_per_round"] for a, b in pairs
    ],
    "example": [
      b["examples_per_second"] / a["examples_per_second"] for a, b in pairs
    ],
  }


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
  """Return a table of times as ratios to fedjax_sim's, in Markdown.

  Args:
    results: simulator -> its `runs`, one a turn, or the `error` of one.
  """
  ours = results[OURS]
  lines = [
    "| simulator | version | trains with"
    f" | time of a round / {OURS}'s | time of an example / {OURS}'s"
    " | training loss | training accuracy |",
    "| --- | --- | --- | --- | --- | --- | --- |",
  ]
  for name, row in results.items():
    if "error" in row:
      failed = f"failed: {row['error'].replace('|', '/')}"
      cells = ["", "", failed, "", "", ""]
    else:
      times = ["unknown", "unknown"]
      if "error" not in ours:
        found = ratios(row["runs"], ours["runs"])
        times = [_spread(found[key], 2) for key in ("round", "example")]
      first = row["runs"][0]
      cells = [
        first["version"],
        first["trains_with"],
        *times,
        _spread([run["train_loss"] for run in row["runs"]], 4),
        _spread([run["train_accuracy"] for run in row["runs"]], 4),
      ]
    lines.append(f"| {' | '.join([name, *cells])} |")
  return "\n".join(lines)


def disagreeing(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
  """Return whose median final loss is not fedjax_sim's within `TOLERANCE`.

  Args:
    results: as in `table`.

  Returns:
    Simulator -> its loss minus ours.
  """
  losses = {
    name: statistics.median(run["train_loss"] for run in row["runs"])
    for name, row in results.items()
    if "error" not in row
  }
  if OURS not in losses:
    return {}
  gaps = {name: loss - losses[OURS] for name, loss in losses.items()}
  return {name: gap for name, gap in gaps.items() if not abs(gap) <= TOLERANCE}


def _spread(values: Sequence[float], digits: int) -> str:
  """Return the median; with the least and greatest where they differ."""
  shown = [
    f"{value:.{digits}f}"
    for value in (statistics.median(values), min(values), max(values))
  ]
  return shown[0] if len(set(shown)) == 1 else "{} ({}-{})".format(*shown)


class Runner(NamedTuple):
  """How a simulator is run.

  Attributes:
    script: of `peers_`.
    interpreter: of its environment.
    packages: as in `Peer`.
    batching: what it trains; FLUTE's has its checkout and version, too.
    env: of its process.
    torch: whether it trains with PyTorch.
  """

  script: str
  interpreter: str | Path
  packages: tuple[str, ...]
  batching: Mapping[str, Any]
  env: Mapping[str, str]
  torch: bool


def our_runners(
  env: Mapping[str, str], work: Mapping[str, Any] = WORK
) -> dict[str, Runner]:
  """Return runners of this simulator, on one CPU device and on one a core."""
  path = os.pathsep.join(filter(None, [str(ROOT), os.getenv("PYTHONPATH")]))
  # Without setup() JAX has one CPU device, which uses every core by itself.
  number = cpu.count()
  devices = {OURS: 1}
  if number > 1:
    devices[f"{OURS}, {number} devices"] = number
  return {
    name: Runner(
      "run_fedjax_sim",
      sys.executable,
      OUR_PACKAGES,
      {**work, "devices": count},
      {**env, "PYTHONPATH": path},
      torch=False,
    )
    for name, count in devices.items()
  }


def peer_runner(
  name: str,
  env: Mapping[str, str],
  work: Mapping[str, Any] = WORK,
  *,
  cache: Path,
  pythons: Sequence[str],
  flute: Path | None,
  seconds: float,
) -> Runner:
  """Return the runner of a peer, in its environment.

  Args:
    name: of `PEERS`.
    env: of the processes.
    work: as `WORK`.
    cache: the folder of environments.
    pythons: interpreters, one of which makes the environment.
    flute: a checkout of FLUTE; None: there is none.
    seconds: a step of an installation may take.

  Raises:
    FailedError: that cannot be made.
  """
  peer = PEERS[name]
  if name == FLUTE:
    work = {**work, **flute_work(flute)}
  try:
    interpreter = environment(
      cache / name,
      peer.requirements,
      python=python_for(pythons, peer.least_python, seconds=seconds),
      seconds=seconds,
    )
  except FailedError as error:
    raise FailedError(f"not installed: {error}") from error
  # Neither our modules nor a message to anybody's server.
  silent = {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
  own = {k: v for k, v in env.items() if k != "PYTHONPATH"} | silent
  return Runner(
    f"run_{name}",
    interpreter,
    peer.packages,
    work,
    own,
    torch="torch" in peer.packages,
  )


def flute_work(checkout: Path | None) -> dict[str, Any]:
  """Return what `run_flute.py` reads besides `WORK`.

  Raises:
    FailedError: this is no checkout of FLUTE.
  """
  if checkout is None or not (checkout / "e2e_trainer.py").is_file():
    raise FailedError(
      f"--flute={checkout}: give a checkout of github.com/microsoft/msrflute"
    )
  path = checkout.resolve()
  git = ["git", "-C", str(path), "rev-parse", "--short", "HEAD"]
  commit = call(git, seconds=60).strip() if (path / ".git").exists() else "?"
  return {
    "flute": str(path),
    "version": commit,
    "processes": cpu.count() + 1,
  }


def take_turns(
  runners: Mapping[str, Runner],
  *,
  data: Path,
  rounds: int,
  repeats: int,
  seconds: float,
) -> dict[str, dict[str, Any]]:
  """Train by every runner in every turn, as long as it does not fail.

  Args:
    runners: simulator -> its runner.
    data: as in `train`.
    rounds: of a run.
    repeats: turns.
    seconds: a run may take.

  Returns:
    Simulator -> its `runs`, one a turn; with the `error` of one that failed.
  """
  results: dict[str, dict[str, Any]] = {name: {"runs": []} for name in runners}
  for turn in range(repeats):
    for name in rotated(runners, turn):
      if "error" in results[name]:  # in an earlier turn
        continue
      try:
        row = train(
          **runners[name]._asdict(), data=data, rounds=rounds, seconds=seconds
        )
      except FailedError as error:
        results[name] |= _failed(name, error)
        continue
      results[name]["runs"].append(row)
      line = {"simulator": name, "turn": turn, **row}
      print(json.dumps(line), flush=True)
  return results


def _failed(name: str, error: FailedError) -> dict[str, Any]:
  """Print what failed, and return it."""
  print(json.dumps({"simulator": name, "error": str(error)}), flush=True)
  return {"error": str(error)}


def main(arguments: Sequence[str] | None = None) -> None:
  """Run what the command line asks for."""
  home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.peers",
    description=str(__doc__).splitlines()[0],
  )
  parser.add_argument(
    "--peers", default=",".join(PEERS), help="their names, with commas"
  )
  parser.add_argument("--case", default="lr", choices=list(CASES))
  parser.add_argument(
    "--rounds", type=int, default=30, help=f"at least {SMALLEST_ROUNDS}"
  )
  parser.add_argument(
    "--repeats", type=int, default=3, help="runs of each simulator"
  )
  parser.add_argument("--json", help="a file for all results")
  parser.add_argument(
    "--cache",
    type=Path,
    default=Path(home) / "fedjax_sim_peers",
    help="a folder for environments and data",
  )
  parser.add_argument(
    "--python",
    default=sys.executable,
    help="what makes the environments; several with commas, the usual first",
  )
  parser.add_argument("--flute", type=Path, help="a checkout of FLUTE")
  parser.add_argument(
    "--data", help="the folder that holds mnist/; default: FEDJAX_SIM_DATA"
  )
  parser.add_argument(
    "--install_seconds", type=float, default=1800, help="the limit of one step"
  )
  parser.add_argument(
    "--run_seconds", type=float, default=900, help="the limit of one run"
  )
  args = parser.parse_args(arguments)
  names = [name for name in args.peers.split(",") if name]
  for name in names:
    if name not in PEERS:
      parser.error(f"no peer {name!r}; there are {', '.join(PEERS)}")
  if args.rounds < SMALLEST_ROUNDS:
    parser.error(f"--rounds={args.rounds}: give at least {SMALLEST_ROUNDS}")
  if args.repeats < 1:
    parser.error("--repeats: give at least 1")

  cache = args.cache.resolve()
  cache.mkdir(parents=True, exist_ok=True)
  data = find_data(args.case, cache, args.data)
  env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}
  work = CASES[args.case]
  runners, errors = our_runners(env, work), {}
  for name in names:
    try:
      runners[name] = peer_runner(
        name,
        env,
        work,
        cache=cache,
        pythons=args.python.split(","),
        flute=args.flute,
        seconds=args.install_seconds,
      )
    except FailedError as error:
      errors[name] = _failed(name, error)
  results = take_turns(
    runners,
    data=data,
    rounds=args.rounds,
    repeats=args.repeats,
    seconds=args.run_seconds,
  )
  results |= errors
  report = {
    "processor": machine.processor(),
    "cores": cpu.count(),
    "python": platform.python_version(),
    "case": args.case,
    "rounds": args.rounds,
    "repeats": args.repeats,
    "data": dict(DATA) if args.case == "lr" else data.name,
    "batching": dict(work),
    "results": results,
  }
  print(
    f"{report['processor']}, {report['cores']} cores, {args.rounds - WARMUP}"
    f" rounds that count, {args.repeats} runs of each"
  )
  print(table(results))
  for name, gap in disagreeing(results).items():
    print(f"{name} ends with a loss {gap:+.4f} from {OURS}'s, over {TOLERANCE}")
  if args.json:
    write_json(args.json, report)


if __name__ == "__main__":
  main()
