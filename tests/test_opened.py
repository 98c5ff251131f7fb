"""Runs are opened as they are: their models, metrics and predictions."""

import json
import pathlib
import shutil
import sys
import textwrap
import time
from typing import Any

import jax
import numpy as np
import pytest

import fedjax_sim as fs
from fedjax_sim import reporting
from fedjax_sim.config import flags
from fedjax_sim.core.digests import tree_digest
from fedjax_sim.data.store.rewrite import write_store
from fedjax_sim.run import experiment
from fedjax_sim.run.checkpoint_reader import CheckpointReader, StateChangedError
from fedjax_sim.run.workdir import ConfigChangedError, WorkdirError
from tiers import slow_but
from workdirs import skip_pictures

load: Any = fs.load  # what it returns has parts that may be None
pytestmark = pytest.mark.usefixtures("same_programs")

ROOT = pathlib.Path(__file__).resolve().parents[1]
DIGITS = ROOT / "configs" / "digits_fedavg.py"
TINY = {
  "model.hidden_sizes": "8",
  "data.num_clients": "10",
  "data.heldout_fraction": "0.2",
  "data.unseen_clients": "2",
  "server.clients_per_round": "3",
  "server.rounds": "4",
  "server.eval_every": "1",
  "client.epochs": "1",
  "client.batch_size": "32",
  "runtime.devices": "1",
  "runtime.checkpoint_every": "2",
}


def run(folder, spec=DIGITS, base=TINY, **changes):
  """Run a config in a folder; return its summary."""
  named = {field.replace("__", "."): text for field, text in changes.items()}
  with pytest.MonkeyPatch.context() as patch:
    skip_pictures(patch)
    return experiment.run(flags.load(str(spec), {**base, **named}), folder)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
  """The workdir of a run on digits, checkpoints after rounds 0, 2 and 4."""
  folder = tmp_path_factory.mktemp("digits") / "run"
  run(folder, server__best_metrics="test/loss")
  return folder


@pytest.fixture
def copied(digits, tmp_path):
  """A copy of that workdir, to be changed."""
  return shutil.copytree(digits, tmp_path / "copied")


def accuracy(opened, examples, **named):
  """How many of the examples are right, as a share."""
  outputs = opened.predict({"x": np.asarray(examples["x"])}, **named)
  return float(np.mean(outputs.argmax(-1) == examples["y"]))


def check_test_accuracy(folder):
  """Predictions reach the test accuracy that the run measured."""
  opened = load(folder)
  test = opened.simulator.data.test
  expected = opened.summary["test/accuracy"]
  assert accuracy(opened, test) == pytest.approx(expected, rel=1e-6)
  return opened


def test_predictions_are_what_the_run_measured(digits):
  opened = check_test_accuracy(digits)
  unseen = opened.simulator.data.unseen
  assert accuracy(opened, unseen.examples) == pytest.approx(
    opened.summary["unseen/accuracy"], rel=1e-6
  )
  assert tree_digest(opened.params) == opened.summary["params_digest"]
  assert opened.params is opened.variables.params
  assert opened.round == 4
  assert opened.config.model.hidden_sizes == (8,)
  assert opened.config.runtime.devices == 1
  assert opened.task is opened.simulator.task
  assert repr(opened) == f"OpenedRun({str(digits)!r}, round=4, finished)"


def test_metrics_are_arrays(digits):
  rows = reporting.read_metrics(digits / "metrics.jsonl")
  metrics = load(str(digits)).metrics
  assert metrics["round"].dtype == np.int64
  np.testing.assert_array_equal(metrics["round"], [1, 2, 3, 4])
  assert metrics.keys() == {name for row in rows for name in row}
  np.testing.assert_array_equal(
    metrics["test/accuracy"], [row["test/accuracy"] for row in rows]
  )


def test_rows_without_a_metric_are_nan(copied):
  path = copied / "metrics.jsonl"
  lines = path.read_text().splitlines()
  row = json.loads(lines[1])
  del row["test/loss"]
  lines[1] = json.dumps({**row, "train/loss": None})
  path.write_text("\n".join(lines) + '\n{"round": 5, "tes')  # torn
  (copied / "summary.json").unlink()
  opened = load(copied)
  assert opened.summary is None
  assert "unfinished" in repr(opened)
  for name in ("test/loss", "train/loss"):
    np.testing.assert_array_equal(
      np.isnan(opened.metrics[name]), [False, True, False, False]
    )
  path.unlink()
  assert load(copied).metrics["round"].size == 0


def test_a_round_and_the_best_one(digits):
  opened = [load(digits, round_) for round_ in (0, 2, 4)]
  assert [o.round for o in opened] == [0, 2, 4]
  assert len({tree_digest(o.params) for o in opened}) == 3
  best = load(digits, "best")
  assert load(digits, "best/test/loss").round == best.round
  losses = best.metrics["test/loss"]
  assert best.round == best.metrics["round"][losses.argmin()]
  assert best.round == best.summary["best/test/loss/round"]
  if best.round in (2, 4):
    same = opened[best.round // 2]
    assert tree_digest(same.params) == tree_digest(best.params)
  examples = best.simulator.data.test
  expected = best.metrics["test/accuracy"][losses.argmin()]
  assert accuracy(best, examples) == pytest.approx(expected, rel=1e-6)


def contents(folder):
  """Everything in a folder, with the times of changes."""
  return {
    path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes())
    for path in [folder, *folder.rglob("*")]
  }


def test_nothing_in_the_workdir_changes(copied):
  (copied / "checkpoints" / "6.unfinished").mkdir()  # of a run that goes on
  before = contents(copied)
  check_test_accuracy(copied)
  assert contents(copied) == before


@pytest.mark.parametrize("when", ["record", "state"])
def test_a_checkpoint_that_is_removed_meanwhile(
  copied, tmp_path, monkeypatch, when
):
  """The run goes on: there is a newer one, and the oldest goes."""
  saved, newer = copied / "checkpoints", tmp_path / "4"
  (saved / "4").rename(newer)
  original = CheckpointReader._load

  def removed(self, round_, item, how):
    if item == when and not (saved / "4").exists():
      shutil.copytree(newer, saved / "4")
      shutil.rmtree(saved / "2")
    return original(self, round_, item, how)

  monkeypatch.setattr(CheckpointReader, "_load", removed)
  assert load(copied).round == 4
  with pytest.raises(WorkdirError, match="no checkpoint of it; there are 0, 4"):
    load(copied, 2)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(copied):
  shutil.rmtree(copied / "checkpoints" / "4" / "state")
  with pytest.warns(UserWarning, match=r"round 4 in .* is damaged .*before is"):
    assert load(copied).round == 2
  assert (copied / "checkpoints" / "4").exists()
  with pytest.raises(WorkdirError, match=r"round=4: its checkpoint .* damaged"):
    load(copied, 4)


def test_a_folder_without_a_file_is_no_checkpoint(copied):
  for name in ("3", "4"):
    shutil.rmtree(copied / "checkpoints" / name, ignore_errors=True)
    (copied / "checkpoints" / name / "state" / "d").mkdir(parents=True)
  assert load(copied).round == 2
  with pytest.raises(WorkdirError, match="no checkpoint of it; there are 0, 2"):
    load(copied, 4)
  (copied / "summary.json").unlink()
  run(copied, server__best_metrics="test/loss")  # which replaces it
  assert load(copied).round == 4


def test_what_is_damaged_is_named_not_numbered(copied):
  (copied / "checkpoints" / "4" / "sha256.json").unlink()
  with pytest.raises(WorkdirError, match=r"damaged \(sha256.json is gone\)"):
    load(copied, 4)


def test_a_url_is_no_folder():
  with pytest.raises(ValueError, match="workdir=s3://b/run is a URL, which on"):
    load("s3://b/run")


def test_a_leaf_that_changed_is_noticed(copied, monkeypatch):
  original = CheckpointReader._load

  def wrong(self, round_, item, how):
    loaded = original(self, round_, item, how)
    if item == "state":
      key = max(loaded, key=lambda k: loaded[k].size)
      loaded[key] = np.nextafter(loaded[key], 9)
    return loaded

  monkeypatch.setattr(CheckpointReader, "_load", wrong)
  with pytest.raises(WorkdirError, match=r"is damaged \(the SHA-256 of "):
    load(copied, 4)


def test_what_is_restored_is_the_model_alone(digits, monkeypatch):
  """No client states, no best model, no transforms' states are read."""
  read = {}
  original = CheckpointReader._load

  def counted(self, round_, item, how):
    loaded = original(self, round_, item, how)
    if item == "state":
      read.update(loaded)
    return loaded

  monkeypatch.setattr(CheckpointReader, "_load", counted)
  opened = load(digits)
  model = jax.tree.leaves(opened.params)
  assert sum(x.nbytes for x in read.values()) == sum(x.nbytes for x in model)


# --- what is refused ----------------------------------------------------------


@pytest.mark.parametrize(
  ("round_", "error", "message"),
  [
    ("best/loss", ValueError, r"round='best/loss': metric='loss' is unknown"),
    (3, WorkdirError, r"round=3: .* no checkpoint of it; there are 0, 2, 4"),
    ("last", ValueError, r"round='last': give a number, 'best' or None"),
    (-1, ValueError, r"round=-1 is out of range"),
    (1.5, TypeError, r"round=1\.5 is a float"),
  ],
)
def test_rounds_that_there_are_not(digits, round_, error, message):
  with pytest.raises(error, match=message):
    load(digits, round_)


def test_folders_that_hold_no_run(tmp_path, copied):
  for folder in (tmp_path / "none", tmp_path):
    with pytest.raises(WorkdirError, match="holds no run: there is no config"):
      load(folder)
  shutil.rmtree(copied / "checkpoints")
  with pytest.raises(WorkdirError, match="has no checkpoint; wait for the run"):
    load(copied)
  (copied / "config.json").write_text('{"seed"')
  with pytest.raises(WorkdirError, match=r"config\.json is damaged"):
    load(copied)


def change_config(folder, **changes):
  path = folder / "config.json"
  config = json.loads(path.read_text())
  for field, value in changes.items():
    section, key = field.split("__")
    config[section][key] = value
  path.write_text(json.dumps(config))


def test_no_best_model(copied):
  change_config(copied, server__best_metrics=None)
  with pytest.raises(StateChangedError, match="other leaves"):
    load(copied)
  with pytest.raises(WorkdirError, match=r"server\.best_metrics is not set"):
    load(copied, "best")


def test_no_evaluation_yet(copied):
  for round_ in (2, 4):
    shutil.rmtree(copied / "checkpoints" / str(round_))
  with pytest.raises(WorkdirError, match="has no best model yet; wait for an"):
    load(copied, "best")


def test_other_data_are_said(copied):
  change_config(copied, data__seed=1)
  with pytest.warns(UserWarning, match="The data are not those that the run"):
    load(copied)


def test_missing_data_are_named(tmp_path, copied):
  np.savez(
    tmp_path / "mine.npz",
    x=np.ones((40, 64), np.float32),
    y=np.arange(40) % 2,
    client=np.arange(40) // 10,
  )
  folder = tmp_path / "run"
  run(
    folder,
    server__rounds="1",
    data__name="npz",
    data__path=str(tmp_path / "mine.npz"),
    **{
      f"data__{field}": "None"
      for field in ("num_clients", "partition", "alpha", "unseen_clients")
    },
  )
  (tmp_path / "mine.npz").rename(tmp_path / "moved.npz")
  with pytest.raises(
    WorkdirError,
    match=r"be rebuilt: .*mine\.npz \(from data\.path\).* data_path, .*--data-",
  ):
    load(folder)
  opened = load(folder, data_path=tmp_path / "moved.npz")
  x = np.ones((2, 64), np.float32)
  for examples in (x, None):
    with pytest.raises(
      TypeError, match=r'give field -> array, such as \{"x": x'
    ):
      opened.predict(examples)
  assert opened.predict({"x": x}).shape == (2, 2)
  assert opened.config.data.path == str(tmp_path / "mine.npz")


def test_a_config_of_another_version(copied):
  change_config(copied, model__depth=3)
  with pytest.raises(ConfigChangedError, match="another version of fedjax_sim"):
    load(copied)


def test_a_global_model_is_nobodys_own(digits):
  with pytest.raises(
    ValueError, match=r"client=0: algorithm\.name='fedavg' gives clients no"
  ):
    load(digits).predict({"x": np.zeros((1, 64))}, client=0)


# --- other kinds of runs ------------------------------------------------------


OWN = """
import jax
import jax.numpy as jnp
from flax import linen, nnx

from fedjax_sim import function_task, linen_task, nnx_task
from tiers import slow_but


def functions(example_shape, num_classes):
  init = lambda key: {"w": jnp.zeros((64,))}
  loss = lambda params, examples: (examples["x"] @ params["w"]) ** 2
  return function_task(init, loss)


class Net(linen.Module):
  classes: int

  @linen.compact
  def __call__(self, x, train):
    x = linen.BatchNorm(use_running_average=not train)(x)
    return linen.Dense(self.classes)(x)


def linear(example_shape, num_classes):
  x = jax.ShapeDtypeStruct((1, *example_shape), jnp.float32)
  return linen_task(Net(num_classes), x, train_argument="train")
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory):
  path = tmp_path_factory.mktemp("own") / "own.py"
  path.write_text(textwrap.dedent(OWN))
  return path


MODELS = {
  "frozen": {"model__frozen": "layers/0/"},
  "bfloat16": {"runtime__compute_dtype": "bfloat16"},
  "linen": {"model__name": "linear", "model__hidden_sizes": "None"},
}


@pytest.mark.parametrize("kind", slow_but(["frozen", "linen"], MODELS))
def test_other_models_predict_what_was_measured(kind, tmp_path, own):
  changes = dict(MODELS[kind])
  if kind == "linen":
    changes["model__name"] = f"{own}:linear"
  run(tmp_path / "run", server__rounds="2", **changes)
  opened = check_test_accuracy(tmp_path / "run")
  assert bool(jax.tree.leaves(opened.variables.buffers)) == (kind == "linen")
  assert bool(jax.tree.leaves(opened.variables.frozen)) == (kind == "frozen")


def test_a_task_without_logits(tmp_path, own):
  run(
    tmp_path / "run",
    server__rounds="2",
    model__name=f"{own}:functions",
    model__hidden_sizes="None",
  )
  opened = load(tmp_path / "run")
  assert set(opened.params) == {"w"}
  with pytest.raises(
    ValueError, match=r"model\.name='.*:functions': its task has no logits, so"
  ):
    opened.predict({"x": np.zeros((1, 64))})


def test_centroids_predict_the_nearest_one(tmp_path):
  spec = f"{ROOT / 'configs' / 'digits_kmeans.py'}:smoke"
  run(tmp_path / "run", spec, {"runtime.devices": "1"})
  opened = load(tmp_path / "run")
  x = opened.simulator.data.train.examples["x"][:5]
  centroids = np.asarray(opened.params["centroids"], np.float64)
  expected = -((x[:, None] - centroids[None]) ** 2).sum(-1)
  np.testing.assert_allclose(opened.predict({"x": x}), expected, rtol=1e-4)


@pytest.fixture(scope="module")
def personal(tmp_path_factory):
  folder = tmp_path_factory.mktemp("personal") / "run"
  run(folder, algorithm__name="apfl", server__best_metrics="seen/loss/mean")
  return folder


def test_a_client_predicts_with_its_own_model(personal):
  opened = load(personal)
  seen = opened.simulator.data.seen
  right = by_all = 0
  for i in range(seen.num_clients):
    examples, count = seen.client(i), seen.sizes[i]
    name = i if i % 2 else seen.client_name(i)
    right += count * accuracy(opened, examples, client=name) if count else 0
    by_all += count * accuracy(opened, examples) if count else 0
  expected = opened.summary["seen/accuracy"]
  assert right / seen.num_examples == pytest.approx(expected, rel=1e-6)
  assert by_all != pytest.approx(right)


def test_clients_that_there_are_not(personal):
  opened, x = load(personal), {"x": np.zeros((1, 64))}
  with pytest.raises(ValueError, match="client=8 is out of range"):
    opened.predict(x, client=8)
  with pytest.raises(
    ValueError, match=r"client='client 9' is none of the 8 .* mean 'client \d'"
  ):
    opened.predict(x, client="client 9")
  best = load(personal, "best")
  assert best.predict(x).shape == (1, 10)
  with pytest.raises(ValueError, match="the clients' own ones are not kept"):
    best.predict(x, client=0)


@pytest.mark.slow
def test_a_store(tmp_path):
  data = fs.data.load_digits(num_clients=8, unseen_clients=2)
  write_store(tmp_path / "store", data)
  run(
    tmp_path / "run",
    server__rounds="2",
    data__name="store",
    data__path=str(tmp_path / "store"),
    **{
      f"data__{field}": "None"
      for field in (
        *("num_clients", "partition", "alpha"),
        *("heldout_fraction", "unseen_clients"),
      )
    },
  )
  opened = load(tmp_path / "run")
  examples = opened.simulator.data.unseen.examples
  assert accuracy(
    opened, {k: np.asarray(v) for k, v in examples.items()}
  ) == pytest.approx(opened.summary["unseen/accuracy"], rel=1e-6)


# --- whole programs -----------------------------------------------------------


def command(folder, spec, **changes):
  named = {field.replace("__", "."): text for field, text in changes.items()}
  fields = [f"--config.{k}={v}" for k, v in named.items()]
  return [
    *(sys.executable, "-m", "fedjax_sim", "run"),
    *(f"--config={spec}", f"--workdir={folder}", *fields),
  ]


@pytest.mark.slow
@pytest.mark.integration
def test_a_model_in_pieces_on_four_devices(tmp_path, popen, monkeypatch):
  monkeypatch.setenv("FEDJAX_SIM_CPU_DEVICES", "4")
  changes = {"model__hidden_sizes": "64", "runtime__model_devices": "4"}
  run_ = popen(
    command(
      tmp_path / "run", f"{DIGITS}:smoke", runtime__devices="4", **changes
    )
  )
  _, err = run_.communicate(timeout=250)
  assert run_.returncode == 0, err
  opened = check_test_accuracy(tmp_path / "run")
  assert len(opened.summary["devices"]) == 4
  assert opened.config.runtime.model_devices == 4


@pytest.mark.skipif(jax.device_count() < 2, reason="needs 2 devices")
def test_a_model_in_pieces(tmp_path):
  pieces = {"runtime__devices": "2", "runtime__model_devices": "2"}
  run(tmp_path / "run", server__rounds="2", **pieces)
  opened = check_test_accuracy(tmp_path / "run")
  assert len(opened.summary["devices"]) == 2
  assert opened.config.runtime.model_devices == 2


@pytest.mark.slow
@pytest.mark.integration
def test_a_run_that_goes_on(tmp_path, popen):
  """Checkpoints come and go while it is opened again and again."""
  run_ = popen(
    command(
      tmp_path / "run",
      DIGITS,
      server__rounds="60",
      server__eval_every="30",
      runtime__checkpoint_every="1",
      runtime__keep_checkpoints="2",
    )
  )
  rounds = [0]
  while run_.poll() is None:
    if rounds == [0] and not any((tmp_path / "run" / "checkpoints").glob("?")):
      time.sleep(0.1)
      continue
    opened = load(tmp_path / "run")
    assert opened.round >= rounds[-1]
    assert opened.predict({"x": np.zeros((1, 64), np.float32)}).shape == (1, 10)
    rounds.append(opened.round)
  _, err = run_.communicate(timeout=250)
  assert run_.returncode == 0, err
  assert len(set(rounds)) > 3
  assert load(tmp_path / "run").round == 60


@pytest.mark.integration
def test_text_and_its_next_characters(tmp_path, real_data):
  spec = f"{ROOT / 'configs' / 'shakespeare_lstm.py'}:smoke"
  run(tmp_path / "run", spec, {"runtime.devices": "1"})
  opened = load(tmp_path / "run")
  x, y = (np.asarray(opened.simulator.data.seen.examples[k]) for k in "xy")
  hits = (opened.predict({"x": x}).argmax(-1) == y)[y != 0]
  expected = opened.summary["seen/accuracy"]
  assert np.mean(hits) == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_patients_with_models_of_their_own(tmp_path, real_data):
  spec = f"{ROOT / 'configs' / 'ecg_apfl.py'}:smoke"
  run(tmp_path / "run", spec, {"runtime.devices": "1"})
  opened = load(tmp_path / "run")
  seen = opened.simulator.data.seen
  shares = [
    accuracy(opened, seen.client(i), client=seen.client_name(i))
    for i in range(seen.num_clients)
  ]
  expected = opened.summary["seen/accuracy"]
  assert np.average(shares, weights=seen.sizes) == pytest.approx(expected)
