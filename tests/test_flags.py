"""Config files and flags: they load, and wrong ones say what is wrong."""

import pathlib
import shlex
import sys

import pytest

from fedjax_sim.cli.main import main
from fedjax_sim.config import complete
from fedjax_sim.config.build import build
from fedjax_sim.config.flags import UsageError, load, number, parse
from fedjax_sim.run.experiment import run
from shaped_files import (
  cifar100_batches,
  fed_cifar100,
  fed_emnist,
  kaggle_heartbeats,
)

CONFIGS = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))
DIGITS = str(CONFIGS[0].parent / "digits_fedavg.py")

START = """
from fedjax_sim.config import default_config

def get_config(arg=""):
  config = default_config()
"""


@pytest.fixture
def written(tmp_path):
  """Writes a config file and returns its path."""

  def write(text):
    path = tmp_path / "mine.py"
    path.write_text(text)
    return str(path)

  return write


LONG = (  # large networks or data
  "cifar10_lenet",
  "cifar10_personal",
  "cifar10_resnet",
  "cifar100_fedlabels",
  "cifar100_resnet",
  "ecg_attention",
  "ecg_cnn",
  "ecg_apfl",
  "mnist_fedlabels",
  "mnist_writers_cnn",
  "shakespeare_decoder",
  "shakespeare_lstm",
)
OF_STORES = (  # test_text_configs.py runs them
  "mind_news",
  "reddit_gru",
  "shakespeare_diloco",
  "tff_shakespeare_lstm",
)
EACH = [
  pytest.param(
    path, id=path.stem, marks=[pytest.mark.slow] if path.stem in LONG else []
  )
  for path in CONFIGS
  if path.stem not in OF_STORES
]
# Configs of files that are not here, and what writes such files.
WRITERS = {
  "cifar100_fedlabels": cifar100_batches,
  "cifar100_resnet": fed_cifar100,
  "ecg_attention": kaggle_heartbeats,
  "femnist_cnn": fed_emnist,
}


def with_files(path, folder):
  """Write the files of a config, and do the imports of its docstring."""
  WRITERS[path.stem](folder)
  text = path.read_text().split('"""')[1].replace("\\\n", "")
  for line in text.splitlines():
    if line.startswith("fedjax-sim data import"):
      assert main(shlex.split(line)[1:]) == 0


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.integration
@pytest.mark.parametrize("path", EACH)
def test_every_config_runs(path, tmp_path, capsys, request, monkeypatch):
  source = load(f"{path}:smoke", {"runtime.devices": "1"})
  if path.stem in WRITERS:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDJAX_SIM_DATA", str(tmp_path))
    with_files(path, tmp_path)
  elif source.data.name not in ("digits", "synthetic"):
    folder = request.getfixturevalue("data_folder")
    monkeypatch.setenv("FEDJAX_SIM_DATA", str(folder))
  assert source.server.rounds <= 5
  summary = run(source, tmp_path / "run")
  assert summary["rounds"] == source.server.rounds
  assert load(str(path)).server.rounds > source.server.rounds
  capsys.readouterr()


@pytest.mark.slow
@pytest.mark.usefixtures("real_data")
def test_heartbeats_by_patient_run(tmp_path, capsys):
  spec = CONFIGS[0].parent / "ecg_attention.py:patients_smoke"
  source = load(str(spec), {"runtime.devices": "1"})
  assert run(source, tmp_path)["rounds"] == 2
  capsys.readouterr()


def test_both_networks_of_personal_models():
  path = CONFIGS[0].parent / "cifar10_personal.py"
  for arg, name, depth in (("", "resnet", 50), (":vgg", "vgg", 16)):
    model = load(f"{path}{arg}").model
    assert (model.name, model.depth, model.norm) == (name, depth, "batch")


def test_an_argument_and_overrides():
  source = load(
    f"{DIGITS}:smoke",
    {
      "client.learning_rate": "1",
      "client.batch_size": "4",
      "client.shuffle": "false",
      "client.steps": "3",
      "data.alpha": "None",
      "model.hidden_sizes": "(8, 4)",
      "runtime.lanes": "auto",
      "transforms.clip.norm": "2.5",
    },
  )
  assert source.server.rounds == 2
  assert source.client.learning_rate == 1.0
  assert isinstance(source.client.learning_rate, float)
  assert source.client.batch_size == 4
  assert source.client.shuffle is False
  assert source.client.steps == 3
  assert source.data.alpha == 0.5  # None unsets what the file sets
  assert source.model.hidden_sizes == (8, 4)
  assert source.runtime.lanes == "auto"
  assert source.transforms.clip.norm == 2.5
  assert source != load(f"{DIGITS}:smoke")


def test_a_file_may_add_fields_and_flags_set_them(written):
  path = written(
    START
    + "  config.server.nesterov = False\n"
    + "  config.server.momentum = 0.9\n"
    + "  return config\n"
  )
  source = load(path, {"server.nesterov": "True"})
  assert source.server.nesterov is True
  build(source)


@pytest.mark.parametrize(
  ("override", "message"),
  [
    (
      "client.learnin_rate=1",
      "learnin_rate'.* Did you mean .client.learning_rate",
    ),
    ("clent.learning_rate=1", "'clent' is unknown.* Did you mean .client"),
    ("sed=1", "'sed'.* Did you mean .seed"),
    ("sed=None", "'sed' is unknown.* 'seed'"),
    ("seed.x=1", "seed.x"),
    ("client=1", "client=1 is no section; set its fields"),
    ("transforms.clip=1", "is no section; set the fields"),
    ("client.batch_size=abc", "batch_size=abc: give a whole number"),
    ("client.batch_size=1.5", "is a float; give a whole number"),
    ("client.batch_size=", "batch_size=: give a whole number"),
    ("client.learning_rate=fast", "learning_rate=fast: give a number"),
    ("client.shuffle=maybe", "shuffle=maybe: give true or false"),
    (
      "data.num_classes=3",
      "does not take 'data.num_classes'.* It takes: alpha",
    ),
  ],
)
def test_a_wrong_override_is_named(override, message):
  field, _, text = override.partition("=")
  with pytest.raises((TypeError, ValueError), match=message) as caught:
    load(DIGITS, {field: text})
  assert field in str(caught.value)
  assert "\n" not in str(caught.value)


def test_a_field_without_its_prefix_is_told_how_it_is_set():
  given = [f"--config={DIGITS}", "--client.epochs=2"]
  with pytest.raises(
    UsageError, match=r"'client.epochs'; .* by --config.client.epochs=\.\.\."
  ):
    parse(given, "config")


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("x = 1\n\ndef get_config(:\n", ", line 3: SyntaxError: invalid syntax"),
    ("import nonexistent_module", ", line 1: ModuleNotFoundError: .*existent"),
    ("raise RuntimeError('a\\nb')", ", line 1: RuntimeError: a b"),
    ("x = 1", "defines no get_config"),
    ("import sys\nsys.exit(3)", ", line 2: SystemExit: 3"),
    ("def get_config(arg=''):\n  return None", "returned a NoneType"),
    ("def get_config(arg=''):\n  return {}", "returned a dict"),
    (START + "  config.client.lr.x = 1\n", ", line 6: AttributeError"),
    (START + "  config.seed = 'a'\n", ", line 6: TypeError: .*'seed'"),
    (START + "  open('/nowhere/x')\n", "No such file .*/nowhere/x"),
  ],
)
def test_a_wrong_file_says_where(written, text, message):
  path = written(text)
  with pytest.raises(ValueError, match=message) as caught:
    load(path)
  assert str(caught.value).startswith(f"--config={path}")
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("line", "cause"),
  [
    ("from beside_it import ROUNDS", "beside_it lies beside the file"),
    ("from .beside_it import ROUNDS", "leave out the dot, and set"),
  ],
)
def test_a_file_that_imports_its_neighbor_is_told_how(
  written, tmp_path, line, cause, monkeypatch
):
  (tmp_path / "beside_it.py").write_text("ROUNDS = 7\n")
  body = START + "  config.server.rounds = ROUNDS\n  return config\n"
  with pytest.raises(ValueError, match=f", line 1: .*{cause}") as caught:
    load(written(line + body))
  assert f"PYTHONPATH={tmp_path} " in str(caught.value)
  # What it says works.
  monkeypatch.setattr(sys, "path", [*sys.path])
  told = str(caught.value).partition("before the import: ")[2].rstrip(".")
  plain = line.replace("from .", "from ")
  path = written(f"{told}\n{plain}{body}")
  assert load(path).server.rounds == 7
  sys.modules.pop("beside_it")


def test_an_argument_that_no_config_knows():
  with pytest.raises(ValueError, match="argument='smok' .* mean 'smoke'"):
    load(f"{DIGITS}:smok")


def test_the_last_of_a_field_wins():
  given = ["--config.client.momentum=None", "--config.client.momentum=0.5"]
  first = f"--config={DIGITS}"
  assert parse([first, *given], "config").config.client.momentum == 0.5
  assert parse([first, *given[::-1]], "config").config.client.momentum is None


def test_an_argument_that_the_file_does_not_take(written):
  path = written("def get_config():\n  return 1\n")
  with pytest.raises(ValueError, match="takes 0 positional arguments"):
    load(f"{path}:smoke")


def test_no_such_file(tmp_path):
  missing = tmp_path / "nope.py"
  with pytest.raises(FileNotFoundError) as caught:
    load(f"{missing}:smoke")
  assert str(caught.value) == f"--config={missing}: there is no such file"
  with pytest.raises(OSError, match="Is a directory"):
    load(str(tmp_path))


def test_loading_leaves_nothing_behind(written, tmp_path):
  load(written(START + "  return config\n"))
  assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]


@pytest.mark.parametrize(
  ("text", "kind", "value"), [("8", int, 8), ("1e9", float, 1e9)]
)
def test_a_number(text, kind, value):
  found = number("--devices", text, kind)
  assert found == value
  assert isinstance(found, kind)


@pytest.mark.parametrize("text", ["", "8.5", "eight", "1e9"])
def test_no_whole_number(text):
  with pytest.raises(UsageError) as caught:
    number("--devices", text, int)
  assert str(caught.value) == f"--devices={text} is wrong; give a whole number."


OPTIONS = """
from fedjax_sim import aggregators
from fedjax_sim.transforms import clip


def mine(maybe: float | None = 0.5, many: int | float = 1, on: bool = True):
  seen.append((maybe, many, on))
  return aggregators.mean()


def named(name: str = "x", norm: float = 1.0):
  return clip(norm)


def fed(error_feedback: bool = True):
  return clip(1.0)


seen = []
"""


@pytest.mark.parametrize(
  ("field", "text", "value"),
  [
    ("maybe", "None", None),
    ("maybe", "2", 2.0),
    ("many", "2.5", 2.5),
    ("on", "false", False),
  ],
)
def test_options_have_the_types_of_their_annotations(
  tmp_path, field, text, value
):
  path = tmp_path / "mine.py"
  path.write_text(OPTIONS)
  fields = {"aggregator.name": f"{path}:mine", f"aggregator.{field}": text}
  found = complete(load(DIGITS, fields)).aggregator
  assert found == complete(load(DIGITS, fields)).aggregator
  assert found[field] == value
  assert type(found[field]) is type(value)


def test_a_flag_without_a_value_is_false(tmp_path):
  (tmp_path / "mine.py").write_text(OPTIONS)
  parsed = parse(
    [
      f"--config={DIGITS}",
      f"--config.aggregator.name={tmp_path / 'mine.py'}:mine",
      "--noconfig.aggregator.on",
    ],
    "config",
  )
  assert parsed.config.aggregator.on is False


@pytest.mark.parametrize("order", ["noise,clip", "(noise, clip)"])
def test_an_order_of_transforms(order):
  fields = {
    "transforms.clip.norm": "1",
    "transforms.noise.name": "gaussian",
    "transforms.noise.stddev": "1",
    "transforms.order": order,
  }
  assert complete(load(DIGITS, fields)).transforms.order == ("noise", "clip")
  fields["transforms.noise"] = "None"
  assert complete(load(DIGITS, fields)).transforms.order == ("clip",)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (
      {"transforms.e.name": "{}:named"},
      "'name', and transforms.e.name is",
    ),
    ({"transforms.e.name": "{}:fed"}, "'error_feedback', and transforms.e.err"),
    (
      {
        "transforms.gaussian.stddev": "1",
        "transforms.gaussian.error_feedback": "true",
      },
      "would take the noise back",
    ),
  ],
)
def test_options_of_transforms_that_are_taken(tmp_path, fields, message):
  (tmp_path / "mine.py").write_text(OPTIONS)
  fields = {k: v.format(tmp_path / "mine.py") for k, v in fields.items()}
  with pytest.raises(ValueError, match=message):
    build(load(DIGITS, fields))


def test_what_is_unset_may_be_absent():
  plain = complete(load(DIGITS))
  for field in ("aggregator.fraction", "algorithm.name", "seed", "model.name"):
    unset = {field: "None"}
    if field == "model.name":
      unset["model.hidden_sizes"] = "None"
    assert complete(load(DIGITS, unset)).algorithm == plain.algorithm
  one_side = {"algorithm.name": "fedsgd", "client.momentum": "0.9"}
  assert complete(load(DIGITS, one_side)).client.optimizer is None
