"""Llama from scratch: a decoder with rotary positions, RMS norms and SwiGLU.

Touvron et al. 2023, "LLaMA" (arXiv 2302.13971) and "Llama 2" (arXiv
2307.09288), whose larger models share keys and values among heads.
"""

from __future__ import annotations

from fedjax_sim.core import Task, validate
from fedjax_sim.models.transformer.decoder import Decoder
from fedjax_sim.models.transformer.objectives import (
  DECODED,
  length_of,
  make_task,
  vocabulary_of,
)
from fedjax_sim.models.transformer.sizes import DecoderSizes


def llama(
  example_shape: tuple[int, ...],
  num_classes: int,
  *,
  objective: str = "causal",
  vocabulary: int | None = None,
  width: int = 128,
  layers: int = 2,
  heads: int = 4,
  key_value_heads: int | None = None,
  feed_forward: int | None = None,
  max_length: int | None = None,
  dropout: float = 0.0,
  tied: bool = False,
  rotary_base: float = 10_000.0,
  padding_id: int = 0,
  label_smoothing: float = 0.0,
  remat_blocks: bool = False,
) -> Task:
  """Return a Llama decoder with random weights.

  Args:
    example_shape: (time,); examples hold ids, and padding after them.
    num_classes: ids of the data, the padding included, or classes.
    objective: "causal", to predict the next token at every position, or
      "classification", by the last token.
    vocabulary: how many ids the model knows; None: those of the data.
    width: of the vectors that pass from layer to layer.
    layers: blocks of attention and feed-forward.
    heads: of attention's queries; divides the width.
    key_value_heads: of keys and values; divides `heads`. None: `heads`.
    feed_forward: units inside a block; None: 8/3 of the width, rounded up to a
      multiple of 8.
    max_length: of a sequence; None: that of the data.
    dropout: rate in training, of all but attention's weights.
    tied: whether the logits of ids come from the embedding's table.
    rotary_base: rotary positions have wavelengths from 2 pi to 2 pi times this.
    padding_id: the id that fills up a sequence, which is not learned; -1: there
      is none.
    label_smoothing: share of each label that is spread over the vocabulary.
    remat_blocks: whether the backward pass computes each block anew, which
      takes time and saves memory.

  Raises:
    TypeError, ValueError: a number out of range, or sizes that do not fit each
      other or the data.
  """
  validate.one_of("objective", objective, DECODED)
  width = validate.integer("width", width)
  inner = -(-8 * width // 24) * 8 if feed_forward is None else feed_forward
  sizes = DecoderSizes(
    vocabulary=vocabulary_of(objective, vocabulary, num_classes, None),
    width=width,
    layers=layers,
    heads=heads,
    key_value_heads=key_value_heads,
    feed_forward=inner,
    max_length=length_of("llama", example_shape, max_length),
    dropout=dropout,
    tied=tied,
    epsilon=1e-6,
    activation="silu",
    padding_id=padding_id,
    remat_blocks=remat_blocks,
    rms_norm=True,
    gated=True,
    bias=False,
    rotary_base=rotary_base,
  )
  return make_task(
    Decoder,
    sizes,
    num_classes,
    objective=objective,
    label_smoothing=label_smoothing,
  )
