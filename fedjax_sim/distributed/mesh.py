"""Devices: the mesh axes `clients` and `model`, and where arrays live on them.

Clients are dealt over `clients`. Along `model`, which only a run with
`runtime.model_devices` has, arrays of the model's shapes are cut in pieces, and
XLA's partitioner adds what a computation on pieces has to send.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fedjax_sim.core import PyTree, validate
from fedjax_sim.distributed import cpu

AXIS = "clients"
MODEL = "model"


# Of mallopt. Left alone, the second grows to 32 MiB as arrays are freed, and
# arrays below it leave gaps: 12 MB a round of 10,000 clients were measured.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGE = 2**20  # bytes


def setup(cpu_devices: int | None = None) -> None:
  """Prepare JAX for a run; must come before its first use.

  On the CPU: one device for every core, and synchronous dispatch (with
  asynchronous dispatch all-reduces over CPU devices were seen to hang). With
  glibc, large arrays that are freed go back to the system, or the memory of
  round after round piles up. The command line calls this; in a script it is
  yours to call, or to leave.

  Args:
    cpu_devices: how many CPU devices; None: what FEDJAX_SIM_CPU_DEVICES says,
      or one for every core that this process may use.

  Raises:
    ValueError: FEDJAX_SIM_CPU_DEVICES is no whole number >= 1.
    RuntimeError: JAX has made its devices already.
  """
  if cpu_devices is None:
    cpu_devices = cpu.cpu_devices()
  try:
    jax.config.update("jax_num_cpu_devices", cpu_devices)
  except RuntimeError as error:
    raise RuntimeError(
      f"setup() is to make {cpu_devices} CPU devices, and comes too late: JAX"
      f" made {jax.local_device_count('cpu')} at its first operation. Call it"
      " before anything is computed, right after the imports; in a notebook,"
      " restart the kernel and put fedjax_sim.setup() into the first cell. Or"
      " leave it out, and JAX stays as it is."
    ) from error
  jax.config.update("jax_cpu_enable_async_dispatch", False)
  with contextlib.suppress(AttributeError, OSError, TypeError):  # no glibc
    allocator = ctypes.CDLL(None).mallopt
    allocator(_MMAP_THRESHOLD, _LARGE)
    allocator(_TRIM_THRESHOLD, _LARGE)


def devices() -> list[jax.Device]:
  """Return the devices that JAX finds.

  Raises:
    ValueError: JAX finds none of the kind that JAX_PLATFORMS asks for.
  """
  try:
    return jax.devices()
  except (RuntimeError, AssertionError) as error:
    platforms = os.environ.get("JAX_PLATFORMS", "")
    why = " ".join(str(error).split()) or "no reason given"
    raise ValueError(
      f"JAX_PLATFORMS={platforms!r}: JAX finds no such device ({why}); unset"
      " it, or install what it needs."
    ) from error


def make_mesh(
  num_devices: int | None = None, model_devices: int | None = None
) -> Mesh:
  """Make a mesh over the first `num_devices` devices.

  Args:
    num_devices: how many; None: all, which several processes must use.
    model_devices: how many of them share a model; None or 1: each has all of
      it, and there is no axis `model`.

  Raises:
    ValueError: more devices than there are, or no multiple of `model_devices`.
  """
  found = devices()
  if num_devices is not None and jax.process_count() > 1:
    raise ValueError(
      f"runtime.devices={num_devices}: several processes use all of their"
      " devices; set it to None."
    )
  if num_devices is None:
    num_devices = len(found)
  validate.integer("runtime.devices", num_devices, le=len(found))
  shape: tuple[int, ...] = (num_devices,)
  axes: tuple[str, ...] = (AXIS,)
  if model_devices is not None and model_devices > 1:
    if num_devices % model_devices:
      raise ValueError(
        f"runtime.model_devices={model_devices}: {num_devices} devices cannot"
        " be cut into groups of so many; give a divisor."
      )
    shape, axes = (num_devices // model_devices, model_devices), (AXIS, MODEL)
  return jax.make_mesh(
    shape,
    axes,
    axis_types=(AxisType.Auto,) * len(axes),
    devices=found[:num_devices],
  )


def is_inside() -> bool:
  """Return whether this is traced in a function that one device runs alone.

  As in `over_devices`, or in the program of a study, of which each device runs
  rounds of its own.
  """
  return AXIS in jax.sharding.get_abstract_mesh().manual_axes


def over_devices(
  function: Callable[..., Any], mesh: Mesh, in_specs: PyTree, out_specs: PyTree
) -> Callable[..., Any]:
  """Return the function, run by every device on its part of the arguments.

  Where a device runs rounds of its own already (`is_inside`), its part is all
  there is, and the function is called as it is.

  Args:
    function: of arrays; `lax.psum` and the like over `AXIS` reach the others.
    mesh: the devices.
    in_specs: how arguments are cut, a tuple of prefixes.
    out_specs: how results are put together, a prefix.
  """

  def call(*arguments: Any) -> Any:
    if is_inside():
      return function(*arguments)
    return jax.shard_map(
      function,
      mesh=mesh,
      in_specs=in_specs,
      out_specs=out_specs,
      axis_names={AXIS},  # XLA partitions along the axis `model` by itself
      check_vma=False,
    )(*arguments)

  return call


def replicated(x: jax.Array, mesh: Mesh) -> jax.Array:
  """Return an array of a compiled program, whole on every device."""
  if is_inside():
    return x
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P()))


def size(mesh: Mesh) -> int:
  """Return how many devices, or groups of them, clients are dealt to."""
  return int(mesh.shape[AXIS])


def in_pieces(tree: PyTree, mesh: Mesh, *leading: str) -> PyTree:
  """Return specs that cut the longest axis of each of the model's arrays.

  Args:
    tree: arrays, or their shapes.
    mesh: the devices; without an axis `model` nothing is cut, nor is an axis
      whose length is no multiple of the size of `model`.
    *leading: mesh axes of the arrays' first axes.
  """
  pieces = mesh.shape.get(MODEL, 1)

  def spec(x: Any) -> P:
    sizes = x.shape[len(leading) :]
    fit = [i for i, n in enumerate(sizes) if n and n % pieces == 0]
    if pieces == 1 or not fit:
      return P(*leading)
    longest = max(fit, key=lambda i: sizes[i])
    return P(*leading, *[None] * longest, MODEL)

  return jax.tree.map(spec, tree)


def shardings(mesh: Mesh, specs: PyTree) -> PyTree:
  """Return the shardings of specs, a tree or a prefix of one."""
  return jax.tree.map(
    lambda spec: NamedSharding(mesh, spec),
    specs,
    is_leaf=lambda x: isinstance(x, P),
  )


def _with_shardings(
  function: Callable[[Any, NamedSharding], Any],
  tree: PyTree,
  mesh: Mesh,
  specs: PyTree,
) -> PyTree:
  """Return function(leaf, sharding) per leaf; `specs` may be a prefix."""
  return jax.tree.map(
    lambda sharding, part: jax.tree.map(lambda x: function(x, sharding), part),
    shardings(mesh, specs),
    tree,
    is_leaf=lambda x: isinstance(x, NamedSharding),
  )


def shard_nbytes(tree: PyTree, mesh: Mesh, specs: PyTree) -> int:
  """Return the bytes that one device has of these arrays."""
  size = lambda x, sharding: (
    math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize
  )
  return sum(jax.tree.leaves(_with_shardings(size, tree, mesh, specs)))


def put(tree: PyTree, mesh: Mesh, specs: PyTree) -> PyTree:
  """Put the tree's arrays on the devices; `specs` may be a prefix of the tree.

  With several processes all of them have to give the same arrays.
  """
  if not mesh.is_multi_process:
    # No alias: who changes an array on the host changes nothing here.
    return jax.device_put(tree, shardings(mesh, specs), may_alias=False)

  def place(x: Any, sharding: NamedSharding) -> jax.Array:
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
      return jax.device_put(x, sharding)
    x = np.asarray(x)
    x = x.astype(jax.dtypes.canonicalize_dtype(x.dtype))
    return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])

  return _with_shardings(place, tree, mesh, specs)


def put_own(tree: PyTree, mesh: Mesh, spec: P) -> PyTree:
  """Make arrays of which each process gives the part of its own devices."""
  sharding = NamedSharding(mesh, spec)
  place = functools.partial(jax.make_array_from_process_local_data, sharding)
  return jax.tree.map(place, tree)


def own_devices(mesh: Mesh) -> list[int]:
  """Return the positions on the axis `clients` with devices of this process."""
  here = jax.process_index()
  groups = mesh.devices.reshape(size(mesh), -1)
  return [
    i
    for i, group in enumerate(groups)
    if any(d.process_index == here for d in group)
  ]


def fetch(tree: PyTree) -> PyTree:
  """Return every array whole, as numpy, on every process that calls it."""
  from jax.experimental import multihost_utils

  def whole(x: Any) -> Any:
    if x.is_fully_addressable or x.is_fully_replicated:
      return x
    return multihost_utils.process_allgather(x, tiled=True)

  return jax.device_get(jax.tree.map(whole, tree))


def abstract(tree: PyTree, mesh: Mesh, specs: PyTree) -> PyTree:
  """Return the shapes, dtypes and shardings of what `put` would return."""
  return _with_shardings(
    lambda x, sharding: jax.ShapeDtypeStruct(
      x.shape, jax.dtypes.canonicalize_dtype(x.dtype), sharding=sharding
    ),
    tree,
    mesh,
    specs,
  )
