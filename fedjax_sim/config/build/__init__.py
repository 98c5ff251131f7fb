"""Builders: each section of a config becomes the component it describes."""

from fedjax_sim.config.build.algorithm import build_algorithm
from fedjax_sim.config.build.data import AUGMENTATION, build_data, preprocessing
from fedjax_sim.config.build.experiment import INITIAL, Experiment, build
from fedjax_sim.config.build.passwords import check_no_password
from fedjax_sim.config.build.server import (
  SCHEDULED,
  build_aggregator,
  build_schedules,
)
from fedjax_sim.config.build.task import COMPUTE_DTYPES, build_task
from fedjax_sim.config.build.timetable import Timetable
from fedjax_sim.config.build.trackers import (
  ConfiguredTracker,
  build_tracker,
  build_trackers,
)

__all__ = [
  "AUGMENTATION",
  "COMPUTE_DTYPES",
  "INITIAL",
  "SCHEDULED",
  "ConfiguredTracker",
  "Experiment",
  "Timetable",
  "build",
  "build_aggregator",
  "build_algorithm",
  "build_data",
  "build_schedules",
  "build_task",
  "build_tracker",
  "build_trackers",
  "check_no_password",
  "preprocessing",
]
