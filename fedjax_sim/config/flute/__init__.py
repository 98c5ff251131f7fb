"""FLUTE's YAML files, translated into configs of ours.

`keys/` is the table of every key that FLUTE reads; `tasks.py` says which model
and data its experiments have here. Nothing in this package needs JAX.
"""

from fedjax_sim.config.flute.importing import importing
from fedjax_sim.config.flute.reading import read
from fedjax_sim.config.flute.rules import COMPATS, MEANT, is_store
from fedjax_sim.config.flute.source import config_file, is_config_file, table
from fedjax_sim.config.flute.tasks import TASKS
from fedjax_sim.config.flute.translation import (
  Translation,
  translate,
  without_data,
)

__all__ = [
  "COMPATS",
  "MEANT",
  "TASKS",
  "Translation",
  "config_file",
  "importing",
  "is_config_file",
  "is_store",
  "read",
  "table",
  "translate",
  "without_data",
]
