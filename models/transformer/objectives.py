"""What a transformer learns: masked or next tokens, or the class of a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from flax import nnx

from fedjax_sim.core import Task, validate
from fedjax_sim.models.options import several
from fedjax_sim.models.transformer.sizes import Sizes
from fedjax_sim.tasks.ids import check_sequence
from fedjax_sim.tasks.transformers import (
  causal_language_task,
  masked_language_task,
  sequence_classification_task,
)

MASKED, CAUSAL, CLASSIFICATION = "masked", "causal", "classification"
ENCODED = (MASKED, CLASSIFICATION)  # objectives of an encoder
DECODED = (CAUSAL, CLASSIFICATION)


def length_of(
  owner: str, example_shape: tuple[int, ...], max_length: int | None
) -> int:
  """Return the longest sequence of a model; None: that of the data.

  Raises:
    TypeError, ValueError: examples are no ids, or longer than that.
  """
  check_sequence(owner, example_shape)
  (time,) = example_shape
  if max_length is None:
    return time
  length = validate.integer("max_length", max_length)
  if time > length:
    raise ValueError(
      f"max_length={length}: examples are {time} ids long; cut them shorter at"
      " import, by --sequence-length, or take a model for longer ones."
    )
  return length


def vocabulary_of(
  objective: str, vocabulary: int | None, num_classes: int, mask_id: int | None
) -> int:
  """Return how many ids a model knows that is made from scratch.

  Args:
    objective: one of `ENCODED` and `DECODED`.
    vocabulary: the number, if it is given; None: as many as the data have, and
      one for the mask if there is none.
    num_classes: of the data: ids, or classes for a classification.
    mask_id: the mask, if it is given.

  Raises:
    TypeError, ValueError: it is needed, and not given, or too small.
  """
  classes = validate.integer("num_classes", num_classes)
  if vocabulary is not None:
    return validate.integer("vocabulary", vocabulary)
  if objective == CLASSIFICATION:
    raise ValueError(
      f"objective={objective!r} has labels that are no ids, so set vocabulary"
      " to the number of ids: the largest one and 1."
    )
  return classes + (objective == MASKED and mask_id is None)


def make_task(
  module: Callable[[Any, int | None, nnx.Rngs], nnx.Module],
  sizes: Sizes,
  num_classes: int,
  *,
  objective: str,
  mask_id: int | None = None,
  special_ids: Sequence[int] = (),
  mask_fraction: float = 0.15,
  label_smoothing: float = 0.0,
) -> Task:
  """Return the task of a transformer.

  Args:
    module: (sizes, number of classes or None, rngs) -> the module.
    sizes: its sizes.
    num_classes: of the data: ids, or classes for a classification.
    objective: "masked", "causal" or "classification".
    mask_id: what hides a token; None: the first id that the data lack.
    special_ids: ids that are never hidden.
    mask_fraction: share of the tokens that is hidden.
    label_smoothing: share of each label that is spread over the vocabulary.

  Raises:
    TypeError, ValueError: a number out of range, or more ids in the data than
      the model knows.
  """
  classes = validate.integer("num_classes", num_classes)
  vocabulary = sizes.vocabulary
  if objective == CLASSIFICATION:
    return sequence_classification_task(
      lambda rngs: module(sizes, classes, rngs), vocabulary=vocabulary
    )
  if classes > vocabulary:
    raise ValueError(
      f"vocabulary={vocabulary} is less than the {classes} ids of the data"
      " (data.num_classes), and the embedding has a row for each; give data of"
      " the model's own tokenizer, or a larger vocabulary."
    )
  make = lambda rngs: module(sizes, None, rngs)
  if objective == CAUSAL:
    return causal_language_task(
      make,
      vocabulary=vocabulary,
      padding_id=sizes.padding_id,
      label_smoothing=label_smoothing,
    )
  if mask_id is None and classes == vocabulary:
    raise ValueError(
      f"vocabulary={vocabulary} leaves no id for the mask, as the data have as"
      " many; set mask_id to the tokenizer's, or unset vocabulary."
    )
  return masked_language_task(
    make,
    vocabulary=vocabulary,
    mask_id=classes if mask_id is None else mask_id,
    padding_id=sizes.padding_id,
    special_ids=several("special_ids", special_ids, "ids", "(1, 2)"),
    mask_fraction=mask_fraction,
    label_smoothing=label_smoothing,
  )
