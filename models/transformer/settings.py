"""What a Hugging Face `config.json` says of a model, as sizes.

Every key is read, known to change nothing here, or has to have a value that is
supported; a warning names all others.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fedjax_sim.core import validate
from fedjax_sim.models.transformer.feed_forward import ACTIVATIONS
from fedjax_sim.models.transformer.sizes import DecoderSizes, EncoderSizes


def _keys(text: str) -> frozenset[str]:
  """Return the words of a text."""
  return frozenset(text.split())


# Keys that do not change what these models compute: names, ids that the
# tokenizer has, how weights began, dropout of attention, generation.
_WITHOUT_EFFECT = _keys(
  """_name_or_path architectures attention_dropout attention_probs_dropout_prob
  attn_pdrop bos_token_id classifier_dropout decoder_start_token_id dtype
  eos_token_id finetuning_task gradient_checkpointing id2label
  initializer_range keys_to_ignore_at_inference label2id model_type n_ctx
  num_labels output_attentions output_hidden_states output_past pad_token_id
  predict_special_tokens pretraining_tp problem_type reorder_and_upcast_attn
  return_dict sep_token_id cls_token_id summary_activation
  summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
  task_specific_params tie_word_embeddings torch_dtype torchscript
  transformers_version use_cache"""
)
_NAMES = {"gelu_pytorch_tanh": "gelu_new", "swish": "silu"}


class _Family(NamedTuple):
  """A `model_type`.

  Attributes:
    sizes: (config, options of `sizes_of`) -> the sizes.
    read: keys that `sizes` reads.
    fixed: key -> the values that are supported; the first where it is missing.
  """

  sizes: Callable[[Mapping[str, Any], Mapping[str, Any]], Any]
  read: frozenset[str]
  fixed: Mapping[str, tuple[Any, ...]]


def sizes_of(
  config: Mapping[str, Any], where: str, **options: Any
) -> EncoderSizes | DecoderSizes:
  """Return the sizes of the model that a `config.json` describes.

  Args:
    config: what the file holds.
    where: what messages call the file.
    **options: `padding_id`, `remat_blocks`, and `dropout`, None for the file's.

  Raises:
    TypeError, ValueError: the kind of model, or a setting, is not supported, or
      a key is missing; names all that are.

  Warns:
    UserWarning: of keys that nothing here knows.
  """
  kind = str(config.get("model_type"))
  if kind not in FAMILIES:
    raise ValueError(
      f"{where}: model_type={kind!r} is not supported; give a model of one of"
      f" {', '.join(FAMILIES)}."
    )
  family = FAMILIES[kind]
  wrong = [
    f"{key}={config[key]!r} is not supported, only"
    f" {' and '.join(map(repr, values))}"
    for key, values in family.fixed.items()
    if config.get(key, values[0]) not in values
  ]
  if wrong:
    raise ValueError(f"{where}: {'; '.join(wrong)}. Give another model.")
  known = _WITHOUT_EFFECT | family.read | set(family.fixed)
  for key in sorted(set(config) - known):
    warnings.warn(
      f"{where}: {key}={config[key]!r:.60} is unknown here, and changes"
      " nothing.",
      stacklevel=2,
    )
  try:
    sizes: EncoderSizes | DecoderSizes = family.sizes(config, options)
  except KeyError as error:
    raise ValueError(
      f"{where} lacks {error}, which a {kind} model has; get it again."
    ) from error
  except (TypeError, ValueError) as error:
    raise type(error)(f"{where}: {error}") from error
  return sizes


def _activation(name: Any) -> str:
  name = _NAMES.get(name, name)
  return validate.one_of("activation", name, ACTIVATIONS)


def _dropout(options: Mapping[str, Any], own: Any) -> float:
  given = options["dropout"]
  return validate.number("dropout", own if given is None else given)


def _encoder(
  config: Mapping[str, Any], options: Mapping[str, Any]
) -> EncoderSizes:
  # The embedding's rows are as the model was trained, whatever fills the data.
  after = None
  if config["model_type"] == "roberta":
    after = validate.integer("pad_token_id", config.get("pad_token_id", 1))
  positions = validate.integer(
    "max_position_embeddings", config["max_position_embeddings"]
  )
  first = 0 if after is None else after + 1
  return EncoderSizes(
    vocabulary=config["vocab_size"],
    width=config["hidden_size"],
    layers=config["num_hidden_layers"],
    heads=config["num_attention_heads"],
    feed_forward=config["intermediate_size"],
    max_length=positions - first,
    dropout=_dropout(options, config.get("hidden_dropout_prob", 0.1)),
    tied=config.get("tie_word_embeddings", True),
    epsilon=config.get("layer_norm_eps", 1e-12),
    activation=_activation(config.get("hidden_act", "gelu")),
    padding_id=options["padding_id"],
    remat_blocks=options["remat_blocks"],
    types=config.get("type_vocab_size", 2),
    positions_after=after,
  )


def _gpt2(
  config: Mapping[str, Any], options: Mapping[str, Any]
) -> DecoderSizes:
  width = validate.integer("n_embd", config["n_embd"])
  return DecoderSizes(
    vocabulary=config["vocab_size"],
    width=width,
    layers=config["n_layer"],
    heads=config["n_head"],
    feed_forward=config.get("n_inner") or 4 * width,
    max_length=config["n_positions"],
    dropout=_dropout(options, config.get("resid_pdrop", 0.1)),
    tied=config.get("tie_word_embeddings", True),
    epsilon=config.get("layer_norm_epsilon", 1e-5),
    activation=_activation(config.get("activation_function", "gelu_new")),
    padding_id=options["padding_id"],
    remat_blocks=options["remat_blocks"],
  )


def _llama(
  config: Mapping[str, Any], options: Mapping[str, Any]
) -> DecoderSizes:
  rotary = config.get("rope_parameters") or {}
  kind = rotary.get("rope_type", "default")
  if kind != "default":
    raise ValueError(
      f"rope_parameters: rope_type={kind!r} is not supported, only 'default';"
      " give another model."
    )
  return DecoderSizes(
    vocabulary=config["vocab_size"],
    width=config["hidden_size"],
    layers=config["num_hidden_layers"],
    heads=config["num_attention_heads"],
    key_value_heads=config.get("num_key_value_heads"),
    head_size=config.get("head_dim"),
    feed_forward=config["intermediate_size"],
    max_length=config["max_position_embeddings"],
    dropout=_dropout(options, 0.0),
    tied=config.get("tie_word_embeddings", False),
    epsilon=config.get("rms_norm_eps", 1e-6),
    activation="silu",
    padding_id=options["padding_id"],
    remat_blocks=options["remat_blocks"],
    rms_norm=True,
    gated=True,
    bias=False,
    rotary_base=float(
      rotary.get("rope_theta", config.get("rope_theta", 10_000.0))
    ),
  )


_OF_ENCODERS = _keys(
  """vocab_size hidden_size num_hidden_layers num_attention_heads
  intermediate_size max_position_embeddings hidden_dropout_prob layer_norm_eps
  hidden_act type_vocab_size"""
)
_AS_ENCODERS: Mapping[str, tuple[Any, ...]] = {
  "is_decoder": (False,),
  "add_cross_attention": (False,),
  "position_embedding_type": ("absolute",),
  "chunk_size_feed_forward": (0,),
  "pruned_heads": ({}, None),
}
FAMILIES: Mapping[str, _Family] = {
  "bert": _Family(_encoder, _OF_ENCODERS, _AS_ENCODERS),
  "roberta": _Family(_encoder, _OF_ENCODERS, _AS_ENCODERS),
  "gpt2": _Family(
    _gpt2,
    _keys(
      """vocab_size n_embd n_layer n_head n_inner n_positions resid_pdrop
      embd_pdrop layer_norm_epsilon activation_function"""
    ),
    {
      "scale_attn_weights": (True,),
      "scale_attn_by_inverse_layer_idx": (False,),
      "add_cross_attention": (False,),
    },
  ),
  "llama": _Family(
    _llama,
    _keys(
      """vocab_size hidden_size num_hidden_layers num_attention_heads
      num_key_value_heads head_dim intermediate_size max_position_embeddings
      rms_norm_eps rope_theta rope_parameters"""
    ),
    {
      "hidden_act": ("silu", "swish"),
      "attention_bias": (False,),
      "mlp_bias": (False,),
      "rope_scaling": (None,),
      "sliding_window": (None,),
    },
  ),
}
