"""A user's own objects by name: found, run once, refused in clear words."""

import ast
import json
import pathlib
import pickle
import re
import sys

import numpy as np
import optax
import pytest

from fedjax_sim import aggregators
from fedjax_sim.config import build, default_config
from fedjax_sim.config.completion import complete, reference_fields
from fedjax_sim.config.flags import load
from fedjax_sim.core import references
from fedjax_sim.core.errors import BadReferenceError
from fedjax_sim.run import experiment
from tiers import slow_but

# Each name is right for one field, and wrong for the others.
MINE = """
import dataclasses

import numpy as np
import optax

from fedjax_sim import aggregators, attacks, data, sampling
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.models.logistic_regression import logistic_regression
from fedjax_sim.privacy.local import additive as randomizers

print("runs")
number = 3
ready = aggregators.mean()


@dataclasses.dataclass
class Point:
  x: int


def data_name(*, seed):
  return data.load_digits(seed=seed, num_clients=20)


def data_partition(num_examples, num_clients, *, seed, min_examples=1):
  return np.arange(num_examples) % num_clients


def model_name(example_shape, num_classes):
  return logistic_regression(example_shape, num_classes)


def adapter_name(task):
  return task._replace(check=lambda examples: None)


def algorithm_name(task, client_optimizer, server_optimizer):
  return fedavg(task, client_optimizer, server_optimizer)


def client_optimizer(learning_rate):
  return optax.sgd(learning_rate)


server_optimizer = replay_optimizer = client_optimizer


def sampler_name(num_clients, size):
  return sampling.uniform(num_clients, size)


def aggregator_name():
  return aggregators.mean()


def attack_name():
  return attacks.ATTACKS["sign_flip"]()


def local_privacy_mechanism():
  return randomizers.clip_only(1.0)


def model_metrics(logits, examples):
  return logits[:, 0]


def nothing(*args, **options):
  return None


def breaks(*args, **options):
  return undefined


def needs(fraction):
  return aggregators.mean()
"""


_config = default_config()
_config.replay.steps = 1
_config.local_privacy.mechanism, _config.local_privacy.clip_norm = "clip", 1.0
FIELDS = (*reference_fields(complete(_config)),)


@pytest.fixture
def mine(tmp_path):
  path = tmp_path / "mine.py"
  path.write_text(MINE)
  return path


def with_reference(field, value):
  """A quick config whose field names it."""
  source = default_config()
  section, key = field.split(".")
  source[section][key] = (value,) if field == "model.metrics" else value
  if section == "replay":
    source.replay.steps = 1
    source.data.server_clients = 5
  return source


# --- what is found ------------------------------------------------------------


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_may_be_a_reference(mine, field):
  name = field.replace(".", "_")
  source = with_reference(field, f"{mine}:{name}")
  made = build.build(source)
  assert made.sources.keys() == {field}
  assert re.fullmatch(
    rf"{name} \(SHA-256 [0-9a-f]{{16}}\)", made.sources[field]
  )


def test_no_field_that_takes_references_is_missing():
  """Of all that the package loads by a name that is written out."""
  package = pathlib.Path(references.__file__).parents[1]
  fields = set()
  for path in package.rglob("*.py"):
    for call in ast.walk(ast.parse(path.read_text())):
      if isinstance(call, ast.Call) and call.args:
        first, name = call.args[0], ast.unparse(call.func)
        if name == "functools.partial" and len(call.args) > 1:
          name, first = ast.unparse(first), call.args[1]
        if name in ("references.lookup", "references.load"):
          fields.add(ast.unparse(first).strip("'"))
  fields = {f for f in fields if "." in f and "{" not in f and "self" not in f}
  assert "model.metrics" in fields
  assert fields <= {*FIELDS}


def test_a_module_that_is_installed():
  source = with_reference("client.optimizer", "optax.contrib:prodigy")
  source.client.learning_rate = 1.0
  made = build.build(source)
  assert made.simulator.hparams["algorithm"]["client"] == {"learning_rate": 1.0}
  found = references.load("field", "optax.contrib:prodigy")
  assert found is optax.contrib.prodigy


def test_a_relative_path_begins_at_the_working_folder(mine, monkeypatch):
  monkeypatch.chdir(mine.parent)
  found = references.load("field", "mine.py:nothing")
  assert found is references.load("field", f"{mine}:nothing")


def test_a_name_in_the_table_is_no_reference():
  table = aggregators.AGGREGATORS
  found = references.lookup("field", "median", table, object)
  assert found is aggregators.median
  assert not references.is_reference("median")
  assert not references.is_reference(None)


def test_the_same_file_runs_once_and_an_edited_one_again(mine, capsys):
  for name in ("nothing", "breaks", "nothing"):
    references.load("field", f"{mine}:{name}")
  assert capsys.readouterr().out == "runs\n"
  before = references.load("field", f"{mine}:nothing")
  mine.write_text(MINE.replace("return None", "return 1"))
  assert references.load("field", f"{mine}:nothing")() == 1
  assert before() is None
  assert capsys.readouterr().out == "runs\n"


def test_a_file_hides_no_module_and_can_be_pickled(tmp_path):
  path = tmp_path / "json.py"
  path.write_text(MINE)
  point = references.load("field", f"{path}:Point")(3)
  assert pickle.loads(pickle.dumps(point)) == point
  assert sys.modules["json"] is json
  twin = tmp_path / "other" / "json.py"
  twin.parent.mkdir()
  twin.write_text(MINE)
  assert references.load("field", f"{twin}:Point") is not type(point)
  assert not [p for p in tmp_path.iterdir() if p.name == "__pycache__"]


def test_a_file_is_not_read_in_our_dialect(tmp_path):
  """Annotations are what they are, not texts as in the package."""
  path = tmp_path / "typed.py"
  path.write_text("def f(x: int):\n  return x\n")
  assert references.load("field", f"{path}:f").__annotations__ == {"x": int}


def test_a_file_that_breaks_leaves_nothing(tmp_path):
  path = tmp_path / "broken.py"
  path.write_text("raise KeyError('z')")
  with pytest.raises(BadReferenceError, match="line 1: KeyError: z") as caught:
    references.load("field", f"{path}:x")
  assert isinstance(caught.value.__cause__, KeyError)
  assert not [name for name in sys.modules if name.startswith("broken@")]


# --- what is refused ----------------------------------------------------------


def check_refused(field, reference, match):
  with pytest.raises((ValueError, TypeError), match=match) as caught:
    build.build(with_reference(field, reference))
  assert str(caught.value).startswith(f"{field}={reference!r}")
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("reference", "match"),
  [
    ("nowhere.py:x", "there is no file .*nowhere.py; give its path"),
    ("{mine}:nothin", "there is no 'nothin' in it.* mean 'nothing'"),
    ("{mine}:number", "is no function, but of type int"),
    ("{mine}:ready", "is no function, but of type Aggregator"),
    ("{mine}:", "names nothing; give path/to/file.py:name or pack"),
    ("{mine}:a.b", "names nothing"),
    (":x", "'' is neither a .py file nor a module"),
    ("mine.txt:x", "there is no module 'mine'"),
    ("a/b:x", "'a/b' is neither a .py file nor a module"),
    ("nowhere.mine:x", "there is no module 'nowhere'; install it, or"),
    ("optax.nowhere:x", "there is no module 'optax.nowhere'"),
  ],
)
def test_references_that_lead_nowhere(mine, reference, match):
  reference = reference.format(mine=mine)
  check_refused("aggregator.name", reference, match)


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_is_named(mine, field):
  check_refused(field, "nowhere.py:x", "there is no file")


@pytest.mark.parametrize("field", [f for f in FIELDS if f != "model.metrics"])
def test_functions_that_break_or_return_something_else(mine, field):
  with pytest.raises(TypeError, match="something of type NoneType") as caught:
    build.build(with_reference(field, f"{mine}:nothing"))
  assert f"{field}=" in str(caught.value)
  line = MINE.splitlines().index("  return undefined") + 1
  with pytest.raises(ValueError, match=f"line {line}: NameError: name 'undefi"):
    build.build(with_reference(field, f"{mine}:breaks"))


def test_what_an_own_function_does_not_take(mine):
  source = with_reference("client.optimizer", f"{mine}:client_optimizer")
  source.client.momentum = 0.9
  with pytest.raises(ValueError, match=r"does not take 'client\.momentum'"):
    build.build(source)
  source = with_reference("model.name", f"{mine}:model_name")
  source.model.channels = 9
  with pytest.raises(ValueError, match=r"does not take 'model\.channels'"):
    build.build(source)
  source = with_reference("aggregator.name", f"{mine}:needs")
  with pytest.raises(ValueError, match="lacks .*'aggregator.fraction'"):
    build.build(source)


def test_errors_inside_a_file_keep_their_cause(tmp_path):
  path = tmp_path / "imports.py"
  path.write_text("x = 1\nimport nothing_like_it\n")
  with pytest.raises(
    ValueError, match=r"line 2: ModuleNotFoundError"
  ) as caught:
    references.load("field", f"{path}:x")
  assert isinstance(caught.value.__cause__, ModuleNotFoundError)
  path.write_text("x = 1\ndef f(:\n")
  with pytest.raises(ValueError, match=r"line 2: SyntaxError: invalid"):
    references.load("field", f"{path}:x")


def test_own_cohorts_and_clients_are_checked(mine):
  mine.write_text(
    MINE
    + "def below(labels, num_clients, *, seed, min_examples=1):\n"
    + "  return np.full(len(labels), -1)\n"
  )
  with pytest.raises(ValueError, match="client_of holds -1"):
    build.build(with_reference("data.partition", f"{mine}:below"))


# --- a run --------------------------------------------------------------------


def run_of(folder: pathlib.Path, path: pathlib.Path):
  return load(
    "configs/digits_fedavg.py",
    {
      "server.rounds": "4",
      "aggregator.name": f"{path}:aggregator_name",
      "runtime.checkpoint_every": "1",
      "server.eval_every": "1",
    },
  )


class Stop(Exception):
  """Ends a run between two rounds."""


def stop_at(wanted):
  def on_round(done):
    if done == wanted:
      raise Stop

  return on_round


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.integration
@pytest.mark.parametrize("edited", slow_but([False], [False, True]))
def test_a_run_goes_on_and_tells_of_new_code(
  mine, tmp_path, monkeypatch, capsys, edited
):
  monkeypatch.chdir(pathlib.Path(__file__).resolve().parents[1])
  config = run_of(tmp_path, mine)
  whole = experiment.run(config, tmp_path / "whole")
  with pytest.raises(Stop):
    experiment.run(config, tmp_path / "parts", stop_at(2))
  capsys.readouterr()
  if edited:
    mine.write_text(MINE.replace("return aggregators.mean()", "return ready"))
  parts = experiment.run(config, tmp_path / "parts")
  told = capsys.readouterr().err
  pattern = (
    r"Since the checkpoint there changed: aggregator\.name: "
    r"'aggregator_name \(SHA-256 \w{16}\)' -> 'aggregator_name \(SHA-256"
    r" \w{16}\)'\. The rounds to come follow the new code\."
  )
  assert bool(re.search(pattern, told)) == edited
  assert ("changed" in told) == edited
  assert parts["params_digest"] == whole["params_digest"]  # code alike


def test_the_same_code_elsewhere_is_the_same(mine, tmp_path):
  other = tmp_path / "elsewhere" / "mine.py"
  other.parent.mkdir()
  other.write_text(MINE)
  fields = dict.fromkeys(FIELDS)
  one, two, three = (
    references.sources(fields | {"model.metrics": metrics})
    for metrics in (
      (f"{mine}:breaks", f"{mine}:nothing"),
      (f"{other}:breaks", f"{other}:nothing"),
      (f"{other}:nothing",),
    )
  )
  assert one == two != three
  other.write_text(MINE + "\n")
  fields["model.metrics"] = (f"{other}:breaks", f"{mine}:nothing")
  assert references.sources(fields) != one
  assert references.sources(dict.fromkeys(FIELDS)) == {}


@pytest.mark.usefixtures("no_pictures")
def test_a_regression_of_ones_own(tmp_path):
  """A model of the user's need not tell classes apart."""
  data = tmp_path / "lines.npz"
  x = np.linspace(0, 1, 12).reshape(12, 1)
  np.savez(data, x=x, y=3 * x[:, 0], client=np.arange(12) % 3)
  path = tmp_path / "line.py"
  path.write_text(
    "import jax.numpy as jnp\n"
    "from fedjax_sim import function_task\n"
    "def line(example_shape, num_classes):\n"
    "  init = lambda key: {'w': jnp.zeros(example_shape)}\n"
    "  error = lambda p, e: (e['x'] @ p['w'] - e['y']) ** 2\n"
    "  return function_task(init, error)\n"
  )
  source = with_reference("model.name", f"{path}:line")
  source.data.name = "npz"
  source.data.path = str(data)
  source.server.clients_per_round = 3
  source.server.rounds = 60
  source.client.learning_rate = 0.5
  source.runtime.lanes = 1
  summary = experiment.run(source, tmp_path / "run")
  assert summary["train/loss"] < 1e-3


@pytest.mark.parametrize(
  ("text", "known"),
  [
    ("set aggregator.name='stack'", True),
    ("what aggregator.name returns", True),
    ("seed=3 is wrong", True),
    ("no seed, no name", False),
    ("the aggregator.names", False),
    ("a.aggregator.name", False),
  ],
)
def test_an_error_that_names_a_field_is_not_blamed_on_references(text, known):
  fields = ["data.name", "aggregator.name", "seed"]
  with (
    pytest.raises(ValueError, match=re.escape(text)) as caught,
    references.named({"data.name": "a.py:b"}, fields),
  ):
    raise ValueError(text)
  assert (str(caught.value) == text) == known
