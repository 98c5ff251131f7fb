"""Run a function on matrices of the form base + scale * a @ b, unmultiplied.

A function is traced, and its program is computed with such a matrix in the
place of an array. Where the program multiplies by it, so does this: once by the
base and twice by the thin factors. Where it does anything else, such as to
convolve or to loop over it, the matrix is multiplied out first, so results are
always those of the whole matrix, up to rounding. So it is where a function with
a derivative of its own (`jax.custom_jvp`, `jax.custom_vjp`) takes the matrix:
inside, that derivative would be lost.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core
from jax.extend.core import primitives

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
  """An array base + scale * a @ b that has not been multiplied out.

  Attributes:
    base: shape=(*ins, *outs).
    a: shape=(*ins, rank), any float.
    b: shape=(rank, *outs), any float.
    scale: of the product; a number.
  """

  base: Array
  a: Array
  b: Array
  scale: Any = dataclasses.field(metadata={"static": True})

  def whole(self) -> Array:
    """Return the array, in the dtype of its base."""
    return self.base + self.change().astype(self.base.dtype)

  def change(self) -> Array:
    """Return scale * a @ b, in the dtype of the factors."""
    rank = self.a.shape[-1]
    flat = self.a.reshape(-1, rank) @ self.b.reshape(rank, -1)
    return self.scale * flat.reshape(self.base.shape)

  def astype(self, dtype: Any) -> LowRank:
    """Return it with all of its parts in another dtype."""
    base, a, b = (x.astype(dtype) for x in (self.base, self.a, self.b))
    return LowRank(base, a, b, self.scale)

  def transposed(self) -> LowRank:
    """Return it with its outs before its ins."""
    base = jnp.moveaxis(self.base, range(self.ins), range(-self.ins, 0))
    a, b = jnp.moveaxis(self.b, 0, -1), jnp.moveaxis(self.a, -1, 0)
    return LowRank(base, a, b, self.scale)

  @property
  def ins(self) -> int:
    """How many axes `a` has of the array's."""
    return self.a.ndim - 1


def evaluate(function: Callable[..., Any], *arguments: Any) -> Any:
  """Return what a pure function gives for arguments with `LowRank` arrays.

  Args:
    function: of trees of arrays.
    *arguments: trees of arrays, some of which are `LowRank`.

  Returns:
    The function's outputs; arrays, multiplied out.
  """
  values, structure = jax.tree.flatten(arguments, is_leaf=_is_low_rank)
  shapes = [x.base if _is_low_rank(x) else x for x in values]
  trace = jax.make_jaxpr(
    lambda *leaves: function(*jax.tree.unflatten(structure, leaves)),
    return_shape=True,
  )
  program, outputs = trace(*shapes)
  leaves = _run(program.jaxpr, program.consts, values)
  leaves = [x.whole() if _is_low_rank(x) else x for x in leaves]
  return jax.tree.unflatten(jax.tree.structure(outputs), leaves)


def _is_low_rank(value: Any) -> bool:
  return isinstance(value, LowRank)


def _run(
  program: core.Jaxpr, consts: Sequence[Any], arguments: Sequence[Any]
) -> list[Any]:
  """Return the outputs of a program; those may be `LowRank`, too."""
  values: dict[Any, Any] = dict(
    zip(
      (*program.constvars, *program.invars), (*consts, *arguments), strict=True
    )
  )

  def read(atom: Any) -> Any:
    return atom.val if isinstance(atom, core.Literal) else values[atom]

  for equation in program.eqns:
    made = _equation(equation, [read(x) for x in equation.invars])
    values.update(zip(equation.outvars, made, strict=True))
  return [read(x) for x in program.outvars]


def _equation(equation: Any, given: list[Any]) -> list[Any]:
  """Return the outputs of an equation."""
  primitive, params = equation.primitive, equation.params
  if any(map(_is_low_rank, given)):
    rule = _RULES.get(primitive)
    made = rule(*given, **params) if rule is not None else None
    if made is not None:
      return made
    given = [x.whole() if _is_low_rank(x) else x for x in given]
  with equation.ctx.manager:
    made = primitive.bind(*given, **primitive.get_bind_params(params))
  return made if primitive.multiple_results else [made]


def _inside(*given: Any, jaxpr: core.ClosedJaxpr, **_: Any) -> list[Any]:
  return _run(jaxpr.jaxpr, jaxpr.consts, given)


def _inside_call(
  *given: Any, call_jaxpr: core.ClosedJaxpr, **_: Any
) -> list[Any]:
  return _run(call_jaxpr.jaxpr, call_jaxpr.consts, given)


def _rematerialized(
  *given: Any, jaxpr: core.Jaxpr, prevent_cse: Any, policy: Any, **_: Any
) -> list[Any]:
  run = lambda *values: _run(jaxpr, (), values)
  return list(
    jax.checkpoint(run, prevent_cse=prevent_cse, policy=policy)(*given)
  )


def _converted(x: LowRank, *, new_dtype: Any, **_: Any) -> list[Any] | None:
  if not jnp.issubdtype(new_dtype, jnp.floating):
    return None
  return [x.astype(new_dtype)]


def _transposed(x: LowRank, *, permutation: Sequence[int]) -> list[Any] | None:
  turned = (*range(x.ins, x.base.ndim), *range(x.ins))
  return [x.transposed()] if tuple(permutation) == turned else None


def _product(
  left: Any, right: Any, *, dimension_numbers: Any, **params: Any
) -> list[Any] | None:
  """Return a product, if it sums over all ins, or over all outs, of one side.

  Its axes are those of `lax.dot_general`: what is left of the left side, then
  of the right one.
  """
  sums, batches = dimension_numbers
  if any(batches) or (_is_low_rank(left) and _is_low_rank(right)):
    return None
  on_the_left = _is_low_rank(left)
  low, other = (left, right) if on_the_left else (right, left)
  low_sums, other_sums = sums if on_the_left else sums[::-1]
  if sorted(low_sums) == [*range(low.ins)]:
    first, first_sums = low.a, low_sums
    second, rank_axis = low.b, 0
  elif sorted(low_sums) == [*range(low.ins, low.base.ndim)]:
    first, first_sums = low.b, [axis - low.ins + 1 for axis in low_sums]
    second, rank_axis = low.a, low.ins
  else:
    return None

  def dot(x: Array, x_sums: Any, y: Array, y_sums: Any) -> Array:
    pair = (x, y, x_sums, y_sums)
    one, two, one_sums, two_sums = (
      pair if on_the_left else (y, x, y_sums, x_sums)
    )
    return lax.dot_general(
      one,
      two,
      ((one_sums, two_sums), ((), ())),
      precision=params["precision"],
      preferred_element_type=params["preferred_element_type"],
    )

  dtype = low.base.dtype
  thin = dot(first.astype(dtype), first_sums, other, other_sums).astype(dtype)
  thin_axis = 0 if on_the_left else thin.ndim - 1  # that of the rank
  change = dot(second.astype(dtype), (rank_axis,), thin, (thin_axis,))
  return [dot(low.base, low_sums, other, other_sums) + low.scale * change]


_RULES: dict[Any, Callable[..., list[Any] | None]] = {
  primitives.jit_p: _inside,
  primitives.closed_call_p: _inside_call,
  primitives.remat_p: _rematerialized,
  primitives.convert_element_type_p: _converted,
  primitives.transpose_p: _transposed,
  primitives.dot_general_p: _product,
}
