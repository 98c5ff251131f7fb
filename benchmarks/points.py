"""A study of points that have names."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from ml_collections import ConfigDict

import fedjax_sim as fs
from fedjax_sim.studies.results import Study

Key = TypeVar("Key")


def studied(
  config: ConfigDict,
  folder: str | os.PathLike[str],
  points: Mapping[Key, Mapping[str, Any]],
  seeds: Sequence[int],
  metric: str,
) -> tuple[Study, dict[Key, list[str]]]:
  """Run a study of points; return it, and the names of each point's runs.

  Args:
    config: what all runs have in common.
    folder: of the study.
    points: name -> field -> value; a field that others set is None without one.
    seeds: of the runs.
    metric: by which settings are compared.

  Returns:
    The study, and name -> runs, one a seed.
  """
  unset = dict.fromkeys(field for point in points.values() for field in point)
  full = [{**unset, **point} for point in points.values()]
  study = fs.study(config, folder, points=full, seeds=seeds, metric=metric)
  names = iter([run["name"] for run in study.runs])
  return study, {key: [next(names) for _ in seeds] for key in points}
