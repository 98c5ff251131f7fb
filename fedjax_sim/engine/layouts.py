"""How the matrices of a model lie in memory while clients train.

A dense layer's kernel has a row for each input and a column for each output.
Where the columns are few, as in a last layer, a row is too short for a CPU's
vectors: an optimizer's step on 784 x 10 numbers takes three times as long as
on 10 x 784. So what the loops over local steps and waves carry has such kernels
transposed, and whatever happens inside gets them as they are, which moves
nothing: XLA reads the transposed array. It changes no number.
`tasks/dense.py` has the products that go with it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint

from fedjax_sim.core import Algorithm, Array, Client, Pass, PyTree, Report
from fedjax_sim.core.tree import is_narrow
from fedjax_sim.distributed import MODEL


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ByColumns:
  """A narrow matrix, column by column.

  Attributes:
    columns: shape=(columns, rows).
  """

  columns: Array


def by_columns(tree: PyTree, pinned: bool = False) -> PyTree:
  """Return the tree, on a CPU with a `ByColumns` for each narrow matrix.

  Where devices share a model, XLA lays out their pieces, and all stay.

  Args:
    tree: anything.
    pinned: XLA must not lay out the transposed array by rows, which it does
      where no product decides; not with virtual devices, with which it has no
      pass that takes such a wish away.
  """
  axes = jax.sharding.get_abstract_mesh().axis_names
  if MODEL in axes or jax.default_backend() != "cpu":
    return tree
  pin = _pin if pinned else lambda x: x

  def turn(x: Any) -> Any:
    array = isinstance(x, jax.Array | np.ndarray)
    return ByColumns(pin(x.T)) if array and is_narrow(x) else x

  return jax.tree.map(turn, tree)


def _pin(x: Array) -> Array:
  return with_layout_constraint(x, Layout(major_to_minor=(0, 1)))


def by_rows(tree: PyTree) -> PyTree:
  """Return what `by_columns` was given."""
  turned = lambda x: isinstance(x, ByColumns)
  turn = lambda x: x.columns.T if turned(x) else x
  return jax.tree.map(turn, tree, is_leaf=turned)


def trained_by_columns(algorithm: Algorithm) -> Algorithm:
  """Return the algorithm; what its local steps carry lies by columns."""

  def finish(client: Client, *carries: PyTree) -> Report:
    return algorithm.finish(client, *by_rows(carries))

  passes = tuple(map(_carried, algorithm.passes))
  return algorithm._replace(passes=passes, finish=finish)


def _carried(walk: Pass) -> Pass:
  """Return the pass with a carry that lies by columns."""

  def start(client: Client, *earlier: PyTree) -> PyTree:
    return by_columns(walk.start(client, *by_rows(earlier)))

  def step(client: Client, carry: PyTree, *given: Any) -> PyTree:
    return by_columns(walk.step(client, by_rows(carry), *given))

  tokens = walk.tokens
  return walk._replace(
    start=start,
    step=step,
    tokens=tokens and (lambda carry: tokens(by_rows(carry))),
  )
