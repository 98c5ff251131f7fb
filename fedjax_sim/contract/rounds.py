"""Rounds of the tiny federation: three compiled programs, and plans to change.

The plan of a round is an argument of the compiled program, so who takes part,
in which order and on which rows is changed without compiling anything.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr

from fedjax_sim.contract.compare import additions
from fedjax_sim.contract.setting import BATCHING, Setting
from fedjax_sim.core import HParams, PyTree, Sampler
from fedjax_sim.engine.plan import CohortPlan
from fedjax_sim.engine.round import make_rounds
from fedjax_sim.engine.state import RoundMetrics, RunState
from fedjax_sim.simulation.dispatch import PlannedRounds
from fedjax_sim.simulation.runtime import Runtime
from fedjax_sim.simulation.simulator import Simulator


class Result(NamedTuple):
  """What a round leaves, on the host.

  Attributes:
    state: after the round.
    metrics: of the round.
  """

  state: RunState
  metrics: RoundMetrics

  @property
  def compared(self) -> PyTree:
    """What has to be the same whatever the lanes, devices and order."""
    state = self.state
    return _Compared(
      state.server, state.clients, state.shared, dict(self.metrics.metrics)
    )


class _Compared(NamedTuple):
  """Names of what is compared, as a user knows them."""

  server: PyTree
  clients: PyTree
  shared: PyTree
  metrics: PyTree


class Rounds:
  """Compiled rounds with a part in them; each program is compiled once.

  Args:
    setting: the part and all that runs with it.
  """

  def __init__(self, setting: Setting):
    self.setting = setting
    self.ids = setting.cohort
    self._simulators: dict[tuple[int, int], Simulator] = {}

  def simulator(self, lanes: int = 1, devices: int = 1) -> Simulator:
    """Return the simulator with so many lanes and devices, always the same."""
    key = lanes, devices
    if key not in self._simulators:
      self._simulators[key] = self._made(lanes, devices)
    return self._simulators[key]

  def _made(self, lanes: int, devices: int) -> Simulator:
    s, ids = self.setting, self.ids
    return Simulator(
      task=s.task,
      algorithm=s.algorithm,
      data=s.data,
      sampler=Sampler(lambda seed, round_: ids, (len(ids),), float(len(ids))),
      batching=BATCHING,
      aggregator=s.aggregator,
      transforms=s.transforms,
      noise_seed=0,
      log_clients=s.kind == "algorithm" and lanes * devices == 1,
      runtime=Runtime(
        lanes=lanes,
        devices=devices,
        residency="device",
        rounds_per_dispatch=1,
        donate=False,
      ),
    )

  @functools.cached_property
  def terms(self) -> float:
    """How many rounding errors add up in a round, as `compare` counts them."""
    simulator = self.simulator()
    walked = zip(simulator.batchings, simulator.splits, strict=True)
    steps = sum(int(b.num_steps(data.sizes).max()) for b, data in walked)
    shape = self.setting.data.example_shape
    size = max(b.batch_size for b in simulator.batchings)
    return additions(len(self.ids), steps, size, shape)

  @functools.cached_property
  def first(self) -> RunState:
    """The state before the first round, on the host."""
    simulator = self.simulator()
    return simulator.states.to_host(simulator.init())

  @functools.cached_property
  def began(self) -> RunState:
    """The state after one round, on the host; most checks begin there."""
    return self.run(self.first).state

  @functools.cached_property
  def program(self) -> ClosedJaxpr:
    """The program of a round."""
    return self.traced_again()

  def traced_again(self) -> ClosedJaxpr:
    """Return the program of a round, for which its functions are called."""
    simulator = self.simulator()
    planned = simulator.plan(0, 1, 1)
    # A new function, as JAX remembers what it has traced.
    return jax.make_jaxpr(make_rounds(simulator.compiler.spec))(
      simulator.states.shapes._replace(sampler=()),
      simulator.states.traced(),
      planned.examples,
      planned.cohorts,
      np.int32(1),
      simulator.data.server,
    )

  def plan(
    self, lanes: int = 1, devices: int = 1, done: int = 1
  ) -> PlannedRounds:
    """Return the plan of the round after `done` rounds."""
    return self.simulator(lanes, devices).plan(done, 1, lanes)

  def run(
    self,
    state: RunState | None = None,
    planned: PlannedRounds | None = None,
    *,
    lanes: int = 1,
    devices: int = 1,
    hparams: HParams | None = None,
  ) -> Result:
    """Run a round.

    Args:
      state: before it, on the host; None: that after the first round.
      planned: its plan, of a simulator with these lanes and devices; None: of
        the whole cohort.
      lanes: clients that a device trains at once.
      devices: how many.
      hparams: other numbers; None for the defaults.
    """
    simulator = self.simulator(lanes, devices)
    state = self.began if state is None else state
    if planned is None:
      planned = self.plan(lanes, devices, int(state.round))
    placed = simulator.states.to_devices(state)
    numbers = simulator.states.traced(hparams)
    after, metrics = simulator.compiler.call(placed, planned, numbers)
    metrics = jax.tree.map(lambda x: x[0], jax.device_get(metrics))
    return Result(simulator.states.to_host(after), metrics)


def kept(planned: PlannedRounds, ids: Sequence[int]) -> PlannedRounds:
  """Return the plan in which the slots of all other clients are empty."""
  out = ~np.isin(planned.cohorts.client, ids)

  def change(plan: CohortPlan) -> CohortPlan:
    def empty(x: np.ndarray, value: int) -> np.ndarray:
      outside = out.reshape(out.shape + (1,) * (x.ndim - out.ndim))
      filled: np.ndarray = np.where(outside, value, x)
      return filled.astype(x.dtype)

    return plan._replace(
      client=empty(plan.client, -1),
      version=empty(plan.version, 0),
      byzantine=empty(plan.byzantine, 0),
      num_examples=empty(plan.num_examples, 0),
      start=empty(plan.start, 0),
      num_steps=empty(plan.num_steps, 0),
    )

  return _changed(planned, change)


def reordered(planned: PlannedRounds, order: Sequence[int]) -> PlannedRounds:
  """Return the plan, of one lane and device, with its waves in this order."""
  waves = np.arange(planned.cohorts.client.shape[2])
  waves[: len(order)] = order
  take = lambda x: x[:, :, waves]

  def change(plan: CohortPlan) -> CohortPlan:
    grids = {
      name: take(getattr(plan, name))
      for name in CohortPlan._fields
      if name not in ("num_waves", "order")
    }
    return plan._replace(**grids)

  return _changed(planned, change)


def with_other_padding(
  planned: PlannedRounds, rows: Sequence[np.ndarray]
) -> PlannedRounds:
  """Return the plan with other rows where a batch is only filled up.

  Args:
    planned: a plan.
    rows: for every pass, shape=(examples,); which row stands for each.
  """

  def change(plan: CohortPlan) -> CohortPlan:
    order = tuple(
      np.where(entries < 0, ~other[np.where(entries < 0, ~entries, 0)], entries)
      for entries, other in zip(plan.order, rows, strict=True)
    )
    return plan._replace(order=order)

  return _changed(planned, change)


def with_a_batch_of_padding(
  planned: PlannedRounds, ident: int, batch_sizes: Sequence[int]
) -> PlannedRounds | None:
  """Return the plan with one client, who goes on to a batch of padding alone.

  Args:
    planned: a plan; other clients' slots are emptied.
    ident: the client.
    batch_sizes: for every pass, examples of a batch.

  Returns:
    The plan; None: the orders have no room for one more batch.
  """
  alone = kept(planned, [ident])
  slot = tuple(int(i[0]) for i in np.nonzero(alone.cohorts.client == ident))
  start, steps = alone.cohorts.start.copy(), alone.cohorts.num_steps.copy()
  orders = []
  for p, size in enumerate(batch_sizes):
    entries = planned.cohorts.order[p].copy()
    begin, length = int(start[slot][p]), int(steps[slot][p]) * size
    own = entries[0, begin : begin + length].copy()
    if not length or length + size > entries.shape[1]:
      return None
    first = own[0] if own[0] >= 0 else ~own[0]
    entries[0, :length] = own
    entries[0, length : length + size] = ~first
    orders.append(entries)
    start[(*slot, p)] = 0
    steps[(*slot, p)] += 1
  return _changed(
    alone,
    lambda plan: plan._replace(
      start=start, num_steps=steps, order=tuple(orders)
    ),
  )


def with_examples(
  planned: PlannedRounds, change: Callable[[str, np.ndarray], np.ndarray]
) -> PlannedRounds:
  """Return the plan with other examples, of the same shapes.

  Args:
    planned: a plan.
    change: (source, examples of a field) -> the field's examples.
  """

  def put(path: Any, x: jax.Array) -> jax.Array:
    changed = change(path[0].key, np.asarray(x)).astype(x.dtype)
    return jax.device_put(changed, x.sharding)

  examples = jax.tree_util.tree_map_with_path(put, planned.examples)
  return planned._replace(examples=examples)


def _changed(
  planned: PlannedRounds, change: Callable[[CohortPlan], CohortPlan]
) -> PlannedRounds:
  return planned._replace(cohorts=change(planned.cohorts))
