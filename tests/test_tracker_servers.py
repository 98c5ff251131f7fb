"""Runs with the real clients: an MLflow server, a store, W&B's files."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import warnings

import pytest

from fedjax_sim import reporting
from fedjax_sim.cli.main import main
from fedjax_sim.reporting.trackers import Opened, RunFacts, wandb_files
from fedjax_sim.reporting.trackers.mlflow import mlflow

pytestmark = pytest.mark.integration

ROOT = pathlib.Path(__file__).parents[1]
ROUNDS = 40
FIELDS = {
  "model.name": "logistic_regression",
  "model.hidden_sizes": "None",
  "client.epochs": "1",
  "server.clients_per_round": "5",
  "server.rounds": str(ROUNDS),
  "server.eval_every": "3",
  "runtime.checkpoint_every": "5",
  "runtime.devices": "1",
  "runtime.lanes": "1",
}
# A process that is killed: with SENT noted, that many rounds are at the server
# and about to be noted; with HALF, the first half of a batch is.
KILLED = """
import os, signal, sys
from fedjax_sim.run import delivery, trackers
from fedjax_sim.reporting.trackers import mlflow
delivery.MOST_ROWS = 7
end = lambda: os.kill(os.getpid(), signal.SIGKILL)
how, number = sys.argv.pop(1).split("=")
if how == "sent":
  change = trackers._Records.change
  def changed(self, label, changes):
    if changes.get("sent", 0) >= int(number):
      end()
    change(self, label, changes)
  trackers._Records.change = changed
if how == "half":
  send = mlflow._MLflow.send
  def sent(self, rows):
    if rows[-1]["round"] >= int(number):
      rows = [*rows[:-1], dict(list(rows[-1].items())[:2])]
      send(self, rows)
      end()
    send(self, rows)
  mlflow._MLflow.send = sent
if how == "created":
  create = mlflow._MLflow._create
  def created(self, run, parent):
    create(self, run, parent)
    end()
  mlflow._MLflow._create = created
from fedjax_sim.cli.main import main
sys.exit(main())
"""


def command(folder, *fields, killed=None):
  program = ["-c", KILLED, killed] if killed else ["-m", "fedjax_sim"]
  given = [f"{name}={text}" for name, text in FIELDS.items()]
  return [
    *(sys.executable, *program, "run"),
    f"--config={ROOT / 'configs' / 'digits_fedavg.py'}",
    f"--workdir={folder}",
    *(f"--config.{field}" for field in (*given, *fields)),
  ]


QUIET = {
  "MLFLOW_DISABLE_TELEMETRY": "true",
  "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # more processes
  "WANDB_ERROR_REPORTING": "false",
}


def environment(**more):
  paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
  own = {
    k: v
    for k, v in os.environ.items()
    if not k.startswith(("MLFLOW_", "WANDB_"))
  }
  return own | QUIET | {"PYTHONPATH": os.pathsep.join(paths)} | more


def finish(arguments, cwd, code=0, **more):
  """Runs a command to its end; its standard error."""
  result = subprocess.run(
    arguments,
    cwd=cwd,
    env=environment(**more),
    capture_output=True,
    text=True,
    timeout=240,
    check=False,
  )
  assert result.returncode == code, result.stderr
  return result.stderr


@pytest.fixture
def run_here(tmp_path, monkeypatch, capfd):
  """A run in this process, which has imported all that it takes.

  Its function takes fields of the config and variables of the environment, and
  returns the run's standard error.
  """
  for name in list(os.environ):
    if name.startswith(("MLFLOW_", "WANDB_")):
      monkeypatch.delenv(name)
  for name, value in QUIET.items():
    monkeypatch.setenv(name, value)
  monkeypatch.chdir(tmp_path)

  def call(folder, *fields, **variables):
    for name, value in variables.items():
      monkeypatch.setenv(name, value)
    capfd.readouterr()
    arguments = command(folder, *fields)
    with warnings.catch_warnings(action="default"):  # they end no user's run
      code = main(arguments[arguments.index("run") :])
    error = capfd.readouterr().err
    assert code == 0, error
    return error

  return call


def free_port():
  with socket.socket() as listening:
    listening.bind(("127.0.0.1", 0))
    return listening.getsockname()[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
  """The URI of an MLflow server of its own."""
  folder = tmp_path_factory.mktemp("server")
  port = free_port()
  arguments = [
    *(sys.executable, "-m", "mlflow", "server", "--workers", "1"),
    *("--port", str(port), "--host", "127.0.0.1"),
    *("--backend-store-uri", f"sqlite:///{folder}/mlflow.db"),
    *("--artifacts-destination", str(folder / "artifacts")),
  ]
  uri = f"http://127.0.0.1:{port}"
  with (folder / "log").open("w") as log:
    process = subprocess.Popen(
      arguments,
      cwd=folder,
      env=environment(),
      stdout=log,
      stderr=subprocess.STDOUT,
      start_new_session=True,
    )
  try:
    end = time.monotonic() + 120
    while True:
      try:
        with urllib.request.urlopen(f"{uri}/health", timeout=5):
          break
      except OSError:
        assert process.poll() is None, (folder / "log").read_text()
        assert time.monotonic() < end
        time.sleep(0.2)
    yield uri
  finally:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def client_of(uri):
  from mlflow import MlflowClient

  return MlflowClient(tracking_uri=uri)


def record_of(folder, label="mlflow"):
  return json.loads((folder / "trackers.json").read_text())[label]


def check_history(folder, uri, status="FINISHED"):
  """Every metric of every row is at the server once, with its value."""
  client = client_of(uri)
  run = client.get_run(record_of(folder)["run_id"])
  assert run.info.status == status
  wanted = reporting.columns(reporting.read_metrics(folder / "metrics.jsonl"))
  assert run.data.metrics.keys() == wanted.keys()
  for name, (rounds, values) in wanted.items():
    history = client.get_metric_history(run.info.run_id, name)
    found = sorted((m.step, m.value) for m in history)
    assert found == list(zip(rounds, values, strict=True)), name
  return run


HALF = ("half=20",)
ALL_KILLS = ("created=0", "sent=10", "half=20", "sent=30")


@pytest.mark.parametrize(
  "kills", [HALF, pytest.param(ALL_KILLS, marks=pytest.mark.slow)]
)
def test_a_run_that_is_killed_is_whole_on_the_server(
  server, tmp_path, kills, run_here
):
  folder = tmp_path / "run"
  fields = [
    f"trackers.mlflow.uri={server}",
    f"trackers.mlflow.experiment={len(kills)} kills",
  ]
  for killed in kills:
    finish(
      command(folder, *fields, killed=killed), tmp_path, code=-signal.SIGKILL
    )
  before = record_of(folder)
  assert before["run_id"]
  assert before["sent"] < 30
  run_here(folder, *fields)
  assert record_of(folder)["run_id"] == before["run_id"]
  assert len(reporting.read_metrics(folder / "metrics.jsonl")) == ROUNDS
  run = check_history(folder, server)
  client = client_of(server)
  experiment = client.get_experiment_by_name(f"{len(kills)} kills")
  assert len(client.search_runs([experiment.experiment_id])) == 1
  assert run.data.params["client.batch_size"] == "8"
  assert run.data.params["server.rounds"] == str(ROUNDS)
  assert not any(name.startswith("trackers.") for name in run.data.params)
  assert run.data.tags["jax"]
  assert run.info.run_name == "run"
  names = {f.path for f in client.list_artifacts(run.info.run_id)}
  assert names >= {"config.json", "summary.json", "curves.png"}
  assert "clients_unseen.csv" in names


@pytest.mark.slow
def test_a_run_that_is_killed_at_any_moment(server, tmp_path):
  folder = tmp_path / "run"
  fields = [f"trackers.mlflow.uri={server}", "server.rounds=600"]
  arguments = command(folder, *fields)
  for seconds in (0.3, 0.6, 0.9):
    process = subprocess.Popen(
      arguments,
      cwd=tmp_path,
      env=environment(),
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )
    checkpoints = folder / "checkpoints"
    while not list(checkpoints.glob("[0-9]*")):
      assert process.poll() is None
      time.sleep(0.05)
    time.sleep(seconds)
    process.kill()
    process.wait()
    assert not (folder / "summary.json").exists()
  finish(arguments, tmp_path)
  check_history(folder, server)


def test_a_run_that_a_job_brings_along(server, tmp_path, run_here):
  """As in Azure ML, which sets these variables."""
  client = client_of(server)
  number = client.create_experiment("job")
  run = client.create_run(number)
  run_here(
    tmp_path / "run",
    "trackers.mlflow.metrics=('test/loss',)",
    "trackers.mlflow.primary_metric=test/accuracy",
    MLFLOW_TRACKING_URI=server,
    MLFLOW_RUN_ID=run.info.run_id,
  )
  (found,) = client.search_runs([number])
  assert found.info.run_id == run.info.run_id
  assert found.data.metrics.keys() == {"test/loss", "accuracy"}


@pytest.mark.slow
def test_two_runs_that_a_job_brings_along(server, tmp_path):
  """The second one becomes a child, and loses no row."""
  client = client_of(server)
  number = client.create_experiment("two of a job")
  job = client.create_run(number).info.run_id
  fields = ["trackers.mlflow.experiment=elsewhere"]
  both = {"MLFLOW_TRACKING_URI": server, "MLFLOW_RUN_ID": job}
  first, second = tmp_path / "first", tmp_path / "second"
  finish(command(first, *fields), tmp_path, **both)
  before = check_history(first, server)
  assert before.info.run_id == job
  other = command(second, *fields, "seed=1")
  killed = command(second, *fields, "seed=1", killed="sent=10")
  finish(killed, tmp_path, code=-signal.SIGKILL, **both)
  error = finish(other, tmp_path, **both)
  assert error == (
    f"mlflow: the run {job} belongs to another workdir; this one is a child"
    " run of it.\n"
  )
  child = check_history(second, server)
  assert child.data.tags["mlflow.parentRunId"] == job
  assert child.data.params["seed"] == "1"
  after = check_history(first, server)
  assert after.data.tags == before.data.tags
  assert after.data.params == before.data.params
  assert len(client.search_runs([number])) == 2
  # The first one's workdir joins its own run again.
  more = command(first, *fields, f"server.rounds={ROUNDS + 5}")
  error = finish(more, tmp_path, **both)
  assert "belongs to another" not in error
  assert check_history(first, server).info.run_id == job


def test_of_two_at_once_one_gets_the_run(server, tmp_path, monkeypatch):
  """Both saw it while it was nobody's."""
  monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
  client = client_of(server)
  run = client.create_run(client.create_experiment("at once"))
  facts = lambda key: RunFacts(key, tmp_path, key, "", -1, 1, {"x": key}, {})
  joining = {"uri": server, "run_id": run.info.run_id}
  first, second = mlflow(**joining), mlflow(**joining)
  monkeypatch.setattr(second, "_given", lambda: run)  # as it was before
  assert first.open(facts("a")) == Opened(run.info.run_id)
  first.send([{"round": 1, "loss": 1.0}])
  opened = second.open(facts("b"))
  assert opened.run_id != run.info.run_id
  assert "is a child run" in opened.warning
  found = client.get_run(run.info.run_id).data
  assert found.tags["fedjax_sim.key"] == "a"
  assert found.params["x"] == "a"


def test_a_server_that_is_not_there(tmp_path, run_here):
  folder, port = tmp_path / "run", free_port()
  error = run_here(folder, f"trackers.mlflow.uri=http://127.0.0.1:{port}")
  lines = error.splitlines()
  assert len(lines) == 2, lines
  assert lines[0].startswith("mlflow: ")
  assert lines[0].endswith(
    "; the run goes on, and its rows wait in metrics.jsonl."
  )
  assert lines[1].startswith(
    f"mlflow: {ROUNDS} of {ROUNDS} rows were not sent:"
  )
  assert (folder / "summary.json").exists()


@pytest.mark.slow
def test_a_server_that_never_answers(tmp_path):
  folder = tmp_path / "run"
  with socket.socket() as listening:
    listening.bind(("127.0.0.1", 0))
    listening.listen(10)
    uri = f"http://127.0.0.1:{listening.getsockname()[1]}"
    fields = [f"trackers.mlflow.uri={uri}", "trackers.mlflow.wait=1"]
    began = time.monotonic()
    err = finish(command(folder, *fields), tmp_path)
    took = time.monotonic() - began
  assert err == (
    f"mlflow: {ROUNDS} of {ROUNDS} rows were not sent: it took longer than 1 s;"
    " they are in metrics.jsonl.\n"
  )
  summary = json.loads((folder / "summary.json").read_text())
  assert took < summary["wall_seconds"] + 25  # imports, the end; MLflow has 30


@pytest.mark.slow
def test_wandb_out_of_reach(tmp_path):
  folder = tmp_path / "run"
  fields = ("wandb.wait=20", "wandb.timeout=2")
  err = finish(
    command(folder, *(f"trackers.{field}" for field in fields)),
    tmp_path,
    WANDB_BASE_URL=f"http://127.0.0.1:{free_port()}",
    WANDB_API_KEY="a" * 40,
  )
  last = err.splitlines()[-1]
  assert last.startswith(
    f"wandb: {ROUNDS} of {ROUNDS} rows were not sent: Fail"
  )
  assert (folder / "summary.json").exists()


@pytest.mark.slow
def test_what_was_not_sent_is_sent_later(server, tmp_path):
  folder = tmp_path / "run"
  away = f"trackers.mlflow.uri=http://127.0.0.1:{free_port()}"
  assert "40 of 40 rows" in finish(command(folder, away), tmp_path)
  again = command(folder, f"trackers.mlflow.uri={server}")
  assert finish(again, tmp_path) == ""
  check_history(folder, server)
  before = (folder / "trackers.json").read_bytes()
  assert finish(again, tmp_path) == ""
  assert (folder / "trackers.json").read_bytes() == before


@pytest.mark.slow
def test_runs_that_do_not_finish_say_so(server, tmp_path):
  """SIGTERM, and an update that is not finite."""
  folder = tmp_path / "run"
  uri = f"trackers.mlflow.uri={server}"
  process = subprocess.Popen(
    command(folder, uri, "server.rounds=100000"),
    cwd=tmp_path,
    env=environment(),
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  )
  while not (folder / "checkpoints" / "50").exists():
    assert process.poll() is None
    time.sleep(0.05)
  process.terminate()
  _, err = process.communicate(timeout=120)
  assert process.returncode == 128 + signal.SIGTERM, err
  check_history(folder, server, "KILLED")

  folder = tmp_path / "diverged"
  err = finish(
    command(folder, uri, "client.learning_rate=1e38"),
    tmp_path,
    code=1,
  )
  run = client_of(server).get_run(record_of(folder)["run_id"])
  assert run.info.status == "FAILED", err


@pytest.mark.slow
def test_wandbs_files_have_each_row_once(tmp_path):
  folder = tmp_path / "run"
  fields = (
    *("trackers.it.name=wandb", "trackers.it.mode=offline"),
    "trackers.it.wait=150",  # of a busy machine
  )
  for number in (10, 25):
    finish(
      command(folder, *fields, killed=f"sent={number}"),
      tmp_path,
      code=-signal.SIGKILL,
    )
  finish(command(folder, *fields), tmp_path)
  run_id = record_of(folder, "it")["run_id"]
  found: list[tuple[int, dict[str, float]]] = []
  for file in sorted(
    (folder / "wandb").glob(f"offline-run-*/run-{run_id}.wandb")
  ):
    found += wandb_files.rows(file).items()
  wanted = reporting.read_metrics(folder / "metrics.jsonl")
  assert [step for step, _ in found] == [row["round"] for row in wanted]
  for (step, metrics), row in zip(found, wanted, strict=True):
    assert {"round": step, **metrics} == row
