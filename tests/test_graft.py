"""What a branch takes over: only what means the same as in its origin.

Branches stop before their first round, so hardly anything is compiled.
"""

import contextlib
import types
from typing import Any

import jax
import numpy as np
import pytest

import fedjax_sim as fs
from fedjax_sim import reporting
from fedjax_sim.config import build, default_config
from fedjax_sim.core.digests import tree_digest
from fedjax_sim.run import experiment
from fedjax_sim.run.checkpoint_reader import CheckpointReader
from fedjax_sim.run.graft import Graft, Side, fields_by_content
from fedjax_sim.run.loop import Loop
from fedjax_sim.run.workdir import ConfigChangedError, WorkdirError
from test_extend import leaves_of
from workdirs import skip_pictures

pytestmark = pytest.mark.usefixtures("same_programs")

REVERTING = {
  "client.schedule": "plateau(metric='test/accuracy')",
  "data.pad": (4, 4),  # a tuple in a field of any type
  "server.best_metrics": ("test/loss", "test/accuracy"),
  "server.revert_to_best": True,
}
PRIVATE = {
  "privacy.clip_norm": 1.0,
  "privacy.delta": 1e-3,
  "privacy.mechanism": "gaussian",
  "privacy.noise_multiplier": 2.0,
}
LOCAL = {
  "local_privacy.clip_norm": 1.0,
  "local_privacy.epsilon": 1.0,
  "local_privacy.mechanism": "laplace",
}


class StoppedError(Exception):
  """Raised instead of the first round."""


@pytest.fixture(autouse=True)
def fast(monkeypatch):
  """Drawing takes longer than a quick run."""
  skip_pictures(monkeypatch)


@pytest.fixture
def logged(monkeypatch):
  """The lines that runs log."""
  lines: list[str] = []
  record = lambda self, message, level="info": lines.append(message)
  monkeypatch.setattr(reporting.Progress, "log", record)
  return lines


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """A file of 12 clients with small images, and a test set that contradicts."""
  path = tmp_path_factory.mktemp("data") / "mine.npz"
  rng = np.random.default_rng(0)
  y = rng.integers(0, 3, 72)
  x = rng.normal(size=(72, 3, 3, 1)).astype(np.float32) + y[:, None, None, None]
  client, some = np.repeat(np.arange(12), 6), slice(0, 20)
  np.savez(path, x=x, y=y, client=client, test_x=x[some], test_y=2 - y[some])
  return path


@pytest.fixture(scope="module")
def weights(data, tmp_path_factory):
  """A file of weights to begin with."""
  path = tmp_path_factory.mktemp("weights") / "model.npz"
  task = build.build(config(data, 1, REVERTING)).simulator.task
  fs.write_weights(path, task.init(jax.random.key(1)).params)
  return path


@pytest.fixture(scope="module")
def origin(data, weights, tmp_path_factory):
  """The workdir of a run of 4 rounds that is worse at its end than before."""
  folder = tmp_path_factory.mktemp("origin") / "run"
  with pytest.MonkeyPatch.context() as patch:
    skip_pictures(patch)
    fields = {**REVERTING, "model.initial": str(weights)}
    experiment.run(config(data, 4, fields), folder)
  return folder


def config(data, rounds, *changes):
  found = default_config()
  found.data.name = "npz"
  fields = {
    "data.path": str(data),
    "runtime.checkpoint_every": 2,
    "runtime.devices": 1,
    "runtime.keep_checkpoints": 9,
    "runtime.lanes": 1,
    "server.clients_per_round": 3,
    "server.rounds": rounds,
  }
  for more in changes:
    fields |= more
  for field, value in fields.items():
    section, _, key = field.rpartition(".")
    (found[section] if section else found)[key] = value
  return found


def begin(folder, config, source=""):
  """Begin a run, and stop it before its first round."""

  def stop(*_, **__):
    raise StoppedError

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Loop, "_dispatches", stop)
    with pytest.raises(StoppedError):
      experiment.run(config, folder, branch_from=str(source))


def state_of(folder, config, round_):
  like = build.build(config).simulator.states.host_shapes
  with contextlib.closing(CheckpointReader(folder / "checkpoints")) as reader:
    return reader.read(round_, like).state


def test_an_ended_run_goes_on_with_its_best_model(
  data, weights, origin, tmp_path, capfd, logged
):
  fields = {**REVERTING, "model.initial": str(weights)}
  begin(tmp_path, config(data, 6, fields), f"{origin}:4")
  said = capfd.readouterr().err
  assert "server.revert_to_best goes on with its model of round" in said
  assert "begin anew" not in said  # tuples are lists in config.json
  assert not any("Beginning with the weights" in line for line in logged)
  best, last = fs.load(origin, "best"), fs.load(origin)
  ours = tree_digest(fs.load(tmp_path, 4).params)
  assert ours == tree_digest(best.params) != tree_digest(last.params)


@pytest.mark.integration
def test_the_end_of_its_origin_is_no_other_round(
  data, origin, weights, tmp_path
):
  fields = {**REVERTING, "model.initial": str(weights)}
  experiment.run(
    config(data, 8, fields), tmp_path / "branch", branch_from=f"{origin}:4"
  )
  experiment.run(config(data, 8, fields), tmp_path / "whole")
  assert leaves_of(tmp_path / "branch") == leaves_of(tmp_path / "whole")


def test_weights_are_not_begun_with(data, weights, origin, tmp_path, logged):
  """Also where no round was done, the model is the origin's."""
  fields = {**REVERTING, "model.initial": str(weights)}
  begin(tmp_path / "run", config(data, 6, fields))
  begins = "Beginning with the weights of model.npz"
  assert any(begins in line for line in logged)
  logged.clear()
  begin(tmp_path / "branch", config(data, 6, fields), f"{origin}:0")
  assert logged
  assert not any(begins in line for line in logged)


def test_a_schedule_of_another_metric_begins_anew(
  data, origin, tmp_path, capfd
):
  other = {
    **REVERTING,
    "client.schedule": "plateau(metric='test/loss')",
    "server.best_metrics": ("test/accuracy",),
  }
  begin(tmp_path, config(data, 6, other), f"{origin}:2")
  said = capfd.readouterr().err
  assert (
    "with them: what the schedule of client.learning_rate has seen." in said
  )
  ours = state_of(tmp_path, config(data, 6, other), 2).watch
  theirs = state_of(origin, config(data, 4, REVERTING), 2).watch
  (seen,) = ours.schedules.values()
  assert np.isinf(seen.best_value)
  (before,) = theirs.schedules.values()
  assert np.isfinite(before.best_value)
  # What another metric's best model was does not count.
  best = ours.best["test/accuracy"]
  assert best.round == theirs.best["test/accuracy"].round >= 0


def test_data_that_moved(data, origin, tmp_path, capfd):
  elsewhere = data.rename(tmp_path / "moved.npz")
  try:
    begin(tmp_path / "run", config(elsewhere, 6, REVERTING), f"{origin}:2")
    assert "begin anew" not in capfd.readouterr().err
    with np.load(elsewhere) as arrays:
      np.savez(tmp_path / "other.npz", **{**arrays, "y": 2 - arrays["y"]})
    message = "mine.npz .*; restore those of the origin there"
    with pytest.raises(WorkdirError, match=message):
      experiment.run(
        config(tmp_path / "other.npz", 6, REVERTING),
        tmp_path / "other",
        branch_from=f"{origin}:2",
      )
  finally:
    elsewhere.rename(data)


@pytest.mark.parametrize(
  ("fields", "changes"),
  [
    (PRIVATE, {"seed": (1, "seed, by which clients take turns: 0 -> 1")}),
    (
      LOCAL,
      {
        "seed": (1, "seed, by which clients take turns: 0 -> 1"),
        "server.clients_per_round": (4, "a client's turn to its next: 4 -> 3"),
      },
    ),
  ],
)
def test_turns_that_would_be_counted_wrong(data, tmp_path, fields, changes):
  cyclic = {"sampler.name": "cyclic", **fields}
  begin(tmp_path / "origin", config(data, 6, cyclic))
  for field, (value, message) in changes.items():
    with pytest.raises(ConfigChangedError, match=message):
      experiment.run(
        config(data, 6, cyclic, {field: value}),
        tmp_path / "branch",
        branch_from=f"{tmp_path / 'origin'}:0",
      )


def test_another_seed_where_nobody_takes_turns(data, tmp_path):
  begin(tmp_path / "origin", config(data, 6, LOCAL))
  other = config(data, 6, LOCAL, {"seed": 1})
  begin(tmp_path / "branch", other, f"{tmp_path / 'origin'}:0")
  assert state_of(tmp_path / "branch", other, 0).seed == 1


def graft_of(personal, before, now, same_data=True):
  simulator: Any = types.SimpleNamespace(
    algorithm=types.SimpleNamespace(personal=personal)
  )
  return Graft(Side(simulator, before), Side(simulator, now), same_data)


def test_code_is_the_same_wherever_it_lies():
  before, now = (
    fields_by_content(
      {"model": {"name": f"{folder}/mine.py:f", "metrics": [1]}, "seed": 0},
      {"model.name": f"f (SHA-256 {digest})", "model.initial": "gone"},
    )
    for folder, digest in (("a", "1"), ("b", "1"))
  )
  assert before == now
  assert before["model.name"] == "f (SHA-256 1)"
  edited = fields_by_content(
    {"model": {"name": "a/mine.py:f"}}, {"model.name": "f (SHA-256 2)"}
  )
  assert not graft_of(None, before, edited).measures("test/loss")


def test_metrics_of_clients_own_models():
  """Another algorithm makes other ones; the global model is measured alike."""
  fields = {"algorithm.name": "ditto"}, {"algorithm.name": "apfl"}
  graft = graft_of(lambda: None, *fields)
  assert graft.measures("test/loss")
  assert not graft.measures("seen/loss/mean")
  assert graft_of(None, *fields).measures("seen/loss/mean")
  assert not graft_of(None, *fields, same_data=False).measures("test/loss")
