"""Libraries that only some features need, each an extra of the package."""

from __future__ import annotations

import importlib
from typing import Any


def library(module: str, extra: str, needed_by: str = "This format") -> Any:
  """Return a library's module, imported when it is asked for.

  Args:
    module: its name, such as `pyarrow.parquet`.
    extra: the extra of the package that installs it.
    needed_by: what needs it, for the message.

  Raises:
    ModuleNotFoundError: it is not installed.
  """
  try:
    return importlib.import_module(module)
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
      f"{needed_by} needs {module.partition('.')[0]}, which is not installed:"
      f" pip install 'fedjax_sim[{extra}]'."
    ) from error
