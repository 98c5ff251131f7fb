"""Whatever kills a run: gone on with, it ends bit for bit as without."""

import contextlib
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest

from workdirs import first_rounds

pytestmark = pytest.mark.integration

ROOT = pathlib.Path(__file__).parents[1]

FIELDS = {
  "model.name": "logistic_regression",
  "model.hidden_sizes": "None",
  "client.epochs": "1",
  "server.clients_per_round": "5",
  "server.optimizer": "adam",
  "server.learning_rate": "0.01",
  "transforms.clip.norm": "1.0",
  "transforms.gaussian.stddev": "0.001",
  "server.eval_every": "3",
  "runtime.checkpoint_every": "5",
  "runtime.devices": "1",
}


def command(folder, rounds, *flags, **fields):
  fields = {name.replace("__", "."): text for name, text in fields.items()}
  return [
    *(sys.executable, "-m", "fedjax_sim", "run"),
    f"--config={ROOT / 'configs' / 'digits_fedavg.py'}",
    f"--workdir={folder}",
    *flags,
    f"--config.server.rounds={rounds}",
    *(f"--config.{k}={v}" for k, v in (FIELDS | fields).items()),
  ]


@contextlib.contextmanager
def started(arguments, cwd):
  """A process of a run, which does not outlive the test."""
  paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
  process = subprocess.Popen(
    arguments,
    cwd=cwd,
    env=os.environ
    | {"PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu"},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  try:
    yield process
  finally:
    process.kill()
    process.communicate()


def finish(folder, rounds, *flags, **fields):
  """Runs to the end; its standard error."""
  arguments = command(folder, rounds, *flags, **fields)
  with started(arguments, folder.parent) as process:
    out, err = process.communicate(timeout=250)
  assert process.returncode == 0, err
  assert "test/accuracy" in out
  return err


def outcome(folder):
  """What must be bit for bit the same."""
  summary = json.loads((folder / "summary.json").read_text())
  return summary["params_digest"], (folder / "metrics.jsonl").read_bytes()


def checkpoints(folder):
  """Rounds of which there is a checkpoint, and whether one is being written."""
  names = [path.name for path in folder.glob("checkpoints/*")]
  rounds = sorted(int(name) for name in names if name.isdecimal())
  return rounds, any("unfinished" in name for name in names)


def rows(folder):
  """Whole lines of metrics.jsonl."""
  path = folder / "metrics.jsonl"
  return path.read_bytes().count(b"\n") if path.exists() else 0


def wait(process, condition, seconds=120):
  """Waits until something is so; the process must live until then."""
  end = time.monotonic() + seconds
  while not condition():
    assert process.poll() is None, process.communicate()
    assert time.monotonic() < end
    time.sleep(0.001)


def at_work(process, folder, earlier, count=1):
  """Waits until the process has written so many rows of its own.

  Args:
    process: the process.
    folder: its workdir.
    earlier: as `first_rounds` was before it began.
    count: how many rows.
  """
  wait(process, lambda: len(first_rounds(folder)) > len(earlier))
  first = first_rounds(folder)[-1]
  wait(process, lambda: rows(folder) >= first - 1 + count)


def kill_at_random(folder, rounds, numbers, rng, most, *flags, begins=0):
  """Ends the run again and again, and checks what was lost.

  Args:
    folder: the workdir.
    rounds: of the run.
    numbers: the signals, one a process.
    rng: chooses the moments: some time after 1 to `most` new rows, or while a
      checkpoint is written, or before the first row.
    most: see `rng`.
    *flags: of the command.
    begins: the round after which the run begins, where it is a branch.
  """
  for i, number in enumerate(numbers):
    kept, _ = checkpoints(folder)
    earlier = first_rounds(folder)
    arguments = command(folder, rounds, *flags)
    with started(arguments, folder.parent) as process:
      how = rng.choice(["time", "time", "time", "saving", "starting"])
      if how == "starting" and number == signal.SIGKILL:
        time.sleep(rng.uniform(0, 3))
      else:
        at_work(process, folder, earlier, rng.randint(1, most))
        time.sleep(rng.uniform(0, 0.03))
        if how == "saving":
          wait(process, lambda: checkpoints(folder)[1])
      process.send_signal(number)
      _, err = process.communicate(timeout=60)
    now, saving = checkpoints(folder)
    first = first_rounds(folder)
    print(
      f"{i}: {number.name} ({how}), exit {process.returncode}, began after"
      f" {kept[-1] if kept else None}, ended after {rows(folder)} rows,"
      f" checkpoints {now}{', one more being written' if saving else ''}"
    )
    if number == signal.SIGKILL:
      assert process.returncode == -number
      assert not err or "other settings" in err or "Branching" in err
    else:
      assert process.returncode == 128 + number
      assert err.count("\n") == 1
      assert f"after round {now[-1]}," in err
      assert now[-1] == rows(folder)
    # It went on from the newest checkpoint: only later rounds were lost.
    if len(first) > len(earlier):
      assert first[-1] == (kept[-1] if kept else begins) + 1


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
  """outcome(rounds) of a run that nothing disturbs."""
  folder = tmp_path_factory.mktemp("undisturbed")
  known = {}

  def of(rounds):
    if rounds not in known:
      assert finish(folder / str(rounds), rounds) == ""
      known[rounds] = outcome(folder / str(rounds))
    return known[rounds]

  return of


def fill_the_disk(folder, rounds):
  """Ends the run by forbidding its files to grow, which needs no root."""
  earlier = first_rounds(folder)
  with started(command(folder, rounds), folder.parent) as process:
    at_work(process, folder, earlier, count=5)  # all is compiled
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1, hard))
    _, err = process.communicate(timeout=120)
  assert process.returncode == 1
  assert err.count("\n") == 1, err
  assert "File too large" in err
  assert str(folder) in err
  kept, saving = checkpoints(folder)
  assert f"round {kept[-1]} is intact" in err
  assert not saving


@pytest.mark.slow
def test_kills_a_stop_and_a_full_disk(tmp_path, undisturbed):
  folder = tmp_path / "run"
  kill, term = signal.SIGKILL, signal.SIGTERM
  rng = random.Random(2)
  kill_at_random(folder, 100, [kill, term], rng, most=25)
  fill_the_disk(folder, 100)
  kill_at_random(folder, 100, [kill], rng, most=15)
  assert finish(folder, 100) == ""
  assert outcome(folder) == undisturbed(100)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", range(3))
def test_ten_kills_at_random_moments(tmp_path, undisturbed, seed):
  folder = tmp_path / "run"
  kills = [signal.SIGKILL] * 10
  kill_at_random(folder, 600, kills, random.Random(seed), most=55)
  assert finish(folder, 600) == ""
  assert outcome(folder) == undisturbed(600)
  print("params_digest", outcome(folder)[0])


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_twenty_kills_while_every_round_is_saved(tmp_path, undisturbed):
  """A thread always writes a checkpoint while the next round is trained."""
  folder, rng = tmp_path / "run", random.Random(0)
  fields = {"runtime__checkpoint_every": "1"}
  cut_short = 0
  for _ in range(20):
    kept, earlier = checkpoints(folder)[0], first_rounds(folder)
    with started(command(folder, 80, **fields), tmp_path) as process:
      at_work(process, folder, earlier, rng.randint(1, 2))
      time.sleep(rng.uniform(0, 0.15))
      process.kill()
      _, err = process.communicate(timeout=60)
    assert err == ""
    now, saving = checkpoints(folder)
    cut_short += saving
    assert now[-1] >= (kept[-1] if kept else 0)
    assert first_rounds(folder)[-1] == (kept[-1] if kept else 0) + 1
  print(f"{cut_short} of 20 kills came while a checkpoint was written")
  assert cut_short
  assert finish(folder, 80, **fields) == ""
  assert outcome(folder) == undisturbed(80)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", range(2))
def test_ten_kills_while_extending_and_branching(tmp_path, undisturbed, seed):
  """Five of each; the first process of all may be killed as it begins."""
  rng, kills = random.Random(seed), [signal.SIGKILL] * 5
  folder = tmp_path / "run"
  finish(folder, 99)
  kill_at_random(folder, 300, kills, rng, 35)
  finish(folder, 300)
  assert outcome(folder) == undisturbed(300)

  branch = tmp_path / "branch"
  flag = f"--branch-from={folder}:300"
  kill_at_random(branch, 600, kills, rng, 50, flag, begins=300)
  finish(branch, 600, flag)
  assert outcome(branch) == undisturbed(600)


@pytest.mark.slow
@pytest.mark.parametrize("room", [0, 20_000, 200_000, 1_500_000])
def test_a_small_disk(tmp_path, undisturbed, room):
  """A file system of 4 MB, on which something else takes the place."""
  disk = tmp_path / "disk"
  disk.mkdir()
  mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
  if subprocess.run(mount, capture_output=True, check=False).returncode:
    pytest.skip("this user may not mount a tmpfs")
  try:
    folder = disk / "run"
    with started(command(folder, 100), tmp_path) as process:
      wait(process, lambda: checkpoints(folder)[0][-1:] > [20])
      with contextlib.suppress(OSError), (disk / "other").open("wb") as file:
        size = shutil.disk_usage(disk).free - room
        file.write(bytes(max(0, size)))
      _, err = process.communicate(timeout=120)
    print(f"room {room}: exit {process.returncode}: {err}")
    assert process.returncode == (1 if room < 1_000_000 else 0)
    assert "Traceback" not in err
    if process.returncode:
      assert err.count("\n") == 1
      assert "No space left on device" in err
    (disk / "other").unlink()
    finish(folder, 100)
    assert outcome(folder) == undisturbed(100)
  finally:
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_a_second_process_and_a_second_signal(tmp_path):
  folder = tmp_path / "run"
  with started(command(folder, 100_000), tmp_path) as first:
    at_work(first, folder, [])
    with started(command(folder, 100_000), tmp_path) as second:
      _, err = second.communicate(timeout=120)
    assert second.returncode == 2
    assert "in use by another process" in err
    assert err.count("\n") == 1
    done = rows(folder)
    wait(first, lambda: rows(folder) > done)  # it notices nothing
    first.send_signal(signal.SIGINT)
    first.send_signal(signal.SIGTERM)
    _, err = first.communicate(timeout=60)
  assert first.returncode == -signal.SIGTERM
  assert err == ""
