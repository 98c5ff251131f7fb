"""Where the training examples are, and how a round comes by them.

On the devices: every device holds all examples, and a round is sent indices.
On the host: a device is sent, with the plan of its rounds, the examples of the
clients that it trains. Then no device needs room for all of them, and of
several processes each sends its own devices what they need. On the disk: the
same, out of a store (`data/store/reader.py`), of which nothing stays in memory.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from fedjax_sim import distributed
from fedjax_sim.core import Pass, PyTree
from fedjax_sim.data import FederatedData, StoredData
from fedjax_sim.data.stored import take
from fedjax_sim.distributed import AXIS, memory, processes
from fedjax_sim.engine import plan, virtual_devices


class Residency(Protocol):
  """What training needs to know of where its examples are.

  Attributes:
    name: of `NAMES`, not "auto".
    why: the reason for it, in words.
    sliced: as in `make_rounds`.
    spec: how the data of a call lie on the devices.
    sources: for every pass, under which name the round finds its examples.
  """

  name: str
  why: str
  sliced: bool
  spec: P
  sources: list[str]

  def shapes(self, capacity: plan.Capacity, rounds: int) -> PyTree:
    """Return shapes and dtypes of the data of a call of `rounds` rounds."""

  def bytes_per_round(self, capacity: plan.Capacity) -> int:
    """Return the bytes of examples that a device is sent in a round."""

  def gather(
    self,
    slices: Sequence[plan.ExampleSlices],
    capacity: plan.Capacity,
    rounds: int,
  ) -> PyTree:
    """Return what is sent with a plan, as numpy arrays."""

  def put(self, gathered: PyTree) -> PyTree:
    """Return the data of a call."""


class _OnDevices:
  """All examples on every device."""

  name = "device"
  sliced = False
  spec = P()

  def __init__(
    self,
    passes: Sequence[Pass],
    splits: Sequence[FederatedData],
    mesh: Mesh,
    why: str,
  ):
    self.why = why
    self.sources = [p.split for p in passes]
    self._examples = _fields(self.sources, splits)
    self._mesh = mesh

  def shapes(self, capacity: plan.Capacity, rounds: int) -> PyTree:
    del capacity, rounds
    return self._examples

  def bytes_per_round(self, capacity: plan.Capacity) -> int:
    del capacity
    return 0

  def gather(
    self,
    slices: Sequence[plan.ExampleSlices],
    capacity: plan.Capacity,
    rounds: int,
  ) -> PyTree:
    del slices, capacity, rounds
    return ()

  def put(self, gathered: PyTree) -> PyTree:
    del gathered
    return self._placed

  @functools.cached_property
  def _placed(self) -> PyTree:
    return distributed.put(self._examples, self._mesh, self.spec)


class _Sliced:
  """Examples on the host or its disk; a call's data are what it needs."""

  sliced = True
  spec = P(None, AXIS)  # of (rounds, devices, examples, ...)

  def __init__(
    self,
    passes: Sequence[Pass],
    splits: Sequence[FederatedData],
    mesh: Mesh,
    each: int,
    name: str,
    why: str,
  ):
    self.name, self.why = name, why
    self._splits = splits
    # By pass: two of them that read the same split need other slices.
    self.sources = [f"{i}:{p.split}" for i, p in enumerate(passes)]
    self._examples = _fields(self.sources, splits)
    self._mesh = mesh
    self._each, self._devices = each, each * distributed.size(mesh)
    self._own = virtual_devices.own_parts(mesh, each)

  def shapes(self, capacity: plan.Capacity, rounds: int) -> PyTree:
    shape = lambda x, length: jax.ShapeDtypeStruct(
      (rounds, self._devices, length, *x.shape[1:]), x.dtype
    )
    return {
      source: {field: shape(x, length) for field, x in fields.items()}
      for (source, fields), length in zip(
        self._examples.items(), capacity.examples, strict=True
      )
    }

  def bytes_per_round(self, capacity: plan.Capacity) -> int:
    one = lambda x: math.prod(x.shape[1:]) * x.itemsize
    return self._each * sum(
      length * sum(one(x) for x in fields.values())
      for fields, length in zip(
        self._examples.values(), capacity.examples, strict=True
      )
    )

  def gather(
    self,
    slices: Sequence[plan.ExampleSlices],
    capacity: plan.Capacity,
    rounds: int,
  ) -> PyTree:
    gathered: dict[str, dict[str, Any]] = {}
    for (source, fields), part, length in zip(
      self._sources.items(), slices, capacity.examples, strict=True
    ):
      fill = functools.partial(
        plan.fill,
        part,
        rounds=rounds,
        devices=self._own,
        length=length,
        take=take,
      )
      gathered[source] = {field: fill(x) for field, x in fields.items()}
    return gathered

  @functools.cached_property
  def _sources(self) -> dict[str, dict[str, np.ndarray]]:
    """Return the source of examples; a store is read at the first call."""
    if self.name == "disk":
      return self._examples
    splits = [
      d.in_memory if isinstance(d, StoredData) else d for d in self._splits
    ]
    return _fields(self.sources, splits)

  def put(self, gathered: PyTree) -> PyTree:
    return distributed.put_own(gathered, self._mesh, self.spec)


NAMES = ("auto", "device", "host", "disk")
_SHARE = 0.25  # of memory, that "auto" lets examples take
_FROM_DISK = 2**28  # bytes of a set for evaluation


def residency(
  name: str,
  passes: Sequence[Pass],
  splits: Sequence[FederatedData],
  mesh: Mesh,
  each: int = 1,
) -> Residency:
  """Return the residency of a name.

  Args:
    name: of `NAMES`. "auto", of examples in memory: "device" where one process
      runs alone, else "host"; of a store: the fastest for which it is small.
    passes: the algorithm's.
    splits: for every pass, the data that it walks over.
    mesh: the devices.
    each: as in `virtual_devices.DeviceSplit`.

  Raises:
    ValueError: "device" with several processes, or "disk" without a store.
  """
  why = "as given"
  stored = all(isinstance(data, StoredData) for data in splits)
  if name == "device" and mesh.is_multi_process:
    raise ValueError(
      "runtime.residency='device' does not go with several processes, each of"
      " which sends its devices the examples of their clients; give 'host' or"
      " 'auto'."
    )
  if name == "disk" and not stored:
    raise ValueError(
      "runtime.residency='disk' reads a store, and these examples are in"
      " memory; write one with StoreWriter (docs/store.md) and set"
      " data.name='store', or give 'host'."
    )
  if name == "auto":
    name, why = _chosen(splits, mesh, stored)
  if name == "device":
    return _OnDevices(passes, splits, mesh, why)
  return _Sliced(passes, splits, mesh, each, name, why)


def check_on_disk(given: Mapping[str, Any]) -> None:
  """Refuse options of a store that copy its examples into memory.

  Args:
    given: option of `data` -> its value; None: not given.

  Raises:
    ValueError: one does; names it.
  """
  partition = "make a store of such clients, by fedjax-sim data partition"
  for option, without, remedy in (
    ("heldout_fraction", 0, f"{partition} --heldout-fraction=..."),
    ("unseen_clients", 0, f"{partition} --unseen-clients=..."),
    ("min_examples", 1, f"{partition} --min-examples=..."),
    ("server_clients", None, "leave it out"),
    ("random_label_clients", None, "leave it out"),
  ):
    if given[option] not in (None, without):
      raise ValueError(
        f"data.{option}={given[option]!r} copies a store's examples into"
        " memory, and runtime.residency='disk' is to leave them on the disk;"
        f" {remedy}, or give runtime.residency='host'."
      )


def _chosen(
  splits: Sequence[FederatedData], mesh: Mesh, stored: bool
) -> tuple[str, str]:
  """Return what "auto" chooses, and why."""
  several = mesh.is_multi_process
  if not stored:
    of_many = "several processes, each with its own devices"
    return ("host", of_many) if several else ("device", "one process")
  total = sum(x.nbytes for d in {*splits} for x in d.examples.values())
  free = {
    "device": lambda: device_room(mesh),
    "host": lambda: _agreed(memory.available_memory()),
  }
  for name in ("host",) if several else ("device", "host"):
    room = free[name]()
    if total <= room:
      why = f"{total / 1e9:.3g} GB of examples, room for {room / 1e9:.3g} GB"
      return name, why
  return "disk", f"{total / 1e9:.3g} GB of examples, too many for memory"


def device_room(mesh: Mesh) -> float:
  """Return the bytes of examples that may be on a device, in any process."""
  return _agreed(memory.memory_limit(mesh.local_devices[0]))


def evaluation_room(given: str, name: str, mesh: Mesh, sets: int) -> float:
  """Return the bytes that one of several sets may take on a device.

  Args:
    given: the residency that is asked for. "device" is for them, too.
    name: where the training examples are. If that is the disk, memory is short
      on the host, too, which gathers what it sends.
    mesh: the devices.
    sets: for evaluation.
  """
  if given == "device":
    return math.inf
  room = device_room(mesh) / sets
  return min(room, _FROM_DISK) if name == "disk" else room


def _agreed(free: int) -> float:
  (negative,) = processes.greatest(-float(free))
  return -_SHARE * negative


def _fields(
  sources: Sequence[str], splits: Sequence[FederatedData]
) -> dict[str, dict[str, np.ndarray]]:
  named = zip(sources, splits, strict=True)
  return {source: dict(data.examples) for source, data in named}
