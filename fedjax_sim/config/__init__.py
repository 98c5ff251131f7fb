"""Configs: components and their fields, complete configs, and flags."""

from typing import TYPE_CHECKING, Any

from fedjax_sim.config.defaults import default_config
from fedjax_sim.config.fields import differences, fields_of, resolved

if TYPE_CHECKING:
  from fedjax_sim.config.completion import complete

__all__ = [
  "complete",
  "default_config",
  "differences",
  "fields_of",
  "resolved",
]


def __getattr__(name: str) -> Any:
  """Import `complete` on first access, since its components import JAX."""
  if name != "complete":
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  from fedjax_sim.config import completion

  return completion.complete
