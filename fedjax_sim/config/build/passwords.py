"""No config holds a password: a workdir and its report keep the config."""

from __future__ import annotations

from ml_collections import ConfigDict

from fedjax_sim.config.fields import fields_of
from fedjax_sim.core import urls

_OF_TRACKERS = (
  ": MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or"
  " MLFLOW_TRACKING_TOKEN; a database's URI as MLFLOW_TRACKING_URI; for W&B"
  " WANDB_API_KEY"
)


def check_no_password(config: ConfigDict) -> None:
  """Refuse URLs with a user, a password or a token in any field.

  Args:
    config: all sections, or some.

  Raises:
    ValueError: names the field, and where the password belongs.
  """
  for field, value in fields_of(config):
    name, shown = urls.without_secrets((field, value))
    if (name, shown) != (field, value):
      names = _OF_TRACKERS if field.startswith("trackers.") else ""
      raise ValueError(
        f"{name}={shown!r} holds a user or a password, which would be written"
        f" to the workdir; leave it out, and set it in the environment{names}."
      )
