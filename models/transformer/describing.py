"""The `config.json` of a transformer, as Hugging Face's library reads it.

Sizes are those of its arrays; what arrays do not show is in the section `model`
of the run's config, and what neither does is the same for all models of a kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fedjax_sim.models.transformer.objectives import (
  CAUSAL,
  CLASSIFICATION,
  MASKED,
)

TOKENS = "embeddings/tokens/embedding"
_ENCODERS = ("bert", "roberta")
_OWNERS = {
  "bert": "Bert",
  "roberta": "Roberta",
  "gpt2": "GPT2",
  "llama": "Llama",
}
_HEADS = {
  MASKED: "ForMaskedLM",
  CAUSAL: "ForCausalLM",
  CLASSIFICATION: "ForSequenceClassification",
}


def made_config(
  kind: str,
  model: Mapping[str, Any],
  arrays: Mapping[str, np.ndarray],
  length: int,
) -> dict[str, Any]:
  """Return the config of a model that began from random weights.

  Args:
    kind: "bert", "gpt2" or "llama".
    model: the fields of `bert`, `gpt2` or `llama`, complete.
    arrays: the parameters, by our names.
    length: of the data's sequences.
  """
  vocabulary, width = arrays[TOKENS].shape
  inner = arrays["layers/0/feed_forward/inner/kernel"].shape[1]
  layers = sum(name.endswith("/attention/query/kernel") for name in arrays)
  length = model["max_length"] or length
  heads, dropout = model["heads"], model["dropout"]
  own: dict[str, Any]
  if kind == "gpt2":
    own = {
      "n_embd": width,
      "n_layer": layers,
      "n_head": heads,
      "n_inner": inner,
      "n_positions": length,
      "activation_function": "gelu_new",
      "layer_norm_epsilon": 1e-5,
      "resid_pdrop": dropout,
      "embd_pdrop": dropout,
      "attn_pdrop": 0.0,
    }
  else:
    own = {
      "hidden_size": width,
      "num_hidden_layers": layers,
      "num_attention_heads": heads,
      "intermediate_size": inner,
      "max_position_embeddings": length,
    }
  if kind == "bert":
    own |= {
      "hidden_act": "gelu",
      "hidden_dropout_prob": dropout,
      "attention_probs_dropout_prob": 0.0,
      "layer_norm_eps": 1e-12,
      "type_vocab_size": 1,
    }
  if kind == "llama":
    base = float(model["rotary_base"])
    own |= {
      "num_key_value_heads": model["key_value_heads"] or heads,
      "head_dim": width // heads,
      "hidden_act": "silu",
      "attention_bias": False,
      "mlp_bias": False,
      "rms_norm_eps": 1e-6,
      "rope_theta": base,  # of earlier versions
      "rope_parameters": {"rope_type": "default", "rope_theta": base},
    }
  return {
    "model_type": kind,
    "vocab_size": vocabulary,
    **own,
    "tie_word_embeddings": model["tied"],
    # Of the kinds, those would be ids that a small vocabulary lacks.
    "bos_token_id": None,
    "eos_token_id": None,
  }


def with_head(
  config: Mapping[str, Any],
  objective: str | None,
  padding_id: int | None,
  arrays: Mapping[str, np.ndarray],
) -> dict[str, Any]:
  """Return a config that says what the model's head is for.

  Args:
    config: of the model, of any head.
    objective: "masked", "causal" or "classification"; None: what the kind is
      for.
    padding_id: the id that fills up a sequence; -1: there is none; None: that
      of the config.
    arrays: the parameters, by our names.
  """
  kind = str(config["model_type"])
  if objective is None:
    objective = MASKED if kind in _ENCODERS else CAUSAL
  head = _HEADS[objective]
  if kind == "gpt2" and objective == CAUSAL:
    head = "LMHeadModel"
  changed = {**config, "architectures": [_OWNERS[kind] + head]}
  for key in ("dtype", "torch_dtype"):  # that of the arrays is float32
    changed.pop(key, None)
  # RoBERTa's positions hang on it, too; the mask of a batch says the rest.
  if padding_id is not None and kind != "roberta":
    changed["pad_token_id"] = None if padding_id < 0 else padding_id
  if objective == CLASSIFICATION:
    count = arrays["head/logits/kernel"].shape[1]
    if len(changed.get("id2label") or ()) != count:
      labels = {str(i): f"LABEL_{i}" for i in range(count)}
      changed["id2label"] = labels
      changed["label2id"] = {label: int(i) for i, label in labels.items()}
  return changed
