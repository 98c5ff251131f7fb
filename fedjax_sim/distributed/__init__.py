"""Devices, hosts and processes: mesh, reductions, agreement, supervision."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from fedjax_sim.distributed.mesh import (
    AXIS,
    MODEL,
    abstract,
    devices,
    fetch,
    in_pieces,
    is_inside,
    make_mesh,
    over_devices,
    own_devices,
    put,
    put_own,
    replicated,
    setup,
    shard_nbytes,
    shardings,
    size,
  )
  from fedjax_sim.distributed.reductions import (
    MOST_PACKED,
    ordered_sum,
    over_coordinates,
    packed_psum,
  )

__all__ = [
  "AXIS",
  "MODEL",
  "MOST_PACKED",
  "abstract",
  "devices",
  "fetch",
  "in_pieces",
  "is_inside",
  "make_mesh",
  "ordered_sum",
  "over_coordinates",
  "over_devices",
  "own_devices",
  "packed_psum",
  "put",
  "put_own",
  "replicated",
  "setup",
  "shard_nbytes",
  "shardings",
  "size",
]

_HOME = {
  "AXIS": "fedjax_sim.distributed.mesh",
  "MODEL": "fedjax_sim.distributed.mesh",
  "MOST_PACKED": "fedjax_sim.distributed.reductions",
  "abstract": "fedjax_sim.distributed.mesh",
  "devices": "fedjax_sim.distributed.mesh",
  "fetch": "fedjax_sim.distributed.mesh",
  "in_pieces": "fedjax_sim.distributed.mesh",
  "is_inside": "fedjax_sim.distributed.mesh",
  "make_mesh": "fedjax_sim.distributed.mesh",
  "ordered_sum": "fedjax_sim.distributed.reductions",
  "over_coordinates": "fedjax_sim.distributed.reductions",
  "over_devices": "fedjax_sim.distributed.mesh",
  "own_devices": "fedjax_sim.distributed.mesh",
  "packed_psum": "fedjax_sim.distributed.reductions",
  "put": "fedjax_sim.distributed.mesh",
  "put_own": "fedjax_sim.distributed.mesh",
  "replicated": "fedjax_sim.distributed.mesh",
  "setup": "fedjax_sim.distributed.mesh",
  "shard_nbytes": "fedjax_sim.distributed.mesh",
  "shardings": "fedjax_sim.distributed.mesh",
  "size": "fedjax_sim.distributed.mesh",
}


def __getattr__(name: str) -> Any:
  """Import a name when it is first used, as some modules need no JAX."""
  if name not in _HOME:
    raise AttributeError(
      f"module 'fedjax_sim.distributed' has no attribute {name!r}"
    )
  return getattr(importlib.import_module(_HOME[name]), name)
