"""How a run would go on other devices: time, network and memory of a round.

A model, not a measurement. What a local step costs is XLA's count for the
compiled step; how many of them the busiest device takes follows from the
clients' sizes, laid out in waves and dealt to devices as a real cohort is. So
nothing is needed of the devices but how many they are, what they compute a
second, and how fast they are connected. docs/scaling.md has the arithmetic.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import numpy as np

from fedjax_sim import sampling
from fedjax_sim.core.tree import nbytes
from fedjax_sim.engine import plan as plans
from fedjax_sim.engine import residency as residencies
from fedjax_sim.engine.virtual_devices import DeviceSplit, split_devices
from fedjax_sim.simulation.costs import Costs, Speed
from fedjax_sim.simulation.simulator import Simulator

SHARE = 0.05  # of a round, below which communication has vanished
DRAWN = 20_000  # clients that a prediction averages over, about
MOST_LAYOUTS = 16
MANY_WAVES = 100  # on a device: then rounds grow in proportion to the cohort
_INT32 = 4  # bytes


class Hardware(NamedTuple):
  """The hardware that a run would have.

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


class Layout(NamedTuple):
  """The work of each device in a round.

  Attributes:
    steps: lane steps of each pass, those of lanes that wait included,
      shape=(devices, passes), int64.
    lanes: lanes that begin, with a client or empty, shape=(devices,), int64.
  """

  steps: np.ndarray
  lanes: np.ndarray

  def seconds(self, costs: Costs, speed: Speed) -> np.ndarray:
    """Return the seconds of each device, shape=(devices,), float64."""
    stepping = self.steps @ costs.step_flops / speed.flops
    return stepping + self.lanes * costs.client_bytes / speed.memory


class Prediction(NamedTuple):
  """The prediction of a round with some number of clients.

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
    """The share of communication in the round's time."""
    seconds = self.network_seconds + self.host_seconds
    return seconds / (self.compute_seconds + seconds)


def exchanged(size: float, devices: int, parts: int = 1) -> float:
  """Return the bytes that a device sends so that all devices have the sum.

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
  """Return the cohort from which on communication takes at most a share.

  Args:
    fixed: seconds of communication of a round, whatever the cohort.
    compute: seconds of computation that each client adds.
    communication: seconds of it that each client adds.
    share: of the round's time, > 0, < 1.

  Returns:
    The clients; infinity if what each client adds is too much already.
  """
  left = share / (1 - share) * compute - communication
  return fixed / left if left > 0 else math.inf


def layout(
  steps: np.ndarray, capacity: plans.Capacity, each: int = 1
) -> Layout:
  """Lay out a cohort as `plan.plan_rounds` would, without the batches.

  Args:
    steps: of every client of a cohort, shape=(clients, passes), int.
    capacity: of the cohort.
    each: as in `virtual_devices.DeviceSplit`.
  """
  width = capacity.lanes
  ranked = steps[np.argsort(-steps.sum(-1), kind="stable")]
  empty = np.zeros((-len(ranked) % width, steps.shape[1]), steps.dtype)
  waves = np.concatenate([ranked, empty]).reshape(-1, width, steps.shape[1])
  longest = waves.max(1)
  total = waves[:, 0].sum(-1)
  dealt = plans.deal(total, capacity.devices, capacity.waves)
  device = dealt[:, 0] // each
  count = (capacity.devices + capacity.idle) // each
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
  def _split(self) -> DeviceSplit:
    virtual = self.simulator.runtime.deterministic_reduction
    return split_devices(self.hardware.devices, virtual)

  def predict(self, clients: int) -> Prediction:
    """Predict a round with this many clients, drawn uniformly.

    Args:
      clients: >= 1.
    """
    simulator, costs, hardware = self.simulator, self.costs, self.hardware
    dealt, idle, each = self._split
    copies = -(-clients // simulator.num_clients)
    sizes = [np.tile(data.sizes, copies) for data in simulator.splits]
    batchings = simulator.batchings
    capacity = plans.capacity(
      sizes, batchings, clients, lanes=self.lanes, devices=dealt, idle=idle
    )
    steps = np.stack(
      [
        batching.num_steps(s)
        for batching, s in zip(batchings, sizes, strict=True)
      ],
      -1,
    )
    sample = sampling.uniform(len(steps), clients).sample
    busiest = mean = lane_steps = own_steps = 0.0
    count = min(MOST_LAYOUTS, -(-DRAWN // clients))
    for round_ in range(count):
      drawn = steps[sample(simulator.seed, round_)]
      one = layout(drawn, capacity, each)
      seconds = one.seconds(costs, hardware.speed)
      busiest += seconds.max() / count
      mean += seconds.mean() / count
      lane_steps += float((one.steps @ costs.step_flops).sum())
      own_steps += float((drawn @ costs.step_flops).sum())

    slots = each * capacity.waves * capacity.lanes
    on_disk = simulator.states.rows is not None
    table = min(len(steps), clients) if on_disk else len(steps)
    rows = costs.row_bytes * -(-table // hardware.devices)
    network = self._exchanged(table, slots, each)
    plan = _INT32 * (sum(capacity.order) + slots * (3 + 2 * len(batchings)))
    sliced, examples = self._examples(capacity, copies, each)
    sent = plan + (examples if sliced else 0) + (rows if on_disk else 0)
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
        "state": costs.state_bytes + rows,
        "lanes": costs.lane_bytes * capacity.lanes,
        # A stack is there twice, when it goes from clients to coordinates.
        "sums": costs.summed_bytes * each + 2 * costs.update_bytes * slots,
        "plan": plan,
        # Of the whole cohort, as XLA gathers them on each device.
        "kept": costs.row_bytes * slots * hardware.devices
        + costs.logged_bytes * slots,
      },
    )

  def _exchanged(self, population: int, slots: int, each: int) -> float:
    """Return the bytes that a device sends to the others in a round.

    Args:
      population: clients of the table of client states.
      slots: lanes of a device in a round, at most.
      each: how many virtual devices it stands for.
    """
    costs, devices = self.costs, self.hardware.devices
    total = exchanged(costs.summed_bytes, devices, each)
    if costs.finishes_shares:
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
    self, capacity: plans.Capacity, copies: int, each: int
  ) -> tuple[bool, int]:
    """Return whether examples are sent every round, and a device's bytes."""
    simulator, devices = self.simulator, self.hardware.devices
    name = simulator.runtime.residency
    if name == "auto" and devices > jax.local_device_count():
      name = "host"  # there will be several processes
    residency = residencies.residency(
      name,
      simulator.algorithm.all_passes,
      simulator.splits,
      simulator.mesh,
      each,
    )
    if residency.sliced:
      return True, residency.bytes_per_round(capacity)
    return False, nbytes(residency.shapes(capacity, 1)) * copies

  def vanishing_cohort(self) -> float:
    """Return the cohort from which on communication takes at most `SHARE`.

    It is extrapolated from a round so large that everything but the sums grows
    in proportion to the cohort.
    """
    dealt, _, each = self._split
    population = self.simulator.num_clients
    enough = MANY_WAVES * dealt * self.lanes
    large = self.predict(population * -(-enough // population))
    summed, devices = self.costs.summed_bytes, self.hardware.devices
    fixed = exchanged(summed, devices, each) / self.hardware.link
    return vanishing_cohort(
      fixed,
      (large.compute_seconds - self.hardware.speed.fixed) / large.clients,
      (large.network_seconds + large.host_seconds - fixed) / large.clients,
    )
