"""From a config to the trackers of a run."""

from __future__ import annotations

from typing import NamedTuple

from ml_collections import ConfigDict

from fedjax_sim.config import components
from fedjax_sim.core import urls, validate
from fedjax_sim.reporting.trackers import Selection, Tracker


class ConfiguredTracker(NamedTuple):
  """A tracker with what its section of the config says.

  Attributes:
    label: the name of its section.
    tracker: the component.
    select: a row -> what the tracker gets of it.
    wait: seconds that the end of the run waits for it.
  """

  label: str
  tracker: Tracker
  select: Selection
  wait: float


def build_trackers(config: ConfigDict) -> list[ConfiguredTracker]:
  """Return the trackers, in the order of their labels; connect none of them.

  Args:
    config: complete.

  Raises:
    ImportError, TypeError, ValueError: see `build_tracker`.
  """
  return [build_tracker(config, label) for label in sorted(config.trackers)]


def build_tracker(config: ConfigDict, label: str) -> ConfiguredTracker:
  """Return the tracker of a section; do not connect it.

  Args:
    config: complete.
    label: the name of the section.

  Raises:
    ImportError: the tracker's package is not installed.
    TypeError, ValueError: what the message says, with the field.
  """
  slot = components.labeled_slot("trackers", label)
  section = config.trackers[label]
  _check_no_password(slot.section, section)
  select = Selection(section.metrics, section.primary_metric)
  return ConfiguredTracker(
    label,
    components.make(config, slot),
    select.check(slot.section),
    validate.number(f"{slot.section}.wait", section.wait, gt=0),
  )


def _check_no_password(name: str, section: ConfigDict) -> None:
  """Refuse a URL with a password: the workdir and its report keep the config.

  Raises:
    ValueError: names the field, and where the password belongs.
  """
  for key, value in section.items():
    if isinstance(value, str) and urls.redacted(value) != value:
      raise ValueError(
        f"{name}.{key}={urls.redacted(value)!r} holds a user or a password,"
        " which would be written to the workdir; leave it out, and set it in"
        " the environment: MLFLOW_TRACKING_USERNAME and"
        " MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN; a database's URI"
        " as MLFLOW_TRACKING_URI; for W&B WANDB_API_KEY."
      )
