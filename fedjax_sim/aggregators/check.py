"""Checks of a user's aggregator, before anything is compiled."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_sim.core import (
  AggregationContext,
  Aggregator,
  PyTree,
  errors,
  returned,
)


def check(aggregator: Aggregator, update: PyTree) -> None:
  """Refuse an aggregator whose shapes break the contract.

  A round would broadcast some of them, and be wrong silently.

  Args:
    aggregator: the aggregator; traced, not run.
    update: update of one client, or its shapes and dtypes.

  Raises:
    ValueError: names the function, and the first leaf that is wrong.
  """
  capacity, lanes = 4, 2

  def shape(*axes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(axes, dtype)

  wave = jax.tree.map(lambda x: shape(lanes, *x.shape, dtype=x.dtype), update)
  weights, present = shape(lanes), shape(lanes, dtype=jnp.bool)
  count = shape(dtype=jnp.int32)
  key: Any = jax.eval_shape(lambda: jax.random.key(0))
  number: Any = shape(dtype=jnp.int32)
  rank: Any = shape(capacity, dtype=jnp.int32)
  of_lanes: Any = shape(lanes, dtype=jnp.int32)
  context = AggregationContext(
    key=key,
    noise_key=key,
    slot=number,
    rank=rank,
    cohort_size=number,
    hparams=jax.tree.map(lambda _: shape(), dict(aggregator.hparams)),
    byzantine=shape(capacity, dtype=jnp.bool),
  )
  in_wave = context._replace(rank=of_lanes, byzantine=present)
  part = "init"
  try:
    acc = jax.eval_shape(lambda: aggregator.init(update, capacity))
    part = "add"
    new = jax.eval_shape(aggregator.add, acc, wave, weights, present, in_wave)
    part = "finish"
    joined = jax.eval_shape(aggregator.finish, acc, shape(), count, context)
  except Exception as error:
    text = errors.raised(None, error)
    raise ValueError(f"aggregator.name: {part}: {text}") from error
  _check_alike("add", new, acc, "as init does")
  if aggregator.reduces:  # of whatever float: the server casts it
    _check_alike("finish", joined, update, "as an update has", dtypes=False)
    for leaf in jax.tree.leaves(joined):
      if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise ValueError(
          f"aggregator.name: finish returns {leaf.dtype}; let it return floats."
        )


def _check_alike(
  part: str, made: PyTree, like: PyTree, why: str, dtypes: bool = True
) -> None:
  kind = lambda x: f"{x.dtype.name if dtypes else ''}{x.shape}"
  if (found := returned.first_difference(made, like, kind)) is not None:
    name, one, other = found
    raise ValueError(
      f"aggregator.name: {part} gives {one} at {name or 'the top'}; let it"
      f" give {other}, {why}."
    )
