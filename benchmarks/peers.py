"""The same federated training through other simulators, and through this one.

    python -m benchmarks.peers --peers=fedjax,pfl,flower --rounds=30

FedAvg on multinomial logistic regression, 784 x 10: 1,000 clients of lognormal
sizes with random data, 10 a round drawn uniformly, one epoch of SGD with rate
0.03 and batches of 10, a mean weighted by examples, on the CPU. Every peer is
installed from PyPI into a virtual environment of its own, and trains by a
script in `benchmarks/peers_` that uses it as its documentation does; what a
peer does otherwise than the others its script says.

A run's first rounds compile and load, so they do not count; of the others the
median does. Of each simulator a line of JSON is printed, then a table of times
as ratios to fedjax_sim on one device. What cannot be installed or run is in
the table, too, with the reason. On a machine that does other work beside this
the ratios are noisy.
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
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

WARMUP = 3  # rounds that do not count
CLIENTS, FEATURES = 1000, 784
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
    requirements: what pip is asked for.
    packages: whose versions are reported, its own first.
  """

  requirements: tuple[str, ...]
  packages: tuple[str, ...]


PEERS: Mapping[str, Peer] = {
  # FedJAX 0.0.17 calls jax.tree_map, which JAX 0.6 no longer has.
  "fedjax": Peer(
    ("fedjax", "jax<0.6", "jaxlib<0.6"),
    ("fedjax", "jax", "dm-haiku", "numpy"),
  ),
  "pfl": Peer(("pfl[pytorch]",), ("pfl", "torch", "numpy")),
  # The PyTorch that its client uses is not among Flower's own requirements.
  "flower": Peer(
    ("flwr[simulation]", "torch"), ("flwr", "ray", "torch", "numpy")
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
  """Runs a command in a process group of its own, and returns its output.

  Raises:
    FailedError: it failed, or ran out of time; then its group is killed.
  """
  process = subprocess.Popen(
    [str(part) for part in command],
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    stdin=subprocess.DEVNULL,
    text=True,
    errors="replace",
    env=dict(os.environ if env is None else env),
    start_new_session=True,
  )
  try:
    output, _ = process.communicate(timeout=seconds)
  except subprocess.TimeoutExpired:
    raise FailedError(f"took more than {seconds:.0f} s") from None
  finally:  # also what it left behind
    with contextlib.suppress(ProcessLookupError, PermissionError):
      os.killpg(process.pid, signal.SIGKILL)
    process.wait()
  if process.returncode:
    raise FailedError(reason(output) or f"exit status {process.returncode}")
  return output


def reason(output: str) -> str:
  """The line of a failed command's output that says most."""
  lines = [line.strip() for line in output.splitlines() if line.strip()]
  errors = [line for line in lines if "error" in line.lower()]
  return (errors or lines or [""])[-1][:300]


def write_data(path: Path) -> None:
  """Writes the clients' examples: of a random linear model, with noise.

  As `fedjax_sim.data.load_npz` reads it, one client after the other.
  """
  rng = np.random.default_rng(0)
  drawn = rng.lognormal(mean=np.log(60), sigma=0.6, size=CLIENTS)
  sizes = np.clip(drawn.round(), 20, 200).astype(np.int64)
  x = rng.standard_normal((sizes.sum(), FEATURES), dtype=np.float32) / 4
  true = rng.standard_normal((FEATURES, WORK["classes"]), dtype=np.float32)
  noise = rng.gumbel(size=(len(x), WORK["classes"]))
  y = np.argmax(x @ true + noise, axis=1).astype(np.int32)
  client = np.repeat(np.arange(CLIENTS), sizes)
  part = path.with_name(f"part-{os.getpid()}.npz")
  np.savez(part, x=x, y=y, client=client)
  part.replace(path)


def environment(
  folder: Path, requirements: Sequence[str], *, python: str, seconds: float
) -> Path:
  """The interpreter of a virtual environment, made where there is none.

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
  work: Mapping[str, Any],
  env: Mapping[str, str],
  seconds: float,
) -> dict[str, Any]:
  """Trains by a script of `peers_`, and measures it.

  Raises:
    FailedError: the script failed, took too long or did not train.
  """
  found = call([interpreter, "-c", _VERSIONS, *packages], seconds=60, env=env)
  versions = json.loads(found.splitlines()[-1])
  with tempfile.TemporaryDirectory() as folder:
    out = Path(folder) / "out.npz"
    path = SCRIPTS / f"{script}.py"
    call(
      [interpreter, path, data, out, str(rounds), json.dumps(work)],
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
    "clients_per_second": work["cohort"] / statistics.median(times),
    "examples_per_round": statistics.mean(examples),
    "train_loss": loss,
    "train_accuracy": accuracy,
    "version": versions[packages[0]],
    "versions": versions,
  }


def evaluate(
  data: Path, kernel: np.ndarray, bias: np.ndarray
) -> tuple[float, float]:
  """Mean cross-entropy and accuracy over all clients' examples."""
  with np.load(data) as file:
    x, y = file["x"], file["y"]
  scores = x @ kernel + bias
  scores = scores - scores.max(axis=1, keepdims=True)
  total = np.log(np.exp(scores).sum(axis=1))
  loss = np.mean(total - scores[np.arange(len(y)), y])
  return float(loss), float(np.mean(scores.argmax(axis=1) == y))


def scores(row: Mapping[str, Any]) -> list[str]:
  """How well a simulator trained, for the table."""
  return [f"{row['train_loss']:.4f}", f"{row['train_accuracy']:.4f}"]


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
  """Times as ratios to fedjax_sim's, which come first.

  Cohorts are drawn by each simulator itself, and some rounds of one have more
  examples than another's; so there is a ratio for an example, too.
  """
  ours = results[OURS]
  lines = [
    f"| simulator | version | time of a round / {OURS}'s"
    f" | time of an example / {OURS}'s | training loss | training accuracy |",
    "| --- | --- | --- | --- | --- | --- |",
  ]
  for name, row in results.items():
    if "error" in row:
      cells = ["", f"failed: {row['error'].replace('|', '/')}", "", "", ""]
    elif "error" in ours:
      cells = [row["version"], "unknown", "unknown", *scores(row)]
    else:
      a_round = row["seconds_per_round"] / ours["seconds_per_round"]
      example = ours["examples_per_second"] / row["examples_per_second"]
      ratios = [f"{ratio:.2f}" for ratio in (a_round, example)]
      cells = [row["version"], *ratios, *scores(row)]
    lines.append(f"| {' | '.join([name, *cells])} |")
  return "\n".join(lines)


def main() -> None:
  """Runs what the command line asks for."""
  cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
  parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
  parser.add_argument(
    "--peers", default=",".join(PEERS), help="their names, with commas"
  )
  parser.add_argument("--case", default="lr", choices=["lr"])
  parser.add_argument(
    "--rounds", type=int, default=30, help=f"at least {SMALLEST_ROUNDS}"
  )
  parser.add_argument("--json", type=Path, help="a file for all results")
  parser.add_argument(
    "--cache",
    type=Path,
    default=Path(cache) / "fedjax_sim_peers",
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
  args = parser.parse_args()
  names = [name for name in args.peers.split(",") if name]
  for name in names:
    if name not in PEERS:
      parser.error(f"no peer {name!r}; there are {', '.join(PEERS)}")
  if args.rounds < SMALLEST_ROUNDS:
    parser.error(f"--rounds={args.rounds}: give at least {SMALLEST_ROUNDS}")

  args.cache.mkdir(parents=True, exist_ok=True)
  data = args.cache.resolve() / f"{args.case}.npz"
  if not data.exists():
    write_data(data)
  common = {
    **os.environ,
    "CUDA_VISIBLE_DEVICES": "",
    "JAX_PLATFORMS": "cpu",
  }
  shared = {"data": data, "rounds": args.rounds, "seconds": args.run_seconds}
  results: dict[str, dict[str, Any]] = {}

  def report(name: str, row: dict[str, Any]) -> None:
    results[name] = row
    print(json.dumps({"simulator": name, **row}), flush=True)

  # Without setup() JAX has one CPU device, which uses every core by itself.
  cores = len(os.sched_getaffinity(0))
  rows = {OURS: 1}
  if cores > 1:
    rows[f"{OURS}, {cores} devices"] = cores
  path = os.pathsep.join(filter(None, [str(ROOT), os.getenv("PYTHONPATH")]))
  for name, devices in rows.items():
    try:
      row = train(
        "run_fedjax_sim",
        sys.executable,
        OUR_PACKAGES,
        work={**WORK, "devices": devices},
        env={**common, "PYTHONPATH": path},
        **shared,
      )
    except FailedError as error:
      row = {"error": str(error)}
    report(name, row)

  # Neither our modules nor a message to anybody's server.
  env = {
    **common,
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
  }
  env.pop("PYTHONPATH", None)
  for name in names:
    peer = PEERS[name]
    try:
      interpreter = environment(
        args.cache.resolve() / name,
        peer.requirements,
        python=args.python,
        seconds=args.install_seconds,
      )
    except FailedError as error:
      report(name, {"error": f"not installed: {error}"})
      continue
    try:
      row = train(
        f"run_{name}", interpreter, peer.packages, work=WORK, env=env, **shared
      )
    except FailedError as error:
      row = {"error": str(error)}
    report(name, row)

  print(table(results))
  if args.json:
    meta = {"case": args.case, "rounds": args.rounds, "cores": cores}
    args.json.write_text(json.dumps({**meta, "results": results}, indent=2))


if __name__ == "__main__":
  main()
