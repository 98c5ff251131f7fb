"""How the matrices of a model lie in memory while clients train.

A dense layer's kernel has a row for each input and a column for each output.
Where the columns are few, as in a last layer, a row is too short for a CPU's
vectors: an optimizer's step on 784 x 10 numbers takes three times as long as
on 10 x 784. So such kernels lie column by column in what the loops over local
steps and waves carry. It changes no shape and no number.
`tasks/dense.py` has the products that go with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.experimental.layout import Layout, with_layout_constraint

from fedjax_sim.core import Algorithm, PyTree
from fedjax_sim.core.tree import is_narrow
from fedjax_sim.distributed import MODEL

T = TypeVar("T")

_BY_COLUMNS = Layout(major_to_minor=(1, 0))


def by_columns(tree: T, virtual: int | None = None) -> T:
  """Return the tree, its narrow matrices column by column on a CPU.

  Args:
    tree: anything; arrays outside of a trace stay as they are, and all where
      devices share a model, whose pieces XLA lays out.
    virtual: number of virtual devices, with which XLA has no pass that removes
      the wish for a layout: then all stay, too; None without any.
  """
  axes = jax.sharding.get_abstract_mesh().axis_names
  if virtual or MODEL in axes or jax.default_backend() != "cpu":
    return tree

  def lay_out(x: Any) -> Any:
    if not isinstance(x, jax.core.Tracer) or not is_narrow(x):
      return x
    return with_layout_constraint(x, _BY_COLUMNS)

  laid_out: T = jax.tree.map(lay_out, tree)
  return laid_out


def trained_by_columns(algorithm: Algorithm, virtual: int | None) -> Algorithm:
  """Return the algorithm; what its local steps carry lies by columns.

  Args:
    algorithm: what clients do.
    virtual: as in `by_columns`.
  """

  def laid_out(step: Callable[..., PyTree]) -> Callable[..., PyTree]:
    return lambda *arguments: by_columns(step(*arguments), virtual)

  passes = tuple(p._replace(step=laid_out(p.step)) for p in algorithm.passes)
  return algorithm._replace(passes=passes)
