"""Several processes as one run, on gloo: equal results, losses, restarts."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from fedjax_sim import build, flags, processes
from fedjax_sim.checkpoint import Checkpoints

ROOT = Path(__file__).parent.parent
CONFIG = "configs/digits_fedavg.py"
FIELDS = {
  "server.rounds": "30",
  "server.eval_every": "30",
  "runtime.checkpoint_every": "5",
  "runtime.rounds_per_dispatch": "1",
  "runtime.lanes": "1",
  "runtime.peer_timeout": "10",
}
PROGRAM = [sys.executable, "-m", "fedjax_sim"]


def command(folder, **changes):
  fields = {**FIELDS, **changes}
  given = [f"--config.{name}={value}" for name, value in fields.items()]
  return ["run", f"--config={CONFIG}", f"--workdir={folder}", *given]


def environment():
  return {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


def begin(arguments):
  return subprocess.Popen(
    [*PROGRAM, *arguments],
    cwd=ROOT,
    env=environment(),
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  )


def finish(process, seconds=200):
  with process:
    try:
      _, told = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
      process.terminate()
      raise
  return process.returncode, told


def launch(count, folder, **changes):
  start = ["launch", f"--processes={count}", "--", *command(folder, **changes)]
  return begin(start)


def params(folder):
  """The global model of the last checkpoint, as one vector."""
  simulator = build.build(flags.load(str(ROOT / CONFIG), FIELDS)).simulator
  with contextlib.closing(Checkpoints(folder / "checkpoints", keep=3)) as saved:
    restored = saved.restore(simulator.fetched_shapes, pytest.fail)
  assert restored is not None
  assert restored.round == 30
  variables = simulator.algorithm.variables(restored.state.server)
  return np.concatenate([np.ravel(x) for x in jax.tree.leaves(variables)])


def rounds_of(folder):
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line)["round"] for line in lines]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
  """One process, one device: its parameters."""
  folder = tmp_path_factory.mktemp("one")
  alone = begin(command(folder, **{"runtime.devices": "1"}))
  assert finish(alone)[0] == 0
  return params(folder)


@pytest.mark.parametrize("count", [2, 4])
def test_processes_train_the_same(tmp_path, undisturbed, count):
  # None is to be lost here, however busy the machine is.
  code, told = finish(launch(count, tmp_path, **{"runtime.peer_timeout": "60"}))
  assert code == 0, told
  np.testing.assert_allclose(params(tmp_path), undisturbed, atol=1e-6)
  assert rounds_of(tmp_path) == list(range(1, 31))
  summary = json.loads((tmp_path / "summary.json").read_bytes())
  assert summary["processes"] == count


def worker_of(rank, count, parent):
  """The process that trains as this rank, not the one that watches it."""
  for path in Path("/proc").glob("[0-9]*"):
    with contextlib.suppress(OSError):
      words = (path / "cmdline").read_bytes().decode().split("\0")
      stat = (path / "stat").read_text().rpartition(")")[2].split()
      if any(
        w.startswith("--distributed=127.") and w.endswith(f",{rank},{count}")
        for w in words
      ) and int(stat[1]) not in (parent, 1):
        return int(path.name)
  raise AssertionError("no such process")


def wait_for_rounds(folder, count=6):
  deadline = time.monotonic() + 120
  while time.monotonic() < deadline:
    with contextlib.suppress(OSError):
      if len(rounds_of(folder)) >= count:
        return
    time.sleep(0.05)
  raise AssertionError("it does not train")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_signal_to_one_process_makes_all_save_and_stop(tmp_path, undisturbed):
  running = launch(2, tmp_path)
  wait_for_rounds(tmp_path)
  worker = worker_of(1, 2, running.pid)
  for _ in range(2):  # as from a batch system and from its parent
    os.kill(worker, signal.SIGTERM)
  code, told = finish(running)
  assert code == 128 + signal.SIGTERM, told
  assert "SIGTERM: stopped after round" in told
  newest = max(int(p.name) for p in (tmp_path / "checkpoints").glob("[0-9]*"))
  assert rounds_of(tmp_path) == list(range(1, newest + 1))

  assert finish(launch(2, tmp_path))[0] == 0
  assert rounds_of(tmp_path) == list(range(1, 31))
  np.testing.assert_allclose(params(tmp_path), undisturbed, atol=1e-6)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
  ("rank", "number"), [(1, signal.SIGKILL), (0, signal.SIGSTOP)]
)
def test_a_lost_process_ends_the_run_which_goes_on_with_fewer(
  tmp_path, undisturbed, rank, number
):
  running = launch(3, tmp_path)
  wait_for_rounds(tmp_path)
  os.kill(worker_of(rank, 3, running.pid), number)
  began = time.monotonic()
  code, told = finish(running)
  assert code == 75, told
  assert time.monotonic() - began < 30  # peer_timeout, and a busy machine
  for i in range(3):
    assert f"fedjax-sim: rank {i} stopped after round" in told

  code, told = finish(launch(2, tmp_path))
  assert code == 0, told
  assert rounds_of(tmp_path) == list(range(1, 31))
  np.testing.assert_allclose(params(tmp_path), undisturbed, atol=1e-6)


def test_another_config_is_refused(tmp_path):
  port = 20000 + os.getpid() % 20000
  both = []
  for i, seed in enumerate(["0", "1"]):
    where = f"--distributed=127.0.0.1:{port},{i},2"
    first, *rest = command(tmp_path, seed=seed)
    both.append(begin([first, where, *rest]))
  for code, told in map(finish, both):
    assert code == 2
    assert "Process 1 differs from process 0: seed: 0 -> 1." in told
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("text", "match"),
  [
    ("host", "neither 'auto', 'off' nor"),
    ("host:1,2", "neither 'auto', 'off' nor"),
    ("host:1,2,2", "process 2 of 2; processes are numbered from 0 to 1"),
  ],
)
def test_addresses_that_are_refused(text, match):
  with pytest.raises(ValueError, match=match):
    processes.parse(text)


def test_one_process_alone():
  assert processes.parse("auto") is None
  assert processes.parse("10.0.0.1:80,3,4") == ("10.0.0.1:80", 3, 4)
  assert processes.from_first(lambda: 3) == 3
  assert processes.greatest(1, 2) == [1, 2]
  assert processes.is_first()
