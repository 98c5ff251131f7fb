"""Type aliases of the whole package, and an empty mapping."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax

PyTree = Any
Array = jax.Array
Key = jax.Array  # a typed key, shape=()
HParams = Mapping[str, Any]  # nested dict of scalars, all traced
Examples = Mapping[str, Array]  # field -> (examples, ...)


@jax.tree_util.register_pytree_node_class
class _Empty(Mapping[str, Any]):
  """An empty mapping that cannot be changed: a pytree without leaves."""

  __slots__ = ()

  def __getitem__(self, key: str) -> Any:
    raise KeyError(key)

  def __iter__(self) -> Iterator[str]:
    return iter(())

  def __len__(self) -> int:
    return 0

  def __or__(self, other: Mapping[str, Any]) -> dict[str, Any]:
    return dict(other)

  def __repr__(self) -> str:
    return "{}"

  def tree_flatten(self) -> tuple[tuple[()], None]:
    """Return no children and nothing else."""
    return (), None

  @classmethod
  def tree_unflatten(cls, aux: None, children: tuple[()]) -> _Empty:
    """Return the empty mapping."""
    del cls, aux, children
    return EMPTY


# A default for fields that all instances of a NamedTuple share.
EMPTY = _Empty()
