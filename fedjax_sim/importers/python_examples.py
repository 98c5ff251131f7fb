"""Any Python iterator of clients and their examples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from fedjax_sim import validate
from fedjax_sim.importers import blocks
from fedjax_sim.importers.blocks import Block, client_names, column, source


@source
def examples(
  pairs: Iterable[tuple[str | int, Mapping[str, Any]]],
) -> Iterator[Block]:
  """Examples one by one, of clients in any order.

  Args:
    pairs: client, a name or a whole number, and its example: field -> number,
      text or array. All examples have the same fields, of one shape each.

  Raises:
    TypeError, ValueError: a pair is something else; names its place.
  """
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
  return client_names(where, "the client", [client])[0], example


def _bytes(value: Any) -> int:
  return value.nbytes if isinstance(value, np.ndarray) else 64


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
