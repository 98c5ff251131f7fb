"""What do trackers cost a run?

    python -m benchmarks.trackers

Trains an MLP of 1.1 million parameters on the digits without any tracker, with
TensorBoard, with an MLflow server on this machine, with Weights & Biases
offline, with an MLflow server that refuses every connection, and with one that
answers none. All take turns, each run in a process of its own. The seconds of
the whole process, on the clock and of processors, are compared with those of
the run without trackers in the same turn; on a busy machine the latter say
more. With the server that never answers the end waits as long as
`trackers.LABEL.wait` says, here 5 seconds.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from absl import app, flags

from benchmarks.turns import rotated

TURNS = flags.DEFINE_integer("turns", 5, "Of each kind of run.")
ROUNDS = flags.DEFINE_integer("rounds", 300, "Of a run.")
ONLY = flags.DEFINE_list("only", None, "Kinds to compare; all by default.")

CONFIG = Path(__file__).parents[1] / "configs" / "digits_fedavg.py"
WAIT = 5  # seconds


@contextlib.contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
  """Start an MLflow server on this machine; yield its URI."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  uri = f"http://127.0.0.1:{port}"
  command = [
    *(sys.executable, "-m", "mlflow", "server", "--workers=1"),
    *("--host=127.0.0.1", f"--port={port}"),
    f"--backend-store-uri=sqlite:///{folder}/mlflow.db",
    f"--artifacts-destination={folder}/artifacts",
  ]
  with (folder / "server.log").open("w") as log:
    server = subprocess.Popen(
      command, stdout=log, stderr=log, cwd=folder, start_new_session=True
    )
  try:
    while True:
      if server.poll() is not None:
        raise RuntimeError((folder / "server.log").read_text())
      with contextlib.suppress(OSError):
        urllib.request.urlopen(f"{uri}/health", timeout=5).close()
        break
      time.sleep(0.2)
    yield uri
  finally:
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()


@contextlib.contextmanager
def silent_server() -> Iterator[str]:
  """Accept connections, and answer none; yield the URI."""
  with socket.socket() as listening:
    listening.bind(("127.0.0.1", 0))
    listening.listen(100)
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@contextlib.contextmanager
def kinds(folder: Path) -> Iterator[dict[str, list[str]]]:
  """Yield kind of run -> the fields of its config."""
  off = "trackers.tensorboard=None"
  of_uri = lambda uri: [off, f"trackers.mlflow.uri={uri}"]
  with mlflow_server(folder) as uri, silent_server() as silent:
    yield {
      "none": [off],
      "tensorboard": [],
      "mlflow": of_uri(uri),
      "wandb offline": [off, "trackers.wandb.mode=offline"],
      "mlflow refused": of_uri("http://127.0.0.1:9"),
      "mlflow silent": [*of_uri(silent), f"trackers.mlflow.wait={WAIT}"],
    }


def seconds_of(workdir: Path, fields: list[str]) -> tuple[float, float]:
  """Run the digits; return the seconds of the clock, and of processors."""
  command = [
    *(sys.executable, "-m", "fedjax_sim", "run"),
    f"--config={CONFIG}",
    f"--workdir={workdir}",
    f"--config.server.rounds={ROUNDS.value}",
    "--config.runtime.lanes=1",
    "--config.model.hidden_sizes=(1024, 1024)",
    *(f"--config.{field}" for field in fields),
  ]
  before = os.times()
  subprocess.run(command, capture_output=True, check=True)
  after = os.times()
  used = sum(after[2:4]) - sum(before[2:4])  # of children
  return after.elapsed - before.elapsed, used


def main(_: list[str]) -> None:
  """Print the seconds of each kind of run, and ratios over the turns."""
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    with kinds(folder) as fields:
      wanted = ["none", *(ONLY.value or list(fields)[1:])]
      seconds: dict[str, list[tuple[float, float]]] = {k: [] for k in wanted}
      seconds_of(folder / "first", fields["none"])  # it compiles
      for turn in range(TURNS.value):
        for kind in rotated(wanted, turn):
          workdir = folder / f"{kind}-{turn}"
          seconds[kind].append(seconds_of(workdir, fields[kind]))
          clock, used = seconds[kind][-1]
          print(f"turn {turn}, {kind}: {clock:.1f} s, {used:.1f} s", flush=True)
  print("\n| trackers | clock | ratio | processors | ratio |")
  print("| --- | --- | --- | --- | --- |")
  for kind, values in seconds.items():
    cells = [kind]
    for which in (0, 1):
      taken = np.array([value[which] for value in values])
      base = np.array([value[which] for value in seconds["none"]])
      low, middle, high = np.percentile(taken / base, [25, 50, 75])
      cells += [
        f"{np.median(taken):.1f} s",
        f"{middle:.3f} ({low:.3f} to {high:.3f})",
      ]
    print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
  app.run(main)
