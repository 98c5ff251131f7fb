"""A finished run that is given more rounds: what may change, and what not."""

import json
import pathlib
import shutil

import pytest
from pyarrow import parquet

from fedjax_sim import config, reporting
from fedjax_sim.config import flags
from fedjax_sim.run import changes, checkpoint_files, experiment
from fedjax_sim.run.loop import Loop
from fedjax_sim.run.workdir import ConfigChangedError, WorkdirError
from fedjax_sim.simulation.simulator import Simulator
from workdirs import skip_pictures

pytestmark = pytest.mark.usefixtures("same_programs")

DIGITS = pathlib.Path(__file__).parents[1] / "configs" / "digits_fedavg.py"
QUICK = {
  "model.name": "logistic_regression",
  "model.hidden_sizes": "None",
  "data.num_clients": "20",
  "server.clients_per_round": "6",
  "server.rounds": "6",
  "server.eval_every": "3",
  "client.epochs": "1",
  "runtime.checkpoint_every": "4",
  "runtime.rounds_per_dispatch": "4",
  "runtime.devices": "1",
}
PLATEAU = {"client__schedule": "plateau(metric='test/loss')"}


def flags_of(rounds, **changes):
  named = {field.replace("__", "."): text for field, text in changes.items()}
  return QUICK | {"server.rounds": str(rounds)} | named


def quick(rounds, **changes):
  return flags.load(str(DIGITS), flags_of(rounds, **changes))


@pytest.fixture(autouse=True)
def fast(monkeypatch):
  """Drawing takes longer than a quick run."""
  skip_pictures(monkeypatch)


def run(folder, rounds, **changes):
  return experiment.run(quick(rounds, **changes), folder)


@pytest.fixture(scope="module")
def six(tmp_path_factory):
  """The workdir of a finished run of 6 rounds."""
  folder = tmp_path_factory.mktemp("six") / "run"
  with pytest.MonkeyPatch.context() as patch:
    skip_pictures(patch)
    run(folder, 6)
  return folder


@pytest.fixture
def finished(six, tmp_path):
  return shutil.copytree(six, tmp_path / "run")


def leaves_of(folder):
  """The SHA-256 of every array of the newest checkpoint."""
  last = max(checkpoint_files.rounds_in(folder / "checkpoints"))
  record = folder / "checkpoints" / str(last) / "record" / "metadata"
  return json.loads(record.read_text())["sha256"]


def rows_of(folder):
  return reporting.read_metrics(folder / "metrics.jsonl")


def test_more_rounds_are_as_good_as_all_at_once(finished, tmp_path, capsys):
  extended = run(finished, 12)
  assert "server.rounds: 6 -> 12" in capsys.readouterr().err
  whole = run(tmp_path / "whole", 12)
  assert extended["params_digest"] == whole["params_digest"]
  assert extended["rounds"] == 12
  assert leaves_of(finished) == leaves_of(tmp_path / "whole")
  assert rows_of(finished) == rows_of(tmp_path / "whole")
  stored = json.loads((finished / "config.json").read_text())
  assert stored["server"]["rounds"] == 12


def test_a_crash_of_what_was_added(finished, tmp_path, monkeypatch):
  def crash(*_, **__):
    raise RuntimeError("crashed")

  with monkeypatch.context() as patch:
    patch.setattr(Simulator, "dispatch", crash)
    with pytest.raises(RuntimeError, match="crashed"):
      run(finished, 12)
  assert not (finished / "summary.json").exists()
  with pytest.raises(ConfigChangedError, match="done 6 rounds"):
    run(finished, 5)
  extended, whole = run(finished, 12), run(tmp_path / "whole", 12)
  assert extended["params_digest"] == whole["params_digest"]


def test_evaluations_and_checkpoints_may_change(finished, tmp_path):
  other = {
    "server__eval_every": "4",
    "server__snapshot_every": "3",
    "runtime__checkpoint_every": "5",
    "runtime__rounds_per_dispatch": "3",
    "runtime__residency": "host",
  }
  extended, whole = run(finished, 12, **other), run(tmp_path / "whole", 12)
  assert extended["params_digest"] == whole["params_digest"]
  rounds = [r["round"] for r in rows_of(finished) if "test/loss" in r]
  assert rounds == [3, 6, 8, 12]
  kept = checkpoint_files.rounds_in(finished / "checkpoints")
  assert kept == [0, 6, 9, 10, 12]


def test_snapshots_of_a_run_that_goes_on(tmp_path):
  folder, saved = tmp_path / "run", tmp_path / "run" / "checkpoints"
  seldom = {
    "server__snapshot_every": "3",
    "server__eval_every": "100",
    "runtime__checkpoint_every": "100",
    "runtime__keep_checkpoints": "2",
    "runtime__rounds_per_dispatch": "64",
  }
  run(folder, 7, **seldom)
  assert checkpoint_files.rounds_in(saved) == [0, 3, 6, 7]
  extended = run(folder, 11, **seldom)
  assert checkpoint_files.rounds_in(saved) == [0, 3, 6, 9, 11]
  timings = reporting.read_metrics(folder / "timings.jsonl")
  assert [row["rounds"] for row in timings] == [3, 3, 1, 2, 2]
  # What a kill in round 10 leaves.
  (folder / "summary.json").unlink()
  shutil.rmtree(saved / "11")
  resumed = run(folder, 11, **seldom)
  assert checkpoint_files.rounds_in(saved) == [0, 3, 6, 9, 11]
  assert resumed["params_digest"] == extended["params_digest"]


def test_no_snapshot_after_no_round(tmp_path):
  with pytest.raises(ValueError, match=r"server\.snapshot_every=0 "):
    run(tmp_path / "run", 3, server__snapshot_every="0")
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("changes", "name"),
  [
    ({"client__learning_rate": "0.5"}, "client.learning_rate: 0.1 -> 0.5"),
    ({"seed": "1"}, "seed: 0 -> 1"),
    ({"runtime__devices": "2"}, "runtime.devices: 1 -> 2"),
    # The metrics' last digits, and what follows them.
    ({"runtime__eval_batch_size": "64"}, "runtime.eval_batch_size: 256 -> 64"),
    ({"sampler__name": "cyclic"}, "sampler.name: 'uniform' -> 'cyclic'"),
  ],
)
def test_what_made_the_past_stays(finished, changes, name):
  before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
  with pytest.raises(ConfigChangedError) as caught:
    run(finished, 12, **changes)
  assert name in str(caught.value)
  assert f"--branch-from={finished}" in str(caught.value)
  assert "server.rounds" not in str(caught.value)
  assert before == {
    p: p.read_bytes() for p in finished.rglob("*") if p.is_file()
  }


@pytest.mark.slow
def test_devices_may_change_where_bits_do_not(tmp_path):
  same = {"runtime__deterministic_reduction": "2", "runtime__lanes": "2"}
  run(tmp_path / "run", 3, **same)
  extended = run(tmp_path / "run", 6, **same, runtime__devices="2")
  whole = run(tmp_path / "whole", 6, **same)
  assert extended["params_digest"] == whole["params_digest"]


def test_rounds_that_were_done_as_no_end(tmp_path, monkeypatch):
  """The end of a run is evaluated, and these rounds were not."""

  def crash(*_, **__):
    raise RuntimeError("crashed")

  with monkeypatch.context() as patch:
    patch.setattr(Loop, "_evaluate", crash)
    with pytest.raises(RuntimeError, match="crashed"):
      run(tmp_path, 9, server__eval_every="9")
  assert checkpoint_files.rounds_in(tmp_path / "checkpoints")[-1] == 8
  before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
  with pytest.raises(ConfigChangedError, match="not evaluated as at its end"):
    run(tmp_path, 8, server__eval_every="9")
  after = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
  assert before == after


def test_no_code_of_another_config_runs(finished, tmp_path):
  """What a stored config names is imported only if it is the user's own."""
  ran = tmp_path / "ran"
  code = tmp_path / "evil.py"
  code.write_text(f"open({str(ran)!r}, 'w').close()\n")
  path = finished / "config.json"
  stored = json.loads(path.read_text())
  stored["model"]["name"] = f"{code}:f"
  path.write_text(json.dumps(stored))
  with pytest.raises(ConfigChangedError, match=r"model\.name"):
    run(finished, 12)
  assert not ran.exists()


def test_no_code_of_another_configs_trackers_runs(finished, tmp_path):
  """Nor is it missed, where the run goes on with other trackers."""
  ran = tmp_path / "ran"
  code = tmp_path / "evil.py"
  code.write_text(f"open({str(ran)!r}, 'w').close()\ndef f(): ...\n")
  path = finished / "config.json"
  stored = json.loads(path.read_text())
  ours = config.resolved(config.complete(quick(12)))
  named = "trackers.tensorboard.name"
  for name in (f"{code}:f", f"{tmp_path}/gone.py:f"):
    # Fields of now that it lacks, in free sections and in others.
    stored["trackers"] = {"other": {"name": name}}
    stored["runtime"].pop("start_timeout", None)
    path.write_text(json.dumps(stored))
    found = changes.changes_since(finished, ours)
    assert found is not None
    assert found.keys() >= {"trackers.other.name", named, "server.rounds"}
    assert found[named] == (None, "tensorboard")
    assert "runtime.start_timeout" not in found
  assert not ran.exists()


@pytest.mark.parametrize("ended", [True, False])
def test_a_run_without_its_checkpoints(finished, ended):
  """Half copied: it would begin anew, and lose its metrics."""
  shutil.rmtree(finished / "checkpoints")
  if not ended:
    (finished / "summary.json").unlink()
  before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
  with pytest.raises(WorkdirError, match="without its checkpoints"):
    run(finished, 12)
  assert before == {
    p: p.read_bytes() for p in finished.rglob("*") if p.is_file()
  }
  if ended:
    assert run(finished, 6)["rounds"] == 6


def test_an_older_summary_is_no_end(finished):
  """Copied in part: the config of now, the summary of 6 rounds."""
  shutil.rmtree(finished / "checkpoints")
  path = finished / "config.json"
  stored = json.loads(path.read_text())
  stored["server"]["rounds"] = 12
  path.write_text(json.dumps(stored))
  metrics = (finished / "metrics.jsonl").read_bytes()
  with pytest.raises(WorkdirError, match="without its checkpoints"):
    run(finished, 12)
  assert (finished / "metrics.jsonl").read_bytes() == metrics


def test_fewer_rounds_than_were_done(finished):
  with pytest.raises(
    ConfigChangedError, match="rounds=5: .* has done 6 rounds"
  ):
    run(finished, 5)


def test_the_end_of_a_run_that_reverts_to_its_best(tmp_path):
  """Its last model is what was evaluated; more rounds begin with the best."""
  worse = {
    "server__best_metrics": "test/loss,test/accuracy",
    "server__revert_to_best": "True",
    "server__learning_rate": "8",  # rounds 3 and 6 are worse than 2
    "server__eval_every": "2",
  }
  first = run(tmp_path / "run", 6, **worse)
  assert first["best/test/loss/round"] < 6
  extended = run(tmp_path / "run", 10, **worse)
  whole = run(tmp_path / "whole", 10, **worse)
  assert extended["params_digest"] == whole["params_digest"]
  for name in ("best/test/loss/round", "best/test/accuracy/round"):
    assert extended[name] == whole[name] > 0
  assert leaves_of(tmp_path / "run") == leaves_of(tmp_path / "whole")


def test_a_schedule_that_followed_the_last_evaluation(tmp_path):
  run(tmp_path, 4, **PLATEAU)
  message = "the schedule of client.learning_rate followed the evaluation at"
  with pytest.raises(ConfigChangedError, match=message):
    run(tmp_path, 6, **PLATEAU)
  with pytest.raises(ConfigChangedError, match=r"server\.eval_every: 3 -> 2"):
    run(tmp_path, 6, **PLATEAU, server__eval_every="2")


@pytest.mark.slow
def test_a_schedule_that_followed_evaluations_goes_on(tmp_path):
  run(tmp_path / "run", 3, **PLATEAU)
  extended = run(tmp_path / "run", 6, **PLATEAU)
  whole = run(tmp_path / "whole", 6, **PLATEAU)
  assert extended["params_digest"] == whole["params_digest"]


@pytest.mark.slow
def test_a_private_run_goes_on_where_its_account_holds(tmp_path):
  private = {
    "privacy__mechanism": "gaussian",
    "privacy__clip_norm": "1.0",
    "privacy__delta": "1e-3",
    "privacy__noise_seed": "1",
  }
  fixed = private | {"privacy__noise_multiplier": "2.0"}
  run(tmp_path / "run", 3, **fixed)
  extended = run(tmp_path / "run", 6, **fixed)
  whole = run(tmp_path / "whole", 6, **fixed)
  assert extended["params_digest"] == whole["params_digest"]
  assert extended["privacy"] == whole["privacy"]

  fitted = private | {"privacy__target_epsilon": "8.0"}
  run(tmp_path / "fitted", 3, **fitted)
  before = (tmp_path / "fitted" / "summary.json").read_bytes()
  with pytest.raises(ConfigChangedError, match="noise_multiplier"):
    run(tmp_path / "fitted", 6, **fitted)
  assert (tmp_path / "fitted" / "summary.json").read_bytes() == before


@pytest.mark.slow
def test_the_clients_log_goes_on(tmp_path):
  logged = {"server__client_log": "True"}
  run(tmp_path / "run", 3, **logged)
  run(tmp_path / "run", 6, **logged)
  run(tmp_path / "whole", 6, **logged)
  ours, theirs = (
    parquet.read_table(tmp_path / name / "client_rounds.parquet")
    for name in ("run", "whole")
  )
  assert ours.equals(theirs)


def test_a_field_that_the_run_did_not_have_yet(finished, tmp_path):
  path = finished / "config.json"
  stored = json.loads(path.read_text())
  del stored["runtime"]["start_timeout"], stored["replay"]
  path.write_text(json.dumps(stored))
  extended, whole = run(finished, 12), run(tmp_path / "whole", 12)
  assert extended["params_digest"] == whole["params_digest"]


@pytest.mark.parametrize("section", ["server", None])
def test_a_field_that_there_is_no_more(finished, section):
  path = finished / "config.json"
  stored = json.loads(path.read_text())
  (stored[section] if section else stored)["sampling"] = "uniform"
  path.write_text(json.dumps(stored))
  with pytest.raises(ConfigChangedError, match="another version of fedjax_sim"):
    run(finished, 12)


def test_free_fields_are_fields_of_configs():
  fields = dict(config.fields_of(config.default_config()))
  assert set(changes.FREE) <= fields.keys()
