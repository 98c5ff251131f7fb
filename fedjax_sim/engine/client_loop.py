"""How clients walk over their data: batch by batch, in lanes and waves.

The loops that training and evaluation share. Trip counts are traced, so
nothing recompiles when a cohort changes. A lane that has done its steps waits
for the longest of its wave: `vmap` of a loop keeps its carry as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from fedjax_sim.core import (
  Algorithm,
  Array,
  Batch,
  Client,
  Examples,
  HParams,
  Key,
  Pass,
  PyTree,
  Report,
)
from fedjax_sim.data import Augment, Prepare
from fedjax_sim.distributed import AXIS
from fedjax_sim.engine.loops import FixedLoop, repeat, repeat_while
from fedjax_sim.engine.plan import CohortPlan

# A plan's grids are dealt over the devices; every device reads all of `order`.
COHORT_SPEC = CohortPlan(
  client=P(AXIS),
  version=P(AXIS),
  byzantine=P(AXIS),
  num_examples=P(AXIS),
  start=P(AXIS),
  num_steps=P(AXIS),
  weight=P(AXIS),
  num_waves=P(AXIS),
  order=P(),
)


class PassSpec(NamedTuple):
  """How a pass reads its batches: constants of the compiled round.

  Attributes:
    source: whose examples, a key of the data.
    batch_size: examples of a batch.
    prepare: what is done to a batch before the algorithm sees it.
    augment: what is done to it then, at random; None: nothing.
    max_tokens: see `LocalBatching`.
    fixed: the loop over its batches, for reverse mode; None: as long as each
      client has batches.
  """

  source: str
  batch_size: int
  prepare: Prepare
  augment: Augment | None = None
  max_tokens: int | None = None
  fixed: FixedLoop | None = None


def read_batch(
  examples: Examples, order: Array, first: Array, walk: PassSpec
) -> Batch:
  """Return the batch whose entries of `order` begin at `first`."""
  entries = lax.dynamic_slice(order, (first,), (walk.batch_size,))
  rows = jnp.where(entries < 0, ~entries, entries)
  take = lambda x: x.at[rows].get(mode="promise_in_bounds")
  stored = jax.tree.map(take, dict(examples))
  return Batch(walk.prepare(stored), entries >= 0)


def augmented(batch: Batch, augment: Augment | None, key: Key) -> Batch:
  """Return the batch, augmented if the data set says how.

  Args:
    batch: as `prepare` leaves it.
    augment: see `FederatedDataset`.
    key: of the client's step, which gets the same key as without.
  """
  if augment is None:
    return batch
  tag = 0x6175676D  # no number that an algorithm would fold in itself
  key = jax.random.fold_in(key, tag)
  return batch._replace(examples=augment(key, batch.examples))


def with_numbers(examples: Examples, hparams: HParams) -> Examples:
  """Return examples with the task's numbers as further fields.

  Args:
    examples: field -> (examples, ...).
    hparams: `Task.hparams`, traced.
  """
  size = len(next(iter(examples.values())))
  numbers = {k: jnp.broadcast_to(x, (size,)) for k, x in hparams.items()}
  return {**examples, **numbers}


def random_batch(examples: Examples, size: int, key: Key) -> Batch:
  """Return examples drawn without replacement; all, in order, if too few.

  Args:
    examples: as the model gets them, leaves (examples, ...).
    size: how many, at most.
    key: chooses them.
  """
  count = len(next(iter(examples.values())))
  size = min(size, count)
  rows = jnp.arange(count)
  if size < count:
    rows = jax.random.choice(key, count, (size,), replace=False)
  chosen = jax.tree.map(lambda x: x[rows], dict(examples))
  return Batch(chosen, jnp.ones(size, bool))


def pass_key(key: Key, p: int) -> Key:
  """Return the key of a client's pass; fold in the step for a step's key."""
  tag = 0x70617373  # no number that an algorithm would fold in itself
  return jax.random.fold_in(jax.random.fold_in(key, tag), p)


def run_client(
  algorithm: Algorithm,
  client: Client,
  start: Array,
  walks: Sequence[PassSpec],
  data: Mapping[str, Examples],
  orders: Sequence[Array],
  task_hparams: HParams,
  first_pass: int = 0,
) -> tuple[Client, Report]:
  """Run one client's round: its passes over its data, then its report.

  Args:
    algorithm: what it does.
    client: what it knows.
    start: shape=(passes,), int32; where its batches begin in each order.
    walks: for every pass, how it reads.
    data: source -> examples.
    orders: for every pass, the order array.
    task_hparams: `Task.hparams`, traced.
    first_pass: see `RoundSpec`.

  Returns:
    The client, with the numbers of steps and examples that it used, and its
    report.
  """
  carries: tuple[PyTree, ...] = ()
  for p, (walked, walk) in enumerate(zip(algorithm.passes, walks, strict=True)):
    carry = walked.start(client, *carries)
    client, carry = _walk_once(
      walked,
      walk,
      p,
      client,
      carry,
      data[walk.source],
      orders[p],
      start[p],
      task_hparams,
      pass_key(client.key, first_pass + p),
    )
    carries += (carry,)
  return client, algorithm.finish(client, *carries)


def _walk_once(
  walked: Pass,
  walk: PassSpec,
  p: int,
  client: Client,
  carry: PyTree,
  examples: Examples,
  order: Array,
  start: Array,
  task_hparams: HParams,
  own_key: Key,
) -> tuple[Client, PyTree]:
  """Run a client's pass `p`, from its first carry to its last.

  Returns:
    The client, with what it used if tokens ended the pass, and the carry.
  """

  def step(
    i: Array, carry: PyTree, inputs: tuple[Client, HParams]
  ) -> tuple[PyTree, Array]:
    client, task_hparams = inputs
    batch = read_batch(examples, order, start + i * walk.batch_size, walk)
    seen = jnp.sum(batch.mask, dtype=jnp.int32)
    key = jax.random.fold_in(own_key, i)
    batch = augmented(batch, walk.augment, key)
    batch = batch._replace(examples=with_numbers(batch.examples, task_hparams))
    return walked.step(client, carry, batch, key), seen

  planned, tokens = client.num_steps[p], walked.tokens
  inputs = client, task_hparams
  if walk.max_tokens is None:
    if _has_value(planned):
      for i in range(int(planned)):
        carry, _ = step(jnp.int32(i), carry, inputs)
      return client, carry
    alone = lambda i, carry, inputs: step(i, carry, inputs)[0]
    return client, repeat(planned, alone, carry, inputs, walk.fixed)
  assert tokens is not None
  enough = lambda carry: tokens(carry) >= walk.max_tokens
  carry, steps, seen = _until(step, enough, planned, carry, inputs, walk.fixed)
  used = client._replace(num_steps=client.num_steps.at[p].set(steps))
  if p == 0:  # all examples come once before one comes twice
    seen = jnp.minimum(client.num_examples, seen)
    used = used._replace(num_examples=seen)
  return used, carry


def _has_value(number: Array) -> bool:
  """Return whether this runs outside of a trace, as `debug=True` does.

  Then local steps are a Python loop, in which arrays have values.
  """
  return not isinstance(number, jax.core.Tracer)


def _until(
  step: Callable[[Array, PyTree, PyTree], tuple[PyTree, Array]],
  enough: Callable[[PyTree], Array],
  most: Array,
  carry: PyTree,
  inputs: PyTree,
  fixed: FixedLoop | None,
) -> tuple[PyTree, Array, Array]:
  """Take steps until a condition holds, at most a given number.

  Returns:
    The carry, the number of steps, shape=(), int32, and of their examples.
  """

  def more(state: tuple[PyTree, Array, Array]) -> Array:
    carry, i, _ = state
    return (i < most) & ~enough(carry)

  def advance(
    state: tuple[PyTree, Array, Array], inputs: PyTree
  ) -> tuple[PyTree, Array, Array]:
    carry, i, total = state
    carry, seen = step(i, carry, inputs)
    return carry, i + 1, total + seen

  state = carry, jnp.zeros_like(most), jnp.int32(0)
  if _has_value(most):
    while more(state):
      state = advance(state, inputs)
    return state
  if fixed is None:
    return lax.while_loop(more, lambda state: advance(state, inputs), state)
  ended: tuple[PyTree, Array, Array] = repeat_while(
    lambda i, state: more(state),
    lambda i, state, inputs: advance(state, inputs),
    state,
    inputs,
    fixed,
  )
  return ended


def over_lanes(one: Callable[[Any], Any], rows: PyTree, lanes: int) -> PyTree:
  """`one` for every lane; a single lane is spared the vmap."""
  if lanes > 1:
    return jax.vmap(one)(rows)
  row = jax.tree.map(lambda x: x[0], rows)
  return jax.tree.map(lambda x: x[None], one(row))


def put_wave(grid: PyTree, outputs: PyTree, w: Array) -> PyTree:
  """Return the grid, leaves (waves, lanes, ...), with wave `w` replaced."""
  put = functools.partial(lax.dynamic_update_index_in_dim, index=w, axis=0)
  return jax.tree.map(put, grid, outputs)


def over_waves(
  one: Callable[[Any], PyTree],
  grid: PyTree,
  num_waves: Array,
  fold: Callable[[PyTree, PyTree, Array], PyTree],
  acc: PyTree,
  fixed: FixedLoop | None = None,
) -> PyTree:
  """Run `one` on every client of the grid, and fold wave after wave.

  Args:
    one: row -> outputs, for one client.
    grid: leaves (waves, lanes, ...).
    num_waves: shape=(), int32; waves in use.
    fold: (acc, outputs with a lane axis, wave) -> acc.
    acc: the first accumulator.
    fixed: the loop over the waves, for reverse mode; None: as long as there
      are waves in use.
  """
  lanes = jax.tree.leaves(grid)[0].shape[1]

  def wave(w: Array, acc: PyTree, inputs: PyTree) -> PyTree:
    del inputs
    take = functools.partial(lax.dynamic_index_in_dim, index=w, keepdims=False)
    rows = jax.tree.map(take, grid)
    return fold(acc, over_lanes(one, rows, lanes), w)

  return repeat(num_waves, wave, acc, fixed=fixed)
