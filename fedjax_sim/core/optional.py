"""Packages that only one feature needs."""

from __future__ import annotations

import importlib.util


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
