"""Verification of a run: honest ones, and those that somebody has changed."""

import json
import shutil
import sys

import jax
import numpy as np
import pytest

from fedjax_sim.cli.main import main
from fedjax_sim.config import build
from fedjax_sim.run import experiment, resume
from fedjax_sim.run.changes import stored_config
from fedjax_sim.run.checkpoint import Checkpoints
from fedjax_sim.run.checkpoint_reader import CheckpointReader
from fedjax_sim.run.verify import stretches_of
from test_extend import quick
from workdirs import skip_pictures

pytestmark = pytest.mark.usefixtures("same_programs")

PRIVATE = {
  "privacy__mechanism": "gaussian",
  "privacy__clip_norm": "1.0",
  "privacy__delta": "1e-3",
  "privacy__noise_multiplier": "2.0",
}


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
  """The workdir of a run with checkpoints after 0, 4 and 8 rounds, and 9."""
  folder = tmp_path_factory.mktemp("honest") / "run"
  with pytest.MonkeyPatch.context() as patch:
    skip_pictures(patch)
    experiment.run(
      quick(9, server__initial_eval="True", runtime__keep_checkpoints="9"),
      folder,
    )
  return folder


@pytest.fixture
def folder(honest, tmp_path):
  return shutil.copytree(honest, tmp_path / "run")


def verify(folder, capsys, *flags):
  """The exit code, and the lines that are printed."""
  code = main(["verify", f"--workdir={folder}", *flags])
  out, err = capsys.readouterr()
  return code, (out + err).splitlines()


def test_an_honest_run(folder, capsys):
  before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
  code, lines = verify(folder, capsys)
  assert code == 0
  assert lines == [
    "machine and software: as then",
    "rounds 1 to 4: checkpoint, 5 arrays equal; metrics, 5 rows equal",
    "rounds 5 to 8: checkpoint, 5 arrays equal; metrics, 4 rows equal",
    "rounds 9 to 9: checkpoint, 5 arrays equal; metrics, 1 row equal",
    "verified: all equal",
  ]
  assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_no_tracker_is_needed(folder, capsys, monkeypatch):
  """Neither a package nor a user's own file: nothing is sent."""
  config = json.loads((folder / "config.json").read_text())
  tracker = config["trackers"]["tensorboard"]
  config["trackers"]["mlflow"] = {**tracker, "name": "mlflow"}
  del config["trackers"]["mlflow"]["folder"]
  config["trackers"]["mine"] = {"name": "gone.py:lines"}
  (folder / "config.json").write_text(json.dumps(config))
  monkeypatch.setitem(sys.modules, "mlflow", None)
  code, lines = verify(folder, capsys, "--rounds=9-9")
  assert code == 0, lines
  assert lines[-1] == "verified: all equal"


@pytest.mark.parametrize(
  ("text", "wanted"),
  [
    ("checkpoints", [(4, 8), (8, 9)]),
    ("all", [(0, 4), (4, 8), (8, 9)]),
    ("6-7", [(4, 8)]),
    ("1-9", [(0, 4), (4, 8), (8, 9)]),
    ("9-9", [(8, 9)]),
    ("0-1", [(0, 4)]),
  ],
)
def test_stretches_of_rounds(tmp_path, text, wanted):
  assert stretches_of([0, 4, 8, 9], [4, 8, 9], text, tmp_path) == wanted


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("5", "give all, checkpoints, or FROM-TO"),
    ("7-6", "give all, checkpoints, or FROM-TO"),
    ("10-12", "can be verified from round 1 to round 9; give rounds of these"),
    ("8-10", "can be verified from round 1 to round 9"),
  ],
)
def test_other_rounds_are_refused(folder, capsys, text, message):
  code, lines = verify(folder, capsys, f"--rounds={text}")
  assert code == 2
  assert message in lines[-1]


@pytest.mark.parametrize("text", ["1-5", "10-15", "0-20"])
def test_rounds_before_the_first_checkpoint_of_a_branch(tmp_path, text):
  """None is left out in silence."""
  with pytest.raises(
    ValueError, match=f"={text}: .* from round 11 to round 20"
  ):
    stretches_of([10, 20], [10, 20], text, tmp_path)


def test_a_changed_line_of_metrics(folder, capsys):
  path = folder / "metrics.jsonl"
  lines = path.read_text().splitlines(keepends=True)
  row = json.loads(lines[6])
  assert row["round"] == 6
  row["train/loss"] += 0.25
  lines[6] = json.dumps(row) + "\n"
  path.write_text("".join(lines))
  code, told = verify(folder, capsys)
  assert code == 1
  assert told[2] == (
    "rounds 5 to 8: checkpoint, 5 arrays equal; metrics, 1 differ: train/loss"
    " by 0.25"
  )
  assert "equal; metrics, 5 rows equal" in told[1]
  assert told[-1] == "NOT verified"


def test_a_url_is_no_folder(capsys):
  code, (line,) = verify("s3://b/run", capsys)
  assert code == 2
  assert "--workdir=s3://b/run is a URL, which only run takes; copy" in line


def test_a_checkpoint_that_is_gone_is_named(folder, capsys):
  (folder / "checkpoints" / "4" / "sha256.json").unlink()
  code, told = verify(folder, capsys)
  assert code == 1
  assert any("sha256.json is gone" in line for line in told), told


def test_a_row_that_is_missing(folder, capsys):
  path = folder / "metrics.jsonl"
  lines = path.read_text().splitlines(keepends=True)
  del lines[-1]
  path.write_text("".join(lines))
  code, told = verify(folder, capsys)
  assert code == 1
  assert "1 differ: round 9, whole by nan" in told[3]


def test_a_checkpoint_with_a_changed_byte(folder, capsys):
  path = max(
    (p for p in (folder / "checkpoints" / "4").rglob("*") if p.is_file()),
    key=lambda p: p.stat().st_size,
  )
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)
  code, told = verify(folder, capsys)
  assert code == 1
  assert "rounds 1 to 4: not compared: " in told[1]
  assert "rounds 5 to 8: not compared: " in told[2]
  assert "rounds 9 to 9: checkpoint, 5 arrays equal" in told[3]


def test_a_checkpoint_of_other_numbers(folder, capsys):
  """Written anew, with sums that hold: nothing but the rounds betray it."""
  states = build.build(stored_config(folder)).simulator.states
  shapes = states.host_shapes
  reader = CheckpointReader(folder / "checkpoints")
  last = reader.read(9, shapes)
  reader.close()
  better = jax.tree.map(np.copy, last.state)
  leaf = jax.tree.leaves(better.server)[-1]
  leaf.reshape(-1)[0] += np.float32(0.5)
  checkpoints = Checkpoints(folder / "checkpoints", keep=9)
  checkpoints.save(9, better, last.facts)
  checkpoints.close()
  code, told = verify(folder, capsys)
  assert code == 1
  assert "rounds 9 to 9: checkpoint, 1 differ: .server" in told[3]
  assert "by 0.5; metrics, 1 row equal" in told[3]


def test_other_software_is_said(folder, capsys, monkeypatch):
  now = resume.versions()
  monkeypatch.setattr(resume, "versions", lambda: now | {"flax": "1.2.3"})
  code, told = verify(folder, capsys)
  assert code == 0
  assert told[0] == f"other than then: flax: {now['flax']!r} -> '1.2.3'"


def test_other_data_are_refused(folder, capsys, monkeypatch):
  from fedjax_sim.run import verify as module

  monkeypatch.setattr(module, "data_digest", lambda _: "0" * 64)
  code, told = verify(folder, capsys)
  assert code == 2
  assert "training data are not those" in told[-1]


def test_a_run_that_was_extended(folder, capsys, monkeypatch):
  """The last round before was evaluated as a last one, and other rounds now."""
  skip_pictures(monkeypatch)
  fields = {
    "server__initial_eval": "True",
    "runtime__keep_checkpoints": "9",
    "server__eval_every": "2",
  }
  experiment.run(quick(12, **fields), folder)
  capsys.readouterr()
  code, told = verify(folder, capsys)
  assert code == 0
  assert [line.split(":")[0] for line in told[1:-1]] == [
    "rounds 1 to 4",
    "rounds 5 to 8",
    "rounds 9 to 9",
    "rounds 10 to 12",
  ]


def test_a_checkpoint_between_two_timetables_is_gone(
  folder, capsys, monkeypatch
):
  """Rounds 1 to 12 in one stretch, evaluated every third, then every second."""
  skip_pictures(monkeypatch)
  fields = {
    "server__initial_eval": "True",
    "runtime__keep_checkpoints": "9",
    "server__eval_every": "2",
  }
  experiment.run(quick(12, **fields), folder)
  for round_ in (4, 8, 9):
    shutil.rmtree(folder / "checkpoints" / str(round_))
  capsys.readouterr()
  code, told = verify(folder, capsys)
  assert code == 0, told
  assert told[1] == (
    "rounds 1 to 12: checkpoint, 5 arrays equal; metrics, 13 rows equal"
  )


@pytest.mark.integration
def test_a_private_run_with_noise_of_its_own(tmp_path, capsys, monkeypatch):
  """It was extended beyond round 65, whose row counts as round 66."""
  skip_pictures(monkeypatch)
  fields = {
    **PRIVATE,
    "server__eval_every": "5",
    "runtime__checkpoint_every": "65",
    "runtime__rounds_per_dispatch": "65",
  }
  for rounds in (65, 67):
    summary = experiment.run(quick(rounds, **fields), tmp_path / "run")
    assert summary["privacy/epsilon"] == summary["privacy"]["epsilon"]
  shutil.rmtree(tmp_path / "run" / "checkpoints" / "0")
  capsys.readouterr()
  code, told = verify(tmp_path / "run", capsys, "--rounds=all")
  assert code == 0, told
  assert len(told) == 4
  rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
  epsilons = [json.loads(row)["privacy/epsilon"] for row in rows]
  assert epsilons[63] < epsilons[64] == epsilons[65] < epsilons[66]


@pytest.mark.parametrize(
  "what", ["nothing", "no checkpoint", "no config", "no metrics"]
)
def test_no_run(tmp_path, folder, capsys, what):
  if what == "nothing":
    folder = tmp_path / "nothing"
  elif what == "no config":
    (folder / "config.json").unlink()
  elif what == "no metrics":
    (folder / "metrics.jsonl").unlink()
  else:
    shutil.rmtree(folder / "checkpoints")
  code, lines = verify(folder, capsys)
  assert code == 2
  assert str(folder) in lines[-1]
