"""Low-rank adapters as Hugging Face's library PEFT keeps them.

A layer's change is alpha / r * B A there, with A of shape (r, inputs) and B of
shape (outputs, r). GPT-2 has queries, keys and values in one layer: adapters of
some of them become one of a larger r, with zeros in its B.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from fedjax_sim.models.transformer.describing import TOKENS
from fedjax_sim.models.transformer.layouts import (
  Source,
  as_files,
  decoder_of,
  source_of,
)
from fedjax_sim.tasks.low_rank import LowRank

ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
_CLASSIFIER = "classifier"


class PeftFiles(NamedTuple):
  """What the two files of an adapter hold.

  Attributes:
    arrays: of the safetensors file.
    config: of the JSON file.
    whole: names of our parameters that `arrays` replace, as a whole.
  """

  arrays: dict[str, np.ndarray]
  config: dict[str, Any]
  whole: frozenset[str]


def peft_files(
  kind: str,
  adapters: Mapping[str, LowRank],
  trained: Collection[str],
  model: Mapping[str, np.ndarray],
  *,
  classes: bool,
) -> PeftFiles:
  """Return the files of a model's adapters.

  Layers of which another parameter trains, and the head that names a class, are
  saved whole (`modules_to_save`), with their adapters multiplied in.

  Args:
    kind: the `model_type`.
    adapters: our names of kernels -> what they are made of, of one rank and
      scale.
    trained: our names of parameters that train whole.
    model: all parameters, with the adapters multiplied in, by our names.
    classes: whether the head names a class, and no ids.

  Raises:
    ValueError: PEFT has no such adapter, or none is left.
  """
  head = {name for name in model if classes and name.startswith("head/")}
  modules = {_saved(kind, name, classes) for name in {*trained, *head}}
  tied = not classes and not {"head/kernel", "head/linear/kernel"} & {*model}
  if tied and TOKENS in trained:
    modules.add(decoder_of(kind))
  files = as_files(kind, model, classes)
  if tied:
    files[f"{decoder_of(kind)}.weight"] = np.asarray(model[TOKENS])
  saved = {
    name: array
    for name, array in files.items()
    if any(name.startswith(f"{module}.") for module in modules)
  }
  layers: dict[str, dict[Source, LowRank]] = {}
  for name, adapter in adapters.items():
    source = source_of(kind, name, classes)
    if source.name in saved:
      continue
    if name.endswith("/embedding"):
      raise ValueError(
        f"adapter.targets matches {name!r}, and an adapter of an embedding is"
        " not one of PEFT's layers; --layout=hugging_face writes the model with"
        " its adapters multiplied in."
      )
    layers.setdefault(source.module, {})[source] = adapter
  if not layers:
    raise ValueError(
      "All adapters are of layers that train whole, so none is left for PEFT;"
      " --layout=hugging_face writes the whole model."
    )
  arrays: dict[str, np.ndarray] = {}
  for module, parts in layers.items():
    arrays[f"{module}.lora_A.weight"], arrays[f"{module}.lora_B.weight"] = (
      _factors(parts)
    )
  first = next(iter(adapters.values()))
  rank = first.a.shape[-1]
  scale = float(first.scale)
  ranks = {m: rank * len(parts) for m, parts in layers.items()}
  larger = {m: r for m, r in ranks.items() if r != rank}
  config = {
    "peft_type": "LORA",
    "task_type": _task_type(kind, classes),
    "r": rank,
    "lora_alpha": _number(scale * rank),
    "rank_pattern": larger,
    "alpha_pattern": {m: _number(scale * r) for m, r in larger.items()},
    "target_modules": sorted(layers),
    "modules_to_save": sorted(modules) or None,
    "fan_in_fan_out": kind == "gpt2",
    "lora_dropout": 0.0,
    "bias": "none",
    "inference_mode": True,
  }
  whole = {n for n in model if source_of(kind, n, classes).name in saved}
  named = {_PREFIX + name: x for name, x in {**arrays, **saved}.items()}
  return PeftFiles(named, config, frozenset({*whole, *trained}))


def _saved(kind: str, name: str, classes: bool) -> str:
  """Return the layer that is saved whole since a parameter of it trains."""
  if name == "head/bias":
    return decoder_of(kind)
  module = source_of(kind, name, classes).module
  # PEFT saves this one whole, whatever of it trains.
  return _CLASSIFIER if module.startswith(f"{_CLASSIFIER}.") else module


def _factors(
  parts: Mapping[Source, LowRank],
) -> tuple[np.ndarray, np.ndarray]:
  """Return A, shape=(r, inputs), and B, shape=(outputs, r), of a layer."""
  flat = [
    (np.asarray(x.a, np.float32).T, np.asarray(x.b, np.float32).T)
    for x in parts.values()
  ]
  a = np.concatenate([one for one, _ in flat])
  if [source.third for source in parts] == [None]:
    return np.ascontiguousarray(a), np.ascontiguousarray(flat[0][1])
  outputs, rank = flat[0][1].shape
  b = np.zeros((3, outputs, len(flat) * rank), np.float32)
  for i, (source, (_, one)) in enumerate(zip(parts, flat, strict=True)):
    assert source.third is not None
    b[source.third, :, i * rank : (i + 1) * rank] = one
  return np.ascontiguousarray(a), b.reshape(3 * outputs, -1)


def _task_type(kind: str, classes: bool) -> str | None:
  """Return what PEFT calls the task; it has no name for masked ids."""
  if classes:
    return "SEQ_CLS"
  return "CAUSAL_LM" if kind in ("gpt2", "llama") else None


def _number(value: float) -> int | float:
  """Return a number that float32 has held, as short as it is."""
  value = float(f"{value:.7g}")
  return int(value) if value.is_integer() else value
