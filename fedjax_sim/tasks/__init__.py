"""Tasks from nnx, linen or plain functions; losses, metrics, fast layers."""

from fedjax_sim.tasks.functions import function_task
from fedjax_sim.tasks.linen import linen_task
from fedjax_sim.tasks.nnx import Check, Inputs, nnx_task
from fedjax_sim.tasks.precision import with_compute_dtype, with_remat

__all__ = [
  "Check",
  "Inputs",
  "function_task",
  "linen_task",
  "nnx_task",
  "with_compute_dtype",
  "with_remat",
]
