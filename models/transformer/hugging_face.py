"""A transformer from a local folder of Hugging Face: BERT to Llama.

The network is made by `config.json`, and begins with the weights beside it. Its
logits are those of PyTorch's `transformers`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjax_sim.core import Task, validate
from fedjax_sim.models.options import begins_from
from fedjax_sim.models.transformer.decoder import Decoder
from fedjax_sim.models.transformer.encoder import Encoder
from fedjax_sim.models.transformer.folder import (
  CONFIG,
  model_files,
  read_arrays,
  read_config,
  read_tokens,
)
from fedjax_sim.models.transformer.layouts import (
  is_without_use,
  plain,
  source_of,
)
from fedjax_sim.models.transformer.objectives import (
  CLASSIFICATION,
  DECODED,
  ENCODED,
  length_of,
  make_task,
)
from fedjax_sim.models.transformer.settings import sizes_of
from fedjax_sim.models.transformer.sizes import EncoderSizes
from fedjax_sim.tasks.freezing import named_variables
from fedjax_sim.tasks.initial import with_initial

_HEAD = "head/"


@begins_from(folder=model_files)
def hugging_face(
  example_shape: tuple[int, ...],
  num_classes: int,
  folder: str,
  *,
  objective: str | None = None,
  dropout: float | None = None,
  padding_id: int | None = None,
  mask_id: int | None = None,
  special_ids: tuple[int, ...] | None = None,
  mask_fraction: float = 0.15,
  label_smoothing: float = 0.0,
  remat_blocks: bool = False,
) -> Task:
  """Return a Hugging Face model from a local folder: BERT to Llama.

  The folder holds `config.json`, of the type bert, roberta, gpt2 or llama, and
  its weights as safetensors, which the model begins with. What the file lacks
  of the head, such as a new classifier, begins at random.

  Args:
    example_shape: (time,); examples hold ids of the model's tokenizer.
    num_classes: ids of the data, or classes.
    folder: where the model is.
    objective: "masked" for an encoder, "causal" for a decoder, or
      "classification"; None: the first or the second.
    dropout: rate in training; None: that of config.json.
    padding_id: the id that fills up a sequence; -1: there is none. None: that
      of config.json.
    mask_id: the id that stands for a hidden token; None: that of
      tokenizer.json.
    special_ids: ids that are never hidden; None: those of tokenizer.json.
    mask_fraction: share of the tokens that is hidden; 80 % of them by the mask,
      10 % by another token, 10 % not at all.
    label_smoothing: share of each label that is spread over the vocabulary.
    remat_blocks: whether the backward pass computes each block anew, which
      takes time and saves memory.

  Raises:
    TypeError, ValueError: the folder holds no such model, a setting of it is
      not supported, weights do not fit, or the data do not.
    ModuleNotFoundError: safetensors is not installed.

  Warns:
    UserWarning: of settings that nothing here knows, of a head that begins at
      random, and of weights that nothing takes.
  """
  place = Path(folder).expanduser()
  config = read_config(place)
  kind = config.get("model_type")
  tokens = read_tokens(place)
  sizes = sizes_of(
    config,
    str(place / CONFIG),
    dropout=dropout,
    padding_id=_padding(place, config, padding_id),
    remat_blocks=remat_blocks,
  )
  encoder = isinstance(sizes, EncoderSizes)
  known = ENCODED if encoder else DECODED
  objective = known[0] if objective is None else objective
  validate.one_of("objective", objective, known)
  _check_length(place, example_shape, sizes.max_length)
  _check_vocabulary(place, objective, num_classes, sizes.vocabulary)
  task = make_task(
    Encoder if encoder else Decoder,
    sizes,
    num_classes,
    objective=objective,
    mask_id=tokens.mask if mask_id is None else mask_id,
    special_ids=tokens.special if special_ids is None else special_ids,
    mask_fraction=mask_fraction,
    label_smoothing=label_smoothing,
  )
  return _begun(task, place, str(kind), objective == CLASSIFICATION)


def _padding(
  folder: Path, config: Mapping[str, Any], padding_id: int | None
) -> int:
  if padding_id is None:
    padding_id = config.get("pad_token_id")
  if padding_id is None:
    raise ValueError(
      f"folder={str(folder)!r}: its config.json has no pad_token_id; set"
      " padding_id to what the data are filled up with, or to -1 if they are"
      " not."
    )
  return validate.integer("padding_id", padding_id, ge=-1)


def _check_length(
  folder: Path, example_shape: tuple[int, ...], length: int
) -> None:
  try:
    length_of("hugging_face", example_shape, length)
  except ValueError as error:
    raise ValueError(f"folder={str(folder)!r}: {error}") from error


def _check_vocabulary(
  folder: Path, objective: str, num_classes: int, vocabulary: int
) -> None:
  if objective != CLASSIFICATION and num_classes > vocabulary:
    raise ValueError(
      f"folder={str(folder)!r}: the data have {num_classes} ids"
      f" (data.num_classes), and the model's embedding {vocabulary}; import"
      " them by the model's own tokenizer."
    )


class Held(NamedTuple):
  """What of a model's parameters a folder holds.

  Attributes:
    arrays: our name -> the array.
    new: our names of what it lacks of the head, or has of other classes.
    rest: its own names of arrays that no parameter takes.
  """

  arrays: dict[str, np.ndarray]
  new: list[str]
  rest: list[str]


def held_arrays(
  folder: Path,
  kind: str,
  shapes: Mapping[str, tuple[int, ...]],
  classes: bool,
) -> Held:
  """Return the parameters that a folder holds.

  Args:
    folder: where the model is.
    kind: its `model_type`.
    shapes: of all parameters, by our names.
    classes: whether its head names a class.

  Raises:
    ValueError: an array is missing, but for the head's, or has another shape.
  """
  source = f"model.folder={str(folder)!r}"
  held = read_arrays(folder)
  known = {plain(kind, name): name for name in held}
  arrays: dict[str, np.ndarray] = {}
  used, new = set(), []
  for name, shape in shapes.items():
    origin = source_of(kind, name, classes)
    theirs = known.get(origin.before or "") or known.get(
      plain(kind, origin.name)
    )
    if theirs is None:
      if not name.startswith(_HEAD):
        raise ValueError(
          f"{source} lacks {origin.name!r}, the weights of {name!r}; get its"
          " files again."
        )
      new.append(name)
      continue
    used.add(theirs)
    array = origin.of(held[theirs])
    if array.shape == shape:
      arrays[name] = array
    elif classes and name.startswith("head/logits/"):
      new.append(name)  # of other classes
    else:
      raise ValueError(
        f"{source}: {theirs!r} makes {name!r} of shape {array.shape}, and its"
        f" config.json asks for {shape}; get both of one model."
      )
  rest = [n for n in held if n not in used and not is_without_use(kind, n)]
  return Held(arrays, new, rest)


def _begun(task: Task, folder: Path, kind: str, classes: bool) -> Task:
  """Return the task, beginning with the folder's weights.

  Args:
    task: of the folder's model.
    folder: where it is.
    kind: its `model_type`.
    classes: whether its head names a class.

  Raises:
    ValueError: see `held_arrays`.
  """
  source = f"model.folder={str(folder)!r}"
  like = named_variables(jax.eval_shape(task.init, jax.random.key(0)))
  shapes = {name: x.shape for name, x in like.items()}
  arrays, new, rest = held_arrays(folder, kind, shapes, classes)
  if new:
    warnings.warn(
      f"{source} has no {', '.join(map(repr, new))} for this objective; they"
      " begin at random.",
      stacklevel=2,
    )
  if rest:
    more = f" and {len(rest) - 5} more" if len(rest) > 5 else ""
    warnings.warn(
      f"{source} also holds {', '.join(map(repr, rest[:5]))}{more}, which"
      " nothing takes.",
      stacklevel=2,
    )
  only = [f"{re.escape(name)}$" for name in arrays] if new else None
  return with_initial(task, arrays, only, source=source)
