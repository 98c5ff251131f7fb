"""A run in a workdir: its files, its refusals, its signals, a full disk."""

import contextlib
import fcntl
import json
import os
import pathlib
import resource
import shutil
import signal
import threading

import jax
import numpy as np
import pytest
from pyarrow import parquet

from fedjax_sim import config, reporting
from fedjax_sim.config import build, flags
from fedjax_sim.config.build import parts
from fedjax_sim.config.completion import complete
from fedjax_sim.core.files import plain
from fedjax_sim.engine.evaluation import EvaluationSet
from fedjax_sim.run import checkpoint, experiment, resume
from fedjax_sim.run.signals import Interrupted
from fedjax_sim.run.workdir import ConfigChangedError, WorkdirError, WriteError
from fedjax_sim.simulation import lanes
from fedjax_sim.simulation.compiler import Compiler
from fedjax_sim.simulation.dispatch import DivergedError
from fedjax_sim.simulation.evaluator import Evaluator
from fedjax_sim.simulation.simulator import Simulator
from workdirs import skip_pictures

pytestmark = pytest.mark.usefixtures("same_programs")

DIGITS = pathlib.Path(__file__).parents[1] / "configs" / "digits_fedavg.py"

DEVICES = min(2, jax.device_count())

QUICK = {
  "model.name": "logistic_regression",
  "model.hidden_sizes": "None",
  "data.num_clients": "20",
  "data.unseen_clients": "2",
  "server.clients_per_round": "6",
  "server.rounds": "12",
  "server.eval_every": "5",
  "client.epochs": "1",
  "runtime.checkpoint_every": "4",
  "runtime.devices": str(DEVICES),
  "runtime.rounds_per_dispatch": "4",  # ends in rounds 4, 5, 8, 10 and 12
}


def quick(**changes):
  """A config of 12 rounds; `server__rounds="3"` changes server.rounds."""
  named = {field.replace("__", "."): text for field, text in changes.items()}
  return flags.load(str(DIGITS), QUICK | named)


@pytest.fixture
def fast(monkeypatch):
  skip_pictures(monkeypatch)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
  """The workdir of a run that nothing disturbed."""
  folder = tmp_path_factory.mktemp("undisturbed") / "run"
  with pytest.MonkeyPatch.context() as patch:
    skip_pictures(patch)
    experiment.run(quick(), folder)
  return folder


def summary_of(folder):
  return json.loads((folder / "summary.json").read_text())


def check_same(folder, undisturbed):
  """The run ended bit for bit as the undisturbed one."""
  ours, theirs = summary_of(folder), summary_of(undisturbed)
  changing = (
    *("wall", "phase_seconds", "train_s", "per_second"),
    *("compilations", "lanes_reason"),
  )
  for name in theirs:
    if not any(word in name for word in changing):
      assert ours[name] == theirs[name], name
  assert ours.keys() == theirs.keys()
  for name in ("metrics.jsonl", "clients_unseen.csv"):
    assert (folder / name).read_bytes() == (undisturbed / name).read_bytes()


def newest(folder):
  """The newest checkpoint."""
  return max((folder / "checkpoints").iterdir(), key=lambda p: int(p.name))


def at(monkeypatch, owner, name, when, act):
  """Lets `act` happen before the `when`-th call of owner.name, from 0."""
  original = getattr(owner, name)
  count = iter(range(1000))

  def called(*args, **kwargs):
    if next(count) == when:
      act()
    return original(*args, **kwargs)

  monkeypatch.setattr(owner, name, called)


# --- what a run leaves --------------------------------------------------------


def test_what_a_run_leaves(tmp_path, capfd):
  folder = tmp_path / "deep" / "run"
  returned = experiment.run(quick(), folder)
  out, err = capfd.readouterr()
  assert err == ""
  assert "test/accuracy" in out
  assert str(folder) in out
  left = {path.name for path in folder.iterdir()} - {".lock"}
  assert left == {
    "config.json",
    "data_profile.json",
    "metrics.jsonl",
    "timings.jsonl",
    "events",
    "checkpoints",
    "curves.png",
    "report.html",
    "summary.json",
    "clients_unseen.csv",
  }
  summary = summary_of(folder)
  assert summary == plain(returned)
  rows = reporting.read_metrics(folder / "metrics.jsonl")
  assert [row["round"] for row in rows] == list(range(1, 13))
  evaluated = [row["round"] for row in rows if "test/accuracy" in row]
  assert evaluated == [5, 10, 12]
  for name in ("train/loss", "test/loss", "test/accuracy", "unseen/loss"):
    assert summary[name] == rows[-1][name]
  assert summary["rounds"] == 12
  assert summary["seed"] == 0
  assert summary["parameters"] == 650
  assert summary["compilations"] == 1
  assert summary["lanes"] == 1
  assert len(summary["devices"]) == DEVICES
  assert len(summary["params_digest"]) == 64
  assert 0 <= summary["padding_waste"] < 1
  assert summary["wall_seconds"] >= summary["train_seconds"] > 0
  assert summary["clients_per_second"] * summary["train_seconds"] == (
    pytest.approx(12 * 6)
  )
  assert summary["versions"].keys() >= {"fedjax_sim", "jax", "python"}
  timings = reporting.read_metrics(folder / "timings.jsonl")
  assert sum(row["rounds"] for row in timings) == 12
  assert not any("seconds" in key for row in rows for key in row)
  assert sum(row["train_seconds"] for row in timings) == pytest.approx(
    summary["train_seconds"]
  )
  assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
  assert len(os.listdir(folder / "events")) == 1
  lines = (folder / "clients_unseen.csv").read_text().splitlines()
  assert len(lines) == 1 + 2
  assert config.resolved(complete(quick())) == json.loads(
    (folder / "config.json").read_text()
  )
  assert sorted(os.listdir(folder / "checkpoints"), key=int) == ["4", "8", "12"]


def test_evaluations_of_their_own(tmp_path, fast):
  folder = tmp_path / "run"
  summary = experiment.run(
    quick(
      server__rounds="7",
      server__eval_every="3",
      server__test_every="2",
      server__initial_eval="True",
      server__best_metrics="test/loss,unseen/loss",
    ),
    folder,
  )
  rows = reporting.read_metrics(folder / "metrics.jsonl")
  assert [row["round"] for row in rows] == list(range(8))
  told = lambda name: [row["round"] for row in rows if name in row]
  assert told("unseen/loss") == [0, 3, 6, 7]
  assert told("test/loss") == [0, 2, 4, 6, 7]
  assert told("train/loss") == list(range(1, 8))
  for metric in ("test/loss", "unseen/loss"):
    best = min((r for r in rows if metric in r), key=lambda r: r[metric])
    assert summary[f"best/{metric}/round"] == best["round"] > 0
    assert summary[f"best/{metric}"] == pytest.approx(best[metric])
  assert summary["compilations"] == 1


def test_every_evaluation_is_made_once(tmp_path, fast, monkeypatch):
  """The last one gives the last line of the metrics, and clients' files."""
  evaluated = []
  evaluate = EvaluationSet.__call__

  def counted(self, state):
    evaluated.append(int(state.round))
    return evaluate(self, state)

  monkeypatch.setattr(EvaluationSet, "__call__", counted)
  experiment.run(
    quick(server__rounds="4", server__eval_every="2"), tmp_path / "run"
  )
  (tmp_path / "run" / "summary.json").unlink()
  sets = evaluated.count(2)
  assert evaluated == [2] * sets + [4] * sets
  before = (tmp_path / "run" / "clients_unseen.csv").read_bytes()
  # Who sums up in another process has to evaluate; test has no file.
  experiment.run(
    quick(server__rounds="4", server__eval_every="2"), tmp_path / "run"
  )
  assert evaluated[2 * sets :] == [4] * (sets - 1)
  assert (tmp_path / "run" / "clients_unseen.csv").read_bytes() == before


def test_who_only_sums_up_compiles_no_round(tmp_path, fast, monkeypatch):
  few = {"server__rounds": "4", "server__eval_every": "4"}
  experiment.run(quick(**few), tmp_path)
  (tmp_path / "summary.json").unlink()
  compiled, program = [], Compiler.program

  def counted(self, *key):
    compiled.append(key)
    return program(self, *key)

  monkeypatch.setattr(Compiler, "program", counted)
  experiment.run(quick(**few), tmp_path)
  assert not compiled


def test_the_same_config_gives_the_same_run(tmp_path, fast, undisturbed):
  experiment.run(quick(), tmp_path / "other")
  check_same(tmp_path / "other", undisturbed)


def test_another_seed_gives_another_run(tmp_path, fast, undisturbed):
  experiment.run(quick(seed="1"), tmp_path)
  ours, theirs = summary_of(tmp_path), summary_of(undisturbed)
  assert ours["params_digest"] != theirs["params_digest"]


def test_speed_fields_do_not_change_results(tmp_path, fast, undisturbed):
  experiment.run(
    quick(
      runtime__rounds_per_dispatch="2147483647",
      runtime__eval_batch_size="2147483647",
      runtime__checkpoint_every="2147483647",
      runtime__keep_checkpoints="2147483647",
    ),
    tmp_path,
  )
  ours, theirs = summary_of(tmp_path), summary_of(undisturbed)
  assert ours["params_digest"] == theirs["params_digest"]
  assert ours["train/loss"] == theirs["train/loss"]


def test_a_finished_run_says_so(tmp_path, undisturbed, capsys, monkeypatch):
  folder = shutil.copytree(undisturbed, tmp_path / "run")
  before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
  monkeypatch.setattr(build, "build", pytest.fail)  # it loads no data
  assert experiment.run(quick(), folder) == summary_of(undisturbed)
  assert "is finished" in capsys.readouterr().out
  assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("*")}


@pytest.mark.slow
def test_the_clients_log_is_the_same_after_a_stop(
  tmp_path, fast, monkeypatch, undisturbed
):
  """After a signal, after a crash beyond a checkpoint, and once it was done."""
  logged = quick(server__client_log="True")
  names = build.build_data(logged).train.client_name
  whole = tmp_path / "whole"
  experiment.run(logged, whole)
  assert (
    summary_of(whole)["params_digest"]
    == (summary_of(undisturbed)["params_digest"])
  )
  files = ("client_rounds.parquet", "client_rounds.png")
  for name in files:
    assert (whole / name).exists()
  held = parquet.read_table(whole / files[0]).to_pydict()
  assert held["name"] == list(map(names, held["client"]))
  assert not (whole / "client_rounds").exists()

  folder = tmp_path / "run"
  with monkeypatch.context() as patch:
    stop = lambda: os.kill(os.getpid(), signal.SIGTERM)
    at(patch, Simulator, "dispatch", 1, stop)
    with pytest.raises(Interrupted):
      experiment.run(logged, folder)
  kept = len(list((folder / "client_rounds").iterdir()))
  assert kept
  with monkeypatch.context() as patch:

    def crash():
      raise RuntimeError("crashed")

    at(patch, Simulator, "dispatch", 2, crash)
    with pytest.raises(RuntimeError, match="crashed"):
      experiment.run(logged, folder)
  assert len(list((folder / "client_rounds").iterdir())) > kept
  experiment.run(logged, folder)
  check_same(folder, whole)
  same = lambda: (
    (folder / files[0]).read_bytes() == ((whole / files[0]).read_bytes())
  )
  assert same()

  (folder / "summary.json").unlink()
  shutil.rmtree(newest(folder))
  experiment.run(logged, folder)
  check_same(folder, whole)
  assert same()


@pytest.mark.integration
def test_from_another_thread(tmp_path, fast, undisturbed):
  thread = threading.Thread(target=experiment.run, args=(quick(), tmp_path))
  thread.start()
  thread.join()
  check_same(tmp_path, undisturbed)


def test_signal_handlers_are_put_back(tmp_path, fast):
  before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
  experiment.run(quick(server__rounds="1"), tmp_path)
  after = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
  assert before == after


# --- refusals -----------------------------------------------------------------


def test_a_changed_config_is_refused(tmp_path, undisturbed):
  folder = shutil.copytree(undisturbed, tmp_path / "run")
  (folder / "summary.json").unlink()
  before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
  changed = quick(client__learning_rate="0.5", data__heldout_fraction="0.5")
  with pytest.raises(ConfigChangedError) as caught:
    experiment.run(changed, folder)
  assert "client.learning_rate: 0.1 -> 0.5" in str(caught.value)
  assert "data.heldout_fraction: 0.0 -> 0.5" in str(caught.value)
  assert "seed" not in str(caught.value)
  assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("*")}


@pytest.mark.parametrize("finished", [True, False])
def test_a_missing_config_is_refused(tmp_path, undisturbed, finished):
  folder = shutil.copytree(undisturbed, tmp_path / "run")
  (folder / "config.json").unlink()
  if not finished:
    (folder / "summary.json").unlink()
  with pytest.raises(WorkdirError, match=r"config\.json is missing"):
    experiment.run(quick(seed="5"), folder)


@pytest.mark.parametrize("content", ["", "[1]", '{"seed": '])
def test_a_damaged_config_is_refused(tmp_path, undisturbed, content):
  folder = shutil.copytree(undisturbed, tmp_path / "run")
  (folder / "config.json").write_text(content)
  with pytest.raises(WorkdirError, match=r"config\.json is damaged"):
    experiment.run(quick(), folder)


@pytest.mark.parametrize("content", ["", '{"rounds": 12'])
def test_a_damaged_summary_is_refused(tmp_path, undisturbed, content, fast):
  folder = shutil.copytree(undisturbed, tmp_path / "run")
  (folder / "summary.json").write_text(content)
  with pytest.raises(WorkdirError, match=r"summary\.json is damaged .*remove"):
    experiment.run(quick(), folder)
  (folder / "summary.json").unlink()
  experiment.run(quick(), folder)
  check_same(folder, undisturbed)


@pytest.mark.parametrize("below", ["", "run"])
def test_a_file_in_the_way(tmp_path, below):
  (tmp_path / "file").write_text("mine")
  with pytest.raises(WorkdirError, match="is a file|cannot be written"):
    experiment.run(quick(), tmp_path / "file" / below)
  assert (tmp_path / "file").read_text() == "mine"


def test_a_workdir_in_use_is_refused(tmp_path, undisturbed):
  folder = shutil.copytree(undisturbed, tmp_path / "run")
  (folder / "summary.json").unlink()
  before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
  with (folder / ".lock").open() as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(WorkdirError, match="in use by another process"):
      experiment.run(quick(), folder)
  after = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
  assert before == after | {folder / ".lock": before[folder / ".lock"]}


def test_what_the_round_refuses_leaves_nothing(tmp_path, monkeypatch):
  """Found where the round is traced, not before."""
  config_ = quick(
    algorithm__name="dga_rl",
    aggregator__name="stack",
    data__server_clients="2",
    algorithm__metric="f1",
  )
  higher = {"f1": True}
  original = build.build_task
  monkeypatch.setattr(
    parts,
    "build_task",
    lambda *args: original(*args)._replace(higher_is_better=higher),
  )
  with pytest.raises(ValueError, match=r"algorithm\.metric='f1' is unknown"):
    experiment.run(config_, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_a_wrong_config_leaves_nothing(tmp_path):
  with pytest.raises(ValueError, match=r"client\.batch_size=0"):
    experiment.run(quick(client__batch_size="0"), tmp_path / "run")
  assert not list(tmp_path.iterdir())


def test_metrics_that_lack_rounds_are_refused(tmp_path, undisturbed):
  folder = shutil.copytree(undisturbed, tmp_path / "run")
  (folder / "summary.json").unlink()
  (folder / "metrics.jsonl").unlink()
  with pytest.raises(ValueError, match=r"metrics\.jsonl ends with round 0"):
    experiment.run(quick(), folder)


def test_no_clients_left_names_the_round(tmp_path):
  with pytest.raises(DivergedError, match=r"Round \d+: .*learning_rate"):
    experiment.run(quick(client__learning_rate="3e38"), tmp_path)


# --- resume -------------------------------------------------------------------


@pytest.mark.integration
def test_signals_stop_after_a_checkpoint(
  tmp_path, fast, undisturbed, monkeypatch
):
  """One run, stopped in everything that it does, and gone on with."""
  saving = checkpoint.Checkpoints, "save_later"
  for owner, name, number, stops_after in [
    (Simulator, "init", signal.SIGTERM, 0),
    (Compiler, "program", signal.SIGINT, 0),  # it compiles, before the rounds
    (Simulator, "dispatch", signal.SIGTERM, 4),
    (*saving, signal.SIGINT, 8),
    (Evaluator, "measure", signal.SIGTERM, 10),
    (reporting.MetricsFile, "append", signal.SIGINT, None),  # the last round
  ]:
    with monkeypatch.context() as patch:
      at(patch, owner, name, 0, lambda n=number: signal.raise_signal(n))
      if stops_after is None:
        experiment.run(quick(), tmp_path)
        break
      with pytest.raises(Interrupted, match=number.name) as caught:
        experiment.run(quick(), tmp_path)
    assert caught.value.exit_code == 128 + number
    assert f"after round {stops_after}," in str(caught.value)
    assert newest(tmp_path).name == str(stops_after)
  check_same(tmp_path, undisturbed)


@pytest.mark.integration
def test_a_stop_between_all_multiples(tmp_path, fast, monkeypatch, undisturbed):
  one = {"runtime__rounds_per_dispatch": "1"}
  with monkeypatch.context() as patch:
    at(patch, Simulator, "dispatch", 6, lambda: signal.raise_signal(15))
    with pytest.raises(Interrupted, match="after round 7,"):
      experiment.run(quick(**one), tmp_path)
  experiment.run(quick(**one), tmp_path)
  check_same(tmp_path, undisturbed)


@pytest.fixture
def interruptible():
  """SIGINT interrupts, though a process in the background ignores it."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


@pytest.mark.integration
def test_a_second_signal_acts_as_usual(
  tmp_path, fast, undisturbed, monkeypatch, interruptible
):
  def twice():
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)

  for owner, name in (
    (Simulator, "init"),
    (Simulator, "dispatch"),
    (Evaluator, "measure"),
  ):
    with monkeypatch.context() as patch:
      at(patch, owner, name, 0, twice)
      with pytest.raises(KeyboardInterrupt):
        experiment.run(quick(), tmp_path)
  experiment.run(quick(), tmp_path)
  check_same(tmp_path, undisturbed)


def test_lanes_are_measured_once(tmp_path, fast, undisturbed, monkeypatch):
  measured = lanes.Choice(2, "measured")
  with monkeypatch.context() as patch:
    patch.setattr(lanes, "choose", lambda *_: measured)
    at(patch, Simulator, "dispatch", 1, lambda: signal.raise_signal(15))
    with pytest.raises(Interrupted):
      experiment.run(quick(runtime__lanes="auto"), tmp_path)
  monkeypatch.setattr(lanes, "choose", pytest.fail)
  summary = experiment.run(quick(runtime__lanes="auto"), tmp_path)
  assert (summary["lanes"], summary["lanes_reason"]) == measured
  theirs = summary_of(undisturbed)["test/loss"]
  assert summary["test/loss"] == pytest.approx(theirs, rel=1e-4)


class KilledError(BaseException):
  """Stands for a kill: nothing of ours catches it."""


@pytest.mark.integration
@pytest.mark.parametrize(
  "name", ["draw_curves", "write_atomically", "write_json"]
)
def test_a_kill_while_summing_up(
  tmp_path, fast, undisturbed, monkeypatch, name
):
  def killed(*_):
    raise KilledError

  folder = shutil.copytree(undisturbed, tmp_path / "run")
  (folder / "summary.json").unlink()
  with monkeypatch.context() as patch:
    # write_json writes config.json and data_profile.json first.
    at(patch, reporting, name, 2 * (name == "write_json"), killed)
    with pytest.raises(KilledError):
      experiment.run(quick(), folder)
  assert not (folder / "summary.json").exists()
  experiment.run(quick(), folder)
  check_same(folder, undisturbed)


def test_a_damaged_checkpoint_falls_back(tmp_path, fast, undisturbed, capfd):
  folder = shutil.copytree(undisturbed, tmp_path / "run")
  (folder / "summary.json").unlink()
  files = [path for path in newest(folder).rglob("*") if path.is_file()]
  path = max(files, key=lambda p: p.stat().st_size)
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)
  experiment.run(quick(), folder)
  assert "round 12 is damaged" in capfd.readouterr().err
  check_same(folder, undisturbed)
  assert sorted(os.listdir(folder / "checkpoints"), key=int) == ["4", "8", "12"]


def test_all_checkpoints_damaged_loses_nothing(tmp_path, fast, undisturbed):
  folder = shutil.copytree(undisturbed, tmp_path / "run")
  (folder / "summary.json").unlink()
  for path in (folder / "checkpoints").iterdir():
    shutil.rmtree(path / "state")
  before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
  with pytest.raises(checkpoint.CheckpointError) as caught:
    experiment.run(quick(), folder)
  message = str(caught.value)
  assert f"No checkpoint in {folder / 'checkpoints'} is whole" in message
  for round_ in (4, 8, 12):
    assert f"round {round_}: state/" in message
  assert "another --workdir" in message
  assert "\n" not in message
  assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_no_checkpoints_starts_again(tmp_path, fast, undisturbed):
  """A kill before the first one leaves the folder, and maybe rows."""
  folder = shutil.copytree(undisturbed, tmp_path / "run")
  (folder / "summary.json").unlink()
  for path in list(folder.glob("checkpoints/*")):
    shutil.rmtree(path)
  experiment.run(quick(), folder)
  check_same(folder, undisturbed)


def test_other_software_is_told(
  tmp_path, fast, undisturbed, capfd, monkeypatch
):
  folder = shutil.copytree(undisturbed, tmp_path / "run")
  (folder / "summary.json").unlink()
  versions = resume.versions() | {"jax": "99.0"}
  monkeypatch.setattr(resume, "versions", lambda: versions)
  experiment.run(quick(), folder)
  err = capfd.readouterr().err
  assert "jax: " in err
  assert "-> '99.0'" in err


@pytest.mark.parametrize(
  "changes",
  [
    {"algorithm__name": "centralized", "client__optimizer": "adam"},
    pytest.param(
      {
        "server__optimizer": "adam",
        "server__learning_rate": "0.01",
        "transforms__clip__norm": "0.1",
        "transforms__gaussian__stddev": "0.001",
        "client__max_examples": "9",
      },
      marks=pytest.mark.slow,
    ),
    pytest.param(
      {
        "server__initial_eval": "True",
        "server__best_metrics": "unseen/loss,test/accuracy",
        "server__revert_to_best": "True",
        "client__schedule": "plateau(metric='unseen/loss', factor=0.5)",
        "server__schedule": "linear(rounds=3)",  # no better model in round 1
      },
      marks=pytest.mark.slow,
    ),
  ],
  ids=["centralized", "server adam", "watched"],
)
@pytest.mark.integration
def test_from_every_checkpoint(tmp_path, fast, changes):
  changes |= {
    "server__rounds": "3",
    "server__eval_every": "2",
    "runtime__checkpoint_every": "1",
    "runtime__keep_checkpoints": "9",
  }
  whole = tmp_path / "whole"
  experiment.run(quick(**changes), whole)
  assert len(os.listdir(whole / "checkpoints")) == 4
  for last in range(3):
    folder = shutil.copytree(whole, tmp_path / str(last))
    (folder / "summary.json").unlink()
    for later in range(last + 1, 4):
      shutil.rmtree(folder / "checkpoints" / str(later))
    experiment.run(quick(**changes), folder)
    check_same(folder, whole)
  rows = reporting.read_metrics(whole / "metrics.jsonl")
  losses = [row["train/loss"] for row in rows if row["round"]]
  assert np.isfinite(losses).all()
  assert len(set(losses)) == 3


# --- a full disk --------------------------------------------------------------


@contextlib.contextmanager
def _limit(size):
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  try:
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.integration
def test_a_full_disk(tmp_path, fast, undisturbed, monkeypatch):
  """One run, on a disk that is full in every moment, and gone on with.

  Each checkpoint is waited for, so that it is known what the disk refuses.
  """
  save_later = checkpoint.Checkpoints.save_later

  def save(self, *args):
    save_later(self, *args)
    self.wait()

  monkeypatch.setattr(checkpoint.Checkpoints, "save_later", save)
  saving = checkpoint.Checkpoints, "save_later"
  refused = checkpoint.CheckpointError
  for owner, name, when, error, intact in [
    (reporting, "write_json", 0, WriteError, None),  # of config.json
    (*saving, 0, refused, None),
    (reporting.MetricsFile, "append", 0, WriteError, 0),  # of metrics.jsonl
    (*saving, 1, refused, 4),
    (reporting.MetricsFile, "append", 5, WriteError, 8),  # of timings.jsonl
    (reporting.EventFiles, "write", 0, WriteError, 8),
    (reporting, "write_json", 2, WriteError, 12),  # of summary.json
  ]:
    with _limit(1) as fill, monkeypatch.context() as patch:
      at(patch, owner, name, when, fill)
      with pytest.raises(error) as caught:
        experiment.run(quick(), tmp_path)
    message = str(caught.value)
    assert str(tmp_path) in message
    assert "File too large" in message
    assert "run the same command again" in message
    assert "\n" not in message
    assert ("intact" in message) is (intact is not None)
    if intact is not None:
      assert f"round {intact} is intact" in message
      assert newest(tmp_path).name == str(intact)
    assert not (tmp_path / "summary.json").exists()
    assert not list(tmp_path.glob("checkpoints/*[!0-9]*"))
  experiment.run(quick(), tmp_path)
  check_same(tmp_path, undisturbed)
  assert not list(tmp_path.rglob("*tmp*"))


def test_other_data_under_the_same_path_are_refused(
  fast, tmp_path, capsys, monkeypatch
):
  rng = np.random.default_rng(0)

  def write(scale):
    x = scale * rng.normal(size=(40, 3)).astype(np.float32)
    y = np.arange(40) % 2
    np.savez(tmp_path / "mine.npz", x=x, y=y, client=np.arange(40) % 8)

  def config_of():
    source = flags.load(
      str(DIGITS),
      {
        "model.name": "logistic_regression",
        "model.hidden_sizes": "None",
        "data.name": "npz",
        "data.path": str(tmp_path / "mine.npz"),
        "data.num_clients": "None",
        "data.partition": "None",
        "data.alpha": "None",
        "data.unseen_clients": "None",
        "server.clients_per_round": "4",
        "server.rounds": "6",
        "runtime.checkpoint_every": "2",
      },
    )
    return source

  write(1.0)

  def stop(*_):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(experiment, "sum_up", stop)
    with pytest.raises(KeyboardInterrupt):
      experiment.run(config_of(), tmp_path / "run")
  write(2.0)
  with pytest.raises(ConfigChangedError, match="training data are not those"):
    experiment.run(config_of(), tmp_path / "run")
  capsys.readouterr()


def test_another_account_of_the_rounds_done_is_refused(
  fast, tmp_path, monkeypatch
):
  def write(clients):
    (tmp_path / "own.py").write_text(
      "from fedjax_sim.sampling import poisson\n\n\n"
      "def mine(num_clients, clients_per_round):\n"
      f"  return poisson(num_clients, {clients})\n"
    )

  def config_of():
    return flags.load(
      str(DIGITS),
      {
        "server.rounds": "4",
        "sampler.name": f"{tmp_path / 'own.py'}:mine",
        "runtime.checkpoint_every": "2",
        "privacy.mechanism": "gaussian",
        "privacy.clip_norm": "1.0",
        "privacy.delta": "0.001",
        "privacy.noise_multiplier": "2.0",
      },
    )

  def stop(*_):
    raise KeyboardInterrupt

  write(20)
  with monkeypatch.context() as patch:
    patch.setattr(experiment, "sum_up", stop)
    with pytest.raises(KeyboardInterrupt):
      experiment.run(config_of(), tmp_path / "run")
  write(2)
  with pytest.raises(ConfigChangedError, match=r"epsilon .*rate: 0\.2"):
    experiment.run(config_of(), tmp_path / "run")
  write(20)
  experiment.run(config_of(), tmp_path / "run")
  summary = json.loads((tmp_path / "run" / "summary.json").read_text())
  assert summary["privacy"]["rounds"] == 4
