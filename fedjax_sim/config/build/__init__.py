"""Builders: each section of a config becomes the component it describes."""

from fedjax_sim.config.build.experiment import (
  AUGMENTATION,
  COMPUTE_DTYPES,
  Experiment,
  Timetable,
  build,
  build_aggregator,
  build_algorithm,
  build_data,
  build_schedules,
  build_task,
  preprocessing,
)

__all__ = [
  "AUGMENTATION",
  "COMPUTE_DTYPES",
  "Experiment",
  "Timetable",
  "build",
  "build_aggregator",
  "build_algorithm",
  "build_data",
  "build_schedules",
  "build_task",
  "preprocessing",
]
