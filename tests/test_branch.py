"""Branches of a run: what they begin with, and what is refused."""

import json
import shutil
import subprocess
import sys

import pytest
from pyarrow import parquet

import fedjax_sim
from fedjax_sim.cli.main import main
from fedjax_sim.config import build
from fedjax_sim.core.digests import tree_digest
from fedjax_sim.run import experiment
from fedjax_sim.run.checkpoint import CheckpointError, Checkpoints
from fedjax_sim.run.workdir import ConfigChangedError, WorkdirError
from test_extend import DIGITS, flags_of, leaves_of, quick, rows_of, run
from workdirs import first_rounds, skip_pictures

pytestmark = pytest.mark.usefixtures("same_programs")

KEPT = {"runtime__keep_checkpoints": "9", "server__eval_every": "2"}
PRIVATE = {
  "privacy__mechanism": "gaussian",
  "privacy__clip_norm": "1.0",
  "privacy__delta": "1e-3",
  "privacy__noise_multiplier": "2.0",
}


@pytest.fixture(autouse=True)
def fast(monkeypatch):
  """Drawing takes longer than a quick run."""
  skip_pictures(monkeypatch)


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
  """The workdir of a run of 8 rounds, with checkpoints after 0, 4 and 8."""
  folder = tmp_path_factory.mktemp("origin") / "run"
  with pytest.MonkeyPatch.context() as patch:
    skip_pictures(patch)
    run(folder, 8, **KEPT)
  return folder


def branch(folder, source, rounds, **changes):
  config = quick(rounds, **KEPT, **changes)
  return experiment.run(config, folder, branch_from=str(source))


def test_another_rate_is_as_by_hand(origin, tmp_path, capsys):
  branched = branch(
    tmp_path / "branch", f"{origin}:4", 8, client__learning_rate="0.02"
  )
  assert "client.learning_rate: 0.1 -> 0.02" in capsys.readouterr().err

  state = None
  for rate, last in (("0.1", 4), ("0.02", 8)):
    config = quick(8, **KEPT, client__learning_rate=rate, runtime__lanes="1")
    simulator = build.build(config).simulator
    state = simulator.init() if state is None else state
    for out in simulator.run(state, last):
      state = out.state
  assert state is not None
  params = simulator.algorithm.variables(state.server).params
  assert branched["params_digest"] == tree_digest(params)


def test_the_same_settings_are_the_same_run(origin, tmp_path):
  branch(tmp_path, f"{origin}:4", 8)
  assert leaves_of(tmp_path) == leaves_of(origin)
  assert rows_of(tmp_path) == rows_of(origin)
  stored = json.loads((tmp_path / "config.json").read_text())
  assert stored["origin"] == {"workdir": str(origin), "round": 4}


def test_without_a_round_it_is_the_newest(origin, tmp_path):
  summary = branch(tmp_path, origin, 10)
  whole = run(tmp_path / "whole", 10, **KEPT)
  assert summary["params_digest"] == whole["params_digest"]
  # Going on needs no origin any more, but another one is refused.
  experiment.run(quick(12, **KEPT), tmp_path)
  with pytest.raises(ConfigChangedError, match=f"branched from {origin}:8"):
    branch(tmp_path, f"{origin}:4", 12)
  with pytest.raises(ConfigChangedError, match="branched from no other run"):
    branch(tmp_path / "whole", origin, 12)


def test_a_crash_before_the_first_checkpoint(origin, tmp_path, monkeypatch):
  def crash(*_, **__):
    raise CheckpointError("crashed")

  with monkeypatch.context() as patch:
    patch.setattr(Checkpoints, "save_later", crash)
    with pytest.raises(CheckpointError, match="crashed"):
      branch(tmp_path, f"{origin}:4", 8)
  experiment.run(quick(8, **KEPT), tmp_path)  # without naming the origin
  assert leaves_of(tmp_path) == leaves_of(origin)


def test_another_algorithm_takes_over_the_model(origin, tmp_path, capsys):
  branch(tmp_path, f"{origin}:8", 9, algorithm__name="scaffold")
  err = capsys.readouterr().err
  assert "begin anew" in err
  assert "the clients' states" in err
  ours, theirs = fedjax_sim.load(tmp_path, 8), fedjax_sim.load(origin, 8)
  assert tree_digest(ours.params) == tree_digest(theirs.params)


def test_states_of_clients_go_on(tmp_path):
  scaffold = {"algorithm__name": "scaffold"}
  run(tmp_path / "origin", 8, **KEPT, **scaffold)
  branch(tmp_path / "branch", f"{tmp_path / 'origin'}:4", 8, **scaffold)
  assert leaves_of(tmp_path / "branch") == leaves_of(tmp_path / "origin")


def test_a_branch_is_verified(origin, tmp_path, capsys):
  branch(tmp_path, f"{origin}:4", 8, client__learning_rate="0.02")
  capsys.readouterr()
  assert main(["verify", f"--workdir={tmp_path}", "--rounds=all"]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert [line.split(":")[0] for line in lines[1:-1]] == ["rounds 5 to 8"]


@pytest.mark.slow
def test_the_best_of_other_data_is_not_taken_over(tmp_path, capsys):
  best = {
    "server__best_metrics": "test/loss",
    "client__schedule": "plateau(metric='test/loss')",
  }
  run(tmp_path / "origin", 8, **KEPT, **best)
  capsys.readouterr()
  for i, other in enumerate(({"data__seed": "1"}, {"model__frozen": ".*bias"})):
    folder = tmp_path / f"branch{i}"
    if i:
      with pytest.raises(ConfigChangedError, match="the model is another one"):
        branch(folder, f"{tmp_path / 'origin'}:8", 10, **best, **other)
      continue
    summary = branch(folder, f"{tmp_path / 'origin'}:8", 10, **best, **other)
    assert summary["best/test/loss/round"] == 10
    err = capsys.readouterr().err
    assert "The data are other ones than the origin's" in err
    assert "what the schedule of client.learning_rate has seen" in err
    assert "the best model by test/loss." in err
  branch(tmp_path / "same", f"{tmp_path / 'origin'}:8", 10, **best)
  assert "begin anew" not in capsys.readouterr().err


def test_another_branch_was_killed_as_it_began(origin, tmp_path):
  """It left rows and parts of another origin, and no config."""
  folder = tmp_path / "branch"
  (folder / "client_rounds").mkdir(parents=True)
  (folder / "client_rounds" / "1-2.parquet").write_bytes(b"other")
  (folder / "metrics.jsonl").write_text('{"round": 1}\n')
  branch(folder, f"{origin}:4", 8)
  assert rows_of(folder) == rows_of(origin)
  assert not (folder / "client_rounds").exists()


@pytest.mark.slow
def test_several_processes(origin, tmp_path):
  """The origin is rebuilt by all of them, and read by the first one."""
  fields = flags_of(8, client__learning_rate="0.02")
  command = [
    *(sys.executable, "-m", "fedjax_sim", "launch", "--processes=2", "--"),
    *("run", f"--config={DIGITS}", f"--workdir={tmp_path / 'branch'}"),
    f"--branch-from={origin}:4",
    *(f"--config.{k}={v}" for k, v in fields.items()),
    *("--config.runtime.devices=None", "--config.runtime.lanes=1"),
  ]
  done = subprocess.run(
    command, capture_output=True, text=True, check=False, timeout=240
  )
  assert done.returncode == 0, done.stderr
  assert "Branching from" in done.stderr
  rows = rows_of(tmp_path / "branch")
  assert rows[:4] == rows_of(origin)[:4]
  assert len(rows) == 8
  assert first_rounds(tmp_path / "branch") == [5]


@pytest.mark.slow
def test_the_log_of_clients(tmp_path, origin):
  logged = {"server__client_log": "True"}
  run(tmp_path / "origin", 8, **KEPT, **logged)
  branch(tmp_path / "branch", f"{tmp_path / 'origin'}:4", 8, **logged)
  ours, theirs = (
    parquet.read_table(tmp_path / name / "client_rounds.parquet")
    for name in ("branch", "origin")
  )
  assert ours.equals(theirs)
  with pytest.raises(ConfigChangedError, match="logged no clients"):
    branch(tmp_path / "other", f"{origin}:4", 8, **logged)


@pytest.mark.parametrize(
  ("place", "rounds", "changes", "message"),
  [
    ("{}:5", 8, {}, "no checkpoint of round 5; there are those of 0, 4, 8"),
    ("{}/none", 8, {}, "none has no checkpoints"),
    ("{}:8", 8, {}, "rounds=8: the branch begins after round 8; give more"),
    (
      "{}:4",
      8,
      {"model__name": "mlp", "model__hidden_sizes": "(4,)"},
      "the model is another one .* model.initial",
    ),
    ("{}:4", 8, PRIVATE, "one that becomes private, has the same account"),
  ],
)
def test_what_is_refused(origin, tmp_path, place, rounds, changes, message):
  folder = tmp_path / "branch"
  with pytest.raises((ConfigChangedError, WorkdirError), match=message):
    branch(folder, place.format(origin), rounds, **changes)
  left = {path.name for path in folder.rglob("*")} if folder.exists() else set()
  assert left <= {".lock", "checkpoints"}


@pytest.mark.slow
def test_a_branch_of_a_private_run(tmp_path, capsys):
  """Its account goes on, but never with the origin's noise."""
  source = tmp_path / "origin"
  run(source, 8, **KEPT, **PRIVATE)
  branch(tmp_path / "branch", f"{source}:4", 8, **PRIVATE)
  assert "privacy compose" in capsys.readouterr().err
  ours, theirs = (
    json.loads((folder / "summary.json").read_text())
    for folder in (tmp_path / "branch", source)
  )
  assert ours["privacy"] == theirs["privacy"]
  assert ours["params_digest"] != theirs["params_digest"]
  for changes in (
    PRIVATE | {"privacy__clip_norm": "0.5"},
    PRIVATE | {"privacy__noise_multiplier": "4.0"},
    PRIVATE | {"privacy__target_epsilon": "100.0"},
    {},
  ):
    with pytest.raises(ConfigChangedError, match="the same account"):
      branch(tmp_path / "other", f"{source}:4", 8, **changes)
    shutil.rmtree(tmp_path / "other", ignore_errors=True)


def test_weights_to_begin_with_are_refused(origin, tmp_path):
  weights = tmp_path / "model.npz"
  fedjax_sim.write_weights(weights, fedjax_sim.load(origin, 4).params)
  with pytest.raises(ConfigChangedError, match="its origin's model"):
    branch(tmp_path / "branch", f"{origin}:4", 8, model__initial=str(weights))


@pytest.mark.parametrize("url", ["s3://b/run", "s3://b/run:4"])
def test_a_url_is_no_origin(tmp_path, url):
  with pytest.raises(ValueError, match=f"--branch-from={url} is a URL, which"):
    branch(tmp_path / "branch", url, 8)
  assert not (tmp_path / "branch").exists()


def test_a_damaged_checkpoint_is_named(origin, tmp_path):
  source = shutil.copytree(origin, tmp_path / "origin")
  (source / "checkpoints" / "4" / "sha256.json").unlink()
  with pytest.raises(WorkdirError, match=":4: the checkpoint cannot be read"):
    branch(tmp_path / "branch", f"{source}:4", 8)


def test_the_origin_is_not_changed(origin, tmp_path):
  before = {p: p.read_bytes() for p in origin.rglob("*") if p.is_file()}
  branch(tmp_path, f"{origin}:4", 6)
  assert before == {p: p.read_bytes() for p in origin.rglob("*") if p.is_file()}
