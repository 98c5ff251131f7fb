"""Small transformers with random adapters, and their files."""

from typing import Any

import jax
import numpy as np

from fedjax_sim.core.files import write_json
from fedjax_sim.core.weights import write_weights
from fedjax_sim.models.transformer.bert import bert
from fedjax_sim.models.transformer.describing import made_config, with_head
from fedjax_sim.models.transformer.gpt2 import gpt2
from fedjax_sim.models.transformer.layouts import as_files
from fedjax_sim.models.transformer.llama import llama
from fedjax_sim.models.transformer.peft import peft_files
from fedjax_sim.tasks.freezing import named_variables
from fedjax_sim.tasks.lora import adapters_of, merged, unadapted, with_lora

TIME, TOKENS, RANK, SCALE = 6, 12, 2, 1.5
SMALL: dict[str, Any] = {"width": 8, "layers": 2, "heads": 2, "dropout": 0.0}
CLASSES: dict[str, Any] = {"objective": "classification", "vocabulary": TOKENS}
FIELDS: dict[str, Any] = {
  "max_length": None,
  "padding_id": 0,
  "key_value_heads": 1,
  "rotary_base": 10_000.0,
  **SMALL,
}
QUERIES = (".*/(query|value)/kernel",)
# kind, fields, what has adapters, and what else trains
CASES: dict[str, tuple[str, dict[str, Any], tuple[str, ...], tuple[str, ...]]]
CASES = {
  "bert": ("bert", {"tied": True}, (".*/(outer|key)/kernel",), ("head/bias",)),
  "bert, untied": ("bert", {"tied": False}, QUERIES, ("head/",)),
  "bert, classes": ("bert", CLASSES, QUERIES, ("head/logits/",)),
  "gpt2": ("gpt2", {"tied": True}, QUERIES, ()),
  "gpt2, embeddings": (
    *("gpt2", {"tied": True}),
    (".*/(query|key|value|inner)/kernel",),
    ("embeddings/tokens/", "layers/1/attention/key/bias", "norm/"),
  ),
  "gpt2, classes": ("gpt2", CLASSES, (".*/kernel",), ()),
  "llama": ("llama", {"tied": False}, QUERIES, ("head/",)),
  "llama, tied": ("llama", {"tied": True}, (".*/gate/kernel",), ()),
}
MAKE = {"bert": bert, "gpt2": gpt2, "llama": llama}


def model_of(case):
  kind, fields, targets, also = CASES[case]
  own = {"key_value_heads": 1, "feed_forward": 12} if kind == "llama" else {}
  outputs = 3 if fields is CLASSES else TOKENS
  task = MAKE[kind]((TIME,), outputs, **{**SMALL, **fields, **own})
  return (
    kind,
    task,
    with_lora(task, targets, RANK, alpha=SCALE * RANK, also=also),
  )


def changed(task, seed=1):
  """Random variables, beside adapters of the scale that they have."""
  rng = np.random.default_rng(seed)

  def value(like):
    if not like.shape:
      return np.float32(SCALE)
    return 0.3 * rng.normal(size=like.shape).astype(np.float32)

  shapes = jax.eval_shape(task.init, jax.random.key(0))
  return jax.tree.map(value, shapes)


def begun(task):
  """The same, before training: adapters are 0, what trains whole is another."""
  before, after = changed(task, seed=2), changed(task)
  zero = lambda x: {k: np.zeros_like(v) for k, v in x.items()}
  params = {
    name: zero(x) if isinstance(x, dict) else x
    for name, x in before.params.items()
  }
  return after._replace(params=params)


def arrays_of(variables):
  return {k: np.asarray(x) for k, x in named_variables(variables).items()}


def files_of(case):
  """The model's kind, its files without adapters and with, and PEFT's."""
  kind, _, adapted = model_of(case)
  variables = changed(adapted)
  classes = CASES[case][1] is CLASSES
  adapters = adapters_of(variables)
  model = arrays_of(merged(variables))
  trained = [n for n in variables.params if n not in adapters]
  found = peft_files(kind, adapters, trained, model, classes=classes)
  # Of what trains whole the base knows nothing.
  base = as_files(kind, arrays_of(unadapted(begun(adapted))), classes)
  return kind, base, as_files(kind, model, classes), found


def write_model(case, variables, folder):
  """Write a model to a folder, as Hugging Face's library has it."""
  kind, fields, *_ = CASES[case]
  arrays = arrays_of(variables)
  section = {**FIELDS, "tied": True, **fields}
  config = with_head(
    made_config(kind, section, arrays, TIME), fields.get("objective"), 0, arrays
  )
  files = as_files(kind, arrays, fields is CLASSES)
  write_weights(folder / "model.safetensors", files, {"format": "pt"})
  write_json(folder / "config.json", config)
