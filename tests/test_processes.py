"""Several processes as one run, on gloo: equal results, losses, restarts."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from fedjax_sim.config import build, flags
from fedjax_sim.distributed import processes
from fedjax_sim.run import experiment
from fedjax_sim.run.checkpoint import Checkpoints
from fedjax_sim.run.checkpoint_files import rounds_in
from workdirs import first_rounds, skip_pictures

pytestmark = pytest.mark.integration

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
ALLOWANCE = 5  # seconds, for a busy machine


def command(folder, **changes):
  fields = {**FIELDS, **changes}
  given = [f"--config.{name}={value}" for name, value in fields.items()]
  return ["run", f"--config={CONFIG}", f"--workdir={folder}", *given]


def environment(**variables):
  ours = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
  return {**os.environ, **ours, **variables}


def begin(arguments, **variables):
  return subprocess.Popen(
    [*PROGRAM, *arguments],
    cwd=ROOT,
    env=environment(**variables),
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
    restored = saved.restore(simulator.states.host_shapes, pytest.fail)
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
  fields = {**FIELDS, "runtime.devices": "1"}
  if jax.default_backend() != "cpu":  # on which the others train
    assert finish(begin(command(folder, **fields)))[0] == 0
    return params(folder)
  with pytest.MonkeyPatch.context() as patch:
    skip_pictures(patch)
    experiment.run(flags.load(str(ROOT / CONFIG), fields), folder)
  return params(folder)


@pytest.mark.slow  # the next one does so twice, with a stop in between
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
  wait_for_rounds(tmp_path, 1)  # 30 are soon over
  worker = worker_of(1, 2, running.pid)
  for _ in range(2):  # as from a batch system and from its parent
    os.kill(worker, signal.SIGTERM)
  code, told = finish(running)
  assert code == 128 + signal.SIGTERM, told
  assert "SIGTERM: stopped after round" in told
  newest = rounds_in(tmp_path / "checkpoints")[-1]
  assert rounds_of(tmp_path) == list(range(1, newest + 1))

  assert newest
  assert finish(launch(2, tmp_path))[0] == 0
  assert first_rounds(tmp_path) == [1, newest + 1]
  assert rounds_of(tmp_path) == list(range(1, 31))
  np.testing.assert_allclose(params(tmp_path), undisturbed, atol=1e-6)
  summary = json.loads((tmp_path / "summary.json").read_bytes())
  assert summary["processes"] == 2


def lose(rank, number, folder, undisturbed, rounds=6, moment=0.0):
  """Loses one of 3 processes, and goes on with 2.

  Args:
    rank: which.
    number: the signal that it gets.
    folder: the workdir.
    undisturbed: the parameters that are right.
    rounds: how many are done before.
    moment: seconds after the last of them.

  Returns:
    Seconds until the last process has ended.
  """
  running = launch(3, folder)
  wait_for_rounds(folder, rounds)
  worker = worker_of(rank, 3, running.pid)
  time.sleep(moment)
  os.kill(worker, number)
  began = time.monotonic()
  code, told = finish(running)
  seconds = time.monotonic() - began
  assert code == 75, told
  for i in range(3):
    assert told.count(f"fedjax-sim: rank {i} stopped after round") == 1, told
  assert len(rounds_of(folder)) < 30

  newest = rounds_in(folder / "checkpoints")[-1]
  code, told = finish(launch(2, folder))
  assert code == 0, told
  assert first_rounds(folder) == [1, newest + 1]
  assert rounds_of(folder) == list(range(1, 31))
  np.testing.assert_allclose(params(folder), undisturbed, atol=1e-6)
  return seconds


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
  ("rank", "number"),
  [
    pytest.param(1, signal.SIGKILL, marks=pytest.mark.slow),
    (0, signal.SIGSTOP),
  ],
)
def test_a_lost_process_ends_the_run_which_goes_on_with_fewer(
  tmp_path, undisturbed, rank, number
):
  seconds = lose(rank, number, tmp_path, undisturbed)
  assert seconds < 30  # peer_timeout, and a busy machine


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("seed", range(10))
def test_a_process_may_be_lost_at_any_moment(tmp_path, undisturbed, seed):
  """Killed or frozen, each rank, in the middle of some round."""
  rank, number = seed % 3, (signal.SIGKILL, signal.SIGSTOP)[seed % 2]
  draw = random.Random(seed)
  rounds, moment = draw.randrange(2, 16), draw.uniform(0, 0.2)
  seconds = lose(rank, number, tmp_path, undisturbed, rounds, moment)
  print(
    f"rank {rank}, {number.name}, {moment:.3f} s after round {rounds}:"
    f" all ended {seconds:.1f} s later"
  )
  assert seconds < float(FIELDS["runtime.peer_timeout"]) + ALLOWANCE


def slurm(rank):
  """What `srun` tells a task of two; the job's number makes JAX's port."""
  return {
    "SLURM_JOB_ID": str(os.getpid()),
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_STEP_TASKS_PER_NODE": "2",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": str(rank),
    "SLURM_LOCALID": str(rank),
  }


def open_mpi(rank):
  """What `mpirun` of Open MPI 4 tells one of two; as with `slurm`."""
  job = 2**12 * (os.getpid() + 2**11)  # another port than slurm's
  return {
    "OMPI_MCA_orte_hnp_uri": f"{job}.0;tcp://127.0.0.1:50911",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": str(rank),
    "OMPI_COMM_WORLD_LOCAL_RANK": str(rank),
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
  }


@pytest.mark.slow
@pytest.mark.parametrize("cluster", [slurm, open_mpi])
def test_auto_meets_as_the_cluster_says(tmp_path, undisturbed, cluster):
  first, *rest = command(tmp_path, **{"runtime.peer_timeout": "60"})
  both = [
    begin(
      [first, "--distributed=auto", *rest],
      FEDJAX_SIM_CPU_DEVICES="1",
      **cluster(rank),
    )
    for rank in range(2)
  ]
  for code, told in map(finish, both):
    assert code == 0, told
  np.testing.assert_allclose(params(tmp_path), undisturbed, atol=1e-6)
  summary = json.loads((tmp_path / "summary.json").read_bytes())
  assert summary["processes"] == 2


@pytest.mark.parametrize(
  ("variables", "gpus"),
  [
    ({}, [0, 1]),
    ({"SLURM_STEP_TASKS_PER_NODE": "1"}, [0, 1]),
    ({"SLURM_STEP_TASKS_PER_NODE": "1(x4)"}, [0, 1]),
    ({"SLURM_STEP_TASKS_PER_NODE": "2(x4)"}, None),
    ({"SLURM_STEP_TASKS_PER_NODE": "1(x3),2"}, None),
    ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, [0, 1]),
    ({"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, None),
    ({"CUDA_VISIBLE_DEVICES": ""}, None),
  ],
)
def test_a_process_alone_on_its_host_takes_all_gpus(
  monkeypatch, variables, gpus
):
  for name in ("SLURM_STEP_TASKS_PER_NODE", "OMPI_COMM_WORLD_LOCAL_SIZE"):
    monkeypatch.delenv(name, raising=False)
  for name, value in ({"CUDA_VISIBLE_DEVICES": "4,6"} | variables).items():
    monkeypatch.setenv(name, value)
  assert processes._all_local_gpus() == gpus


def free_port():
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


def test_another_config_and_other_devices_and_floats_are_refused(tmp_path):
  port = free_port()
  both = []
  for rank in range(2):
    where = f"--distributed=127.0.0.1:{port},{rank},2"
    ours = {
      "FEDJAX_SIM_CPU_DEVICES": str(1 + rank),
      "JAX_ENABLE_X64": str(rank),
    }
    arguments = command(tmp_path / "run", seed=str(rank))
    both.append(begin([*arguments, where], **ours))
  for code, told in map(finish, both):
    assert code == 2
    assert "Process 1 differs from process 0: " in told
    for odd in (
      "seed: 0 -> 1",
      "devices of a process: 1 -> 2",
      "widest float: 'float32' -> 'float64'",
    ):
      assert odd in told
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_one_process_writes_the_profile(tmp_path):
  start = ["launch", "--processes=2", "--", *command(tmp_path), "--profile"]
  code, told = finish(begin(start))
  assert code == 0, told
  found = json.loads((tmp_path / "profile" / "phases.json").read_bytes())
  assert found["rounds_traced"] == 3
  assert found["rounds_measured"] == 27
  assert len(list(tmp_path.glob("profile/**/*.xplane.pb"))) == 1


@pytest.mark.slow
def test_all_processes_profile_or_none(tmp_path):
  port = free_port()
  both = []
  for rank, more in enumerate([[], ["--profile"]]):
    where = f"--distributed=127.0.0.1:{port},{rank},2"
    both.append(begin([*command(tmp_path / "run"), where, *more]))
  for code, told in map(finish, both):
    assert code == 2
    assert "differs from process 0: --profile: False -> True." in told
  assert not list(tmp_path.iterdir())


def test_a_port_in_use_is_refused(tmp_path):
  with socket.socket() as other:
    other.bind(("", 0))
    other.listen()
    port = other.getsockname()[1]
    where = f"--distributed=127.0.0.1:{port},0,2"
    code, told = finish(begin([*command(tmp_path / "run"), where]))
  assert code == 2
  assert f"port {port} of this host cannot be used" in told
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("text", "match"),
  [
    ("host", "neither 'auto', 'off' nor"),
    ("host:1,2", "neither 'auto', 'off' nor"),
    ("host:1,2,2", "process 2 of 2; give a count of 1 or more, and number"),
    ("host:0,0,1", "port 0 is out of range; give 1 to 65535"),
    ("host:65536,0,1", "port 65536 is out of range"),
  ],
)
def test_addresses_that_are_refused(text, match):
  with pytest.raises(ValueError, match=match):
    processes.parse(text)


@pytest.mark.parametrize(
  ("here", "lost_at", "expected"),
  [
    (0, None, ["leaving", "left", "word"]),
    (1, None, ["leaving", "word", "left", "word"]),
    (0, "leaving", ["leaving", "word"]),
    (1, "leaving", ["leaving", "word"]),
    (0, "left", ["leaving", "left", "word"]),
    (1, "left", ["leaving", "word", "left", "word"]),
  ],
)
def test_nobody_depends_on_process_0_after_its_last_word(
  monkeypatch, here, lost_at, expected
):
  happened = []

  class Client:
    def wait_at_barrier(self, name, milliseconds):
      assert milliseconds == 20_000
      happened.append(name.rpartition("/")[2])
      if name.endswith(f"/{lost_at}"):
        raise RuntimeError("DEADLINE_EXCEEDED")

  monkeypatch.setattr(jax, "process_count", lambda: 3)
  monkeypatch.setattr(jax, "process_index", lambda: here)
  monkeypatch.setattr(processes, "key_value_client", Client)
  processes.leave(lambda: happened.append("word"))
  assert happened == expected


def test_one_process_alone():
  assert processes.parse("auto") is None
  assert processes.parse("10.0.0.1:80,3,4") == ("10.0.0.1:80", 3, 4)
  assert processes.from_first(lambda: 3) == 3
  assert processes.greatest(1, 2) == [1, 2]
  assert processes.is_first()


SLOW = """
import sys, time
import jax
from fedjax_sim.distributed import processes

address, rank = sys.argv[1], int(sys.argv[2])
processes.join(f"{address},{rank},2", 30.0, 120.0)
processes.WAITING_SECONDS = 0.5


def ready(seconds):
  def make():
    time.sleep(seconds * rank)
    return rank, {"data": "the same"}

  return make


print(processes.check_same(ready(2.0), 60.0)[0], flush=True)
try:
  processes.check_same(ready(12.0), 1.5)
except processes.PeerError as error:
  print(error, processes.is_loss(error), flush=True)
sys.stdin.read()
"""


def test_a_slow_process_is_named_and_not_lost():
  """It is waited for as long as the setting says, and no longer."""
  address = f"127.0.0.1:{free_port()}"
  both = [
    subprocess.Popen(
      [sys.executable, "-c", SLOW, address, str(rank)],
      env=environment(),
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for rank in range(2)
  ]
  with both[0] as first, both[1] as second:
    try:
      assert first.stdout is not None
      assert first.stdout.readline() == "0\n"  # after the slow one
      refused = first.stdout.readline()
    finally:
      for process in both:
        process.kill()
    assert first.stderr is not None
    said = first.stderr.read()
    assert second.stdout is not None
    assert second.stdout.read() == "1\n"
  assert refused.startswith("Process 1 is not ready 1.5 s after this process")
  assert "raise runtime.start_timeout" in refused
  assert refused.endswith(" False\n")
  assert said.count("fedjax-sim: waiting: process 1 is not ready") == 2
