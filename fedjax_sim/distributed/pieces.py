"""Arrays in pieces: the part of an array that a process has on its devices.

An array that is spread over the devices of several processes may fit on no
single host. Its pieces are copied to the host and back without any process
having it whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import jax
import numpy as np
from jax.sharding import Sharding

# Where a piece begins and ends, on each axis of the whole array.
Ranges = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Pieces:
  """Pieces of an array; a leaf of a pytree.

  Attributes:
    shape: of the whole array.
    dtype: of the array.
    own: where a piece lies -> the piece.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  own: Mapping[Ranges, np.ndarray]

  @property
  def nbytes(self) -> int:
    """Bytes of these pieces."""
    return sum(piece.nbytes for piece in self.own.values())


@dataclasses.dataclass(frozen=True)
class Wanted:
  """Which pieces of an array a process needs; not a tree, but a leaf of one.

  Attributes:
    ranges: where they lie; None for the whole array.
  """

  ranges: list[Ranges] | None


def is_spread(sharding: Sharding) -> bool:
  """Return whether no process has all of an array with this sharding."""
  return not (sharding.is_fully_addressable or sharding.is_fully_replicated)


def to_pieces(array: jax.Array, rows: int | None = None) -> Pieces:
  """Return the pieces that this process stores; every piece has one process.

  Args:
    array: on the devices of several processes.
    rows: number of rows that count; what follows is padding. None for all.
  """
  shape = array.shape if rows is None else (rows, *array.shape[1:])
  own = {}
  for shard in array.addressable_shards:
    if shard.replica_id:
      continue
    ranges = within(ranges_of(shard.index, array.shape), shape)
    if is_empty(ranges):
      continue
    size = tuple(slice(end - begin) for begin, end in ranges)
    own[ranges] = np.asarray(shard.data)[size]
  return Pieces(shape, np.dtype(array.dtype), own)


def wanted_ranges(
  shape: tuple[int, ...], sharding: Sharding, rows: int | None = None
) -> list[Ranges]:
  """Return where the pieces lie that this process's devices need.

  Args:
    shape: of the whole array on the devices.
    sharding: how it is to lie there.
    rows: as in `to_pieces`.
  """
  stored = shape if rows is None else (rows, *shape[1:])
  found = sharding.addressable_devices_indices_map(shape).values()
  ranges = [within(ranges_of(i or (), shape), stored) for i in found]
  return [r for r in dict.fromkeys(ranges) if not is_empty(r)]


def place(
  pieces: Pieces, shape: tuple[int, ...], sharding: Sharding
) -> jax.Array:
  """Return an array of which each process gives what its devices need.

  Args:
    pieces: with all ranges of `wanted_ranges`.
    shape: of the array; rows beyond those of the pieces are padding.
    sharding: how it is to lie on the devices.
  """

  def give(index: tuple[slice, ...] | None) -> np.ndarray:
    ranges = ranges_of(index or (), shape)
    size = tuple(end - begin for begin, end in ranges)
    cut = within(ranges, pieces.shape)
    if cut == ranges:
      return pieces.own[cut]
    padded = np.zeros(size, pieces.dtype)
    if not is_empty(cut):
      piece = pieces.own[cut]
      padded[: len(piece)], padded[len(piece) :] = piece, piece[-1:]
    return padded

  return jax.make_array_from_callback(shape, sharding, give)


def assemble(
  ranges: Ranges, dtype: np.dtype, parts: Iterable[tuple[Ranges, np.ndarray]]
) -> np.ndarray:
  """Return a piece put together from what overlaps it.

  Args:
    ranges: where the piece lies.
    dtype: of the array.
    parts: where each part lies, and the part.

  Raises:
    ValueError: some of the piece is in no part.
  """
  size = tuple(end - begin for begin, end in ranges)
  piece = np.empty(size, dtype)
  filled = 0
  for where, part in parts:
    common = overlap(ranges, where)
    if is_empty(common):
      continue
    to = _slices(common, ranges)
    piece[to] = part[_slices(common, where)]
    filled += piece[to].size
  if filled != piece.size:
    raise ValueError(f"{piece.size - filled} of its values are missing")
  return piece


def cut(array: np.ndarray, ranges: Ranges) -> np.ndarray:
  """Return a view of the piece of a whole array."""
  return array[tuple(slice(begin, end) for begin, end in ranges)]


def ranges_of(index: tuple[slice, ...], shape: tuple[int, ...]) -> Ranges:
  """Return slices as ranges; axes that they do not name are whole."""
  whole = (*index, *(slice(None),) * (len(shape) - len(index)))
  bounds = [s.indices(n)[:2] for s, n in zip(whole, shape, strict=True)]
  return tuple((begin, end) for begin, end in bounds)


def within(ranges: Ranges, shape: tuple[int, ...]) -> Ranges:
  """Return the part of the ranges that lies in an array of this shape."""
  return overlap(ranges, tuple((0, n) for n in shape))


def overlap(a: Ranges, b: Ranges) -> Ranges:
  """Return what two ranges have in common; its end may be before its begin."""
  return tuple(
    (max(x[0], y[0]), min(x[1], y[1])) for x, y in zip(a, b, strict=True)
  )


def is_empty(ranges: Ranges) -> bool:
  """Return whether there is no element in the ranges."""
  return any(end <= begin for begin, end in ranges)


def _slices(part: Ranges, of: Ranges) -> tuple[slice, ...]:
  """Return where a part lies in the ranges that hold it."""
  return tuple(
    slice(begin - first, end - first)
    for (begin, end), (first, _) in zip(part, of, strict=True)
  )
