"""Exported adapters: merged, or as PyTorch's libraries have them."""

import dataclasses
import json
import pathlib
import re
import warnings

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

import fedjax_sim as fs
from fedjax_sim.cli.main import main
from fedjax_sim.config import flags
from fedjax_sim.core.weights import read_weights
from fedjax_sim.models.transformer.gpt2 import gpt2
from fedjax_sim.models.transformer.hugging_face import hugging_face
from fedjax_sim.run import experiment, export_folder
from fedjax_sim.run import export as exports
from fedjax_sim.run.export import ExportError
from fedjax_sim.tasks.freezing import named_variables
from fedjax_sim.tasks.lora import adapters_of, unadapted, with_kernels
from workdirs import skip_pictures

ROOT = pathlib.Path(__file__).resolve().parents[1]
TINY = {
  "data.name": "npz",
  "data.path": str(ROOT / "tests" / "tokens.npz"),
  "data.num_clients": "None",
  "data.partition": "None",
  "data.alpha": "None",
  "data.unseen_clients": "0",
  "model.name": "gpt2",
  "model.hidden_sizes": "None",
  "model.width": "8",
  "model.layers": "1",
  "client.epochs": "1",
  "client.learning_rate": "1.0",
  "server.clients_per_round": "2",
  "server.rounds": "2",
  "runtime.devices": "1",
}
ADAPTER = {
  "adapter.name": "lora",
  "adapter.targets": ".*/query/kernel,.*/outer/kernel",
  "adapter.rank": "2",
  "adapter.alpha": "3.0",
  "adapter.also": "norm/",
}
TIME, TOKENS = 6, 12


def run(folder, changes):
  with pytest.MonkeyPatch.context() as patch:
    skip_pictures(patch)
    config = flags.load(str(ROOT / "configs" / "digits_fedavg.py"), changes)
    experiment.run(config, folder)
  return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """A run of a model from random weights, with adapters."""
  return run(tmp_path_factory.mktemp("made") / "run", TINY | ADAPTER)


def export(workdir, path, *more):
  return main(["export", f"--workdir={workdir}", f"--to={path}", *more])


def facts_of(path):
  return json.loads(path.with_name(f"{path.name}.json").read_text())


def begun(folder):
  """What `hugging_face` makes of a folder, its task and variables."""
  with warnings.catch_warnings(action="error"):
    task = hugging_face((TIME,), TOKENS, str(folder))
  return task, jax.jit(task.init)(jax.random.key(1))


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".msgpack"])
def test_a_merged_model_has_no_adapters(made, tmp_path, suffix):
  path = tmp_path / f"model{suffix}"
  assert export(made, path, "--merged") == 0
  found = read_weights(path).arrays
  opened = fs.load(made)
  assert "frozen" not in "".join(found)
  assert "lora" not in "".join(found)
  own = {n: np.asarray(x) for n, x in named_variables(opened.variables).items()}
  for name in ("query", "outer"):
    (kernel,) = (n for n in found if n.endswith(f"{name}/kernel"))
    a, b = (
      np.asarray(own[f"{kernel}/lora_{part}"], np.float64) for part in "ab"
    )
    assert np.abs(b).max() > 0
    np.testing.assert_allclose(
      found[kernel], own[kernel] + 3.0 / 2 * a @ b, atol=1e-6
    )
  assert facts_of(path)["round"] == 2


def test_a_merged_model_begins_a_run(made, tmp_path):
  export(made, tmp_path / "model.npz", "--merged")
  model = gpt2((TIME,), TOKENS, width=8, layers=1)
  with warnings.catch_warnings(action="error"):  # all is there, and taken
    fs.with_initial(model, read_weights(tmp_path / "model.npz").arrays)


def test_hugging_faces_folder_predicts_as_the_run(made, tmp_path, capsys):
  path = tmp_path / "model"
  assert export(made, path, "--layout=hugging_face") == 0
  assert capsys.readouterr().out == f"{path}: 20 arrays, of round 2\n"
  assert sorted(f.name for f in path.iterdir()) == [
    *("config.json", "model.safetensors")
  ]
  assert read_weights(path / "model.safetensors").metadata["format"] == "pt"
  config = json.loads((path / "config.json").read_text())
  assert config["architectures"] == ["GPT2LMHeadModel"]
  opened, (task, variables) = fs.load(made), begun(path)
  x = np.asarray(opened.simulator.data.train.examples["x"])[:3]
  assert task.logits is not None
  np.testing.assert_allclose(
    jax.jit(task.logits)(variables, {"x": x}),
    opened.predict({"x": x}),
    atol=1e-5,
  )


def test_pefts_folder_has_the_adapters_and_their_base(made, tmp_path, capsys):
  path = tmp_path / "adapters"
  assert export(made, path, "--layout=peft") == 0
  said = f"{path}: 2 adapters of {path / 'base'}, of round 2\n"
  assert capsys.readouterr().out == said
  config = json.loads((path / "adapter_config.json").read_text())
  assert config["modules_to_save"] == ["transformer.ln_f"]
  assert config["base_model_name_or_path"] is None
  arrays = read_weights(path / "adapter_model.safetensors").arrays
  assert {n.removeprefix("base_model.model.transformer.") for n in arrays} == {
    *("h.0.attn.c_attn.lora_A.weight", "h.0.attn.c_attn.lora_B.weight"),
    *("h.0.mlp.c_proj.lora_A.weight", "h.0.mlp.c_proj.lora_B.weight"),
    *("ln_f.weight", "ln_f.bias"),
  }
  _, variables = begun(path / "base")
  expected = named_variables(unadapted(fs.load(made).variables))
  for name, value in named_variables(variables).items():
    np.testing.assert_array_equal(value, expected[name])
  facts = facts_of(path)
  assert (facts["layout"], facts["round"]) == ("peft", 2)
  assert export(made, path, "--layout=peft") == 0  # in the place of its own


def changed(opened, kernels=None, **fields):
  """The opened run with other fields of `model`, or kernels it began with."""
  config = ConfigDict(opened.config.to_dict())
  with config.unlocked():
    config.model.update(fields)
  other = dataclasses.replace(opened, config=config)
  if kernels is not None:
    other.__dict__["variables"] = with_kernels(opened.variables, kernels)
  return other


def test_adapters_of_a_folders_model_need_no_other_base(made, tmp_path):
  """But those of FedEx-LoRA do, which changes the kernels themselves."""
  export(made, tmp_path / "adapters", "--layout=peft")
  folder = tmp_path / "adapters" / "base"
  opened = fs.load(made)
  kernels = {p: x.base + 1 for p, x in adapters_of(opened.variables).items()}
  given = {"name": "hugging_face", "folder": str(folder)}
  for name, own in (("same", None), ("other", kernels)):
    path = tmp_path / name
    export_folder.export_folder(changed(opened, own, **given), path, "peft")
    config = json.loads((path / "adapter_config.json").read_text())
    base = config["base_model_name_or_path"]
    assert (base, (path / "base").exists()) == {
      "same": ("base", False),
      "other": (None, True),
    }[name]
  held = read_weights(tmp_path / "other" / "base" / "model.safetensors").arrays
  before = read_weights(folder / "model.safetensors").arrays
  for name, value in before.items():
    moved = np.abs(held[name] - value).max()
    adapted = "c_attn.w" in name or "mlp.c_proj.w" in name
    np.testing.assert_allclose(moved, 1 if adapted else 0, atol=1e-6)


@pytest.mark.parametrize(
  ("to", "more", "message"),
  [
    ("model", ("--layout=onnx",), "--layout='onnx' is unknown"),
    ("model", ("--layout=peft", "--format=npz"), "leave out --format=npz"),
    ("model", ("--layout=peft", "--merged"), "--layout=peft says by itself"),
    ("m.stablehlo", ("--merged",), r"a \.stablehlo file says by itself"),
    ("none/model", ("--layout=peft",), "there is no folder .*none; make it"),
    ("full", ("--layout=peft",), "is there, and no export with --layout=peft"),
    ("file", ("--layout=peft",), "is there, and no export with --layout=peft"),
  ],
)
def test_what_is_refused(made, tmp_path, capsys, to, more, message):
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "mine").touch()
  (tmp_path / "file").touch()
  before = sorted(tmp_path.rglob("*"))
  assert export(made, tmp_path / to, *more) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert re.search(message, line), line
  assert sorted(tmp_path.rglob("*")) == before


def test_runs_that_have_nothing_to_export(made, tmp_path):
  opened = fs.load(made)
  other = changed(opened, name="mlp")
  with pytest.raises(ExportError, match="'mlp' has no layout of Hugging"):
    export_folder.export_folder(other, tmp_path / "model", "peft")
  other.__dict__["variables"] = unadapted(opened.variables)
  with pytest.raises(ExportError, match="no adapters to merge"):
    exports.export(other, tmp_path / "model.npz", merge=True)
  assert not any(tmp_path.iterdir())


def test_another_layout_is_not_mixed_in(made, tmp_path, capsys):
  path = tmp_path / "model"
  export(made, path, "--layout=hugging_face")
  assert export(made, path, "--layout=peft") == 2
  assert "no export with --layout=peft wrote it" in capsys.readouterr().err
  assert export_folder.LAYOUTS == ("hugging_face", "peft")
