"""Configs: default fields, command-line flags, and checks of fields."""

from fedjax_sim.config.defaults import default_config
from fedjax_sim.config.fields import differences, fields_of, resolved

__all__ = [
  "default_config",
  "differences",
  "fields_of",
  "resolved",
]
