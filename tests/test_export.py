"""`fedjax-sim export`: weights that are the run's, and a program of its own."""

import json
import os
import pathlib
import re
import subprocess
import sys
import types
from typing import Any

import jax
import numpy as np
import pytest

import fedjax_sim as fs
from fedjax_sim import config as configs
from fedjax_sim.cli.main import main
from fedjax_sim.config import flags
from fedjax_sim.config.completion import complete
from fedjax_sim.core.weights import read_weights
from fedjax_sim.run import experiment
from fedjax_sim.run import export as exports
from fedjax_sim.tasks.freezing import named_variables
from workdirs import skip_pictures

pytestmark = pytest.mark.usefixtures("same_programs")

ROOT = pathlib.Path(__file__).resolve().parents[1]
DIGITS = ROOT / "configs" / "digits_fedavg.py"
TINY = {
  "model.hidden_sizes": "8",
  "data.num_clients": "10",
  "data.unseen_clients": "2",
  "server.clients_per_round": "3",
  "server.rounds": "2",
  "client.epochs": "1",
  "runtime.devices": "1",
  "runtime.checkpoint_every": "1",
  "server.best_metrics": "test/loss",
}
LEN = '''
import jax.numpy as jnp
from flax import nnx

from fedjax_sim import nnx_task


class Net(nnx.Module):
  """Batch norm, and code that needs to know how many examples there are."""

  def __init__(self, features, classes, rngs):
    self.norm = nnx.BatchNorm(features, rngs=rngs)
    self.linear = nnx.Linear(features, classes, rngs=rngs)

  def __call__(self, x):
    x = self.norm(x).reshape(len(x), -1)
    return self.linear(x)


def net(example_shape, num_classes):
  return nnx_task(lambda rngs: Net(example_shape[0], num_classes, rngs))
'''


def run(folder, **changes):
  named = {field.replace("__", "."): text for field, text in changes.items()}
  with pytest.MonkeyPatch.context() as patch:
    skip_pictures(patch)
    experiment.run(flags.load(str(DIGITS), TINY | named), folder)
  return folder


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp("run") / "run"
  return run(folder, model__frozen="layers/0/bias")


@pytest.fixture(scope="module")
def with_buffers(tmp_path_factory):
  folder = tmp_path_factory.mktemp("net")
  (folder / "net.py").write_text(LEN)
  name = f"{folder / 'net.py'}:net"
  return run(folder / "run", model__name=name, model__hidden_sizes="None")


def export(workdir, path, *more):
  return main(["export", f"--workdir={workdir}", f"--to={path}", *more])


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".msgpack"])
def test_weights_are_the_runs(workdir, tmp_path, suffix, capsys):
  path = tmp_path / f"model{suffix}"
  assert export(workdir, path, f"--format={suffix[1:]}") == 0
  assert capsys.readouterr().out == f"{path}: 4 arrays, of round 2\n"
  arrays, metadata = read_weights(path)
  assert list(arrays) == [
    *("layers/0/bias", "layers/0/kernel"),  # the first of them is frozen
    *("layers/1/bias", "layers/1/kernel"),
  ]
  for name, value in named_variables(fs.load(workdir).variables).items():
    assert arrays[name].tobytes() == np.asarray(value).tobytes()
  summary = json.loads((workdir / "summary.json").read_text())
  facts = json.loads((tmp_path / f"model{suffix}.json").read_text())
  assert facts["params_digest"] == summary["params_digest"]
  assert facts["round"] == 2
  config = json.loads((workdir / "config.json").read_text())
  del config["trackers"]  # whose URIs are nobody else's business
  assert facts["config"] == config
  assert {k: json.loads(metadata[k]) for k in facts} == facts
  first = path.read_bytes()
  export(workdir, path)
  assert path.read_bytes() == first  # the same model is the same file


PRIVATE = {
  "central": {
    "privacy.mechanism": "gaussian",
    "privacy.clip_norm": "1.0",
    "privacy.delta": "0.001",
    "privacy.noise_multiplier": "1.0",
    "sampler.name": "poisson",
  },
  "local": {
    "local_privacy.mechanism": "gaussian",
    "local_privacy.clip_norm": "1.0",
    "local_privacy.epsilon": "8.0",
    "local_privacy.delta": "1e-5",
  },
  "secure": {
    "aggregator.name": "secure_sum",
    "aggregator.noise_multiplier": "1.0",
    "aggregator.clip": "1.0",
  },
}
SECRET = {"seed": "71717", "privacy.noise_seed": "81818"}


@pytest.mark.parametrize("kind", [*PRIVATE])
def test_a_private_config_goes_without_seeds_and_folders(kind, tmp_path):
  (tmp_path / "secret").mkdir()
  (tmp_path / "secret" / "net.py").write_text(LEN)
  fields = {
    **PRIVATE[kind],
    **SECRET,
    "model.name": f"{tmp_path / 'secret' / 'net.py'}:net",
    "model.hidden_sizes": "None",
    "model.initial": f"{tmp_path / 'secret' / 'first.npz'}",
    "data.path": str(tmp_path / "secret"),
    "data.name": "npz",
    "data.num_clients": "None",
    "data.partition": "None",
    "data.alpha": "None",
    "data.unseen_clients": "0",
  }
  config = complete(flags.load(str(DIGITS), fields))
  with config.unlocked():
    config.client.note = "see http://me:hunter2@host"
  shared = exports._shared_config(config)
  text = json.dumps(shared)
  assert shared["client"].pop("note") == "see http://***@host"
  for word in ("secret", "71717", "81818", str(tmp_path)):
    assert word in json.dumps(configs.resolved(config))
    assert word not in text
  assert shared["model"]["name"] == "net.py:net"
  assert shared["model"]["initial"] == "first.npz"
  assert shared["client"]["epochs"] == config.client.epochs


def test_a_private_model_goes_without_seeds(tmp_path):
  changes = PRIVATE["central"] | SECRET | {"server.rounds": "1"}
  folder = tmp_path / "run"
  run(folder, **changes)
  export(folder, tmp_path / "model.npz")
  _, metadata = read_weights(tmp_path / "model.npz")
  for text in ((tmp_path / "model.npz.json").read_text(), *metadata.values()):
    assert "71717" not in text
    assert "81818" not in text
  assert json.loads(metadata["config"])["privacy"]["noise_multiplier"] == 1.0


@pytest.mark.parametrize("suffix", [".npz", ".stablehlo"])
def test_a_json_file_is_never_that_of_another_model(
  suffix, workdir, tmp_path, monkeypatch
):
  """A kill before or after the model is written leaves none."""
  path = tmp_path / f"model{suffix}"
  beside = tmp_path / f"model{suffix}.json"
  writer = "write_weights" if suffix == ".npz" else "write_atomically"

  def killed(*args):
    raise KeyboardInterrupt

  for name in (writer, "write_json"):
    export(workdir, path, "--round=1")
    before = path.read_bytes()
    with monkeypatch.context() as patch:
      patch.setattr(exports, name, killed)
      with pytest.raises(KeyboardInterrupt):
        exports.export(fs.load(workdir, 2), path)
    assert not beside.exists()
    assert (path.read_bytes() == before) == (name == writer)
  export(workdir, path, "--round=2")
  assert json.loads(beside.read_text())["round"] == 2


def test_buffers_have_a_prefix(with_buffers, tmp_path):
  export(with_buffers, tmp_path / "model.npz")
  assert set(read_weights(tmp_path / "model.npz").arrays) == {
    *("norm/scale", "norm/bias", "linear/kernel", "linear/bias"),
    *("buffers/norm/mean", "buffers/norm/var"),
  }


def test_another_round(workdir, tmp_path):
  for round_, expected in (
    ("0", 0),
    ("1", 1),
    ("best", None),
    ("best/test/loss", None),
  ):
    export(workdir, tmp_path / "model.npz", f"--round={round_}")
    facts = json.loads((tmp_path / "model.npz.json").read_text())
    opened = fs.load(workdir, "best" if expected is None else expected)
    assert facts["round"] == opened.round
    found = read_weights(tmp_path / "model.npz").arrays["layers/1/bias"]
    named = named_variables(opened.variables)
    np.testing.assert_array_equal(found, named["layers/1/bias"])


def test_an_exported_model_begins_a_run(workdir, tmp_path):
  export(workdir, tmp_path / "model.npz")
  run(tmp_path / "run", model__initial=str(tmp_path / "model.npz"))
  began = named_variables(fs.load(tmp_path / "run", 0).variables)
  for name, value in read_weights(tmp_path / "model.npz").arrays.items():
    np.testing.assert_array_equal(began[name], value)


@pytest.mark.parametrize(
  ("to", "more", "message"),
  [
    ("model.pt", (), r"a \.pt file is a pickle"),
    (
      "model.onnx",
      (),
      r"\.onnx names no format .* \.safetensors, .*\.msgpack, \.stablehlo\.",
    ),
    ("model.npz", ("--format=msgpack",), "--format=msgpack and --to="),
    ("model.npz", ("--round=last",), "--round=last is wrong; give a whole"),
    ("model.npz", ("--round=7",), "round=7: .* there are 0, 1, 2"),
    ("none/model.npz", (), "there is no folder .*none; make it first"),
    ("model.npz", ("--data-path=x", "--best"), "Unknown command line flag"),
  ],
)
def test_what_is_refused(workdir, tmp_path, capsys, to, more, message):
  assert export(workdir, tmp_path / to, *more) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("fedjax-sim: error: ")
  assert re.search(message, line), line
  assert not any(tmp_path.iterdir())


def test_no_other_file_is_replaced(workdir, tmp_path, capsys):
  other = tmp_path / "model.npz.json"
  for content in ("{}", "[]", "text"):
    other.write_text(content)
    assert export(workdir, tmp_path / "model.npz") == 2
    error = capsys.readouterr().err
    assert "model.npz.json would be replaced, which no export wrote" in error
    assert other.read_text() == content


def test_exports_of_one_stem_keep_their_facts(workdir, tmp_path):
  for suffix, round_ in ((".npz", 1), (".msgpack", 2)):
    export(workdir, tmp_path / f"model{suffix}", f"--round={round_}")
  for suffix, round_ in ((".npz", 1), (".msgpack", 2)):
    facts = json.loads((tmp_path / f"model{suffix}.json").read_text())
    assert facts["round"] == round_


def test_a_url_is_no_folder(tmp_path, capsys):
  to = tmp_path / "model.npz"
  assert main(["export", "--workdir=s3://b/run", f"--to={to}"]) == 2
  text = "--workdir=s3://b/run is a URL, which only run takes; copy"
  assert text in capsys.readouterr().err
  assert not to.exists()


def test_a_missing_library_is_named(workdir, tmp_path, capsys, monkeypatch):
  monkeypatch.setitem(sys.modules, "flatbuffers", None)
  assert export(workdir, tmp_path / "model.stablehlo") == 2
  assert "pip install 'fedjax_sim[stablehlo]'" in capsys.readouterr().err


ALONE = """
import sys

for name in ("fedjax_sim", "flax", "optax", "orbax", "ml_collections"):
  sys.modules[name] = None  # it cannot be imported

import jax
import numpy as np

model, inputs, outputs = sys.argv[1:]
with open(model, "rb") as file:
  program = jax.export.deserialize(bytearray(file.read()))
examples = np.load(inputs)
parts = [examples[:1], examples[1:8], examples[8:]]
found = [program.call({"x": part}) for part in parts]
np.save(outputs, np.concatenate(found))
print(*program.platforms)
"""


@pytest.mark.integration
@pytest.mark.parametrize(
  "kind",
  [
    "digits",
    pytest.param("images", marks=pytest.mark.slow),
    "text",
    pytest.param("heartbeats", marks=pytest.mark.slow),
  ],
)
def test_a_program_runs_with_jax_alone(tmp_path, kind, workdir, real_data):
  configs = {
    "images": "mnist_writers_cnn.py",
    "text": "shakespeare_lstm.py",
    "heartbeats": "ecg_cnn.py",
  }
  if kind != "digits":
    workdir = tmp_path / "run"
    config = flags.load(
      f"{ROOT / 'configs' / configs[kind]}:smoke",
      {
        "runtime.devices": "1",
        "server.rounds": "1",
        "server.clients_per_round": "2",
      },
    )
    experiment.run(config, workdir)
  opened: Any = fs.load(workdir)
  path = tmp_path / "model.stablehlo"
  assert export(workdir, path, "--format=stablehlo") == 0
  facts = json.loads((tmp_path / "model.stablehlo.json").read_text())
  assert facts["platforms"] == ["cpu", "cuda", "tpu"]
  assert list(facts["inputs"]) == ["x"]

  data = opened.simulator.data
  x = np.asarray(data.train.examples["x"])[:20]
  assert facts["inputs"]["x"]["shape"] == ["b", *x.shape[1:]]
  np.save(tmp_path / "x.npy", x)
  (tmp_path / "alone.py").write_text(ALONE)
  files = (path, tmp_path / "x.npy", tmp_path / "out.npy")
  done = subprocess.run(
    [sys.executable, str(tmp_path / "alone.py"), *map(str, files)],
    capture_output=True,
    text=True,
    check=False,
    cwd=tmp_path,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout == "cpu cuda tpu\n"
  found = np.load(tmp_path / "out.npy")
  np.testing.assert_allclose(
    found, opened.predict({"x": x}), rtol=1e-4, atol=1e-5
  )


def test_code_that_asks_for_the_number_of_examples(
  with_buffers, tmp_path, capsys
):
  assert export(with_buffers, tmp_path / "model.stablehlo") == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert "cannot be exported for any number of examples" in line
  assert "let its code take x.shape[0], not len(x)." in line
  assert not any(tmp_path.iterdir())


def test_a_platform_that_a_layer_lacks_is_left_out(
  workdir, tmp_path, monkeypatch, capsys
):
  real = jax.export.export

  def refusing(function, *, platforms):
    if "tpu" in platforms:
      raise NotImplementedError
    return real(function, platforms=platforms)

  monkeypatch.setattr(
    exports,
    "jax",
    types.SimpleNamespace(
      **{
        k: getattr(jax, k)
        for k in ("jit", "ShapeDtypeStruct", "dtypes", "config")
      },
      export=types.SimpleNamespace(
        export=refusing, symbolic_shape=jax.export.symbolic_shape
      ),
    ),
  )
  assert export(workdir, tmp_path / "model.stablehlo") == 0
  assert "a program for cpu, cuda, of round 2" in capsys.readouterr().out
  # Debug information would name the files of the code, and who has them.
  content = (tmp_path / "model.stablehlo").read_bytes()
  assert b"StableHLO" in content
  assert b".py" not in content
  for folder in (ROOT, pathlib.Path(jax.__file__).parents[1], workdir):
    assert os.fsencode(folder) not in content
