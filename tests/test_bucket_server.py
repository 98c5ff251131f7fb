"""Workdirs in a bucket of a real S3 server, through kills."""

import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from fedjax_sim.run.bucket import lock, staging
from fedjax_sim.run.bucket.folder import Bucket
from workdirs import first_rounds

s3fs = pytest.importorskip("s3fs")
boto3 = pytest.importorskip("boto3")
pytest.importorskip("moto")

pytestmark = pytest.mark.integration

ROOT = pathlib.Path(__file__).parents[1]
ROUNDS = 60
FIELDS = {
  "model.name": "logistic_regression",
  "model.hidden_sizes": "None",
  "client.epochs": "1",
  "server.clients_per_round": "5",
  "server.eval_every": "20",
  "server.rounds": str(ROUNDS),
  "runtime.checkpoint_every": "3",
  "runtime.keep_checkpoints": "2",
  "runtime.devices": "1",
  "runtime.lanes": "1",
}


def command(workdir, *flags):
  return [
    *(sys.executable, "-m", "fedjax_sim", "run"),
    f"--config={ROOT / 'configs' / 'digits_fedavg.py'}",
    f"--workdir={workdir}",
    *(f"--config.{k}={v}" for k, v in FIELDS.items()),
    *flags,
  ]


def free_port():
  with socket.socket() as found:
    found.bind(("127.0.0.1", 0))
    return found.getsockname()[1]


def served(popen, monkeypatch, **variables):
  """Starts a server, and lets this process and others find it."""
  port = free_port()
  popen(
    [sys.executable, "-m", "moto.server", "-p", str(port)],
    env=os.environ | variables,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  end = time.monotonic() + 60
  while True:
    with socket.socket() as tried:
      if tried.connect_ex(("127.0.0.1", port)) == 0:
        break
    assert time.monotonic() < end
    time.sleep(0.05)
  named = {
    "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_MAX_ATTEMPTS": "1",
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": str(ROOT),
  }
  for name, value in named.items():
    monkeypatch.setenv(name, value)
  s3fs.S3FileSystem.clear_instance_cache()  # of another test's server


def make_bucket(name):
  boto3.client("s3").create_bucket(Bucket=name)


@pytest.fixture
def url(popen, monkeypatch, tmp_path):
  """A folder in a bucket; the user's cache is one of this test."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  served(popen, monkeypatch)
  make_bucket("runs")
  return "s3://runs/deep/digits"


def finish(process, seconds=240):
  out, err = process.communicate(timeout=seconds)
  return process.returncode, out, err


@pytest.fixture
def undisturbed(popen, tmp_path, monkeypatch):
  """The digest and the metrics of a run on the disk."""
  monkeypatch.setenv("PYTHONPATH", str(ROOT))
  folder = tmp_path / "undisturbed"
  code, _, err = finish(popen(command(folder), cwd=tmp_path))
  assert code == 0, err
  summary = json.loads((folder / "summary.json").read_bytes())
  return summary["params_digest"], (folder / "metrics.jsonl").read_bytes()


@pytest.mark.slow
def test_kills_while_sending(url, popen, tmp_path, undisturbed):
  """Each process is on a host of its own, which has nothing but the bucket."""
  rng, bucket, kept = random.Random(0), Bucket(url), []
  for i in range(4):
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    process = popen(command(url), cwd=tmp_path)
    before, end = (
      staging.complete_rounds(bucket.sizes()),
      time.monotonic() + 120,
    )
    while staging.complete_rounds(bucket.sizes())[-1:] <= before[-1:]:
      assert process.poll() is None, process.communicate()
      assert time.monotonic() < end
    time.sleep(rng.uniform(0, 0.3))
    process.kill()
    process.communicate(timeout=60)
    there = bucket.sizes()
    assert lock.LOCK in there
    rounds = staging.complete_rounds(there)
    partly = {staging.checkpoint_of(name) for name in there} - {None, *rounds}
    print(f"{i}: complete {rounds}, begun {partly}")
    assert rounds[-1:] > before[-1:]
    kept.append(partly)
  assert any(kept)  # one was in the middle of it
  shutil.rmtree(tmp_path / "cache", ignore_errors=True)
  code, out, err = finish(popen(command(url), cwd=tmp_path))
  assert code == 0, err
  assert err == ""
  assert url in out
  summary = json.loads(bucket.read("summary.json") or b"")
  assert summary["params_digest"] == undisturbed[0]
  assert bucket.read("metrics.jsonl") == undisturbed[1]
  assert lock.LOCK not in bucket.sizes()
  assert staging.complete_rounds(bucket.sizes()) == [ROUNDS - 3, ROUNDS]
  folder = staging.folder_of(url)
  local = {
    path.relative_to(folder).as_posix(): path.read_bytes()
    for path in folder.rglob("*")
    if path.is_file() and path.name not in (".lock", staging.SENT)
  }
  assert local == {name: bucket.read(name) for name in bucket.sizes()}


def test_what_others_write_is_seen(url):
  """Whatever fsspec remembers of the bucket."""
  first, second = Bucket(url), Bucket(url)
  assert first.sizes() == {}
  assert first.read("a") is None
  boto3.client("s3").put_object(Bucket="runs", Key="deep/digits/a", Body=b"1")
  assert second.read("a") == b"1"
  assert first.sizes() == {"a": 1}


@pytest.mark.slow
def test_a_second_run_and_a_signal(url, popen, tmp_path):
  first = popen(command(url, "--config.server.rounds=100000"), cwd=tmp_path)
  end = time.monotonic() + 120
  while not staging.complete_rounds(Bucket(url).sizes()):
    assert first.poll() is None, first.communicate()
    assert time.monotonic() < end
  code, _, err = finish(popen(command(url), cwd=tmp_path))
  assert code == 2
  assert err.count("\n") == 1
  assert f"{url} is in use by another run (process {first.pid} on " in err
  first.send_signal(signal.SIGTERM)
  code, _, err = finish(first)
  assert code == 128 + signal.SIGTERM
  there = Bucket(url).sizes()
  assert lock.LOCK not in there
  # What was saved for the signal has been sent.
  last = staging.complete_rounds(there)[-1]
  assert f"after round {last}," in err


@pytest.mark.slow
def test_several_processes(url, popen, tmp_path):
  """A table of clients is spread over them; the copy holds all pieces."""
  run = [*command(url)[3:], "--config.algorithm.name=scaffold"]
  launch = [sys.executable, "-m", "fedjax_sim", "launch", "--processes=2"]
  one = [a for a in run if "runtime.devices" not in a]
  folder = staging.folder_of(url)
  for rounds, first in ((20, 1), (40, 21)):
    shutil.rmtree(folder, ignore_errors=True)  # as on another host
    more = f"--config.server.rounds={rounds}"
    code, _, err = finish(popen([*launch, "--", *one, more], cwd=tmp_path))
    assert code == 0, err
    assert "damaged" not in err
    assert first_rounds(folder)[-1] == first
    summary = json.loads(Bucket(url).read("summary.json") or b"")
    assert summary["processes"] == 2
    assert summary["rounds"] == rounds
    assert f"checkpoints/{rounds}/pieces_1.bin" in Bucket(url).sizes()


@pytest.mark.slow
def test_without_rights(popen, monkeypatch, tmp_path):
  """All but the making of the bucket needs rights, which nobody has."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  served(popen, monkeypatch, INITIAL_NO_AUTH_ACTION_COUNT="1")
  make_bucket("runs")
  url, folder = "s3://runs/digits", tmp_path / "run"
  code, _, err = finish(popen(command(url), cwd=tmp_path))
  assert code == 2
  assert err.count("\n") == 1
  assert f"{url}: {lock.LOCK} cannot be read" in err
  run = command(folder, f"--sync-to={url}")
  code, _, err = finish(popen(run, cwd=tmp_path))
  assert code == 1, err
  first, last = err.splitlines()
  assert "The run goes on, and copies again" in first
  assert f"{folder} is finished, but its copy is not complete" in last
  assert f"{url} lacks bucket.json, checkpoints/57" in last
  assert (folder / "summary.json").exists()


@pytest.mark.slow
def test_without_a_bucket_or_a_network(url, popen, monkeypatch, tmp_path):
  folder = tmp_path / "run"
  run = command(folder, "--sync-to=s3://nosuch/digits")
  code, _, err = finish(popen(run, cwd=tmp_path))
  assert code == 1, err
  assert "s3://nosuch/digits lacks" in err.splitlines()[-1]
  monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
  code, _, err = finish(popen(command(url), cwd=tmp_path))
  assert code == 2
  assert err.count("\n") == 1
  assert url in err
