"""How a run would go on other devices: time, network and memory of a round.

A model, not a measurement. What a local step costs is XLA's count for the
compiled step; how many of them the busiest device takes follows from the
clients' sizes, laid out in waves and dealt to devices as a real cohort is. So
nothing is needed of the devices but how many they are, what they compute a
second, and how fast they are connected. docs/scaling.md has the arithmetic.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sim import aggregators, distributed, lanes, sampling
from fedjax_sim import cohort as cohorts
from fedjax_sim import residency as residencies
from fedjax_sim.base import (
  Array,
  Batch,
  Client,
  HParams,
  Key,
  Purpose,
  PyTree,
  key_for,
)
from fedjax_sim.dispatch import Planned
from fedjax_sim.finite import all_finite
from fedjax_sim.round import RunState
from fedjax_sim.simulator import MOST_ROUNDS, Simulator
from fedjax_sim.traffic import nbytes

SHARE = 0.05  # of a round, below which communication has vanished
DRAWN = 20_000  # clients that a prediction averages over, about
MOST_LAYOUTS = 16
MANY_WAVES = 100  # on a device: then rounds grow in proportion to the cohort
MEASURED_CALLS = 3
MEASURED_SECONDS = 0.5  # of a call
_INT32 = 4  # bytes


class Speed(NamedTuple):
  """How fast a device is.

  Attributes:
    flops: FLOP/s that it sustains in local steps.
    memory: bytes a second that it reads and writes of its memory in what a
      client does beside its steps.
    fixed: seconds of a round that trains nobody.
  """

  flops: float
  memory: float = math.inf
  fixed: float = 0.0


class Hardware(NamedTuple):
  """What a run would have.

  Attributes:
    devices: how many, all alike.
    link: bytes a second that a device sends to the others, and gets.
    host: bytes a second that a device gets from its host.
    speed: of a device.
  """

  devices: int
  link: float
  host: float
  speed: Speed


class Cost(NamedTuple):
  """What XLA says of a compiled function.

  Attributes:
    flops: floating-point operations of a call.
    accessed_bytes: that it reads and writes.
    temporary_bytes: memory beside arguments and results.
  """

  flops: float
  accessed_bytes: float
  temporary_bytes: int


class Costs(NamedTuple):
  """What clients cost, whatever the cohort and the devices.

  Attributes:
    step_flops: of one local step of each pass, shape=(passes,), float64.
    client_bytes: that a client reads and writes beside its steps: for its copy
      of the parameters, its update, the transforms, the weighted sum.
    lane_bytes: what a client that trains keeps: its carries, its gradients and
      all else that lives during a step.
    state_bytes: what every device has of the run's state.
    row_bytes: what one client keeps from round to round.
    summed_bytes: what the devices sum, in float32 at least.
    update_bytes: one client's update, if a stacked aggregator keeps all of
      them; else 0.
    by_coordinate: as in `Aggregator`.
  """

  step_flops: np.ndarray
  client_bytes: float
  lane_bytes: int
  state_bytes: int
  row_bytes: int
  summed_bytes: int
  update_bytes: int
  by_coordinate: bool


class Layout(NamedTuple):
  """What each device does in a round.

  Attributes:
    steps: lane steps of each pass, those of lanes that wait included,
      shape=(devices, passes), int64.
    lanes: lanes that begin, with a client or empty, shape=(devices,), int64.
  """

  steps: np.ndarray
  lanes: np.ndarray

  def seconds(self, costs: Costs, speed: Speed) -> np.ndarray:
    """Of each device, shape=(devices,), float64."""
    stepping = self.steps @ costs.step_flops / speed.flops
    return stepping + self.lanes * costs.client_bytes / speed.memory


class Prediction(NamedTuple):
  """A round with so many clients.

  Attributes:
    clients: in the cohort.
    entries: batch rows of the largest such cohort; a plan has int32 for them.
    compute_seconds: of the busiest device.
    waiting: share of the lane steps that wait for the longest of their wave.
    idle: share of the time that devices wait for the busiest, on average.
    network_bytes: what a device sends to the others.
    network_seconds: what that takes.
    host_bytes: what a device gets from its host: the plan, and the examples
      where they are there.
    host_seconds: what that takes.
    memory: part -> bytes on a device.
  """

  clients: int
  entries: int
  compute_seconds: float
  waiting: float
  idle: float
  network_bytes: float
  network_seconds: float
  host_bytes: float
  host_seconds: float
  memory: dict[str, float]

  @property
  def communication(self) -> float:
    """Its share of the round's time."""
    seconds = self.network_seconds + self.host_seconds
    return seconds / (self.compute_seconds + seconds)


# --- the model ----------------------------------------------------------------


def exchanged(size: float, devices: int, parts: int = 1) -> float:
  """Bytes that a device sends so that all have the sum.

  Every device keeps a share of the coordinates: it gets their parts from all
  others, and sends their sum to all. A ring does as much.

  Args:
    size: bytes of what is summed.
    devices: how many.
    parts: summands of a device, sent one by one; 1: it adds its own up first;
      0: there is nothing to add, the shares are collected.
  """
  return (parts + 1) * (devices - 1) / devices * size


def vanishing_cohort(
  fixed: float, compute: float, communication: float, share: float = SHARE
) -> float:
  """The cohort from which on communication is at most a share of the round.

  Args:
    fixed: seconds of communication of a round, whatever the cohort.
    compute: seconds of computation that each client adds.
    communication: seconds of it that each client adds.
    share: > 0, < 1.

  Returns:
    The clients; infinity if what each client adds is too much already.
  """
  left = share / (1 - share) * compute - communication
  return fixed / left if left > 0 else math.inf


def layout(
  steps: np.ndarray, capacity: cohorts.Capacity, virtual: int = 1
) -> Layout:
  """What `cohort.plan_rounds` would give the devices, without the batches.

  Args:
    steps: of every client of a cohort, shape=(clients, passes), int.
    capacity: of the cohort.
    virtual: how many of the capacity's devices, in a row, are one.
  """
  width = capacity.lanes
  ranked = steps[np.argsort(-steps.sum(-1), kind="stable")]
  empty = np.zeros((-len(ranked) % width, steps.shape[1]), steps.dtype)
  waves = np.concatenate([ranked, empty]).reshape(-1, width, steps.shape[1])
  longest = waves.max(1)
  total = waves[:, 0].sum(-1)
  dealt = cohorts.deal(total, capacity.devices, capacity.waves)
  device = dealt[:, 0] // virtual
  count = (capacity.devices + capacity.idle) // virtual
  of_device = np.zeros((count, steps.shape[1]), np.int64)
  np.add.at(of_device, device, width * longest)
  return Layout(of_device, width * np.bincount(device, minlength=count))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Model:
  """Predicts rounds of a run on other devices.

  The population is taken several times over where a cohort is larger.

  Attributes:
    simulator: the run; its own devices do not matter.
    costs: from `costs_of`.
    hardware: what the run would have.
    lanes: clients that a device trains at once.
  """

  simulator: Simulator
  costs: Costs
  hardware: Hardware
  lanes: int

  @property
  def _dealt(self) -> tuple[int, int, int]:
    """Devices of a plan, those of them that idle, and how many are one."""
    devices = self.hardware.devices
    dealt = self.simulator.runtime.deterministic_reduction or devices
    idle = -dealt % devices
    return dealt, idle, (dealt + idle) // devices

  def predict(self, clients: int) -> Prediction:
    """A round with so many clients, drawn uniformly.

    Args:
      clients: >= 1.
    """
    simulator, costs, hardware = self.simulator, self.costs, self.hardware
    dealt, idle, virtual = self._dealt
    copies = -(-clients // simulator.num_clients)
    sizes = [np.tile(data.sizes, copies) for data in simulator.splits]
    works = simulator.works
    capacity = cohorts.capacity(
      sizes, works, clients, lanes=self.lanes, devices=dealt, idle=idle
    )
    steps = np.stack(
      [work.num_steps(s) for work, s in zip(works, sizes, strict=True)], -1
    )
    sample = sampling.uniform(len(steps), clients).sample
    busiest = mean = lane_steps = own_steps = 0.0
    count = min(MOST_LAYOUTS, -(-DRAWN // clients))
    for round_ in range(count):
      drawn = steps[sample(simulator.seed, round_)]
      one = layout(drawn, capacity, virtual)
      seconds = one.seconds(costs, hardware.speed)
      busiest += seconds.max() / count
      mean += seconds.mean() / count
      lane_steps += float((one.steps @ costs.step_flops).sum())
      own_steps += float((drawn @ costs.step_flops).sum())

    slots = virtual * capacity.waves * capacity.lanes
    network = self._exchanged(len(steps), slots, virtual)
    plan = _INT32 * (sum(capacity.order) + slots * (3 + 2 * len(works)))
    sliced, examples = self._examples(capacity, copies, virtual)
    sent = plan + (examples if sliced else 0)
    return Prediction(
      clients=clients,
      entries=max(capacity.order),
      compute_seconds=hardware.speed.fixed + busiest,
      waiting=1 - own_steps / lane_steps if lane_steps else 0.0,
      idle=1 - mean / busiest if busiest else 0.0,
      network_bytes=network,
      network_seconds=network / hardware.link,
      host_bytes=sent,
      host_seconds=sent / hardware.host,
      memory={
        "examples": examples,
        "state": costs.state_bytes
        + costs.row_bytes * -(-len(steps) // hardware.devices),
        "lanes": costs.lane_bytes * capacity.lanes,
        # A stack is there twice, when it goes from clients to coordinates.
        "sums": costs.summed_bytes * virtual + 2 * costs.update_bytes * slots,
        "plan": plan,
        # Of the whole cohort, as XLA gathers them on each device.
        "kept": costs.row_bytes * slots * hardware.devices,
      },
    )

  def _exchanged(self, population: int, slots: int, virtual: int) -> float:
    """What a device sends to the others in a round, in bytes.

    Args:
      population: clients that may take part.
      slots: lanes of a device in a round, at most.
      virtual: how many virtual devices it stands for.
    """
    costs, devices = self.costs, self.hardware.devices
    total = exchanged(costs.summed_bytes, devices, virtual)
    if costs.by_coordinate:
      total += exchanged(costs.update_bytes, devices, slots)
    else:  # all of the stack, to all
      total += (devices - 1) * slots * costs.update_bytes
    # XLA sums the cohort's rows up, to which all but one device add zeros, or
    # collects the whole table, if that is less; the new rows are collected.
    rows = slots * devices * costs.row_bytes
    read = min(
      exchanged(rows, devices),
      exchanged(population * costs.row_bytes, devices, 0),
    )
    return total + read + exchanged(rows, devices, 0)

  def _examples(
    self, capacity: cohorts.Capacity, copies: int, virtual: int
  ) -> tuple[bool, int]:
    """Whether examples are sent every round, and a device's bytes of them."""
    simulator, devices = self.simulator, self.hardware.devices
    name = simulator.runtime.residency
    if name == "auto" and devices > jax.local_device_count():
      name = "host"  # there will be several processes
    residency = residencies.residency(
      name,
      simulator.algorithm.passes,
      simulator.splits,
      simulator.mesh,
      virtual * distributed.size(simulator.mesh),
    )
    if residency.sliced:
      return True, residency.bytes_per_round(capacity)
    return False, nbytes(residency.shapes(capacity, 1)) * copies

  def vanishing_cohort(self) -> float:
    """The cohort from which on communication is at most `SHARE` of a round.

    By rounds so large that all but the sums grows in proportion to the cohort.
    """
    dealt, _, virtual = self._dealt
    population = self.simulator.num_clients
    enough = MANY_WAVES * dealt * self.lanes
    large = self.predict(population * -(-enough // population))
    summed, devices = self.costs.summed_bytes, self.hardware.devices
    fixed = exchanged(summed, devices, virtual) / self.hardware.link
    return vanishing_cohort(
      fixed,
      (large.compute_seconds - self.hardware.speed.fixed) / large.clients,
      (large.network_seconds + large.host_seconds - fixed) / large.clients,
    )


# --- what its numbers come from -----------------------------------------------


def cost(function: Callable[..., Any], *arguments: Any) -> Cost:
  """Compiles a function for these arguments, or their shapes.

  XLA counts a loop's body once; matrix products in scans are counted as often
  as the scan runs, other loops are not.
  """
  traced = jax.jit(function).trace(*arguments)
  compiled = traced.lower().compile()
  counted = compiled.cost_analysis() or {}
  memory: Any = compiled.memory_analysis()
  return Cost(
    flops=float(counted.get("flops", 0.0)) + _repeats(traced.jaxpr.jaxpr),
    accessed_bytes=float(counted.get("bytes accessed", 0.0)),
    temporary_bytes=int(memory.temp_size_in_bytes) if memory else 0,
  )


def _repeats(jaxpr: Any, times: int = 1) -> float:
  """Operations of products in scans, without each body's first pass."""
  total = 0.0
  for equation in jaxpr.eqns:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
      (contracted, _), _ = params["dimension_numbers"]
      left, out = equation.invars[0].aval, equation.outvars[0].aval
      length = math.prod(left.shape[i] for i in contracted)
      total += 2.0 * length * math.prod(out.shape) * (times - 1)
    passes = params["length"] if name == "scan" else 1
    for value in params.values():
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        total += _repeats(inner, times * passes)
  return total


def costs_of(simulator: Simulator) -> Costs:
  """What the clients of this run cost; compiles their parts, runs nothing.

  Raises:
    ValueError: the run's devices share models.
  """
  if simulator.runtime.model_devices is not None:
    raise ValueError(
      "runtime.model_devices: what devices send that share a model is not"
      " predicted; unset it, by --config.runtime.model_devices=None."
    )
  aggregator, prepare = simulator.aggregator, simulator.data.prepare
  begin = functools.partial(_begin, simulator)
  end = functools.partial(_end, simulator)
  state = simulator.state_shapes
  number = jax.dtypes.canonicalize_dtype(np.float64)
  hparams = jax.tree.map(
    lambda _: jax.ShapeDtypeStruct((), number), simulator.hparams
  )
  client, kept, carries = jax.eval_shape(begin, state, hparams)
  ending = client, kept, carries, state.shared
  update, others, _ = jax.eval_shape(end, *ending)
  zeros = aggregators.zeros_accumulator
  summed = jax.eval_shape(zeros, (() if aggregator.stacked else update, others))

  steps = []
  for walked, carry, data, work in zip(
    simulator.algorithm.passes,
    carries,
    simulator.splits,
    simulator.works,
    strict=True,
  ):

    def step(
      client: Client,
      carry: PyTree,
      batch: Batch,
      key: Key,
      walked: Any = walked,
    ) -> PyTree:
      batch = batch._replace(examples=prepare(batch.examples))
      return walked.step(client, carry, batch, key)

    shape: Any = lambda x, size=work.batch_size: jax.ShapeDtypeStruct(
      (size, *x.shape[1:]), jax.dtypes.canonicalize_dtype(x.dtype)
    )
    fields = {field: shape(x) for field, x in data.examples.items()}
    batch = Batch(fields, shape(np.zeros(1, bool)))
    steps.append(cost(step, client, carry, batch, client.key))

  # An accumulator is read and written, what is added to it only read.
  added = 3 * nbytes(jax.eval_shape(zeros, (update, others)))
  own = cost(lambda *a: begin(*a)[2], state, hparams), cost(end, *ending)
  # Where a step is a single loop over the new carry, it needs nothing else.
  beside = max(
    max(step.temporary_bytes, nbytes(carry))
    for step, carry in zip(steps, carries, strict=True)
  )
  return Costs(
    step_flops=np.array([step.flops for step in steps]),
    client_bytes=added + sum(one.accessed_bytes for one in own),
    lane_bytes=nbytes(carries) + beside,
    state_bytes=nbytes(state._replace(clients=())),
    row_bytes=nbytes((client.state, kept)),
    summed_bytes=nbytes(summed),
    update_bytes=nbytes(update) if aggregator.stacked else 0,
    by_coordinate=aggregator.by_coordinate,
  )


def _begin(
  simulator: Simulator, state: RunState, hparams: HParams
) -> tuple[Client, PyTree, tuple[PyTree, ...]]:
  """A client, its transforms' states, and its carries, before any step."""
  algorithm = simulator.algorithm
  zero = jnp.zeros((), jnp.int32)
  own, kept = jax.tree.map(lambda x: x[0], state.clients)
  client = Client(
    message=algorithm.download(algorithm.broadcast(state.server), zero),
    state=own,
    hparams=hparams,
    id=zero,
    version=zero,
    num_examples=zero,
    num_steps=jnp.zeros((len(algorithm.passes),), jnp.int32),
    round=zero,
    key=key_for(state.seed, Purpose.CLIENT),
  )
  carries: tuple[PyTree, ...] = ()
  for walked in algorithm.passes:
    carries += (walked.start(client, *carries),)
  return client, kept, carries


def _end(
  simulator: Simulator,
  client: Client,
  kept: PyTree,
  carries: tuple[PyTree, ...],
  shared: PyTree,
) -> tuple[PyTree, PyTree, Array]:
  """Its update; what else is summed; whether all is finite."""
  report = simulator.algorithm.finish(client, *carries)
  update, aux = report.update, []
  for transform, common, own in zip(
    simulator.transforms, shared, kept, strict=True
  ):
    hparams = client.hparams["transforms"][transform.name]
    update, _, seen = transform.apply(update, common, own, hparams, client.key)
    aux.append(seen)
  others = report.buffers, report.statistics, aux, report.metrics
  finite = all_finite((report._replace(metrics={}), update))
  return update, (others, jnp.float32(report.weight)), finite


def measure(simulator: Simulator, costs: Costs) -> tuple[Speed, int]:
  """Runs rounds on one of this machine's devices.

  The same rounds are run as they are, with clients that take no step, and
  without clients; each as fast as in the fastest of a few calls.

  Returns:
    How fast the device is, by the model's counts; and its lanes.

  Raises:
    DivergedError: a round has no finite result.
  """
  alone = dataclasses.replace(
    simulator,
    runtime=dataclasses.replace(
      simulator.runtime,
      devices=1,
      deterministic_reduction=None,
      rounds_per_dispatch=None,
      most_rounds=MOST_ROUNDS,
    ),
  )
  state, done = alone.init(), 0

  def seconds(planned: Planned, plan: cohorts.Cohort) -> float:
    nonlocal state, done
    out = alone.dispatch(state, planned._replace(first=done, cohorts=plan))
    if out.failure is not None and plan is planned.cohorts:
      raise out.failure
    state, done = out.state, done + planned.num_rounds
    return out.seconds

  planned = alone.plan(0, 1)
  once = min(seconds(planned, planned.cohorts) for _ in range(2))
  most = max(1, min(MOST_ROUNDS, int(MEASURED_SECONDS / once)))
  planned = alone.plan(0, most)
  whole = planned.cohorts
  still = whole._replace(num_steps=np.zeros_like(whole.num_steps))
  kinds = whole, still, lanes.emptied(whole)
  turns = [
    [seconds(planned, plan) for plan in kinds] for _ in range(MEASURED_CALLS)
  ]
  all_, without_steps, without_clients = np.min(turns, axis=0)

  width = whole.client.shape[-1]
  steps = width * whole.num_steps.max(-2).sum((0, 1, 2))
  flops = float(steps @ costs.step_flops)
  accessed = width * int(whole.num_waves.sum()) * costs.client_bytes
  stepping, rest = all_ - without_steps, without_steps - without_clients
  speed = Speed(
    flops=flops / float(stepping if stepping > 0 else all_),
    memory=accessed / float(rest) if rest > 0 else math.inf,
    fixed=float(without_clients) / planned.num_rounds,
  )
  return speed, alone.lane_choice.lanes
