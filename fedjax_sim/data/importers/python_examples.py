"""Any Python iterator of clients and their examples."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from fedjax_sim.core import validate
from fedjax_sim.data.importers import blocks
from fedjax_sim.data.importers.blocks import Block, Source, client_names, column


def examples(
  pairs: Iterable[tuple[str | int, Mapping[str, Any]]],
) -> Iterable[Block]:
  """Read examples one by one, of clients in any order.

  Args:
    pairs: client, a name or a whole number, and its example: field -> number,
      text or array. All examples have the same fields, of one shape each.

  Returns:
    Blocks of examples, which can be read again if `pairs` can.

  Raises:
    TypeError, ValueError: a pair is something else; names its place.
  """
  if iter(pairs) is pairs:
    return _blocks(pairs)
  return Source(functools.partial(_blocks, pairs))


def _blocks(
  pairs: Iterable[tuple[str | int, Mapping[str, Any]]],
) -> Iterator[Block]:
  held: list[tuple[str, Mapping[str, Any]]] = []
  size, first = 0, 0
  for number, pair in enumerate(pairs):
    held.append(_checked(f"example {number}", pair))
    size += sum(_bytes(value) for value in held[-1][1].values())
    if size >= blocks.BLOCK:
      yield _block(first, held)
      held, size, first = [], 0, number + 1
  if held:
    yield _block(first, held)


def _checked(where: str, pair: Any) -> tuple[str, Mapping[str, Any]]:
  if not isinstance(pair, tuple) or len(pair) != 2:
    raise TypeError(
      f"{where} is a {type(pair).__name__}; give a client and its example, a"
      " tuple of two."
    )
  client, example = pair
  validate.instance(where, example, Mapping, "{'x': ..., 'y': ...}")
  name = client_names(where, "the client", [client], row=None)[0]
  return name, {k: _compact(v) for k, v in example.items()}


def _compact(value: Any) -> Any:
  """Convert a list to an array, which is smaller and has a known size."""
  try:
    return np.asarray(value) if isinstance(value, list | tuple) else value
  except ValueError:  # of several shapes: told of with its field
    return value


def _bytes(value: Any) -> int:
  if isinstance(value, np.ndarray):
    return value.nbytes + 100  # the object
  return 4 * len(value) if isinstance(value, str) else 64


def _block(first: int, held: list[tuple[str, Mapping[str, Any]]]) -> Block:
  where = f"examples from {first} on"
  fields = list(held[0][1])
  for i, (_, example) in enumerate(held):
    if set(example) != set(fields):
      raise ValueError(
        f"example {first + i} has fields {sorted(example)}, others"
        f" {sorted(fields)}; give all the same."
      )
  arrays = {k: column(where, k, [e[k] for _, e in held]) for k in fields}
  return blocks.grouped(where, [name for name, _ in held], arrays)
