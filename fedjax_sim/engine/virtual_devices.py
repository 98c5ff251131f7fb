"""Virtual devices: the same bits on any number of real ones.

Floats that are summed in another order give other last bits, and the order
follows the devices. With `runtime.deterministic_reduction=V` clients are
assigned to V virtual devices, however many real ones there are. A real one does
the work of several in a row, one after the other, and every device adds the V
sums of its share of the coordinates in their order. What this takes is here,
and that is all of it:

- `split_devices`: the virtual devices of each real one, for plans;
- `own_parts`: those of this process, whose examples it sends;
- `over_parts`: a real device does the work of its virtual ones;
- `isolate_compilation`: that work is rounded alike wherever it runs;
- `sum_over_devices`: sums in a fixed order;
- `COMPILER_OPTIONS`: XLA rewrites no arithmetic;
- `check`: what does not go with it.

The promise is for parameters, not for evaluations, and was tested on CPU
devices only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from fedjax_sim import distributed
from fedjax_sim.core import Array, PyTree, validate
from fedjax_sim.engine.tracing import trace_once

T = TypeVar("T")

MOST_VIRTUAL = 1024  # additions in the compiled round

# XLA's simplifier turns some divisions into products with a reciprocal, other
# ones for one device than for several.
COMPILER_OPTIONS = {"xla_disable_hlo_passes": "algsimp"}


class DeviceSplit(NamedTuple):
  """How many devices a plan has, and how many of them a real one stands for.

  Attributes:
    devices: number of devices that get clients: those of the mesh, or virtual
      ones.
    idle: number of padding devices, which receive no clients, so that every
      real device stands for the same number.
    each: number of them, in a row, that a device of the mesh stands for.
  """

  devices: int
  idle: int
  each: int


def split_devices(devices: int, virtual: int | None) -> DeviceSplit:
  """Return the devices that clients are assigned to.

  Args:
    devices: number of devices of the mesh.
    virtual: number of virtual devices; None for those of the mesh themselves.
  """
  if virtual is None:
    return DeviceSplit(devices, 0, 1)
  each = -(-virtual // devices)
  return DeviceSplit(virtual, each * devices - virtual, each)


def own_parts(mesh: Mesh, each: int) -> list[int]:
  """Return the indices of the devices that this process holds.

  The first virtual devices are on the first real one, and so on.

  Args:
    mesh: the real devices.
    each: as in `DeviceSplit`.
  """
  return [
    i
    for device in distributed.own_devices(mesh)
    for i in range(each * device, each * (device + 1))
  ]


def over_parts(function: Callable[[Array | int], T], parts: int) -> T:
  """Call a function for every virtual device of a real one.

  Args:
    function: index of the virtual device -> arrays.
    parts: number of them; 1 without virtual devices, which spares the loop.

  Returns:
    Results with a leading axis of `parts`.
  """
  result: T
  if parts == 1:
    result = jax.tree.map(lambda x: x[None], function(0))
  else:
    result = lax.map(function, jnp.arange(parts))
  return result


def isolate_compilation(
  virtual: int | None, round_: Array, function: Callable[[], T]
) -> T:
  """Call a function; with virtual devices, compile it by itself.

  Without isolation XLA fuses it with its neighbors, and rounding then depends
  on them. XLA does not fuse across a conditional whose predicate it cannot
  know, such as that the number of a round is not negative; optimization
  barriers are removed before fusion.

  Args:
    virtual: number of virtual devices; None without any.
    round_: shape=(), int32; number of the round.
    function: returns arrays.
  """
  if virtual is None:
    return function()
  function = trace_once(function)
  shapes = jax.eval_shape(function)
  nothing = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  result: T = lax.cond(round_ >= 0, function, nothing)
  return result


def sum_over_devices(tree: PyTree, virtual: int | None) -> PyTree:
  """Sum over all devices; with virtual devices, in their order.

  Inside `shard_map`.

  Args:
    tree: leaves (virtual devices of this device, ...), or (1, ...).
    virtual: number of virtual devices; None without any.

  Returns:
    The sums, leaves (...).
  """
  if virtual is None:
    return distributed.packed_psum(jax.tree.map(lambda x: x[0], tree))
  return distributed.ordered_sum(tree, virtual)


def check(
  virtual: int | None, lanes: int | str, model_devices: int | None
) -> None:
  """Refuse what gives other bits on other machines.

  Args:
    virtual: number of virtual devices; None without any.
    lanes: number of clients that a device trains at once, or "auto".
    model_devices: number of devices that share a model; None for none.

  Raises:
    TypeError, ValueError: names the field.
  """
  if virtual is None:
    return
  validate.integer("runtime.deterministic_reduction", virtual, le=MOST_VIRTUAL)
  if lanes == "auto":
    raise ValueError(
      "runtime.lanes='auto' is measured anew on every machine, and other"
      " lanes give other bits; with runtime.deterministic_reduction give a"
      " number."
    )
  if model_devices is not None:
    raise ValueError(
      "runtime.model_devices does not go with"
      " runtime.deterministic_reduction: sums over a model's pieces have no"
      " fixed order. Unset one of them."
    )
