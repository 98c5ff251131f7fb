"""Runs that begin from weights: all of them, some, or none that fit."""

import hashlib
import json
import pathlib
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedjax_sim as fs
from fedjax_sim import reporting
from fedjax_sim.config import build, flags
from fedjax_sim.core import Loss, Metric, Task, Variables
from fedjax_sim.core.weights import Weights, read_weights, write_weights
from fedjax_sim.engine import tracing
from fedjax_sim.models.mlp import mlp
from fedjax_sim.run import experiment
from fedjax_sim.run.opened import load
from fedjax_sim.run.signals import Interrupted
from fedjax_sim.tasks.freezing import (
  named_variables,
  with_frozen,
  with_trainable,
)
from fedjax_sim.tasks.initial import with_initial
from workdirs import skip_pictures

pytestmark = pytest.mark.usefixtures("same_programs")

DIGITS = pathlib.Path(__file__).parents[1] / "configs" / "digits_fedavg.py"
TINY = {
  "model.hidden_sizes": "8",
  "data.num_clients": "10",
  "data.unseen_clients": "2",
  "server.clients_per_round": "3",
  "server.rounds": "2",
  "client.epochs": "1",
  "runtime.devices": "1",
  "runtime.checkpoint_every": "1",
}
KEY = jax.random.key(1)


def tiny(**changes):
  named = {field.replace("__", "."): text for field, text in changes.items()}
  return flags.load(str(DIGITS), TINY | named)


@pytest.fixture(scope="module")
def task():
  return mlp((6,), 3, (8,))


@pytest.fixture(scope="module")
def given(task):
  """Values of every parameter of the task."""
  named = named_variables(task.init(jax.random.key(0)))
  return {name: np.asarray(x) + 1 for name, x in named.items()}


def begun(task):
  return {k: np.asarray(x) for k, x in named_variables(task.init(KEY)).items()}


def test_all_variables_begin_as_given(task, given):
  found = begun(with_initial(task, given))
  assert sorted(found) == sorted(given)
  for name, value in given.items():
    np.testing.assert_array_equal(found[name], value)


def test_what_matches_no_pattern_begins_as_usual(task, given):
  usual = begun(task)
  some = {k: v for k, v in given.items() if k.startswith("layers/0/")}
  found = begun(with_initial(task, some, ("layers/0/",)))
  for name in given:
    expected = some.get(name, usual[name])
    np.testing.assert_array_equal(found[name], expected)


def test_a_frozen_part_begins_as_given_under_its_own_name(task, given):
  frozen = with_frozen(with_initial(task, given), ("layers/0/",))
  assert sorted(begun(frozen)) == sorted(given)
  np.testing.assert_array_equal(
    begun(frozen)["layers/0/kernel"], given["layers/0/kernel"]
  )
  again = with_trainable(task, ("layers/1/",))  # frozen by the task itself
  found = begun(with_initial(again, given))
  np.testing.assert_array_equal(found["layers/0/bias"], given["layers/0/bias"])


def with_buffers():
  """A task with a parameter, a buffer and something frozen, all called w."""

  def init(key):
    w = {"w": jax.random.normal(key, (2,))}
    return Variables(w, w, w)

  def loss(variables, examples, key):
    value = examples["x"] @ variables.params["w"]
    return Loss(value, jnp.ones_like(value), variables.buffers)

  def metrics(variables, examples):
    value = examples["x"] @ variables.params["w"]
    return {"loss": Metric(value, jnp.ones_like(value))}

  return Task(init, loss, metrics)


def test_buffers_and_frozen_variables_have_prefixes():
  names = ("w", "buffers/w", "frozen/w")
  values = {n: np.full(2, i, np.float32) for i, n in enumerate(names)}
  found = begun(with_initial(with_buffers(), values))
  for name, value in values.items():
    np.testing.assert_array_equal(found[name], value)
  with pytest.warns(
    UserWarning, match=r"initial lacks 'buffers/w', 'frozen/w'; they begin as"
  ):
    found = begun(with_initial(with_buffers(), {"w": values["w"]}))
  usual = begun(with_buffers())
  np.testing.assert_array_equal(found["w"], values["w"])
  np.testing.assert_array_equal(found["buffers/w"], usual["buffers/w"])


def test_two_variables_of_one_name_are_refused():
  w = jnp.zeros(2)
  with pytest.raises(ValueError, match="called 'buffers/w'; rename the"):
    named_variables(Variables({"buffers": {"w": w}}, {"w": w}))


@pytest.mark.parametrize("factor", ["lora_a", "lora_b"])
def test_adapters_that_nothing_takes_are_refused(task, given, factor):
  """The kernels beside them are not those of the model that was trained."""
  more = {**given, f"layers/1/kernel/{factor}": np.zeros(1)}
  with pytest.raises(ValueError, match=r"an adapter of 'layers/1/kernel'.*--m"):
    with_initial(task, more)
  with pytest.warns(UserWarning, match="which nothing takes"):
    with_initial(task, more, ["layers/0/"])


def test_what_nothing_takes_is_said(task, given):
  more = {**given, **{f"more{i}": np.zeros(1) for i in range(7)}}
  with pytest.warns(
    UserWarning,
    match=r"initial also holds 'more0', .*'more4' and 2 more, which nothing",
  ):
    found = begun(with_initial(task, more))
  np.testing.assert_array_equal(found["layers/1/bias"], given["layers/1/bias"])


@pytest.mark.parametrize(
  ("change", "only", "message"),
  [
    (
      {"layers/0/kernel": None, "layer/0/kernels": np.zeros((6, 8))},
      None,
      r"initial lacks 'layers/0/kernel'; its nearest names are"
      r" 'layer/0/kernels'.* model\.initial_only",
    ),
    (
      {"layers/0/kernel": np.zeros((8, 6), np.float32)},
      None,
      r"'layers/0/kernel' has shape \(8, 6\), and the model's has shape"
      r" \(6, 8\); convert",
    ),
    (
      {"layers/0/kernel": np.zeros((6, 8))},
      None,
      r"'layers/0/kernel' is float64, and the model's is float32; convert it",
    ),
    (
      {"layers/0/kernel": None},
      ("layers/0",),
      "lacks 'layers/0/kernel'",
    ),
    ({}, ("layers/7",), r"model\.initial_only=.*'layers/7' matches no param"),
    ({}, ("(",), r"model\.initial_only=.*'\(' is no regular expression"),
  ],
)
def test_what_does_not_fit_is_refused(task, given, change, only, message):
  arrays = {k: v for k, v in {**given, **change}.items() if v is not None}
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    with pytest.raises(ValueError, match=message):
      with_initial(task, arrays, only)


@pytest.mark.parametrize(
  ("arrays", "message"),
  [
    (Weights({}, {}), r"is a Weights; .*such as read_weights\(path\)\.arrays"),
    (({}, {}), r"is a tuple; .*such as read_weights\(path\)\.arrays"),
    ("a.npz", r"is a str; .*such as read_weights\(path\)\.arrays"),
    (None, "is a NoneType; give name -> array"),
    ({"layers/0/bias": [0.0] * 8}, r"'layers/0/bias' is a list; .*np\.asarray"),
    ({"layers": {"0": {}}}, r"'layers' is a dict of more, as in a tree; give"),
  ],
)
def test_what_is_no_mapping_of_arrays(task, arrays, message):
  with pytest.raises(TypeError, match=message):
    with_initial(task, arrays)


def test_a_tree_is_refused_and_its_names_are_taken(task):
  variables = task.init(KEY)
  with pytest.raises(TypeError, match=r"give .*named_variables\(variables\)"):
    with_initial(task, variables)
  with pytest.raises(TypeError, match="give name"):
    with_initial(task, variables.params)
  found = begun(with_initial(task, fs.named_variables(variables)))
  assert sorted(found) == sorted(named_variables(variables))


@pytest.mark.parametrize("only", [(), ("",), ("layers/0/", "")])
def test_no_pattern_is_refused(task, given, only):
  message = r"model\.initial_only=\(.*\) names nothing; give patterns"
  with pytest.raises(ValueError, match=message):
    with_initial(task, given, only)


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_numbers_have_to_be_finite(task, given, odd):
  bad = {k: np.array(v) for k, v in given.items()}
  bad["layers/1/bias"][:2] = odd
  message = r"^initial: 'layers/1/bias' holds 2 numbers that are NaN or"
  with pytest.raises(ValueError, match=message):
    with_initial(task, bad)
  with pytest.warns(UserWarning, match="which nothing takes"):
    with_initial(task, bad, ("layers/0/",))


def test_patterns_are_a_tuple(task, given):
  message = r"model\.initial_only='layers' is a text; give a tuple"
  with pytest.raises(TypeError, match=message):
    with_initial(task, given, "layers")


# --- runs ---------------------------------------------------------------------


@pytest.fixture
def fast(monkeypatch):
  skip_pictures(monkeypatch)


@pytest.fixture
def logged(monkeypatch):
  """The lines that runs log."""
  lines: list[str] = []
  record = lambda self, message, level="info": lines.append(message)
  monkeypatch.setattr(reporting.Progress, "log", record)
  return lines


@pytest.fixture
def weights(tmp_path):
  """Function of a suffix: a weights file of the tiny run's model."""

  def written(suffix, seed=3, **more):
    task = build.build(tiny()).simulator.task
    named = named_variables(task.init(jax.random.key(seed)))
    path = tmp_path / f"weights{suffix}"
    write_weights(path, {**named, **more})
    return path

  return written


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".msgpack"])
def test_a_run_begins_with_the_file_bit_for_bit(
  suffix, weights, tmp_path, fast, logged
):
  path = weights(suffix)
  experiment.run(tiny(model__initial=str(path)), tmp_path / "run")
  begins = f"Beginning with the weights of {path.name} (SHA-256"
  assert sum(line.startswith(begins) for line in logged) == 1
  began = load(tmp_path / "run", 0)
  for name, value in read_weights(path).arrays.items():
    found = np.asarray(named_variables(began.variables)[name])
    assert found.tobytes() == value.tobytes(), name
  path.unlink()  # the run that is opened holds what it needs
  ended = load(tmp_path / "run")
  assert ended.config.model.initial == str(path)
  assert ended.round == 2


def test_a_backbone_is_given_and_frozen(weights, tmp_path, fast):
  path = weights(".npz")
  config = tiny(
    model__initial=str(path),
    model__initial_only="layers/0/",
    model__frozen="layers/0/",
  )
  with pytest.warns(UserWarning, match="also holds 'layers/1/bias'"):
    experiment.run(config, tmp_path / "run")
  found = named_variables(load(tmp_path / "run").variables)
  arrays = read_weights(path).arrays
  for name, value in arrays.items():
    equal = np.array_equal(found[name], value)
    assert equal == name.startswith("layers/0/"), name


def test_a_changed_file_is_said_and_changes_nothing(
  weights, tmp_path, fast, logged, capfd
):
  def stop(done):
    if done == 1:
      raise Interrupted(15, done, tmp_path)

  path = weights(".npz")
  config = tiny(model__initial=str(path), runtime__rounds_per_dispatch="1")
  undisturbed = experiment.run(config, tmp_path / "undisturbed")
  with pytest.raises(Interrupted):
    experiment.run(config, tmp_path / "run", stop)
  weights(".npz", seed=4)
  logged.clear()
  capfd.readouterr()
  summary = experiment.run(config, tmp_path / "run")
  _, err = capfd.readouterr()
  assert "Since the checkpoint there changed: model.initial: 'weights" in err
  assert "The run keeps the weights that it began with." in err
  assert any(line.startswith("Going on") for line in logged)
  assert not any(line.startswith("Beginning") for line in logged)
  assert summary["params_digest"] == undisturbed["params_digest"]


@pytest.mark.parametrize(
  ("changes", "error", "message"),
  [
    (
      {"model__initial": "none.npz"},
      FileNotFoundError,
      r"model\.initial='none\.npz' cannot be read: No such file or directory",
    ),
    (
      {"model__initial": "model.pt"},
      ValueError,
      r"model\.initial: model\.pt: a \.pt file is a pickle",
    ),
    (
      {"model__initial_only": "layers"},
      ValueError,
      r"model\.initial_only=\('layers',\) does nothing without model\.initial",
    ),
  ],
)
def test_files_that_are_refused(changes, error, message):
  with pytest.raises(error, match=message):
    build.build(tiny(**changes))


@pytest.mark.parametrize("text", ["", "()"])
def test_a_flag_without_a_pattern_is_refused(text, weights):
  changes = {
    "model__initial": str(weights(".npz")),
    "model__initial_only": text,
  }
  with pytest.raises(
    ValueError, match=r"^model\.initial_only=.* names nothing"
  ):
    build.build(tiny(**changes))


def test_a_file_with_nan_is_refused(weights):
  bad = {"layers/0/bias": np.full(8, np.nan, np.float32)}
  config = tiny(model__initial=str(weights(".npz", **bad)))
  message = r"^model\.initial='.*weights\.npz': 'layers/0/bias' holds 8 numbers"
  with pytest.raises(ValueError, match=message):
    build.build(config)


def test_a_file_of_another_model_is_refused(weights):
  path = weights(".npz")
  config = tiny(model__initial=str(path), model__hidden_sizes="9")
  with pytest.raises(ValueError, match=r"^model\.initial=.* has shape \(8,\)"):
    build.build(config)


def test_the_digest_belongs_to_the_run(weights):
  path = weights(".npz")
  config = tiny(model__initial=str(path))
  one = build.build(config).sources
  assert json.dumps(dict(one)).count("weights.npz (SHA-256 ") == 1
  weights(".npz", seed=5)
  assert build.build(config).sources != one


def test_a_model_of_one_s_own_says_what_it_begins_with(tmp_path):
  code = (
    "from fedjax_sim.models.mlp import mlp",
    "from fedjax_sim.models.options import begins_from",
    "@begins_from(folder=lambda path: sorted(path.glob('*.bin')))",
    "def mine(example_shape, num_classes, folder: str, other: str = ''):",
    "  return mlp(example_shape, num_classes, (8,))",
  )
  (tmp_path / "mine.py").write_text("\n".join(code))
  folder = tmp_path / "held"
  folder.mkdir()
  for name in ("a.bin", "b.bin", "c.txt"):
    (folder / name).write_text(name)

  def digest():
    config = tiny(
      model__name=f"{tmp_path}/mine.py:mine",
      model__folder=str(folder),
      model__hidden_sizes="None",
    )
    return build.build(config).sources["model.initial"]

  one = digest()
  lines = [
    f"{n} {hashlib.sha256(n.encode()).hexdigest()}" for n in ("a.bin", "b.bin")
  ]
  expected = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
  assert one == f"held (SHA-256 {expected})"
  (folder / "c.txt").write_text("other")
  assert digest() == one
  (folder / "b.bin").write_text("other")
  assert digest() != one


def test_weights_are_arguments_of_the_program_not_constants(monkeypatch):
  given = np.random.default_rng(0).normal(size=100_000).astype(np.float32)
  programs = []

  def jit(function, **options):
    jitted = jax.jit(function, **options)

    def call(*arguments):
      programs.append(jitted.lower(*arguments).as_text())
      return jitted(*arguments)

    return call

  monkeypatch.setattr(
    tracing, "jax", types.SimpleNamespace(**{**vars(jax), "jit": jit})
  )
  where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  init = tracing.jitted_once(
    lambda key, scale: {"w": jnp.asarray(given) * scale, "key": key},
    (np.uint32(0), np.float32(0)),
    where,
  )
  found = init(np.uint32(7), np.float32(2))
  np.testing.assert_array_equal(found["w"], 2 * given)
  assert int(found["key"]) == 7
  (program,) = programs
  assert len(program) < 5_000
