"""What the weights of Hugging Face models are called, and how they lie.

PyTorch's linear layers hold (outputs, inputs), Flax's kernels (inputs,
outputs); GPT-2's lie as Flax's, queries, keys and values in one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class Source(NamedTuple):
  """Where a parameter comes from.

  Attributes:
    name: in the file.
    transposed: whether it lies there the other way around.
    third: which third of the last axis it is; None: all of it.
    before: another name, which is preferred where a file has both.
  """

  name: str
  transposed: bool = False
  third: int | None = None
  before: str | None = None

  def of(self, array: np.ndarray) -> np.ndarray:
    """Return the parameter, float32, of the file's array."""
    if self.third is not None:
      array = np.split(array, 3, axis=-1)[self.third]
    return np.ascontiguousarray(
      array.T if self.transposed else array, np.float32
    )

  @property
  def module(self) -> str:
    """The layer that holds it in PyTorch."""
    return self.name.rpartition(".")[0]


_LINEAR = {"kernel": "weight", "bias": "bias"}
_NORM = {"scale": "weight", "bias": "bias"}

# Our names -> theirs, of modules; {} is the number of a layer.
_ENCODER = {
  "embeddings/tokens": "embeddings.word_embeddings",
  "embeddings/positions": "embeddings.position_embeddings",
  "embeddings/types": "embeddings.token_type_embeddings",
  "embeddings_norm": "embeddings.LayerNorm",
  "layers/{}/attention/query": "encoder.layer.{}.attention.self.query",
  "layers/{}/attention/key": "encoder.layer.{}.attention.self.key",
  "layers/{}/attention/value": "encoder.layer.{}.attention.self.value",
  "layers/{}/attention/output": "encoder.layer.{}.attention.output.dense",
  "layers/{}/attention_norm": "encoder.layer.{}.attention.output.LayerNorm",
  "layers/{}/feed_forward/inner": "encoder.layer.{}.intermediate.dense",
  "layers/{}/feed_forward/outer": "encoder.layer.{}.output.dense",
  "layers/{}/feed_forward_norm": "encoder.layer.{}.output.LayerNorm",
}
_GPT2 = {
  "embeddings/tokens": "wte",
  "embeddings/positions": "wpe",
  "layers/{}/attention_norm": "h.{}.ln_1",
  "layers/{}/attention/query": "h.{}.attn.c_attn",
  "layers/{}/attention/key": "h.{}.attn.c_attn",
  "layers/{}/attention/value": "h.{}.attn.c_attn",
  "layers/{}/attention/output": "h.{}.attn.c_proj",
  "layers/{}/feed_forward_norm": "h.{}.ln_2",
  "layers/{}/feed_forward/inner": "h.{}.mlp.c_fc",
  "layers/{}/feed_forward/outer": "h.{}.mlp.c_proj",
  "norm": "ln_f",
}
_LLAMA = {
  "embeddings/tokens": "embed_tokens",
  "layers/{}/attention_norm": "layers.{}.input_layernorm",
  "layers/{}/attention/query": "layers.{}.self_attn.q_proj",
  "layers/{}/attention/key": "layers.{}.self_attn.k_proj",
  "layers/{}/attention/value": "layers.{}.self_attn.v_proj",
  "layers/{}/attention/output": "layers.{}.self_attn.o_proj",
  "layers/{}/feed_forward_norm": "layers.{}.post_attention_layernorm",
  "layers/{}/feed_forward/gate": "layers.{}.mlp.gate_proj",
  "layers/{}/feed_forward/inner": "layers.{}.mlp.up_proj",
  "layers/{}/feed_forward/outer": "layers.{}.mlp.down_proj",
  "norm": "norm",
}
_THIRDS = {"query": 0, "key": 1, "value": 2}


class _Names(NamedTuple):
  """What a `model_type` calls its parts.

  Attributes:
    prefix: of all but the head; files of the model alone lack it.
    body: our modules -> theirs, below the prefix.
    language: the same, of the head that predicts ids.
    decoder: the layer of the logits of ids, if it is not the embedding's table.
    bias: of the logits of ids; None: there is none.
    classes: our modules -> theirs, of the head that names a class.
    without_use: patterns of arrays that nothing needs.
  """

  prefix: str
  body: Mapping[str, str]
  language: Mapping[str, str]
  decoder: str
  bias: str | None
  classes: Mapping[str, str]
  without_use: str


_NAMES: Mapping[str, _Names] = {
  "bert": _Names(
    "bert.",
    _ENCODER,
    {
      "head/dense": "cls.predictions.transform.dense",
      "head/norm": "cls.predictions.transform.LayerNorm",
    },
    "cls.predictions.decoder",
    "cls.predictions.bias",
    {"head/dense": "bert.pooler.dense", "head/logits": "classifier"},
    r"(bert\.)?(embeddings\.position_ids|pooler\.)|cls\.seq_relationship\."
    r"|cls\.predictions\.(decoder\.|bias$)",  # one of two that are the same
  ),
  "roberta": _Names(
    "roberta.",
    _ENCODER,
    {"head/dense": "lm_head.dense", "head/norm": "lm_head.layer_norm"},
    "lm_head.decoder",
    "lm_head.bias",
    {"head/dense": "classifier.dense", "head/logits": "classifier.out_proj"},
    r"(roberta\.)?(embeddings\.position_ids|pooler\.)|lm_head\.(decoder\.|bias$)",
  ),
  "gpt2": _Names(
    "transformer.",
    _GPT2,
    {"head/linear": "lm_head"},
    "lm_head",
    None,
    {"head/logits": "score"},
    r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias$|lm_head\.",
  ),
  "llama": _Names(
    "model.",
    _LLAMA,
    {"head/linear": "lm_head"},
    "lm_head",
    None,
    {"head/logits": "score"},
    r"(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq|lm_head\.",
  ),
}


def source_of(kind: str, name: str, classes: bool) -> Source:
  """Return where a parameter of ours is in a file.

  Args:
    kind: the `model_type`.
    name: our parameter's name.
    classes: whether the head names a class, and no ids.

  Example:
    source_of("llama", "norm/scale", False).name  # "model.norm.weight"
  """
  names = _NAMES[kind]
  if name == "head/bias":
    assert names.bias is not None
    return Source(names.bias, before=f"{names.decoder}.bias")
  if name == "head/kernel":
    return Source(f"{names.decoder}.weight", transposed=True)
  module, _, leaf = name.rpartition("/")
  number = re.search(r"/(\d+)/", module)
  pattern = module if number is None else module.replace(number[1], "{}", 1)
  head = names.classes if classes else names.language
  theirs = head.get(pattern) or names.prefix + names.body[pattern]
  if number is not None:
    theirs = theirs.replace("{}", number[1])
  if leaf == "embedding":
    return Source(f"{theirs}.weight")
  if leaf == "scale" or pattern.endswith("norm"):
    return Source(f"{theirs}.{_NORM[leaf]}")
  if kind == "gpt2" and pattern in _GPT2:
    third = _THIRDS.get(module.rpartition("/")[2])
    return Source(f"{theirs}.{_LINEAR[leaf]}", third=third)
  return Source(f"{theirs}.{_LINEAR[leaf]}", transposed=leaf == "kernel")


def as_files(
  kind: str, arrays: Mapping[str, np.ndarray], classes: bool
) -> dict[str, np.ndarray]:
  """Return a model's parameters as files of Hugging Face hold them.

  The inverse of `Source.of`. A file of BERT has the bias of its logits under
  two names, and vectors of segments, which models without them get as zeros.

  Args:
    kind: the `model_type`.
    arrays: all parameters, by our names.
    classes: whether the head names a class, and no ids.

  Example:
    as_files("llama", {"norm/scale": x}, False)  # {"model.norm.weight": x}
  """
  made: dict[str, np.ndarray] = {}
  thirds: dict[str, dict[int, np.ndarray]] = {}
  for name, array in arrays.items():
    source = source_of(kind, name, classes)
    theirs = np.ascontiguousarray(array.T if source.transposed else array)
    if source.third is None:
      made |= {key: theirs for key in (source.name, source.before) if key}
    else:
      thirds.setdefault(source.name, {})[source.third] = theirs
  for name, parts in thirds.items():
    made[name] = np.concatenate([parts[i] for i in range(3)], axis=-1)
  names = _NAMES[kind]
  types = "embeddings/types"
  if types in names.body and f"{types}/embedding" not in arrays:
    width = arrays["embeddings/tokens/embedding"].shape[1]
    made[f"{names.prefix}{names.body[types]}.weight"] = np.zeros(
      (1, width), np.float32
    )
  return made


def decoder_of(kind: str) -> str:
  """Return what a `model_type` calls the layer of the logits of ids."""
  return _NAMES[kind].decoder


def plain(kind: str, name: str) -> str:
  """Return an array's name without what differs from file to file.

  A file of the model without a head lacks the prefix, and old ones of BERT call
  a norm's weight and bias gamma and beta.
  """
  name = re.sub(r"(?<=LayerNorm\.)gamma$", "weight", name)
  name = re.sub(r"(?<=LayerNorm\.)beta$", "bias", name)
  return name.removeprefix(_NAMES[kind].prefix)


def is_without_use(kind: str, name: str) -> bool:
  """Return whether an array of a file is not needed: masks, positions, ids."""
  return re.match(_NAMES[kind].without_use, name) is not None
