"""Workdirs in buckets: copied, locked, fetched, and whole after any kill."""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import time

import fsspec
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim import config as configs
from fedjax_sim.cli.main import main
from fedjax_sim.config import flags
from fedjax_sim.config.completion import complete
from fedjax_sim.core.files import write_json
from fedjax_sim.reporting import MetricsFile
from fedjax_sim.run import changes, checkpoint, experiment
from fedjax_sim.run.bucket import lock, mirror, snapshot, staging
from fedjax_sim.run.bucket.folder import Bucket
from fedjax_sim.run.bucket.lock import Lock
from fedjax_sim.run.bucket.sender import Sender
from fedjax_sim.run.checkpoint import Checkpoints
from fedjax_sim.run.loop import Loop
from fedjax_sim.run.workdir import WorkdirError, finished_summary, locked
from workdirs import skip_pictures

pytestmark = pytest.mark.usefixtures("same_programs")

DIGITS = pathlib.Path(__file__).parents[1] / "configs" / "digits_fedavg.py"

QUICK = {
  "model.name": "logistic_regression",
  "model.hidden_sizes": "None",
  "data.num_clients": "20",
  "data.unseen_clients": "2",
  "server.clients_per_round": "6",
  "server.rounds": "8",
  "server.eval_every": "4",
  "client.epochs": "1",
  "runtime.checkpoint_every": "2",
  "runtime.devices": "1",
  "runtime.lanes": "1",
  "runtime.keep_checkpoints": "2",
  "runtime.rounds_per_dispatch": "2",
}


def quick(rounds=8):
  return flags.load(str(DIGITS), QUICK | {"server.rounds": str(rounds)})


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  """The user's cache is a folder of this test."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  monkeypatch.setattr(experiment, "print_summary", lambda *_: None)
  skip_pictures(monkeypatch)
  return tmp_path / "cache"


@pytest.fixture
def url(tmp_path):
  """A folder in a bucket, of this test alone."""
  memory = fsspec.filesystem("memory")
  yield f"memory://{tmp_path.name}/deep/run"
  memory.store.clear()


def state_of(round_):
  return {"round": jnp.int32(round_), "x": jnp.arange(5.0) * round_}


CONFIG = {
  "server": {"rounds": 9},
  "runtime": {"deterministic_reduction": None},
}


class Work:
  """A workdir to which rounds can be added; no training."""

  def __init__(self, folder):
    self.folder = folder
    folder.mkdir()
    write_json(folder / "config.json", CONFIG)
    write_json(folder / staging.IDENTITY, {"run": folder.name})

  def save(self, round_):
    with (
      MetricsFile(
        self.folder / "metrics.jsonl", keep_through=round_ - 1
      ) as metrics,
      contextlib.closing(
        Checkpoints(self.folder / "checkpoints", keep=2)
      ) as checkpoints,
    ):
      metrics.append([{"round": round_, "loss": 1 / round_}])
      metrics.sync()
      parts = self.folder / "client_rounds"
      parts.mkdir(exist_ok=True)
      (parts / f"{round_}.parquet").write_text(str(round_))
      checkpoints.save(round_, state_of(round_), {})

  def finish(self, rounds=3):
    write_json(self.folder / "summary.json", {"lanes": 1, "rounds": rounds})
    shutil.rmtree(self.folder / "client_rounds")


def files_of(folder):
  return {
    path.relative_to(folder).as_posix(): path.read_bytes()
    for path in folder.rglob("*")
    if path.is_file()
    and not any(n.startswith(".") for n in path.relative_to(folder).parts)
  }


def copy_of(url):
  bucket = Bucket(url)
  return {name: bucket.read(name) for name in bucket.sizes()}


def restored(folder):
  """The newest checkpoint of a fetched folder, whose rows are there, too."""
  with contextlib.closing(
    Checkpoints(folder / "checkpoints", keep=2)
  ) as checkpoints:
    found = checkpoints.restore(state_of(0), pytest.fail)
  if found is None:
    return 0
  np.testing.assert_array_equal(found.state["x"], state_of(found.round)["x"])
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  rounds = [json.loads(line)["round"] for line in lines]
  assert rounds[: found.round] == list(range(1, found.round + 1))
  return found.round


# --- snapshots and their copies -----------------------------------------------


def test_a_copy_is_what_the_workdir_was(tmp_path, url):
  work = Work(tmp_path / "run")
  (work.folder / ".lock").touch()
  sender, bucket = Sender(Bucket(url)), Bucket(url)
  for round_ in (1, 2, 3):
    work.save(round_)
    taken = snapshot.take(work.folder, round_)
    before = files_of(work.folder)
    # What comes later is not part of it, whatever becomes of the files.
    with (work.folder / "metrics.jsonl").open("a") as file:
      file.write('{"round": 9')
    checkpoint = work.folder / "checkpoints" / str(round_)
    checkpoint.rename(tmp_path / "gone")
    sender.send(taken, lambda: None)
    assert copy_of(url) == before
    (tmp_path / "gone").rename(checkpoint)
    (work.folder / "metrics.jsonl").write_bytes(before["metrics.jsonl"])
  assert staging.complete_rounds(bucket.sizes()) == [2, 3]
  snapshot.forget(taken)
  assert not list((work.folder / snapshot.FOLDER).iterdir())


def test_only_what_is_new_is_sent(tmp_path, url, monkeypatch):
  sent = []
  send = Bucket.send

  def noted(self, path, name, size):
    sent.append(name)
    send(self, path, name, size)

  monkeypatch.setattr(Bucket, "send", noted)
  work = Work(tmp_path / "run")
  sender = Sender(Bucket(url))
  for round_ in (1, 2):
    work.save(round_)
    sent.clear()
    sender.send(snapshot.take(work.folder, round_), lambda: None)
  prefixes = {"/".join(name.split("/")[:2]) for name in sent}
  assert prefixes == {
    "metrics.jsonl",
    "client_rounds/2.parquet",
    "checkpoints/2",
  }
  assert sent[-1] == "checkpoints/2/sha256.json"
  sent.clear()  # another process looks what is there
  Sender(Bucket(url)).send(snapshot.take(work.folder, 3), lambda: None)
  assert sorted(sent) == ["bucket.json", "config.json", "metrics.jsonl"]


def test_without_hard_links_a_snapshot_copies(tmp_path, monkeypatch):
  def refuses(*_):
    raise OSError(errno.EPERM, "no links")

  work = Work(tmp_path / "run")
  work.save(1)
  monkeypatch.setattr(os, "link", refuses)
  taken = snapshot.take(work.folder, 1)
  assert files_of(taken.folder) == files_of(work.folder)


def test_a_file_too_large_for_one_piece(tmp_path, url, monkeypatch):
  monkeypatch.setattr("fedjax_sim.run.bucket.folder._WHOLE", 10)
  (tmp_path / "file").write_bytes(bytes(range(100)))
  Bucket(url).send(tmp_path / "file", "file", 35)
  assert Bucket(url).read("file") == bytes(range(35))


class KilledError(BaseException):
  pass


class Killer:
  """Kills whoever changes the bucket, before a change to come."""

  def __init__(self, monkeypatch):
    self.left = 10**6  # changes that are let through
    memory = type(fsspec.filesystem("memory"))
    for name in ("pipe_file", "mv", "rm_file"):
      monkeypatch.setattr(memory, name, self._counted(getattr(memory, name)))

  def _counted(self, method):
    def called(files, *args, **kwargs):
      self.left -= 1
      if self.left < 0:
        raise KilledError
      return method(files, *args, **kwargs)

    return called


@pytest.mark.parametrize("step", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_any_kill_leaves_a_run_in_the_bucket(tmp_path, monkeypatch, step):
  """Stops before every change of the bucket, or every ninth, in five copies."""
  work = Work(tmp_path / "run")
  taken = []
  for round_ in (1, 2, 3, 4):
    work.save(round_)
    taken.append(snapshot.take(work.folder, round_))
  work.finish()
  taken.append(snapshot.take(work.folder, 5))
  last = files_of(work.folder)
  memory, killer = fsspec.filesystem("memory"), Killer(monkeypatch)
  seen, sending = set(), 0
  for moment in range(0, 1000, step):
    url = f"memory://kill{moment}"
    killer.left, sending = moment, 0
    sender = Sender(Bucket(url))
    try:
      for sending, one in enumerate(taken):  # noqa: B007 - read below
        sender.send(one, lambda: None)
      break
    except KilledError:
      pass
    killer.left = 10**6
    folder = tmp_path / f"fetched{moment}"
    staging.fill(folder, Bucket(url), lambda *_: None)
    changes.changes_since(folder, CONFIG)  # it goes on, or begins anew
    round_ = restored(folder) if folder.exists() else 0
    seen.add(round_)
    # The checkpoint of the copy before is there, or the new one.
    assert min(sending, 4) <= round_ <= min(sending + 1, 4)
    finished = (folder / "summary.json").exists()
    assert not finished or sending == 4
    # Another process goes on with what is there.
    Sender(Bucket(url)).send(taken[-1], lambda: None)
    assert copy_of(url) == last
    shutil.rmtree(folder, ignore_errors=True)
    memory.store.clear()
  else:
    pytest.fail("it never ends")
  assert seen == {0, 1, 2, 3, 4}
  memory.store.clear()


def test_a_kill_leaves_no_summary_of_fewer_rounds(tmp_path, url, monkeypatch):
  """Of a finished run with more rounds, only the last state is sent."""
  killer = Killer(monkeypatch)
  work = Work(tmp_path / "run")
  work.save(1)
  work.finish(1)
  finished = snapshot.take(work.folder, 1)
  write_json(work.folder / "config.json", {"server": {"rounds": 2}})
  work.save(2)
  work.finish(2)
  taken, last = snapshot.take(work.folder, 2), files_of(work.folder)
  for moment in range(1000):
    killer.left = 10**6
    Sender(Bucket(url)).send(finished, lambda: None)
    assert json.loads(copy_of(url)["summary.json"])["rounds"] == 1
    killer.left = moment
    with contextlib.suppress(KilledError):
      Sender(Bucket(url)).send(taken, lambda: None)
    there = copy_of(url)
    if killer.left >= 0:
      break
    if there["config.json"] == last["config.json"] and "summary.json" in there:
      assert there["summary.json"] == last["summary.json"]
    fsspec.filesystem("memory").store.clear()
  assert moment > 5
  assert there == last


# --- the lock -----------------------------------------------------------------


def lock_of(url, say=pytest.fail):
  return Lock(Bucket(url), say)


def test_the_lock_keeps_others_out(url):
  first, second = lock_of(url), lock_of(url)
  first.take()
  first.take()
  with pytest.raises(
    WorkdirError, match=rf"{url} is in use .*process {os.getpid()} .*remove"
  ):
    second.take()
  first.release()
  second.take()
  second.check()
  second.release()
  assert Bucket(url).sizes() == {}


def held(url, **changes):
  """Somebody else's lock."""
  says = {"token": "other", "host": "far", "process": 7, "time": time.time()}
  Bucket(url).write(lock.LOCK, json.dumps(says | changes).encode())


def test_whose_lock_is_nobodys(url):
  held(url)
  with pytest.raises(WorkdirError, match="process 7 on far"):
    lock_of(url).take()
  with subprocess.Popen(["true"]) as gone:
    pass
  held(url, process=gone.pid, machine=lock._machine())
  with contextlib.closing(_Taken(url)):
    pass
  held(url, process=os.getpid(), machine=lock._machine())
  with pytest.raises(WorkdirError, match="in use"):
    lock_of(url).take()
  Bucket(url).write(lock.LOCK, b"{torn")
  with contextlib.closing(_Taken(url)):
    pass


SKEWED = (-3600, lock.STALE_SECONDS + 1, 3600)  # seconds that clocks differ


@pytest.fixture
def watched(monkeypatch):
  """An old lock is watched for a short while; yields what is said of it."""
  monkeypatch.setattr(lock, "WATCH_SECONDS", 0.5)
  monkeypatch.setattr(lock, "_LOOK_SECONDS", 0.01)
  return []


@pytest.mark.parametrize("age", SKEWED)
def test_a_lock_that_looks_old_is_nobodys_if_it_stays(url, watched, age):
  held(url, time=time.time() - age)
  with contextlib.closing(_Taken(url, watched.append)):
    assert json.loads(Bucket(url).read(lock.LOCK) or b"")["token"] != "other"
  (said,) = watched
  assert said.startswith(f"{url} may be in use by another run (process 7 on")


@pytest.mark.parametrize("age", SKEWED)
def test_a_living_lock_of_another_clock(url, watched, age, monkeypatch):
  """It is renewed while it is watched, by a host whose clock is wrong."""
  monkeypatch.setattr(lock, "WATCH_SECONDS", 20.0)
  held(url, time=time.time() - age)

  def renewed(text):
    watched.append(text)
    later = threading.Timer(0.1, held, [url], {"time": time.time() - age + 0.1})
    later.start()

  taken = lock_of(url, renewed)
  with pytest.raises(WorkdirError, match="in use by another run .*process 7"):
    taken.take()
  assert json.loads(Bucket(url).read(lock.LOCK) or b"")["token"] == "other"
  held(url, time=time.time() - age)
  with pytest.raises(WorkdirError, match="in use by another run .*process 7"):
    taken.check()
  assert len(watched) == 2


def test_a_lock_that_was_lost_to_a_killed_run_is_taken_back(url, watched):
  mine = lock_of(url, watched.append)
  mine.take()
  held(url, time=0)
  mine.check()
  mine.check()
  assert len(watched) == 1
  mine.release()
  assert Bucket(url).sizes() == {}


def test_no_heartbeat_outlives_the_lock(url, monkeypatch):
  """The lock is given back while a heartbeat is on its way."""
  monkeypatch.setattr(lock, "BEAT_SECONDS", 0.01)
  mine = lock_of(url)
  mine.take()
  write, begun = Bucket.write, threading.Event()

  def slow(self, name, content):
    begun.set()
    time.sleep(0.3)
    write(self, name, content)

  monkeypatch.setattr(Bucket, "write", slow)
  assert begun.wait(20)
  mine.release()
  time.sleep(0.5)
  assert Bucket(url).sizes() == {}


def test_a_lock_that_is_taken_after_all_is_over(url):
  """As when the bucket answers too late."""
  mine = lock_of(url)
  mine.release()
  mine.take()
  mine.release()
  assert Bucket(url).sizes() == {}


class _Taken:
  def __init__(self, url, say=pytest.fail):
    self._lock = lock_of(url, say)
    self._lock.take()

  def close(self):
    self._lock.release()


def test_the_heart_beats_and_a_lock_can_be_lost(url, monkeypatch):
  monkeypatch.setattr(lock, "BEAT_SECONDS", 0.01)
  mine = lock_of(url)
  mine.take()
  said = lambda: json.loads(Bucket(url).read(lock.LOCK) or b"")
  first, end = said()["time"], time.monotonic() + 20
  while said()["time"] == first:
    assert time.monotonic() < end
  held(url)
  with pytest.raises(WorkdirError, match="process 7 on far"):
    mine.check()
  time.sleep(0.05)
  assert said()["token"] == "other"  # and no heartbeat takes it back
  mine.release()
  assert said()["token"] == "other"


# --- staging ------------------------------------------------------------------


@pytest.fixture
def sent(tmp_path, url):
  """A workdir of two rounds, and its copy."""
  work = Work(tmp_path / "run")
  for round_ in (1, 2):
    work.save(round_)
  Sender(Bucket(url)).send(snapshot.take(work.folder, 1), lambda: None)
  snapshot.forget_all(work.folder)
  return work


def fill(folder, url):
  says = []
  staging.fill(folder, Bucket(url), lambda text, level: says.append(text))
  return says


def test_an_empty_folder_is_filled(sent, url, tmp_path):
  (said,) = fill(tmp_path / "new", url)
  assert "fetched the run, with its checkpoint of round 2" in said
  assert files_of(tmp_path / "new") == files_of(sent.folder)
  assert fill(tmp_path / "new", url) == []


def test_a_folder_that_is_ahead_stays(sent, url, tmp_path):
  fill(tmp_path / "new", url)
  sent.save(3)
  before = files_of(sent.folder)
  assert fill(sent.folder, url) == []
  assert files_of(sent.folder) == before
  sender = Sender(Bucket(url))
  sender.send(snapshot.take(sent.folder, 1), lambda: None)
  (said,) = fill(tmp_path / "new", url)  # now it is behind
  assert "round 3" in said
  assert files_of(tmp_path / "new") == before
  assert not (tmp_path / "new.before-1").exists()


def test_another_run_is_set_aside(sent, url, tmp_path):
  other = Work(tmp_path / "other")
  other.save(1)
  before = files_of(other.folder)
  said = fill(other.folder, url)
  assert "is now in" in said[-1]
  assert files_of(tmp_path / "other.before-1") == before
  assert files_of(other.folder) == files_of(sent.folder)


def test_what_was_set_aside_stays(sent, url, tmp_path, monkeypatch):
  """However often, and if whoever does so is killed before it says so."""
  folder = tmp_path / "other"
  rename = pathlib.Path.rename

  def killed(path, to):
    if path.name.endswith(".fetched"):
      raise KilledError
    return rename(path, to)

  kept = {}
  for number in (1, 2):
    Work(folder).save(1)
    write_json(folder / staging.IDENTITY, {"run": f"mine {number}"})
    kept[number] = files_of(folder)
    with monkeypatch.context() as patch:
      patch.setattr(pathlib.Path, "rename", killed)
      with pytest.raises(KilledError):
        fill(folder, url)
    assert not folder.exists()
    said = fill(folder, url)
    assert f"earlier is in {folder}.before-1" in said[0]
    assert f"{folder}.before-{number}." in said[0]
    assert files_of(folder) == files_of(sent.folder)
    shutil.rmtree(folder)
  for number, before in kept.items():
    assert files_of(tmp_path / f"other.before-{number}") == before


def test_a_bucket_that_somebody_emptied(sent, url, tmp_path):
  fill(tmp_path / "new", url)
  fsspec.filesystem("memory").store.clear()
  (said,) = fill(tmp_path / "new", url)
  assert "holds no run any more" in said
  assert not (tmp_path / "new").exists()
  assert files_of(tmp_path / "new.before-1") == files_of(sent.folder)
  assert fill(sent.folder, url) == []  # nothing of it was ever sent
  assert sent.folder.exists()


def test_a_damaged_checkpoint_is_not_fetched(sent, url, tmp_path):
  bucket = Bucket(url)
  name = "checkpoints/2/record/metadata"
  bucket.write(name, (bucket.read(name) or b"").replace(b"2", b"3", 1))
  damage, fetched = fill(tmp_path / "new", url)
  assert "the checkpoint of round 2 is damaged: the SHA-256 of" in damage
  assert "round 1" in fetched
  assert restored(tmp_path / "new") == 1
  assert fill(sent.folder, url) == []  # what is whole here is better
  assert restored(sent.folder) == 2


def test_without_a_whole_checkpoint_nothing_begins_anew(sent, url, tmp_path):
  bucket = Bucket(url)
  for round_ in (1, 2):
    bucket.write(f"checkpoints/{round_}/record/metadata", b"{}")
  for _ in range(2):
    with pytest.raises(WorkdirError, match="none of its checkpoints is whole"):
      fill(tmp_path / "new", url)
    assert list(tmp_path.glob("new*")) == []
  assert fill(sent.folder, url) == []  # what is whole here is better
  assert restored(sent.folder) == 2


@pytest.mark.parametrize(
  "name",
  [
    "../evil",
    "a/../../evil",
    "{tmp_path}/evil",
    "a//evil",
    "./evil",
    "a/./evil",
    "..\\evil",
    "C:/evil",
    "C:evil",
    "evil\0",
    "evil/",
  ],
)
def test_an_object_outside_of_the_folder_is_not_fetched(
  sent, url, tmp_path, name
):
  store = fsspec.filesystem("memory").store
  path = next(key for key in store if key.endswith("/config.json"))
  evil = name.format(tmp_path=tmp_path)
  store[path.replace("config.json", evil)] = store[path]
  before = files_of(sent.folder)
  fill(tmp_path / "new", url)
  assert files_of(tmp_path / "new") == before
  assert not list(tmp_path.rglob("*evil*"))


def test_a_listing_that_leaves_the_folder(sent, url, tmp_path, monkeypatch):
  sizes = Bucket.sizes
  evil = str(tmp_path / "evil")
  monkeypatch.setattr(Bucket, "sizes", lambda self: sizes(self) | {evil: 1})
  with pytest.raises(WorkdirError, match="evil', which is outside .*; remove"):
    fill(tmp_path / "new", url)
  assert not (tmp_path / "evil").exists()
  assert not (tmp_path / "new").exists()


def test_checkpoints_that_a_bucket_has_lost(sent, url, tmp_path):
  """The run does not begin anew."""
  bucket = Bucket(url)
  for name in bucket.sizes():
    if name.startswith("checkpoints/"):
      bucket.remove(name)
  fill(tmp_path / "new", url)
  with pytest.raises(WorkdirError, match="without its checkpoints"):
    changes.changes_since(tmp_path / "new", CONFIG)


def test_every_url_has_its_folder(cache):
  folders = {
    staging.folder_of(u)
    for u in ("s3://a/b", "s3://a-b", "s3://a/b/c", "gs://a/b", "s3://../..")
  }
  assert len(folders) == 5
  assert staging.folder_of("s3://a/b/") == staging.folder_of("s3://a/b")
  assert {f.parent for f in folders} == {cache / "fedjax_sim" / "workdirs"}


@pytest.mark.parametrize(
  ("rounds", "wanted", "more", "finished"),
  [
    (2, 2, {}, True),
    (2, 3, {}, False),  # an older summary beside a newer config
    (1, 1, {}, False),  # and beside a newer checkpoint
    (2, 3, {"privacy_budget": "ends"}, True),
    (1, 3, {"privacy_budget": "ends"}, False),
  ],
)
def test_an_older_summary(tmp_path, rounds, wanted, more, finished):
  work = Work(tmp_path / "run")
  for round_ in (1, 2):
    work.save(round_)
  summary = {"lanes": 1, "rounds": rounds} | more
  write_json(work.folder / "summary.json", summary)
  found = finished_summary(work.folder, wanted)
  assert found == (summary if finished else None)


# --- runs ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
  """A run without any bucket: its digest and metrics."""
  folder = tmp_path_factory.mktemp("undisturbed") / "run"
  digest = experiment.run(quick(), folder)["params_digest"]
  return digest, (folder / "metrics.jsonl").read_bytes()


def killed_after(rounds, url, monkeypatch):
  """Lets a run end there as if it were killed, when that much was sent."""
  count_rounds = Loop._count_rounds

  def counted(self, out):
    if self.done == rounds:
      end = time.monotonic() + 20
      while rounds not in staging.complete_rounds(Bucket(url).sizes()):
        assert time.monotonic() < end
      raise KilledError
    count_rounds(self, out)

  monkeypatch.setattr(Loop, "_count_rounds", counted)


def test_a_run_goes_on_on_another_host(url, cache, undisturbed, monkeypatch):
  for rounds in (2, 6):
    with monkeypatch.context() as patch:
      killed_after(rounds, url, patch)
      with pytest.raises(KilledError):
        experiment.run(quick(), url)
    shutil.rmtree(cache)  # another host has another one
  assert experiment.run(quick(), url)["params_digest"] == undisturbed[0]
  there = copy_of(url)
  assert there["metrics.jsonl"] == undisturbed[1]
  assert json.loads(there["summary.json"])["rounds"] == 8
  assert staging.complete_rounds(there) == [6, 8]
  assert lock.LOCK not in there
  folder = staging.folder_of(url)
  assert files_of(folder) == there
  shutil.rmtree(cache)
  assert experiment.run(quick(), url)["rounds"] == 8  # it is finished


def test_a_copy_of_a_folder(tmp_path, url, undisturbed, capfd):
  folder = tmp_path / "run"
  for _ in range(2):  # the second one finds it finished
    summary = experiment.run(quick(), folder, sync_to=url)
    assert summary["params_digest"] == undisturbed[0]
    assert copy_of(url) == files_of(folder)
  assert capfd.readouterr().err == ""
  assert not (folder / snapshot.FOLDER).exists()
  with pytest.raises(WorkdirError, match=rf"{url} holds another run .*give an"):
    experiment.run(quick(), tmp_path / "other", sync_to=url)
  assert not (tmp_path / "other").exists()
  assert copy_of(url) == files_of(folder)
  # Who fetches it goes on with the same copy.
  shutil.copytree(folder, tmp_path / "copied")
  experiment.run(quick(10), tmp_path / "copied", sync_to=url)
  assert json.loads(copy_of(url)["summary.json"])["rounds"] == 10


@pytest.mark.parametrize("finished", [True, False])
def test_a_workdir_in_use_is_not_copied(tmp_path, url, capfd, finished):
  work = Work(tmp_path / "run")
  (work.folder / staging.IDENTITY).unlink()
  write_json(work.folder / "config.json", configs.resolved(complete(quick())))
  if finished:
    summary = {"lanes": 1, "rounds": 8}
    write_json(work.folder / "summary.json", summary)
  (work.folder / snapshot.FOLDER / "1").mkdir(parents=True)
  with locked(work.folder):
    before = {path.name for path in work.folder.iterdir()}
    with pytest.raises(WorkdirError, match="in use by another process"):
      experiment.run(quick(), work.folder, sync_to=url)
    assert {path.name for path in work.folder.iterdir()} == before
    assert (work.folder / snapshot.FOLDER / "1").exists()
  assert capfd.readouterr().err == ""
  assert Bucket(url).sizes() == {}


def test_a_staging_folder_in_use_is_not_filled(sent, url):
  folder = staging.folder_of(url)
  folder.parent.mkdir(parents=True)
  Work(folder)
  with locked(folder):
    before = files_of(folder)
    with pytest.raises(WorkdirError, match="in use by another process"):
      experiment.run(quick(), url)
    assert files_of(folder) == before
  assert lock.LOCK not in Bucket(url).sizes()


def test_a_bucket_in_use(tmp_path, url):
  held(url)
  for workdir, sync_to in ((tmp_path / "run", url), (url, None)):
    with pytest.raises(WorkdirError, match=f"{url} is in use by another run"):
      experiment.run(quick(), workdir, sync_to=sync_to)
  assert not (tmp_path / "run").exists()
  assert set(Bucket(url).sizes()) == {lock.LOCK}


@contextlib.contextmanager
def broken(*names):
  """The bucket refuses some operations."""
  memory = fsspec.filesystem("memory")
  with pytest.MonkeyPatch.context() as patch:

    def refuses(*_, **__):
      raise PermissionError("no\nrights")

    for name in names:
      patch.setattr(type(memory), name, refuses)
    yield


def test_a_copy_that_fails_never_stops_a_run(tmp_path, url, undisturbed, capfd):
  folder = tmp_path / "run"
  lacks = (
    rf"{folder} is finished, but .*: {url} lacks bucket.json, checkp.*/6, "
  )
  for _ in range(2):  # the second one finds it finished
    with broken("pipe_file"), pytest.raises(mirror.CopyError, match=lacks):
      experiment.run(quick(), folder, sync_to=url)
    (line,) = capfd.readouterr().err.splitlines()
    assert "not up to date" in line
    assert "no rights. The run goes on" in line
  summary = experiment.run(quick(), folder, sync_to=url)
  assert summary["params_digest"] == undisturbed[0]
  assert capfd.readouterr().err == ""
  assert copy_of(url) == files_of(folder)


def test_a_run_without_a_checkpoint_begins_anew_on_another_host(
  url, cache, undisturbed, monkeypatch
):
  """Rounds were done before the first one failed."""
  count_rounds = Loop._count_rounds
  trained = threading.Event()

  def counted(self, out):
    count_rounds(self, out)
    if self.done == 4:
      trained.set()

  def full(*_):
    assert trained.wait(60)
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  fields = QUICK | {"runtime.checkpoint_every": "6"}
  seldom = flags.load(str(DIGITS), fields)
  with monkeypatch.context() as patch:
    patch.setattr(Loop, "_count_rounds", counted)
    patch.setattr(Checkpoints, "_write_whole", full)
    with pytest.raises(checkpoint.CheckpointError, match="No space left"):
      experiment.run(seldom, url)
  (metrics,) = cache.rglob("metrics.jsonl")
  assert metrics.read_bytes()
  assert "config.json" in Bucket(url).sizes()
  shutil.rmtree(cache)
  summary = experiment.run(seldom, url)
  assert summary["params_digest"] == undisturbed[0]
  assert copy_of(url)["metrics.jsonl"] == undisturbed[1]


def test_a_bucket_that_another_run_took_before_the_first_copy(tmp_path, url):
  work = Work(tmp_path / "run")
  place = mirror.Mirror(work.folder, Bucket(url))
  with contextlib.closing(place):
    place.fill()
    held(url)
    with pytest.raises(mirror.CopyError, match="in use by another run"), place:
      work.save(1)
  assert set(Bucket(url).sizes()) == {lock.LOCK}


def test_a_copy_that_fails_for_a_while(tmp_path, url, capfd, monkeypatch):
  """It fails at the first checkpoint, and then works again."""
  folder, memory = tmp_path / "run", fsspec.filesystem("memory")
  pipe_file, fails = type(memory).pipe_file, threading.Event()

  def sometimes(self, path, value, **options):
    if "checkpoints/0/" in path:
      fails.set()
      raise OSError("away")
    return pipe_file(self, path, value, **options)

  monkeypatch.setattr(type(memory), "pipe_file", sometimes)
  copy = mirror.Mirror.copy

  def after_failing(self):
    if (folder / "checkpoints" / "2").exists():
      fails.wait(20)
    copy(self)

  monkeypatch.setattr(mirror.Mirror, "copy", after_failing)
  experiment.run(quick(), folder, sync_to=url)
  (line,) = capfd.readouterr().err.splitlines()[:1]
  assert "checkpoints/0/" in line
  assert "away. The run goes on" in line
  assert copy_of(url) == files_of(folder)


def test_a_slow_bucket_slows_no_run(tmp_path, url, monkeypatch):
  """One snapshot waits at most, and the newest one is what is sent."""
  open_, sends = threading.Event(), []

  class Slow(Sender):
    def send(self, taken, check):
      sends.append(taken.checkpoints()[-1])
      assert open_.wait(60)
      super().send(taken, check)

  monkeypatch.setattr(mirror, "Sender", Slow)
  finish = mirror.Mirror._finish

  def at_the_end(self):
    assert sends == [
      0
    ]  # all rounds are done, and the first is still on its way
    open_.set()
    finish(self)

  monkeypatch.setattr(mirror.Mirror, "_finish", at_the_end)
  experiment.run(quick(), tmp_path / "run", sync_to=url)
  assert sends[0] == 0
  assert set(sends[1:]) == {8}
  assert copy_of(url) == files_of(tmp_path / "run")


def test_a_workdir_in_a_bucket_that_refuses(url, cache, capsys):
  arguments = ["run", f"--config={DIGITS}", f"--workdir={url}"]
  for operation in ("cat_file", "pipe_file"):
    with broken(operation):
      assert main(arguments) == 2
    out = capsys.readouterr().err
    assert out.count("\n") == 1
    assert url in out
    assert "no rights" in out
  assert not cache.exists()


def test_no_password_of_a_url_is_shown(tmp_path, url, capsys):
  secret = url.replace("://", "://me:hunter2@")
  shown = url.replace("://", "://***@")
  folder = f"--workdir={tmp_path / 'run'}"
  for arguments in (
    [f"--workdir={secret}"],
    [f"--workdir={secret}", f"--sync-to={secret}"],
    [f"--workdir={secret}".replace("memory:", "nosuch:")],
    [folder, f"--branch-from={secret}:4"],
  ):
    with broken("cat_file"):
      assert main(["run", f"--config={DIGITS}", *arguments]) == 2
    err = capsys.readouterr().err
    assert shown.partition(":")[2] in err
    assert "hunter2" not in err
  for workdir, sync_to in ((secret, None), (tmp_path / "run", secret)):
    with mirror.placed(workdir, sync_to) as place:
      assert place.mirror is not None
      place.mirror._fail(OSError(f"{secret} is gone"))
      said = [message for message, _ in place.mirror.messages()]
    mirror._print(f"Waiting for {secret}.")
    text = " ".join([place.name, *said, capsys.readouterr().err])
    assert shown in text
    assert "hunter2" not in text
  held(secret)
  with pytest.raises(WorkdirError) as caught:
    experiment.run(quick(), secret)
  assert str(caught.value).startswith(f"{shown} is in use by another run")


def test_no_staging_folder_has_a_password(url):
  secret = url.replace("://", "://me:hunter2@")
  folder = staging.folder_of(secret)
  assert "hunter2" not in folder.name
  assert folder == staging.folder_of(secret.replace("hunter2", "hunter3"))
  assert folder != staging.folder_of(url)


def test_a_copy_that_fails_shows_in_the_exit_code(tmp_path, url, capfd):
  folder = tmp_path / "run"
  arguments = ["run", f"--config={DIGITS}", f"--workdir={folder}"]
  arguments += [f"--config.{field}={text}" for field, text in QUICK.items()]
  arguments += ["--config.server.rounds=2", f"--sync-to={url}"]
  with broken("pipe_file"):
    assert main(arguments) == 1
  last = capfd.readouterr().err.splitlines()[-1]
  assert last.startswith(
    f"fedjax-sim: error: The run in {folder} is finished, but its copy is not"
    f" complete: {url} lacks "
  )
  assert main(arguments) == 0
  assert capfd.readouterr().err == ""


def test_urls_that_are_refused(tmp_path, url, monkeypatch, capsys):
  run = lambda **given: main(
    ["run", f"--config={DIGITS}", *(f"--{k}={v}" for k, v in given.items())]
  )
  folder = tmp_path / "run"
  for given, text in (
    ({"workdir": folder, "sync-to": "dir"}, "--sync-to=dir is no URL"),
    ({"workdir": url, "sync-to": url}, "in a bucket already; give one"),
    ({"workdir": folder, "sync-to": "nosuch://a/b"}, "nosuch://a/b: "),
    ({"workdir": "nosuch://a/b"}, "nosuch://a/b: "),
    ({"workdir": folder, "sync-to": ""}, "--sync-to= is empty; give a URL or"),
    ({"workdir": folder, "sync-to": f"file://{folder}"}, "a URL outside of it"),
  ):
    assert run(**given) == 2
    err = capsys.readouterr().err
    assert text in err
    assert err.count("\n") == 1
  monkeypatch.setitem(sys.modules, "fsspec.core", None)
  assert run(workdir=url) == 2
  assert "fedjax_sim[bucket]" in capsys.readouterr().err
  assert not folder.exists()


@pytest.mark.parametrize(
  ("workdir", "target"),
  [
    ("run", "run"),
    ("run", "run/copy"),
    ("run", "."),
    ("link", "run"),
    ("run", "link/copy"),
    ("link", "."),
  ],
)
def test_no_copy_into_itself(tmp_path, workdir, target):
  """Whatever is there stays, by whatever path it is named."""
  work = Work(tmp_path / "run")
  (tmp_path / "link").symlink_to(work.folder)
  before = files_of(work.folder)
  url = f"file://{tmp_path}/{target}"
  with pytest.raises(ValueError, match=f"--sync-to={url} and .* outside of it"):
    experiment.run(quick(), tmp_path / workdir, sync_to=url)
  assert files_of(work.folder) == before
  assert {path.name for path in tmp_path.iterdir()} == {"run", "link"}


def test_no_staging_folder_in_its_own_copy(cache):
  url = f"file://{cache}"
  with pytest.raises(ValueError, match=f"--workdir={url} and .* outside of it"):
    experiment.run(quick(), url)
  assert not cache.exists()


def test_a_copy_beside_the_workdir(tmp_path, undisturbed):
  """What is removed of it leaves no folders, and the copy is a workdir."""
  folder, copy = tmp_path / "run", tmp_path / "run2"
  experiment.run(quick(), folder, sync_to=f"file://{copy}")
  assert files_of(copy) == files_of(folder)
  assert sorted(path.name for path in (copy / "checkpoints").iterdir()) == [
    "6",
    "8",
  ]
  assert copy.exists()


def test_a_folder_is_removed_when_it_is_empty(tmp_path):
  there = Bucket(f"file://{tmp_path}/copy")
  for name in ("a/b/c", "a/d", "e"):
    there.write(name, b"")
  there.remove("a/b/c")
  assert {path.name for path in (tmp_path / "copy" / "a").iterdir()} == {"d"}
  there.remove("a/d")
  there.remove("e")
  assert list((tmp_path / "copy").iterdir()) == []


def test_a_workdir_in_memory_does_not_last(url):
  place = mirror.Mirror(staging.folder_of(url), Bucket(url))
  place.fill()
  place.close()
  warnings = [text for text, level in place.messages() if level == "warning"]
  (text,) = warnings
  assert text.startswith(f"--workdir={url} ends with this process; give a")


# --- file systems -------------------------------------------------------------


def refusing(monkeypatch, owner, name, number):
  def refuses(*_, **__):
    raise OSError(number, os.strerror(number))

  monkeypatch.setattr(owner, name, refuses)


@pytest.mark.parametrize(
  ("owner", "name", "number", "text"),
  [
    (fcntl, "flock", errno.ENOLCK, r"refuses flock \(No locks available\)"),
    (fcntl, "flock", errno.ENOTSUP, "refuses flock"),
    (fcntl, "flock", errno.ENOSYS, "refuses flock"),
    (os, "rename", errno.ENOSYS, "refuses rename"),
    (os, "replace", errno.EPERM, "refuses rename"),
    (os, "fsync", errno.EINVAL, "refuses fsync"),
  ],
)
def test_a_file_system_that_is_not_safe(
  tmp_path, monkeypatch, owner, name, number, text
):
  """One line, before a round is computed."""
  monkeypatch.setattr(Loop, "run", pytest.fail)
  refusing(monkeypatch, owner, name, number)
  with pytest.raises(WorkdirError, match=text) as caught:
    experiment.run(quick(), tmp_path / "run")
  assert f"--workdir={tmp_path / 'run'}: " in str(caught.value)
  assert "--workdir on a local disk, with --sync-to=URL" in str(caught.value)
  assert {p.name for p in (tmp_path / "run").iterdir()} == {".lock"}


def test_a_full_disk_is_no_bad_file_system(tmp_path, monkeypatch):
  refusing(monkeypatch, os, "replace", errno.ENOSPC)
  with locked(tmp_path):
    pass


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
def test_room_without_fallocate(tmp_path, monkeypatch, number):
  refusing(monkeypatch, os, "posix_fallocate", number)
  with contextlib.closing(Checkpoints(tmp_path, keep=2)) as checkpoints:
    checkpoints.save(1, state_of(1), {})
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(checkpoint.CheckpointError, match="No space left"):
      checkpoints.save(2, state_of(2), {})
    assert checkpoints.rounds() == [1]
