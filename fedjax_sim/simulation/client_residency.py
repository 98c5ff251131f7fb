"""Where client states are: a table on the devices, or rows on the disk."""

from __future__ import annotations

from jax.sharding import Mesh

from fedjax_sim import distributed
from fedjax_sim.engine import residency as residencies

NAMES = ("auto", "device", "disk")
_FIELD = "runtime.state_residency"
_SMALL = 2**26  # bytes of a table that is no question


def residency(
  asked: str, row_bytes: int, num_clients: int, mesh: Mesh
) -> tuple[str, str]:
  """Return where client states are, "device" or "disk", and why.

  Args:
    asked: of `NAMES`. "auto": "device" if the table takes a fifth of the
      devices' memory at most, or if the disk does not go.
    row_bytes: of what one client keeps.
    num_clients: how many there are.
    mesh: the devices.

  Raises:
    ValueError: "disk" where several processes or devices share a state.
  """
  total = row_bytes * num_clients
  if not total:
    return "device", "clients keep nothing"
  obstacle = ""
  if mesh.is_multi_process:
    obstacle = "several processes share the table"
  elif distributed.MODEL in mesh.axis_names:
    obstacle = "runtime.model_devices shares every client's row"
  if asked == "disk" and obstacle:
    raise ValueError(
      f"{_FIELD}='disk': {obstacle}, and a file of rows is one process's, with"
      " devices that have whole ones; give 'device', or leave the other out."
    )
  if asked != "auto":
    return asked, "as given"
  size = f"{total / 1e9:.3g} GB of rows"
  if total <= _SMALL or obstacle:
    return "device", obstacle or size
  room = residencies.device_room(mesh) * distributed.size(mesh)
  if total <= room:
    return "device", f"{size}, room for {room / 1e9:.3g} GB"
  return "disk", f"{size}, too many for memory"
