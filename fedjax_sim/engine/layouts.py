"""How the matrices of a model lie in memory while clients train.

A dense layer's kernel has a row for each input and a column for each output.
Where the columns are few, as in a last layer, a row is too short for a CPU's
vectors: an optimizer's step on 784 x 10 numbers takes three times as long as
on 10 x 784. So what the loops over local steps and waves carry has such kernels
transposed, and whatever happens inside gets them as they are, which moves
nothing: XLA reads the transposed array. `tasks/dense.py` has the products that
go with it.

Of a table of embeddings, which is looked up and not multiplied, XLA would make
a transposed copy in every step. It keeps its shape and is laid out by columns,
unless these are so few that rows are as fast. No number changes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint

from fedjax_sim.core import (
  Algorithm,
  Array,
  Client,
  Pass,
  PyTree,
  Report,
  returned,
)
from fedjax_sim.core.tree import is_narrow
from fedjax_sim.distributed import MODEL

TABLE = "embedding"
FEWEST_OF_TABLES = 9  # columns: of fewer, rows are as fast or faster

_BY_ROWS = Layout(major_to_minor=(0, 1))
_BY_COLUMNS = Layout(major_to_minor=(1, 0))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ByColumns:
  """A narrow matrix, column by column.

  Attributes:
    columns: shape=(columns, rows).
  """

  columns: Array


def by_columns(tree: PyTree, pinned: bool = True) -> PyTree:
  """Return the tree, on a CPU with a `ByColumns` for each narrow matrix.

  A table keeps its shape; it is whatever has a key `embedding` on its path, as
  Flax names it. Where devices share a model, XLA lays out its pieces, and all
  stay.

  Args:
    tree: anything.
    pinned: XLA must not lay out by rows again, which it does where no product
      decides; not with virtual devices, with which it has no pass that takes
      such a wish away.
  """
  axes = jax.sharding.get_abstract_mesh().axis_names
  if MODEL in axes or jax.default_backend() != "cpu":
    return tree

  def lie(x: Any, layout: Layout) -> Any:
    traced = isinstance(x, jax.core.Tracer)
    return with_layout_constraint(x, layout) if pinned and traced else x

  def turned(path: Any, x: Any) -> Any:
    if not isinstance(x, jax.Array | np.ndarray) or not is_narrow(x):
      return x
    keys = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
    if TABLE not in keys:
      return ByColumns(lie(x.T, _BY_ROWS))
    return x if x.shape[1] < FEWEST_OF_TABLES else lie(x, _BY_COLUMNS)

  return jax.tree_util.tree_map_with_path(turned, tree)


def by_rows(tree: PyTree) -> PyTree:
  """Return what `by_columns` was given."""
  turn = lambda x: x.columns.T if _is_turned(x) else x
  return jax.tree.map(turn, tree, is_leaf=_is_turned)


def _is_turned(x: Any) -> bool:
  return isinstance(x, ByColumns)


def trained_by_columns(algorithm: Algorithm, pinned: bool) -> Algorithm:
  """Return the algorithm; what its local steps carry lies by columns.

  Args:
    algorithm: what clients do.
    pinned: as in `by_columns`.
  """

  def finish(client: Client, *carries: PyTree) -> Report:
    return algorithm.finish(client, *by_rows(carries))

  passes = tuple(_carried(walk, pinned) for walk in algorithm.passes)
  return algorithm._replace(passes=passes, finish=finish)


def _carried(walk: Pass, pinned: bool) -> Pass:
  """Return the pass with a carry that lies by columns."""

  def start(client: Client, *earlier: PyTree) -> PyTree:
    return by_columns(walk.start(client, *by_rows(earlier)), pinned)

  def step(client: Client, carry: PyTree, *given: Any) -> PyTree:
    after = walk.step(client, by_rows(carry), *given)
    _check_kept(carry, after)
    return by_columns(after, pinned)

  tokens = walk.tokens
  return walk._replace(
    start=start,
    step=step,
    tokens=tokens and (lambda carry: tokens(by_rows(carry))),
  )


def _check_kept(carry: PyTree, after: PyTree) -> None:
  """Refuse a step that changes what a matrix is, which JAX would tell turned.

  Args:
    carry: before the step, by columns.
    after: what the step returned. JAX refuses another structure.

  Raises:
    TypeError: names the matrix.
  """
  before = jax.tree_util.tree_leaves_with_path(carry, is_leaf=_is_turned)
  structure: Any = jax.tree.structure
  if structure(by_rows(carry)) != structure(after):
    return
  for (path, x), new in zip(before, jax.tree.leaves(after), strict=True):
    if not _is_turned(x):
      continue
    old, kind = x.columns.T, lambda x: (np.shape(x), jax.dtypes.result_type(x))
    if kind(old) != kind(new):
      raise TypeError(
        f"Pass.step: in the carry {jax.tree_util.keystr(path)} was"
        f" {returned.described(old)}, and the step returned"
        f" {returned.described(new)}; keep shape and dtype."
      )
