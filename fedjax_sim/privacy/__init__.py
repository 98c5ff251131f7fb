"""Differential privacy: mechanisms, accounting, audits, leakage.

Mechanisms are pure functions of the compiled round; accountants work on the
host. What needs `dp-accounting` or `jax-privacy` imports them when it is used,
since they are an extra and take a second.
"""

from __future__ import annotations

import importlib
from typing import Any


def library(name: str) -> Any:
  """Import a module of the extra `privacy`, such as `dp_accounting.rdp`.

  Raises:
    ImportError: it is not installed; says how to install it.
  """
  try:
    return importlib.import_module(name)
  except ImportError as error:
    raise ImportError(
      f"privacy needs {name.partition('.')[0]}, which cannot be imported"
      f" ({error}); pip install 'fedjax_sim[privacy]'."
    ) from error
