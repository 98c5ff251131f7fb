"""Devices: the mesh axis `clients`, and where arrays live on it."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fedjax_sim import cores, validate
from fedjax_sim.base import PyTree

AXIS = "clients"
MOST_PACKED = 2**17  # numbers of an array that is summed together with others


def setup(cpu_devices: int | None = None) -> None:
  """Prepares JAX for a run; must come before its first use.

  On the CPU: one device for every core, and synchronous dispatch (with
  asynchronous dispatch all-reduces over CPU devices were seen to hang). The
  command line calls this; in a script it is yours to call, or to leave.

  Args:
    cpu_devices: how many CPU devices; None: what FEDJAX_SIM_CPU_DEVICES says,
      or one for every core that this process may use.

  Raises:
    ValueError: FEDJAX_SIM_CPU_DEVICES is no whole number >= 1.
  """
  if cpu_devices is None:
    cpu_devices = cores.cpu_devices()
  jax.config.update("jax_num_cpu_devices", cpu_devices)
  jax.config.update("jax_cpu_enable_async_dispatch", False)


def devices() -> list[jax.Device]:
  """The devices that JAX finds.

  Raises:
    ValueError: none of the kind that JAX_PLATFORMS asks for.
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


def make_mesh(num_devices: int | None = None) -> Mesh:
  """A mesh over the first `num_devices` devices; None: all.

  Raises:
    ValueError: more devices than there are.
  """
  found = devices()
  if num_devices is not None and jax.process_count() > 1:
    raise ValueError(
      f"runtime.devices={num_devices}: several processes use all of their"
      " devices; set it to None."
    )
  if num_devices is None:
    num_devices = len(found)
  validate.whole("runtime.devices", num_devices, most=len(found))
  return jax.make_mesh(
    (num_devices,),
    (AXIS,),
    axis_types=(AxisType.Auto,),
    devices=found[:num_devices],
  )


def packed_psum(tree: PyTree) -> PyTree:
  """`psum` over the devices, small arrays of one dtype as one array.

  Inside `shard_map`. On the CPU devices meet anew for every array, which takes
  longer than to add a small one.
  """
  leaves, structure = jax.tree.flatten(tree)
  packs: dict[object, list[int]] = {}
  for i, leaf in enumerate(leaves):
    small = leaf.size <= MOST_PACKED
    packs.setdefault(leaf.dtype if small else i, []).append(i)
  for members in packs.values():
    parts = [leaves[i] for i in members]
    if len(parts) == 1:
      leaves[members[0]] = lax.psum(parts[0], AXIS)
      continue
    total = lax.psum(jnp.concatenate([x.ravel() for x in parts]), AXIS)
    ends = list(itertools.accumulate(x.size for x in parts))
    for i, part in zip(members, jnp.split(total, ends[:-1]), strict=True):
      leaves[i] = part.reshape(leaves[i].shape)
  summed: PyTree = jax.tree.unflatten(structure, leaves)
  return summed


def shardings(mesh: Mesh, specs: PyTree) -> PyTree:
  """Where arrays with these specs live; a tree, or a prefix of one."""
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
  """function(leaf, sharding) for every leaf; `specs` may be a prefix."""
  return jax.tree.map(
    lambda sharding, part: jax.tree.map(lambda x: function(x, sharding), part),
    shardings(mesh, specs),
    tree,
    is_leaf=lambda x: isinstance(x, NamedSharding),
  )


def put(tree: PyTree, mesh: Mesh, specs: PyTree) -> PyTree:
  """The tree's arrays on the devices; `specs` may be a prefix of the tree.

  With several processes all of them have to give the same.
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
  """Arrays of which every process has the part of its own devices."""
  sharding = NamedSharding(mesh, spec)
  place = functools.partial(jax.make_array_from_process_local_data, sharding)
  return jax.tree.map(place, tree)


def own_devices(mesh: Mesh) -> list[int]:
  """Which devices of the mesh, by their places in it, this process has."""
  here = jax.process_index()
  return [i for i, d in enumerate(mesh.devices.flat) if d.process_index == here]


def fetch(tree: PyTree) -> PyTree:
  """The whole of every array as numpy, on every process that calls it."""
  from jax.experimental import multihost_utils

  def whole(x: Any) -> Any:
    if x.is_fully_addressable or x.is_fully_replicated:
      return x
    return multihost_utils.process_allgather(x, tiled=True)

  return jax.device_get(jax.tree.map(whole, tree))


def abstract(tree: PyTree, mesh: Mesh, specs: PyTree) -> PyTree:
  """Shapes, dtypes and shardings of what `put` would give."""
  return _with_shardings(
    lambda x, sharding: jax.ShapeDtypeStruct(
      x.shape, jax.dtypes.canonicalize_dtype(x.dtype), sharding=sharding
    ),
    tree,
    mesh,
    specs,
  )
