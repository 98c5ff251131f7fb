"""The same federated training through other simulators, and through this one.

    python -m benchmarks.peers --peers=fedjax,pfl,flower --rounds=30

FedAvg on multinomial logistic regression, 784 x 10: 1,000 clients of lognormal
sizes with random data, 10 a round drawn uniformly, one epoch of SGD with rate
0.03 and batches of 10, a mean weighted by examples, on the CPU. Every peer is
installed from PyPI into a virtual environment of its own, and trains by a
script in `benchmarks/peers_` that uses it as its documentation does; what a
peer does otherwise than the others its script says.

A run's first rounds compile and load, so they do not count; of the others the
median does. The simulators take turns, a new process each time, another one
first in every turn. Of each run a line of JSON is printed, then a table of
times as ratios to fedjax_sim on one device in the same turn: medians, and the
least and greatest. What cannot be installed or run is in the table, too, with
the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import inspect
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import machine
from benchmarks.turns import rotated
from fedjax_sim.core.files import write_json
from fedjax_sim.distributed import cpu

WARMUP = 3  # rounds that do not count
DATA: Mapping[str, Any] = {
  "clients": 1000,
  "features": 784,
  "classes": 10,
  "median_size": 60,
  "sigma": 0.6,
  "least_size": 20,
  "greatest_size": 200,
  "seed": 0,
}
WORK: Mapping[str, Any] = {
  "classes": 10,
  "cohort": 10,
  "batch_size": 10,
  "epochs": 1,
  "learning_rate": 0.03,
}
SCRIPTS = Path(__file__).resolve().parent / "peers_"
ROOT = SCRIPTS.parent.parent
OURS = "fedjax_sim"
SMALLEST_ROUNDS = WARMUP + 1


class Peer(NamedTuple):
  """Another simulator.

  Attributes:
    requirements: what pip is asked for; what a round's time hangs on, in the
      version that was measured.
    packages: whose versions are reported: its own, what it trains with, others.
  """

  requirements: tuple[str, ...]
  packages: tuple[str, ...]


PEERS: Mapping[str, Peer] = {
  # FedJAX 0.0.17 calls jax.tree_map, which JAX 0.6 no longer has.
  "fedjax": Peer(
    (
      "fedjax==0.0.17",
      "jax==0.5.3",
      "jaxlib==0.5.3",
      "dm-haiku==0.0.17",
      "optax==0.2.8",
      "numpy==2.4.6",
    ),
    ("fedjax", "jax", "dm-haiku", "optax", "numpy"),
  ),
  "pfl": Peer(
    ("pfl[pytorch]==0.6.0", "torch==2.14.1", "numpy==2.4.6"),
    ("pfl", "torch", "numpy"),
  ),
  # The PyTorch that its client uses is not among Flower's own requirements.
  "flower": Peer(
    (
      "flwr[simulation]==1.42.0",
      "ray==2.55.1",
      "torch==2.14.1",
      "numpy==2.4.6",
    ),
    ("flwr", "torch", "ray", "numpy"),
  ),
}
OUR_PACKAGES = ("fedjax_sim", "jax", "flax", "numpy")

_VERSIONS = """
import importlib.metadata, json, sys
found = {}
for name in sys.argv[1:]:
  try:
    found[name] = importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    found[name] = "not installed"
print(json.dumps(found))
"""


class FailedError(RuntimeError):
  """A command failed or took too long; the message is one line."""


def call(
  command: Sequence[str | Path],
  *,
  seconds: float,
  env: Mapping[str, str] | None = None,
) -> str:
  """Run a command in a process group of its own, and return its output.

  Raises:
    FailedError: it failed, or ran out of time; then its group is killed.
  """
  with subprocess.Popen(
    [str(part) for part in command],
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    stdin=subprocess.DEVNULL,
    text=True,
    errors="replace",
    env=dict(os.environ if env is None else env),
    start_new_session=True,
  ) as process:
    try:
      output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
      raise FailedError(f"took more than {seconds:.0f} s") from None
    finally:  # also what it left behind
      with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
  if process.returncode:
    raise FailedError(reason(output) or f"exit status {process.returncode}")
  return output


def reason(output: str) -> str:
  """Return the last line of the output that has "error" in it, or the last."""
  lines = [line.strip() for line in output.splitlines() if line.strip()]
  errors = [line for line in lines if "error" in line.lower()]
  return (errors or lines or [""])[-1][:300]


def data_name(of: Mapping[str, Any] = DATA) -> str:
  """Return the name of the data's file, which differs where its content would.

  Args:
    of: as `DATA`.
  """
  made = json.dumps(dict(of), sort_keys=True) + inspect.getsource(write_data)
  return f"lr-{hashlib.sha256(made.encode()).hexdigest()[:12]}.npz"


def write_data(path: Path, of: Mapping[str, Any] = DATA) -> None:
  """Write the clients' examples: of a random linear model, with noise.

  As `fedjax_sim.data.load_npz` reads it, one client after the other.

  Args:
    path: where.
    of: as `DATA`.
  """
  rng = np.random.default_rng(of["seed"])
  middle, num_clients = np.log(of["median_size"]), of["clients"]
  drawn = rng.lognormal(middle, of["sigma"], num_clients).round()
  sizes = np.clip(drawn, of["least_size"], of["greatest_size"]).astype(np.int64)
  shape = (of["features"], of["classes"])
  x = rng.standard_normal((sizes.sum(), shape[0]), dtype=np.float32) / 4
  true = rng.standard_normal(shape, dtype=np.float32)
  noise = rng.gumbel(size=(len(x), shape[1]))
  y = np.argmax(x @ true + noise, axis=1).astype(np.int32)
  client = np.repeat(np.arange(num_clients), sizes)
  part = path.with_name(f"part-{os.getpid()}.npz")
  np.savez(part, x=x, y=y, client=client)
  part.replace(path)


def environment(
  folder: Path, requirements: Sequence[str], *, python: str, seconds: float
) -> Path:
  """Return a virtual environment's interpreter; make it where there is none.

  Raises:
    FailedError: it cannot be made.
  """
  interpreter, done = folder / "bin" / "python", folder / "requirements.json"
  wanted = json.dumps([python, *requirements])
  if done.exists() and done.read_text() == wanted:
    return interpreter
  shutil.rmtree(folder, ignore_errors=True)
  call([python, "-m", "venv", folder], seconds=seconds)
  pip = ["-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
  call([interpreter, *pip, *requirements], seconds=seconds)
  done.write_text(wanted)
  return interpreter


def train(
  script: str,
  interpreter: str | Path,
  packages: Sequence[str],
  *,
  data: Path,
  rounds: int,
  batching: Mapping[str, Any],
  env: Mapping[str, str],
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
    seconds: it may take.

  Raises:
    FailedError: the script failed, took too long or did not train.
  """
  found = call([interpreter, "-c", _VERSIONS, *packages], seconds=60, env=env)
  versions = json.loads(found.splitlines()[-1])
  with tempfile.TemporaryDirectory() as folder:
    out = Path(folder) / "out.npz"
    path = SCRIPTS / f"{script}.py"
    call(
      [interpreter, path, data, out, str(rounds), json.dumps(batching)],
      seconds=seconds,
      env={**env, "FLWR_HOME": folder},
    )
    with np.load(out) as file:
      result = {name: file[name] for name in file.files}
  times = result["seconds"][WARMUP:].tolist()
  examples = result["examples"][WARMUP:].tolist()
  if len(times) != rounds - WARMUP or len(examples) != len(times):
    raise FailedError(f"{len(result['seconds'])} rounds, not {rounds}")
  loss, accuracy = evaluate(data, result["kernel"], result["bias"])
  return {
    "seconds_per_round": statistics.median(times),
    "first_round_seconds": float(result["seconds"][0]),
    "examples_per_second": statistics.median(
      count / time for count, time in zip(examples, times, strict=True)
    ),
    "clients_per_second": batching["cohort"] / statistics.median(times),
    "examples_per_round": statistics.mean(examples),
    "train_loss": loss,
    "train_accuracy": accuracy,
    "version": versions[packages[0]],
    "trains_with": f"{packages[1]} {versions[packages[1]]}",
    "versions": versions,
  }


def evaluate(
  data: Path, kernel: np.ndarray, bias: np.ndarray
) -> tuple[float, float]:
  """Return mean cross-entropy and accuracy over all clients' examples."""
  with np.load(data) as file:
    x, y = file["x"], file["y"]
  scores = x @ kernel + bias
  scores = scores - scores.max(axis=1, keepdims=True)
  total = np.log(np.exp(scores).sum(axis=1))
  loss = np.mean(total - scores[np.arange(len(y)), y])
  return float(loss), float(np.mean(scores.argmax(axis=1) == y))


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
    batching: what it trains.
    env: of its process.
  """

  script: str
  interpreter: str | Path
  packages: tuple[str, ...]
  batching: Mapping[str, Any]
  env: Mapping[str, str]


def our_runners(env: Mapping[str, str]) -> dict[str, Runner]:
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
      {**WORK, "devices": count},
      {**env, "PYTHONPATH": path},
    )
    for name, count in devices.items()
  }


def peer_runner(
  name: str,
  env: Mapping[str, str],
  *,
  cache: Path,
  python: str,
  seconds: float,
) -> Runner:
  """Return the runner of a peer, in its environment.

  Raises:
    FailedError: that cannot be made.
  """
  peer = PEERS[name]
  try:
    interpreter = environment(
      cache / name, peer.requirements, python=python, seconds=seconds
    )
  except FailedError as error:
    raise FailedError(f"not installed: {error}") from error
  # Neither our modules nor a message to anybody's server.
  silent = {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
  own = {k: v for k, v in env.items() if k != "PYTHONPATH"} | silent
  return Runner(f"run_{name}", interpreter, peer.packages, WORK, own)


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
  parser.add_argument("--case", default="lr", choices=["lr"])
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
    "--python", default=sys.executable, help="what makes the environments"
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
  data = cache / data_name()
  if not data.exists():
    write_data(data)
  env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}
  runners = our_runners(env)
  results: dict[str, dict[str, Any]] = {
    name: {"runs": []} for name in (*runners, *names)
  }

  def failed(name: str, error: FailedError) -> None:
    results[name]["error"] = str(error)
    print(json.dumps({"simulator": name, "error": str(error)}), flush=True)

  for name in names:
    try:
      runners[name] = peer_runner(
        name,
        env,
        cache=cache,
        python=args.python,
        seconds=args.install_seconds,
      )
    except FailedError as error:
      failed(name, error)
  for turn in range(args.repeats):
    for name in rotated(runners, turn):
      if "error" in results[name]:  # in an earlier turn
        continue
      try:
        row = train(
          **runners[name]._asdict(),
          data=data,
          rounds=args.rounds,
          seconds=args.run_seconds,
        )
      except FailedError as error:
        failed(name, error)
        continue
      results[name]["runs"].append(row)
      line = {"simulator": name, "turn": turn, **row}
      print(json.dumps(line), flush=True)

  report = {
    "processor": machine.processor(),
    "cores": cpu.count(),
    "python": platform.python_version(),
    "case": args.case,
    "rounds": args.rounds,
    "repeats": args.repeats,
    "data": dict(DATA),
    "batching": dict(WORK),
    "results": results,
  }
  print(
    f"{report['processor']}, {report['cores']} cores, {args.rounds - WARMUP}"
    f" rounds that count, {args.repeats} runs of each"
  )
  print(table(results))
  if args.json:
    write_json(args.json, report)


if __name__ == "__main__":
  main()
