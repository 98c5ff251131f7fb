"""BERT from scratch: an encoder that fills in hidden tokens, or names a class.

Devlin et al. 2019 (arXiv 1810.04805), without a second segment and without the
prediction of the next sentence.
"""

from __future__ import annotations

from fedjax_sim.core import Task, validate
from fedjax_sim.models.transformer.encoder import Encoder
from fedjax_sim.models.transformer.objectives import (
  ENCODED,
  length_of,
  make_task,
  vocabulary_of,
)
from fedjax_sim.models.transformer.sizes import EncoderSizes


def bert(
  example_shape: tuple[int, ...],
  num_classes: int,
  *,
  objective: str = "masked",
  vocabulary: int | None = None,
  width: int = 128,
  layers: int = 2,
  heads: int = 2,
  feed_forward: int | None = None,
  max_length: int | None = None,
  dropout: float = 0.1,
  tied: bool = True,
  padding_id: int = 0,
  mask_id: int | None = None,
  special_ids: tuple[int, ...] = (),
  mask_fraction: float = 0.15,
  label_smoothing: float = 0.0,
  remat_blocks: bool = False,
) -> Task:
  """Return a BERT encoder with random weights.

  Args:
    example_shape: (time,); examples hold ids.
    num_classes: ids of the data, the padding included, or classes.
    objective: "masked", to fill in hidden tokens, or "classification", by the
      first token.
    vocabulary: how many ids the model knows; None: those of the data, and one
      for the mask.
    width: of the vectors that pass from layer to layer.
    layers: blocks of attention and feed-forward.
    heads: of attention; divides the width.
    feed_forward: units inside a block; None: 4 times the width.
    max_length: of a sequence; None: that of the data.
    dropout: rate in training, of all but attention's weights.
    tied: whether the logits of ids come from the embedding's table.
    padding_id: the id that fills up a sequence; -1: there is none.
    mask_id: the id that stands for a hidden token; None: the first one that the
      data lack.
    special_ids: ids that are never hidden, such as those that begin and end a
      text.
    mask_fraction: share of the tokens that is hidden; 80 % of them by the mask,
      10 % by another token, 10 % not at all.
    label_smoothing: share of each label that is spread over the vocabulary.
    remat_blocks: whether the backward pass computes each block anew, which
      takes time and saves memory.

  Raises:
    TypeError, ValueError: a number out of range, or sizes that do not fit each
      other or the data.
  """
  validate.one_of("objective", objective, ENCODED)
  width = validate.integer("width", width)
  sizes = EncoderSizes(
    vocabulary=vocabulary_of(objective, vocabulary, num_classes, mask_id),
    width=width,
    layers=layers,
    heads=heads,
    feed_forward=4 * width if feed_forward is None else feed_forward,
    max_length=length_of("bert", example_shape, max_length),
    dropout=dropout,
    tied=tied,
    epsilon=1e-12,
    activation="gelu",
    padding_id=padding_id,
    remat_blocks=remat_blocks,
  )
  return make_task(
    Encoder,
    sizes,
    num_classes,
    objective=objective,
    mask_id=mask_id,
    special_ids=special_ids,
    mask_fraction=mask_fraction,
    label_smoothing=label_smoothing,
  )
