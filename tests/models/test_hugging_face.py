"""Models from folders: what is loaded, and what is refused."""

import json
import pathlib
import warnings
from typing import Any

import jax
import numpy as np
import pytest

from fedjax_sim.config import default_config
from fedjax_sim.config.build import build
from fedjax_sim.core.weights import write_weights
from fedjax_sim.models.transformer.gpt2 import gpt2
from fedjax_sim.models.transformer.hugging_face import hugging_face
from fedjax_sim.models.transformer.layouts import source_of
from fedjax_sim.models.transformer.llama import llama
from fedjax_sim.tasks.freezing import named_variables

TIME, TOKENS = 6, 12  # of tokens.npz
KEY = jax.random.key(0)
LLAMA = {
  "model_type": "llama",
  "vocab_size": TOKENS,
  "hidden_size": 8,
  "num_hidden_layers": 1,
  "num_attention_heads": 2,
  "num_key_value_heads": 1,
  "intermediate_size": 12,
  "max_position_embeddings": 16,
  "rms_norm_eps": 1e-6,
  "pad_token_id": 0,
}
GPT2 = {
  "model_type": "gpt2",
  "vocab_size": TOKENS,
  "n_embd": 8,
  "n_layer": 1,
  "n_head": 2,
  "n_positions": TIME,
  "resid_pdrop": 0.0,
  "pad_token_id": 0,
}
BERT = {
  "model_type": "bert",
  "vocab_size": TOKENS,
  "hidden_size": 8,
  "num_hidden_layers": 1,
  "num_attention_heads": 2,
  "intermediate_size": 12,
  "max_position_embeddings": 16,
  "pad_token_id": 0,
}
SMALL: dict[str, Any] = {"width": 8, "layers": 1, "heads": 2}
MADE = {
  "llama": lambda: llama(
    (TIME,), TOKENS, **SMALL, key_value_heads=1, feed_forward=12
  ),
  "gpt2": lambda: gpt2((TIME,), TOKENS, **SMALL, dropout=0.0),
}


def theirs(kind, task, classes=False):
  """Return a task's parameters as Hugging Face's files hold them."""
  named = named_variables(jax.jit(task.init)(KEY))
  arrays: dict[str, np.ndarray] = {}
  thirds: dict[str, list[Any]] = {}
  for name, value in named.items():
    source = source_of(kind, name, classes)
    array = np.asarray(value).T if source.transposed else np.asarray(value)
    if source.third is None:
      arrays[source.name] = array
    else:
      thirds.setdefault(source.name, [None] * 3)[source.third] = array
  for name, parts in thirds.items():
    arrays[name] = np.concatenate(parts, axis=-1)
  return arrays


@pytest.fixture(scope="module")
def weights():
  """The arrays of a model of each kind."""
  return {kind: theirs(kind, make()) for kind, make in MADE.items()}


def write(folder, config, *shards):
  folder.mkdir(exist_ok=True)
  (folder / "config.json").write_text(json.dumps(config))
  if len(shards) == 1:
    write_weights(folder / "model.safetensors", shards[0])
    return str(folder)
  places: dict[str, str] = {}
  for i, arrays in enumerate(shards):
    file = f"model-{i + 1}-of-{len(shards)}.safetensors"
    write_weights(folder / file, arrays)
    places |= dict.fromkeys(arrays, file)
  if places:
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
  return str(folder)


def loaded(folder, classes=TOKENS, **options):
  return hugging_face((TIME,), classes, folder, **options)


def values(task):
  return {
    name: np.asarray(x)
    for name, x in named_variables(jax.jit(task.init)(KEY)).items()
  }


@pytest.mark.parametrize(("kind", "config"), [("llama", LLAMA), ("gpt2", GPT2)])
@pytest.mark.parametrize("shards", [1, 2])
def test_a_folder_gives_the_model_that_made_it(
  kind, config, shards, weights, tmp_path
):
  names = sorted(weights[kind])
  parts = [names[i::shards] for i in range(shards)]
  held = [{n: weights[kind][n] for n in part} for part in parts]
  # Files of the model without its head have no prefix, and lower precision.
  if shards == 2:
    cut = lambda n: n.removeprefix("model.").removeprefix("transformer.")
    held = [{cut(n): x.astype(np.float16) for n, x in h.items()} for h in held]
  with warnings.catch_warnings(action="error"):
    task = loaded(write(tmp_path / "m", config, *held))
  expected, found = values(MADE[kind]()), values(task)
  assert found.keys() == expected.keys()
  for name, value in expected.items():
    assert found[name].dtype == np.float32
    np.testing.assert_allclose(found[name], value, atol=1e-3 * (shards - 1))


def test_a_new_head_begins_at_random(weights, tmp_path):
  folder = write(tmp_path / "m", GPT2, weights["gpt2"])
  with pytest.warns(UserWarning, match=r"has no 'head/logits/kernel' for this"):
    task = loaded(folder, 3, objective="classification")
  found = values(task)
  assert found["head/logits/kernel"].shape == (8, 3)
  assert found["head/logits/kernel"].std() > 0
  np.testing.assert_array_equal(
    found["norm/scale"], weights["gpt2"]["transformer.ln_f.weight"]
  )
  two = {**weights["gpt2"], "score.weight": np.zeros((2, 8), np.float32)}
  folder = write(tmp_path / "other", GPT2, two)
  with pytest.warns(UserWarning, match=r"has no 'head/logits/kernel' for this"):
    loaded(folder, 3, objective="classification")
  with warnings.catch_warnings(action="error"):
    loaded(folder, 2, objective="classification")


def test_the_mask_and_special_tokens_are_the_tokenizers(tmp_path):
  (tmp_path / "m").mkdir()
  added = [
    {"id": 3, "content": "[MASK]", "special": True},
    {"id": 2, "content": "[CLS]", "special": True},
    {"id": 5, "content": "word", "special": False},
  ]
  (tmp_path / "m" / "tokenizer.json").write_text(
    json.dumps({"added_tokens": added})
  )
  made = theirs("bert", bert_task(tmp_path / "scratch"))
  folder = write(tmp_path / "m", BERT, made)
  task = loaded(folder, mask_fraction=1.0)
  x = np.array([[2, 5, 6, 3, 0, 0]], np.int32)
  variables = jax.jit(task.init)(KEY)
  loss = jax.jit(task.loss)(variables, {"x": x}, KEY)
  assert loss.weight.tolist() == [2]
  (tmp_path / "m" / "tokenizer.json").unlink()
  with pytest.raises(
    ValueError, match="vocabulary=12 leaves no id for the mask"
  ):
    loaded(folder)
  loaded(folder, mask_id=3)


def bert_task(folder):
  """Return BERT's task; its weights are all zero, but for the head's."""
  names = (
    *("embeddings/tokens/embedding", "embeddings/positions/embedding"),
    *("embeddings/types/embedding", "embeddings_norm/scale"),
  )
  shapes = [(TOKENS, 8), (16, 8), (2, 8), (8,)]
  arrays = {
    source_of("bert", n, False).name: np.zeros(shape, np.float32)
    for n, shape in zip(names, shapes, strict=True)
  }
  arrays["bert.embeddings.LayerNorm.beta"] = np.zeros(8, np.float32)  # old name
  layer = "bert.encoder.layer.0."
  for name, n_in, n_out in (
    *((f"attention.self.{n}", 8, 8) for n in ("query", "key", "value")),
    ("attention.output.dense", 8, 8),
    ("intermediate.dense", 8, 12),
    ("output.dense", 12, 8),
  ):
    arrays[f"{layer}{name}.weight"] = np.zeros((n_out, n_in), np.float32)
    arrays[f"{layer}{name}.bias"] = np.zeros(n_out, np.float32)
  for name in ("attention.output", "output"):
    arrays[f"{layer}{name}.LayerNorm.gamma"] = np.zeros(8, np.float32)
    arrays[f"{layer}{name}.LayerNorm.beta"] = np.zeros(8, np.float32)
  with pytest.warns(UserWarning, match="has no 'head/bias', 'head/dense/bias'"):
    return loaded(write(folder, BERT, arrays), mask_id=3)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"model_type": "t5"},
      r"model_type='t5' is not supported; give .* bert, r",
    ),
    ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported, only 'silu'"),
    (
      {"attention_bias": True, "mlp_bias": True},
      "attention_bias=True is not supported, only False; mlp_bias=True is not",
    ),
    (
      {"rope_parameters": {"rope_type": "yarn"}},
      "rope_type='yarn' is not supported, only 'default'",
    ),
    ({"vocab_size": None}, "vocabulary=None is a NoneType"),
    ({"num_key_value_heads": 3}, "key_value_heads=3 does not divide heads=2"),
    ({"pad_token_id": None}, r"no pad_token_id; set padding_id to what"),
    ({"max_position_embeddings": 5}, "max_length=5: examples are 6 ids long"),
    (
      {"vocab_size": 11},
      "the data have 12 ids .*, and the model's embedding 11",
    ),
    (
      {"intermediate_size": 13},
      r"gate_proj\.weight' makes .* of shape \(8, 12\), and its .*\(8, 13\)",
    ),
    ({"num_hidden_layers": 2}, r"lacks 'model\.layers\.1\.self_attn\.k_proj"),
  ],
)
def test_settings_that_do_not_fit(changes, message, weights, tmp_path):
  folder = write(tmp_path / "m", {**LLAMA, **changes}, weights["llama"])
  with pytest.raises((TypeError, ValueError), match=message) as caught:
    loaded(folder)
  assert str(tmp_path) in str(caught.value)
  assert "\n" not in str(caught.value)


def test_unknown_settings_and_weights_are_told(weights, tmp_path):
  more = {**weights["llama"], "model.extra": np.zeros(2, np.float32)}
  folder = write(tmp_path / "m", {**LLAMA, "fancy": 3}, more)
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    loaded(folder)
  texts = [str(w.message) for w in caught]
  assert len(texts) == 2
  assert "fancy=3 is unknown here, and changes nothing" in texts[0]
  assert "also holds 'model.extra', which nothing takes" in texts[1]


def test_folders_that_hold_no_model(weights, tmp_path):
  with pytest.raises(ValueError, match="is no folder; give the folder of a"):
    loaded(str(tmp_path / "none"))
  with pytest.raises(
    ValueError, match=r"holds no config\.json; give the folder"
  ):
    loaded(str(tmp_path))
  place = tmp_path / "m"
  folder = write(place, LLAMA)
  with pytest.raises(ValueError, match=r"holds no \*\.safetensors; put the"):
    loaded(folder)
  (place / "pytorch_model.bin").write_bytes(b"\x80")
  with pytest.raises(
    ValueError, match=r"in pytorch_model\.bin, a pickle, which runs code.*conv"
  ):
    loaded(folder)
  index = place / "model.safetensors.index.json"
  index.write_text('{"weight_map": {"a": "b.safetensors"}}')
  with pytest.raises(ValueError, match=r"names b\.safetensors, which is not"):
    loaded(folder)
  index.write_text("{}")
  with pytest.raises(ValueError, match="has no weight_map"):
    loaded(folder)
  index.unlink()
  (place / "model.safetensors").write_bytes(b"torn")
  with pytest.raises(ValueError, match=r"folder: .*is damaged"):
    loaded(folder)
  (place / "config.json").write_text("{")
  with pytest.raises(ValueError, match=r"config\.json is no JSON"):
    loaded(folder)
  (place / "config.json").write_text("[]")
  with pytest.raises(ValueError, match=r"config\.json holds a list, no object"):
    loaded(folder)


def test_objectives_are_those_of_the_kind(weights, tmp_path):
  folder = write(tmp_path / "m", LLAMA, weights["llama"])
  with pytest.raises(ValueError, match="objective='masked' is unknown"):
    loaded(folder, objective="masked")


def test_a_config_names_the_folder(weights, tmp_path):
  folder = write(tmp_path / "m", LLAMA, weights["llama"])
  config = default_config()
  config.data.name = "npz"
  config.data.path = str(pathlib.Path(__file__).parents[1] / "tokens.npz")
  config.model.name = "hugging_face"
  with pytest.raises(ValueError, match=r"model\.folder"):
    build(config)
  config.model.folder = folder
  first = build(config)
  assert first.sources["model.initial"].startswith("m (SHA-256 ")
  changed = {**weights["llama"]}
  changed["model.norm.weight"] = changed["model.norm.weight"] + 1
  write(tmp_path / "m", LLAMA, changed)
  assert build(config).sources != first.sources
  config.model.objective = "masked"
  with pytest.raises(
    ValueError, match=r"^model\.objective='masked' is unknown"
  ):
    build(config)
