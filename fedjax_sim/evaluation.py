"""Evaluation: of the global model on a central set, and client by client.

Both are one program: every client of the set walks over its examples once, in
the waves and lanes of a cohort, and its metrics are summed. A central set is
cut into blocks that play the clients' part. With `Algorithm.personal` each
client is evaluated with the parameters that it would use itself.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from fedjax_sim import cohort as cohorts
from fedjax_sim import distributed
from fedjax_sim.base import (
  Algorithm,
  Array,
  Examples,
  Metric,
  PyTree,
  Task,
  Variables,
  sum_metrics,
)
from fedjax_sim.cohort import Cohort
from fedjax_sim.data import FederatedData, Prepare, as_stored
from fedjax_sim.round import RunState
from fedjax_sim.walk import (
  COHORT_SPEC,
  Walk,
  over_waves,
  put_wave,
  read_batch,
)

PERCENTILES = (10, 50, 90)


class ClientMetrics(NamedTuple):
  """Metrics of every client of a set.

  Attributes:
    total: name -> shape=(num_clients,), float64; summed over its examples.
    weight: name -> shape=(num_clients,), float64.
  """

  total: dict[str, np.ndarray]
  weight: dict[str, np.ndarray]

  def per_client(self) -> dict[str, np.ndarray]:
    """Each client's mean; NaN for a client without examples."""
    means = {}
    for name, total in self.total.items():
      weight = self.weight[name]
      some = weight > 0
      means[name] = np.where(some, total / np.where(some, weight, 1), np.nan)
    return means

  def overall(self) -> dict[str, float]:
    """The mean over all examples; NaN if none has weight."""
    means = {}
    for name, total in self.total.items():
      weight = self.weight[name].sum()
      means[name] = float(total.sum() / weight) if weight > 0 else math.nan
    return means

  def summary(self, prefix: str) -> dict[str, float]:
    """Overall means, and mean and percentiles over clients.

    Args:
      prefix: e.g. "seen" gives `seen/accuracy` (over examples),
        `seen/accuracy/mean` (over clients), `seen/accuracy/p10`, ...
    """
    row = {}
    overall = self.overall()
    for name, values in self.per_client().items():
      row[f"{prefix}/{name}"] = overall[name]
      values = values[self.weight[name] > 0]
      if not len(values):
        values = np.array([np.nan])
      row[f"{prefix}/{name}/mean"] = float(values.mean())
      for q in PERCENTILES:
        row[f"{prefix}/{name}/p{q}"] = float(np.percentile(values, q))
    return row


def told(metric: str, prefix: str) -> list[str]:
  """The names under which `ClientMetrics.summary` tells a metric."""
  one = {metric: np.ones(1)}
  return list(ClientMetrics(one, one).summary(prefix))


def as_blocks(examples: Mapping[str, np.ndarray], size: int) -> FederatedData:
  """A central set as federated data: blocks of `size` examples."""
  count = len(next(iter(examples.values())))
  offsets = np.append(np.arange(0, count, size), count)
  return FederatedData(examples=examples, offsets=offsets)


def make_evaluate(
  task: Task,
  algorithm: Algorithm,
  *,
  batch_size: int,
  mesh: Mesh,
  prepare: Prepare,
) -> Callable[[PyTree, PyTree, Examples, Cohort], dict[str, Metric]]:
  """The function that evaluates every client of a cohort.

  Returns:
    (server state, client states, examples, cohort) -> name -> `Metric`,
    shape=(devices, waves, lanes). `examples` are field -> (devices, examples,
    ...), each device's own; `client states` has a row for every client
    of the plan, leaves (devices, waves, lanes, ...); None evaluates the
    global model.
  """
  walk = Walk("eval", batch_size, prepare)

  def device(
    server: PyTree, states: PyTree, examples: Examples, cohort: Cohort
  ) -> dict[str, Metric]:
    mine = jax.tree.map(lambda x: x[0], cohort._replace(order=()))
    states, examples = jax.tree.map(lambda x: x[0], (states, examples))
    message = algorithm.broadcast(server)
    order = jnp.asarray(cohort.order[0])

    def one(row: tuple[Array, Array, PyTree]) -> dict[str, Metric]:
      start, num_steps, state = row
      if states is None or algorithm.personal is None:
        variables = algorithm.variables(server)
      else:
        variables = algorithm.personal(message, state)
      return _client_metrics(
        task, variables, examples, order, start, num_steps, walk
      )

    grid = (mine.start[..., 0], mine.num_steps[..., 0], states)
    shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0, 0], grid))
    zeros = jax.tree.map(
      lambda x: jnp.zeros((*mine.client.shape, *x.shape), x.dtype), shapes
    )
    out = over_waves(
      one,
      grid,
      mine.num_waves,
      put_wave,
      zeros,
    )
    return jax.tree.map(lambda x: x[None], out)

  split, whole = P(distributed.AXIS), P()
  return jax.shard_map(
    device,
    mesh=mesh,
    in_specs=(whole, split, split, COHORT_SPEC),
    out_specs=split,
    axis_names={distributed.AXIS},
    check_vma=False,
  )


def _client_metrics(
  task: Task,
  variables: Variables,
  examples: Examples,
  order: Array,
  start: Array,
  num_steps: Array,
  walk: Walk,
) -> dict[str, Metric]:
  """One client's metrics, summed over its batches."""

  def batch_sums(i: Array) -> dict[str, Metric]:
    batch = read_batch(examples, order, start + i * walk.batch_size, walk)
    return sum_metrics(task, variables, batch)

  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype),
    jax.eval_shape(batch_sums, jnp.zeros((), jnp.int32)),
  )
  add = lambda i, acc: jax.tree.map(jnp.add, acc, batch_sums(i))
  return jax.lax.fori_loop(0, num_steps, add, zeros)


class EvaluationSet:
  """A set of clients on the devices, with its plan and compiled program.

  The plan is the same at every evaluation, so it is made and sent once.

  Args:
    task: what is evaluated.
    algorithm: whose server state and client states are evaluated.
    data: the set; clients may lack examples.
    mesh: the devices.
    lanes: clients that a device evaluates at once.
    batch_size: examples of a client that go through the model at once.
    personal: the set's clients are the run's clients, in the same order, so
      each may be evaluated with its own state.
    prepare: see `FederatedDataset`.

  Raises:
    ValueError: no client has an example.
  """

  def __init__(
    self,
    task: Task,
    algorithm: Algorithm,
    data: FederatedData,
    *,
    mesh: Mesh,
    lanes: int,
    batch_size: int,
    personal: bool = False,
    prepare: Prepare = as_stored,
  ):
    if not data.num_examples:
      raise ValueError(
        f"None of the {data.num_clients} clients to be evaluated has an"
        " example; leave the set out, or raise data.heldout_fraction."
      )
    self.num_clients = data.num_clients
    self._personal = personal and algorithm.personal is not None
    work = cohorts.LocalWork(batch_size=batch_size, shuffle=False)
    work = work.fitted(data.sizes)
    ids = np.flatnonzero(data.sizes > 0)
    shape = cohorts.capacity(
      [data.sizes],
      [work],
      len(ids),
      lanes=lanes,
      devices=distributed.size(mesh),
    )
    planned, (slices,) = cohorts.plan_rounds(
      [data.offsets],
      [work],
      [ids],
      shape,
      seed=0,
      first=0,
      rounds=1,
      sliced=True,
    )
    plan = cohorts.at_round(planned, 0)
    fill = functools.partial(
      cohorts.fill,
      slices,
      rounds=1,
      devices=distributed.own_devices(mesh),
      length=int(slices.place.max()) + 1,  # the plan is the only one
    )
    examples = {field: fill(x)[0] for field, x in data.examples.items()}
    self._ids = plan.client
    self._plan = distributed.put(plan, mesh, COHORT_SPEC)
    self._examples = distributed.put_own(examples, mesh, P(distributed.AXIS))
    evaluate = make_evaluate(
      task,
      algorithm,
      batch_size=work.batch_size,
      mesh=mesh,
      prepare=prepare,
    )

    def program(
      server: PyTree, table: PyTree, examples: Examples, plan: Cohort
    ) -> dict[str, Metric]:
      rows = jnp.maximum(plan.client, 0)
      own = table[0] if self._personal else None
      states = jax.tree.map(lambda x: x[rows], own)
      return evaluate(server, states, examples, plan)

    whole = distributed.shardings(mesh, P())
    self._program = jax.jit(program, out_shardings=whole)

  def __call__(self, state: RunState) -> ClientMetrics:
    """Metrics of every client of the set."""
    table = state.clients if self._personal else ()
    out = self._program(state.server, table, self._examples, self._plan)
    out = jax.device_get(out)
    real = self._ids >= 0
    place = functools.partial(self._place, self._ids[real], real)
    return ClientMetrics(
      total={k: place(m.total) for k, m in out.items()},
      weight={k: place(m.weight) for k, m in out.items()},
    )

  def _place(
    self, ids: np.ndarray, real: np.ndarray, values: np.ndarray
  ) -> np.ndarray:
    result = np.zeros(self.num_clients)
    result[ids] = values[real]
    return result
