"""Adapters as PEFT's files hold them, and models as Hugging Face's do."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapted import (
  CASES,
  CLASSES,
  RANK,
  SMALL,
  TIME,
  TOKENS,
  arrays_of,
  changed,
  files_of,
  model_of,
  write_model,
)

from fedjax_sim.models.transformer.gpt2 import gpt2
from fedjax_sim.models.transformer.hugging_face import held_arrays, hugging_face
from fedjax_sim.models.transformer.peft import peft_files
from fedjax_sim.tasks.lora import adapters_of, merged, with_lora


def loaded(base, found):
  """What PEFT makes of a base: W + alpha / r B A, and the saved layers.

  Names end as `named_modules` has them, patterns match their ends.
  """
  arrays, config = found.arrays, found.config
  assert all(name.startswith("base_model.model.") for name in arrays)
  arrays = {n.removeprefix("base_model.model."): x for n, x in arrays.items()}
  made = dict(base)
  for module in config["target_modules"]:
    rank = config["rank_pattern"].get(module, config["r"])
    alpha = config["alpha_pattern"].get(module, config["lora_alpha"])
    a = arrays.pop(f"{module}.lora_A.weight")
    b = arrays.pop(f"{module}.lora_B.weight")
    change = alpha / rank * np.float64(b) @ np.float64(a)
    weight = made[f"{module}.weight"]
    linear = any(head in module for head in ("score", "classifier", "lm_head"))
    if config["fan_in_fan_out"] and not linear:
      inputs, outputs = weight.shape
      change = change.T
    else:
      outputs, inputs = weight.shape
    assert (a.shape, b.shape) == ((rank, inputs), (outputs, rank))
    made[f"{module}.weight"] = weight + change
  for name, array in arrays.items():
    module = name.rpartition(".")[0]
    saved = config["modules_to_save"]
    assert any(module == m or module.startswith(f"{m}.") for m in saved)
    made[name] = array
  return made


@pytest.mark.parametrize("case", CASES)
def test_a_base_with_pefts_files_is_the_merged_model(case):
  kind, base, expected, found = files_of(case)
  made = loaded(base, found)
  # A saved layer of logits holds the embeddings' vectors itself.
  own = {n: made.pop(n) for n in made.keys() - expected.keys()}
  assert own.keys() <= {"lm_head.weight", "cls.predictions.decoder.weight"}
  for name in own:
    tokens = {
      "gpt2": "transformer.wte",
      "bert": "bert.embeddings.word_embeddings",
    }
    np.testing.assert_array_equal(own[name], expected[f"{tokens[kind]}.weight"])
  if "head/bias" in found.whole:  # the other name of the bias that is used
    expected["cls.predictions.bias"] = base["cls.predictions.bias"]
  for name, value in expected.items():
    np.testing.assert_allclose(made[name], value, atol=1e-5, err_msg=name)
  assert any(np.abs(made[n] - base[n]).max() > 0.1 for n in base)


def test_names_and_config_are_pefts():
  kind, _, _, found = files_of("gpt2")
  layers = [f"transformer.h.{i}.attn.c_attn" for i in range(2)]
  assert {name: x.shape for name, x in found.arrays.items()} == {
    f"base_model.model.{layer}.lora_{part}.weight": shape
    for layer in layers
    for part, shape in (("A", (2 * RANK, 8)), ("B", (24, 2 * RANK)))
  }
  assert kind == "gpt2"
  assert found.config == {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": RANK,
    "lora_alpha": 3,
    "rank_pattern": dict.fromkeys(layers, 2 * RANK),
    "alpha_pattern": dict.fromkeys(layers, 6),
    "target_modules": layers,
    "modules_to_save": None,
    "fan_in_fan_out": True,
    "lora_dropout": 0.0,
    "bias": "none",
    "inference_mode": True,
  }
  _, _, _, found = files_of("bert, classes")
  assert found.config["task_type"] == "SEQ_CLS"
  assert found.config["modules_to_save"] == ["bert.pooler.dense", "classifier"]
  assert not found.config["fan_in_fan_out"]
  assert "base_model.model.classifier.bias" in found.arrays


def test_adapters_that_peft_has_not_are_refused():
  task = gpt2((TIME,), TOKENS, **SMALL)
  for targets, also, message in (
    (("embeddings/tokens/",), (), "'embeddings/tokens/embedding', and an"),
    ((".*/query/kernel",), (".*/query/bias",), "none is left for PEFT"),
  ):
    variables = changed(with_lora(task, targets, RANK, also=also))
    adapters = adapters_of(variables)
    trained = [n for n in variables.params if n not in adapters]
    model = arrays_of(merged(variables))
    with pytest.raises(ValueError, match=message):
      peft_files("gpt2", adapters, trained, model, classes=False)


@pytest.mark.parametrize("case", CASES)
def test_a_written_model_has_the_arrays(case, tmp_path):
  kind, fields, *_ = CASES[case]
  _, _, adapted = model_of(case)
  whole = merged(changed(adapted))
  write_model(case, whole, tmp_path)
  arrays = arrays_of(whole)
  shapes = {name: x.shape for name, x in arrays.items()}
  held = held_arrays(tmp_path, kind, shapes, fields is CLASSES)
  assert held.arrays.keys() == arrays.keys()
  for name, value in arrays.items():
    np.testing.assert_array_equal(held.arrays[name], value)
  types = "bert.embeddings.token_type_embeddings.weight"
  assert held.rest == ([types] if kind == "bert" else [])


@pytest.mark.parametrize("case", ["bert, untied", "llama, tied"])
def test_a_written_model_is_the_model(case, tmp_path):
  """The folder of a model from random weights gives its logits."""
  _, task, adapted = model_of(case)
  whole = merged(changed(adapted))
  write_model(case, whole, tmp_path)
  with warnings.catch_warnings(action="error"):
    again = hugging_face((TIME,), TOKENS, str(tmp_path), mask_id=TOKENS)
  x = np.random.default_rng(0).integers(1, TOKENS, (2, TIME)).astype(np.int32)
  x[1, 4:] = 0
  of = lambda task, v: jax.jit(task.logits)(v, {"x": jnp.asarray(x)})
  first = jax.jit(again.init)(jax.random.key(1))
  np.testing.assert_allclose(of(again, first), of(task, whole), atol=1e-5)
