"""From a config to the trackers of a run."""

from __future__ import annotations

from typing import NamedTuple

from ml_collections import ConfigDict

from fedjax_sim.config import components
from fedjax_sim.config.build.passwords import check_no_password
from fedjax_sim.core import validate
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
  check_no_password(ConfigDict({"trackers": {label: section}}))
  select = Selection(section.metrics, section.primary_metric)
  return ConfiguredTracker(
    label,
    components.make(config, slot),
    select.check(slot.section),
    validate.number(f"{slot.section}.wait", section.wait, gt=0),
  )
