"""GPT-2 from scratch: a decoder with learned positions and layer norms.

Radford et al. 2019, "Language models are unsupervised multitask learners".
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


def gpt2(
  example_shape: tuple[int, ...],
  num_classes: int,
  *,
  objective: str = "causal",
  vocabulary: int | None = None,
  width: int = 128,
  layers: int = 2,
  heads: int = 2,
  feed_forward: int | None = None,
  max_length: int | None = None,
  dropout: float = 0.1,
  tied: bool = True,
  padding_id: int = 0,
  label_smoothing: float = 0.0,
  remat_blocks: bool = False,
) -> Task:
  """Return a GPT-2 decoder with random weights.

  Args:
    example_shape: (time,); examples hold ids, and padding after them.
    num_classes: ids of the data, the padding included, or classes.
    objective: "causal", to predict the next token at every position, or
      "classification", by the last token.
    vocabulary: how many ids the model knows; None: those of the data.
    width: of the vectors that pass from layer to layer.
    layers: blocks of attention and feed-forward.
    heads: of attention; divides the width.
    feed_forward: units inside a block; None: 4 times the width.
    max_length: of a sequence; None: that of the data.
    dropout: rate in training, of all but attention's weights.
    tied: whether the logits of ids come from the embedding's table.
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
  sizes = DecoderSizes(
    vocabulary=vocabulary_of(objective, vocabulary, num_classes, None),
    width=width,
    layers=layers,
    heads=heads,
    feed_forward=4 * width if feed_forward is None else feed_forward,
    max_length=length_of("gpt2", example_shape, max_length),
    dropout=dropout,
    tied=tied,
    epsilon=1e-5,
    activation="gelu_new",
    padding_id=padding_id,
    remat_blocks=remat_blocks,
  )
  return make_task(
    Decoder,
    sizes,
    num_classes,
    objective=objective,
    label_smoothing=label_smoothing,
  )
