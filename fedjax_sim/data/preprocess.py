"""What happens to a batch on the device, before a model gets it.

Steps are pure functions that JAX traces. Some are done to every batch:

    reshape, look_up, normalize, pad:  examples -> examples

others in clients' local steps alone, by chance, every example by itself:

    random_crop, random_flip:  (key, examples) -> examples

`examples` are field -> (batch, ...). A step is added to what a data set does
already by the `with_...` of its name, which checks that the two go together:

    data = with_flip(with_crop(with_normalization(data, 0.5, 0.2), pixels=2))

A function of one's own is given by
`dataclasses.replace(data, prepare=..., augment=...)`. `augment.py` has stronger
changes of images.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fedjax_sim.core import Array, Key, validate
from fedjax_sim.data.augment import LEAST_SIDE
from fedjax_sim.data.batch_steps import (
  Augment,
  Prepare,
  as_stored,
  input_shape,
  normalize,
  prepared_shapes,
)
from fedjax_sim.data.dataset import FederatedDataset
from fedjax_sim.data.location import locate

# What is beyond an image's edge -> what `jnp.pad` calls it.
FILLS = {"zeros": "constant", "reflect": "reflect"}
MOST_ID = 2**31 - 1

_SEVERAL = (Sequence, np.ndarray)
Numbers = float | Sequence[float] | np.ndarray  # one, or one a channel

# --- steps of every batch -----------------------------------------------------


def reshape(
  examples: Mapping[str, Any], *, shape: tuple[int, ...]
) -> dict[str, Any]:
  """Reshape every `x` to a shape of as many numbers, in row-major order."""
  x = examples["x"]
  return {**examples, "x": x.reshape(len(x), *shape)}


def look_up(
  examples: Mapping[str, Any], *, table: np.ndarray, field: str
) -> dict[str, Any]:
  """Replace a field's integers i by `table[i]`.

  Args:
    examples: with the field, of any shape; without it nothing is done, as to
      examples that lack labels.
    table: shape=(n,), int32; every number is below n.
    field: which one.
  """
  if field not in examples:
    return dict(examples)
  ids = examples[field].astype(np.int32)
  found = jnp.asarray(table).at[ids].get(mode="clip")
  return {**examples, field: found}


def pad(
  examples: Mapping[str, Any], *, size: int | tuple[int, int]
) -> dict[str, Any]:
  """Pad `x` with zeros.

  Args:
    examples: with "x".
    size: a length: zeros follow the first axis of x, (length, ...), and of
      `y`, if it has an axis of that length. Height and width: zeros go around
      x, (height, width, ...); where their number is odd, the last side gets
      one more.
  """
  x, y = examples["x"], examples.get("y")
  if not isinstance(size, int):
    extra = [n - old for n, old in zip(size, x.shape[1:3], strict=True)]
    return {**examples, "x": _pad(x, [(n // 2, n - n // 2) for n in extra])}
  after = [(0, size - x.shape[1])]
  out = {**examples, "x": _pad(x, after)}
  if y is not None and y.shape[1:2] == x.shape[1:2]:
    out["y"] = _pad(y, after)
  return out


def _pad(
  x: Array, widths: Sequence[tuple[int, int]], mode: str = "constant"
) -> Array:
  """Pad the axes after the first by `jnp.pad`."""
  rest = [(0, 0)] * (x.ndim - 1 - len(widths))
  return jnp.pad(x, [(0, 0), *widths, *rest], mode=mode)


# --- steps of training, at random ---------------------------------------------


def random_crop(
  key: Key, examples: Mapping[str, Any], *, pixels: int, fill: str = "zeros"
) -> dict[str, Any]:
  """Move every image `x` by up to `pixels` up or down, left or right.

  Args:
    key: draws one move an example.
    examples: with "x", (batch, height, width) or with channels at the end.
    pixels: below height and width; all (2 pixels + 1)^2 moves are as likely.
    fill: what moves in: `zeros`, or the image as a mirror shows it (`reflect`).
  """
  x = examples["x"]
  wide = _pad(x, [(pixels, pixels)] * 2, FILLS[fill])
  first = jax.random.randint(key, (len(x), 2), 0, 2 * pixels + 1)
  rest = (0,) * (x.ndim - 3)
  cut = lambda image, at: lax.dynamic_slice(image, (*at, *rest), x.shape[1:])
  return {**examples, "x": jax.vmap(cut)(wide, first)}


def random_flip(key: Key, examples: Mapping[str, Any]) -> dict[str, Any]:
  """Mirror every image `x` left to right with probability 1/2.

  Args:
    key: draws for every example whether it is mirrored.
    examples: with "x", (batch, height, width) or with channels at the end.
  """
  x = examples["x"]
  mirrored = jax.random.bernoulli(key, shape=(len(x),) + (1,) * (x.ndim - 1))
  return {**examples, "x": jnp.where(mirrored, x[:, :, ::-1], x)}


# --- steps of a data set ------------------------------------------------------


def then(prepare: Prepare, step: Prepare) -> Prepare:
  """Chain two steps of `prepare`; the result can be pickled if both can."""
  if prepare is as_stored:
    return step
  return functools.partial(_in_turn, (prepare, step))


def _in_turn(
  steps: Sequence[Prepare], examples: Mapping[str, Any]
) -> Mapping[str, Any]:
  for step in steps:
    examples = step(examples)
  return examples


def then_augment(augment: Augment | None, step: Augment) -> Augment:
  """Chain two steps of `augment`, each with a key of its own."""
  if augment is None:
    return step
  return functools.partial(_in_turn_at_random, (augment, step))


def _in_turn_at_random(
  steps: Sequence[Augment], key: Key, examples: Mapping[str, Any]
) -> Mapping[str, Any]:
  for i, step in enumerate(steps):
    examples = step(jax.random.fold_in(key, i), examples)
  return examples


def _prepared(dataset: FederatedDataset, step: Prepare) -> FederatedDataset:
  """Return the data set with one more step for every batch."""
  prepare = then(dataset.prepare, step)
  shape = input_shape(prepare, dataset.train.examples)
  return dataclasses.replace(dataset, prepare=prepare, example_shape=shape)


def _field(dataset: FederatedDataset, what: str, field: str = "x") -> Any:
  """Return shape and dtype of a field in a batch of one, as models get it."""
  shapes = prepared_shapes(dataset.prepare, dataset.train.examples)
  if field not in shapes:
    raise ValueError(
      f"{what}: the examples of {dataset.name} have fields {sorted(shapes)} and"
      f" no {field!r}; unset it."
    )
  return shapes[field]


def with_reshape(
  dataset: FederatedDataset, shape: Sequence[int]
) -> FederatedDataset:
  """Reshape every `x`, such as (64,) to (8, 8, 1).

  Raises:
    TypeError, ValueError: `shape` does not have as many numbers.
  """
  what = f"data.reshape={shape!r}"
  if not isinstance(shape, tuple | list):
    raise TypeError(f"{what}: give a tuple, such as (8, 8, 1).")
  sizes = tuple(validate.integer("data.reshape", n) for n in shape)
  count = math.prod(_field(dataset, what).shape)
  if math.prod(sizes) != count:
    raise ValueError(
      f"{what} has {math.prod(sizes)} numbers, and one 'x' has {count}, in the"
      f" shape {dataset.example_shape}; give a shape of as many."
    )
  return _prepared(dataset, functools.partial(reshape, shape=sizes))


def with_lookup(
  dataset: FederatedDataset,
  table: np.ndarray | str | os.PathLike[str],
  field: str = "x",
) -> FederatedDataset:
  """Replace a field's integers i by `table[i]`, in every batch.

  A table for "y" makes the classes: there are as many as its largest entry + 1.

  Args:
    dataset: whose field holds whole numbers.
    table: shape=(n,), int32 or int64, >= 0; or an `.npy` file of it, see
      `locate`.
    field: "x", or "y". Where labels are sequences, 0 is padding, and stays 0.

  Raises:
    FileNotFoundError: there is no such file.
    TypeError, ValueError: it is no such table, or a number has no entry; names
      the client.
  """
  names = {"x": "data.lookup", "y": "data.label_lookup"}
  name = validate.lookup("field", field, names)
  what = name if isinstance(table, np.ndarray) else f"{name}={str(table)!r}"
  found = _field(dataset, what, field)
  if field in dataset.tables:
    raise ValueError(
      f"{what}: {field!r} is looked up in a table already; give one table that"
      " does both."
    )
  if not jnp.issubdtype(found.dtype, jnp.integer):
    raise TypeError(
      f"{what}: {field!r} is {found.dtype} before it is looked up; leave the"
      " table out, or give data of whole numbers."
    )
  entries = _table(what, name, table)
  for part, data in dataset.parts.items():
    values = data.examples[field]
    if not values.size:
      continue
    least, most = data.label_range(field)
    if least < 0 or most >= len(entries):
      raise ValueError(
        f"{what} has entries 0 to {len(entries) - 1}, and field {field!r} of"
        f" {part} holds {least if least < 0 else most}; give a table with an"
        " entry for every number."
      )
  classes = dataset.num_classes
  if field == "y":
    classes = int(entries.max()) + 1
    if len(found.shape) > 1 and entries[0]:
      raise ValueError(
        f"{what} turns 0, which is padding where labels are sequences, into"
        f" {entries[0]}; let its first entry be 0."
      )
  return dataclasses.replace(
    dataset,
    prepare=then(
      dataset.prepare, functools.partial(look_up, table=entries, field=field)
    ),
    tables={**dataset.tables, field: entries},
    num_classes=classes,
  )


def _table(
  what: str, name: str, table: np.ndarray | str | os.PathLike[str]
) -> np.ndarray:
  """Return the entries, shape=(n,), int32, from an array or a file."""
  if not isinstance(table, np.ndarray):
    table = _read(what, locate(Path(table), name))
  if table.dtype.kind not in "iu" or table.ndim != 1 or not table.size:
    raise TypeError(
      f"{what} holds {table.dtype} of shape {table.shape}; give one or more"
      " whole numbers in one dimension."
    )
  low, high = int(table.min()), int(table.max())
  if low < 0 or high > MOST_ID:
    raise ValueError(
      f"{what} holds {low if low < 0 else high}; give numbers from 0 to"
      f" {MOST_ID}."
    )
  return table.astype(np.int32)


def _read(what: str, path: Path) -> np.ndarray:
  try:
    with path.open("rb") as file:
      return np.lib.format.read_array(file, allow_pickle=False)
  except (OSError, ValueError, EOFError) as error:
    text = " ".join(str(error).split())
    raise ValueError(
      f"{what}: {path} cannot be read as .npy: {text}. Write it by numpy.save."
    ) from error


def with_normalization(
  dataset: FederatedDataset, mean: Numbers, stddev: Numbers
) -> FederatedDataset:
  """Subtract a mean from every `x` and divide by a standard deviation.

  Args:
    dataset: with "x", (..., channels).
    mean: a number, or one a channel.
    stddev: the same, > 0.

  Raises:
    TypeError, ValueError: they are not such numbers, or too many or too few.
  """
  what = f"data.normalize={(mean, stddev)!r}"
  shape = _field(dataset, what).shape[1:]
  limit = float(np.finfo(np.float32).max)
  least = {"mean": -limit, "standard deviation": float(np.finfo("f4").tiny)}
  made = []
  for kind, given in zip(least, (mean, stddev), strict=True):
    several = isinstance(given, _SEVERAL)
    numbers: list[Any] = [*given] if isinstance(given, _SEVERAL) else [given]
    for number in numbers:
      try:
        validate.number("number", number, ge=least[kind], le=limit)
      except (TypeError, ValueError) as error:
        raise type(error)(
          f"{what}: the {kind} {number!r} is no number"
          f" {'> 0 ' if kind != 'mean' else ''}that float32 holds; correct it."
        ) from error
    if several and len(numbers) != (shape[-1] if shape else 0):
      raise ValueError(
        f"{what}: there are {len(numbers)} numbers for the {kind}, and one 'x'"
        f" has shape {shape}; give one number, or one for each of the last"
        " axis."
      )
    made.append(np.array(numbers if several else numbers[0], np.float32))
  step = functools.partial(normalize, mean=made[0], stddev=made[1])
  return _prepared(dataset, step)


def with_padding(
  dataset: FederatedDataset, size: int | Sequence[int]
) -> FederatedDataset:
  """Pad every `x` with zeros to a larger size.

  Args:
    dataset: with "x", (length,) or (length, channels), or images.
    size: the length of sequences, or the height and width of images; see `pad`.

  Raises:
    TypeError, ValueError: it is smaller than an `x` is, or does not fit.
  """
  what = f"data.pad={size!r}"
  shape = _field(dataset, what).shape[1:]
  images = isinstance(size, tuple | list)
  wanted = tuple(size) if isinstance(size, tuple | list) else (size,)
  fits = len(wanted) == 2 <= len(shape) <= 3 if images else 1 <= len(shape) <= 2
  if not fits:
    raise ValueError(
      f"{what} does not fit to 'x' of shape {shape}; give the length of"
      " sequences, a number, or (height, width) of images."
    )
  sizes = [validate.integer("data.pad", n) for n in wanted]
  if any(n < old for n, old in zip(sizes, shape, strict=False)):
    raise ValueError(
      f"{what} is smaller than 'x', whose shape is {shape}; give at least that."
    )
  made = (sizes[0], sizes[1]) if images else sizes[0]
  return _prepared(dataset, functools.partial(pad, size=made))


def with_crop(
  dataset: FederatedDataset, pixels: int, fill: str = "zeros"
) -> FederatedDataset:
  """Move training images at random by up to `pixels`; see `random_crop`.

  Raises:
    TypeError, ValueError: `x` are no images, or too small.
  """
  height, width = _image(dataset, f"data.crop={pixels!r}")
  validate.integer("data.crop", pixels, le=min(height, width) - 1)
  validate.one_of("data.crop_fill", fill, FILLS)
  step = functools.partial(random_crop, pixels=pixels, fill=fill)
  return _augmented(dataset, step)


def with_flip(dataset: FederatedDataset) -> FederatedDataset:
  """Mirror training images with probability 1/2; see `random_flip`.

  Raises:
    ValueError: `x` are no images.
  """
  _image(dataset, "data.flip=True")
  return _augmented(dataset, random_flip)


def _image(dataset: FederatedDataset, what: str) -> tuple[int, int]:
  """Return the height and width of images; refuse what is no image."""
  shape = _field(dataset, what).shape[1:]
  if len(shape) not in (2, 3) or min(shape[:2]) < LEAST_SIDE:
    raise ValueError(
      f"{what} is for images, and one 'x' has shape {shape}; give (height,"
      f" width) or (height, width, channels), by data.reshape, both sides >="
      f" {LEAST_SIDE}, or unset it."
    )
  return shape[0], shape[1]


def _augmented(dataset: FederatedDataset, step: Augment) -> FederatedDataset:
  """Return the data set with one more step for training batches."""
  augment = then_augment(dataset.augment, step)
  return dataclasses.replace(dataset, augment=augment)
