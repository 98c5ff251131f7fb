"""The bare loop: plain SGD over the engine's batches, and nothing else.

One model is trained on through, with no client, weight, mask, key or metric:
what a compiled loop over these batches costs at least. Layers, the layout of
their kernels and the compiler's options are those of the engine.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fedjax_sim import distributed
from fedjax_sim.core import PyTree, Task, Variables
from fedjax_sim.data import Prepare, as_stored
from fedjax_sim.engine.layouts import by_columns, by_rows
from fedjax_sim.engine.plan import CohortPlan
from fedjax_sim.engine.program import compiler_options
from fedjax_sim.engine.small_programs import is_small
from fedjax_sim.simulation.costs import cost


def rows_of(plans: list[CohortPlan], batch_size: int) -> np.ndarray:
  """Return the rows that the plans' clients train on, batch by batch, int32."""
  parts = []
  for plan in plans:
    used = plan.order[0][: int(plan.num_steps.sum()) * batch_size]
    parts.append(np.where(used < 0, ~used, used))
  return np.concatenate(parts)


class Bare:
  """A compiled loop of SGD steps on one device.

  Args:
    task: what is trained.
    examples: field -> (examples, ...); put on the device.
    batch_size: rows of a step.
    learning_rate: of the steps.
    capacity: rows of a call, at most.
    prepare: as in `FederatedDataset`.
    seed: of the model.
  """

  def __init__(
    self,
    task: Task,
    examples: Mapping[str, np.ndarray],
    *,
    batch_size: int,
    learning_rate: float,
    capacity: int,
    prepare: Prepare = as_stored,
    seed: int = 0,
  ):
    self._task, self._prepare = task, prepare
    self._rate, self.batch_size = learning_rate, batch_size
    self._capacity = capacity
    self._device = jax.devices()[0]
    self._examples = jax.device_put(dict(examples), self._device)
    variables = jax.jit(task.init)(jax.random.key(seed))
    self.params, *self._kept = jax.device_put(variables, self._device)

  def _step(
    self, params: PyTree, kept: Any, examples: PyTree, rows: jax.Array
  ) -> PyTree:
    take = lambda x: x.at[rows].get(mode="promise_in_bounds")
    batch = self._prepare(jax.tree.map(take, examples))

    def loss(params: PyTree) -> jax.Array:
      variables = Variables(params, *kept)
      return jnp.mean(
        self._task.loss(variables, batch, jax.random.key(0)).value
      )

    gradient = jax.grad(loss)(params)
    descend = lambda p, g: p - self._rate * g
    return jax.tree.map(descend, params, gradient)

  def _loop(
    self,
    params: PyTree,
    kept: Any,
    examples: PyTree,
    rows: jax.Array,
    steps: jax.Array,
  ) -> PyTree:
    size = self.batch_size

    def step(i: jax.Array, params: PyTree) -> PyTree:
      entries = lax.dynamic_slice(rows, (i * size,), (size,))
      return by_columns(self._step(by_rows(params), kept, examples, entries))

    return by_rows(lax.fori_loop(0, steps, step, by_columns(params)))

  @functools.cached_property
  def _train(self) -> Any:
    given = self.params, self._kept, self._examples
    rows = jax.ShapeDtypeStruct((self._capacity,), jnp.int32)
    steps = jax.ShapeDtypeStruct((), jnp.int32)
    traced = jax.jit(self._loop, donate_argnums=0).trace(*given, rows, steps)
    small = is_small(traced.jaxpr, clients=1)
    mesh = distributed.make_mesh(1)
    options = compiler_options(mesh, deterministic=False, small=small)
    return traced.lower().compile(compiler_options=options)

  def put(self, rows: np.ndarray) -> tuple[jax.Array, np.int32]:
    """Return what `train` takes: the rows on the device, and the steps.

    Args:
      rows: whole batches, shape=(steps * batch_size,).
    """
    padded = np.zeros(self._capacity, np.int32)
    padded[: len(rows)] = rows
    steps = np.int32(len(rows) // self.batch_size)
    return jax.device_put(padded, self._device), steps

  def train(self, rows: jax.Array, steps: np.int32) -> None:
    """Train on the rows, and wait until it is done."""
    trained = self._train(self.params, self._kept, self._examples, rows, steps)
    self.params = jax.block_until_ready(trained)

  @functools.cached_property
  def flops(self) -> float:
    """Floating-point operations of one step, by XLA's count."""
    rows = jnp.zeros(self.batch_size, jnp.int32)
    return cost(self._step, self.params, self._kept, self._examples, rows).flops
