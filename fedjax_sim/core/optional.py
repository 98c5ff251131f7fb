"""Libraries that only some features need, each an extra of the package."""

from __future__ import annotations

import importlib
import importlib.util
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


def require(package: str, extra: str, feature: str) -> None:
  """Check that an optional package is installed, without importing it.

  Args:
    package: the name by which it is imported.
    extra: of `fedjax_sim`, which installs it.
    feature: what needs it, for the message.

  Raises:
    ModuleNotFoundError: it is not installed.

  Example:
    require("mlflow", "mlflow", "The tracker mlflow")
  """
  if importlib.util.find_spec(package) is None:
    raise ModuleNotFoundError(
      f"{feature} needs {package}, which is not installed:"
      f" pip install 'fedjax_sim[{extra}]'.",
      name=package,
    )
