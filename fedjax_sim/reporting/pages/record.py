"""Read what a run left in its workdir, finished or not.

Files are read once, no lock is taken, and nothing is written, so that it works
while the run goes on.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedjax_sim.core.errors import FedjaxSimError
from fedjax_sim.reporting.client_rounds import count_rounds
from fedjax_sim.reporting.metrics_file import read_metrics

_SUMMARY = (  # what a report needs of it
  *("rounds", "parameters", "params_digest", "wall_seconds", "phase_seconds"),
  *("clients_per_second", "examples_per_second", "padding_waste"),
  *("compilations", "lanes", "lanes_reason", "processes", "devices"),
  *("device_kind", "versions"),
)
_SETS = ("seen", "unseen")
_STUDY = "study.json"  # in the folder of a study


class NoRunError(FedjaxSimError, ValueError):
  """A folder holds no run, or a part of one, or damaged files."""


class ClientTable(NamedTuple):
  """The metrics of every client of a set, of `clients_*.csv`.

  Attributes:
    names: of the clients.
    sizes: shape=(clients,), integer; their examples.
    metrics: name -> shape=(clients,), float.
  """

  names: Sequence[str]
  sizes: np.ndarray
  metrics: Mapping[str, np.ndarray]


class Participation(NamedTuple):
  """How many rounds clients took part in, of `client_rounds.parquet`.

  Attributes:
    names: index -> name, of those that were asked.
    counts: index -> rounds in which its update was in the aggregate.
  """

  names: Mapping[int, str]
  counts: Mapping[int, int]


class RunOutcome(NamedTuple):
  """What the files say that every run has.

  Attributes:
    name: of the run: its folder's.
    config: as in `config.json`.
    rows: of `metrics.jsonl`.
    summary: of `summary.json`; None: the run is not finished.
  """

  name: str
  config: Mapping[str, Any]
  rows: Sequence[Mapping[str, float]]
  summary: Mapping[str, Any] | None


class RunRecord(NamedTuple):
  """What the files of a workdir say.

  Attributes:
    name: of the run: its folder's.
    config: as in `config.json`.
    rows: of `metrics.jsonl`.
    timings: of `timings.jsonl`.
    summary: of `summary.json`; None: the run is not finished.
    clients: set -> its clients' metrics; those that there are.
    profile: of `data_profile.json`; None: there is none.
    participation: None: clients were not logged.
    missing: why something is not here, one line each.
  """

  name: str
  config: Mapping[str, Any]
  rows: Sequence[Mapping[str, float]]
  timings: Sequence[Mapping[str, float]]
  summary: Mapping[str, Any] | None
  clients: Mapping[str, ClientTable]
  profile: Mapping[str, Any] | None
  participation: Participation | None
  missing: Sequence[str]

  @property
  def rounds(self) -> int:
    """The rounds that the run has; 0 before the first."""
    return int(self.rows[-1]["round"]) if self.rows else 0

  @property
  def wanted(self) -> int:
    """The rounds that its config asks for."""
    return int(self.config["server"]["rounds"])


def read_run(
  folder: Path, summary: Mapping[str, Any] | None = None
) -> RunRecord:
  """Return what a run left.

  Args:
    folder: its workdir.
    summary: of a run that has yet to write it; None: it is read.

  Raises:
    NoRunError: there is no run, or a file that each run has is missing or
      damaged.
    OSError: a file cannot be read.
  """
  outcome = read_outcome(folder, summary)
  _check_summary(folder, outcome.summary, _SUMMARY)
  missing: list[str] = []
  return RunRecord(
    **outcome._asdict(),
    timings=_timings(folder / "timings.jsonl", missing),
    clients=_clients(folder, missing, finished=outcome.summary is not None),
    profile=read_profile(folder, missing),
    participation=_participation(folder, outcome.config, missing),
    missing=missing,
  )


def read_outcome(
  folder: Path, summary: Mapping[str, Any] | None = None
) -> RunOutcome:
  """Return what a run left, of the files that every run has.

  Args:
    folder: its workdir.
    summary: of a run that has yet to write it; None: it is read.

  Raises:
    NoRunError: there is no run, or a file that each run has is missing or
      damaged.
    OSError: a file cannot be read.
  """
  if not folder.exists():
    raise NoRunError(f"--workdir={folder}: there is no such folder.")
  if not folder.is_dir():
    raise NoRunError(f"--workdir={folder} is a file; name a run's folder.")
  config_file, metrics = folder / "config.json", folder / "metrics.jsonl"
  if not config_file.exists():
    told = "its config.json is missing; copy all of its files"
    if not any((folder / n).exists() for n in ("metrics.jsonl", "checkpoints")):
      told = "it has no config.json; name the --workdir of a run"
      if (folder / _STUDY).exists():
        told = f"it is a study; give fedjax-sim compare {folder}"
    raise NoRunError(f"{folder} holds no run that can be read: {told}.")
  config = _json(config_file)
  try:
    _ = int(config["server"]["rounds"])
    _ = [config[name]["name"] for name in ("data", "model", "algorithm")]
  except (KeyError, TypeError) as error:
    raise NoRunError(
      f"{config_file} is no config of this version of fedjax_sim: {error} is"
      " missing; report with the version that began the run."
    ) from error
  if not metrics.exists():
    raise NoRunError(
      f"{metrics} is missing: the run has not begun its rounds, or its folder"
      " was copied in part; copy all of it."
    )
  try:
    rows = read_metrics(metrics)
  except ValueError as error:
    raise NoRunError(str(error)) from error
  if summary is None and (folder / "summary.json").exists():
    summary = _json(folder / "summary.json")
  _check_whole(folder, rows, summary)
  return RunOutcome(folder.resolve().name, config, rows, summary)


def _check_whole(
  folder: Path,
  rows: Sequence[Mapping[str, float]],
  summary: Mapping[str, Any] | None,
) -> None:
  """Refuse a summary that does not belong to the metrics."""
  if summary is None:
    return
  _check_summary(folder, summary, ("rounds",))
  last = rows[-1]["round"] if rows else 0
  if summary["rounds"] != last:
    raise NoRunError(
      f"{folder / 'metrics.jsonl'} ends with round {last}, but summary.json is"
      f" of round {summary['rounds']}: the folder was copied in part; copy all"
      " of it."
    )


def _check_summary(
  folder: Path, summary: Mapping[str, Any] | None, names: Sequence[str]
) -> None:
  """Refuse a summary without one of the names."""
  absent = [] if summary is None else [n for n in names if n not in summary]
  if absent and (folder.parent.parent / "study.json").exists():
    raise NoRunError(
      f"{folder} is a run of a study; fedjax-sim compare {folder.parent.parent}"
      " writes the page of all of them."
    )
  if absent:
    raise NoRunError(
      f"{folder / 'summary.json'} is of another version of fedjax_sim, or"
      f" damaged: {absent[0]!r} is missing; report with the version that made"
      " the run."
    )


def _json(path: Path) -> Any:
  try:
    value = json.loads(path.read_bytes())
    if not isinstance(value, dict):
      raise ValueError("no JSON object")
  except ValueError as error:
    raise NoRunError(f"{path} is damaged ({error}); restore it.") from error
  return value


def _timings(path: Path, missing: list[str]) -> list[dict[str, float]]:
  if not path.exists():
    missing.append(f"Seconds by phase: {path.name} is missing.")
    return []
  try:
    return read_metrics(path)
  except ValueError as error:
    raise NoRunError(str(error)) from error


def _clients(
  folder: Path, missing: list[str], *, finished: bool
) -> dict[str, ClientTable]:
  """Return the tables of a finished run; an unfinished one has older ones."""
  if not finished:
    missing.append("Metrics of each client: they are written at the end.")
    return {}
  paths = {name: folder / f"clients_{name}.csv" for name in _SETS}
  return {
    name: _client_table(path) for name, path in paths.items() if path.exists()
  }


def _client_table(path: Path) -> ClientTable:
  try:
    head, *lines = csv.reader(io.StringIO(path.read_text(encoding="utf-8")))
    if head[:2] != ["client", "examples"]:
      raise ValueError("its columns are not client, examples, ...")
    columns = [*zip(*lines, strict=True)] or [()] * len(head)
    if len(columns) != len(head):
      raise ValueError("lines have other columns than the first")
    return ClientTable(
      names=columns[0],
      sizes=np.asarray(columns[1], int),
      metrics={
        name: np.asarray(values, float)
        for name, values in zip(head[2:], columns[2:], strict=True)
      },
    )
  except ValueError as error:
    raise NoRunError(f"{path} is damaged ({error}); restore it.") from error


def read_profile(folder: Path, missing: list[str]) -> dict[str, Any] | None:
  """Return what `data_profile.json` of a workdir says of the data.

  Args:
    folder: the workdir.
    missing: gets a line where there is no such file, and None is returned.

  Raises:
    NoRunError: it is damaged.
  """
  path = folder / "data_profile.json"
  if not path.exists():
    missing.append(f"Clients' sizes and labels: {path.name} is missing.")
    return None
  profile: dict[str, Any] = _json(path)
  try:
    _ = profile["classes"], profile["labels"], profile["sets"]["train"]["sizes"]
  except (KeyError, TypeError) as error:
    raise NoRunError(
      f"{path} is damaged ({error} is missing); remove it."
    ) from error
  return profile


def _participation(
  folder: Path, config: Mapping[str, Any], missing: list[str]
) -> Participation | None:
  if not config["server"].get("client_log"):
    missing.append(
      "Rounds of each client: they were not logged (server.client_log)."
    )
    return None
  try:
    counted = count_rounds(
      folder / "client_rounds", folder / "client_rounds.parquet"
    )
  except ImportError:
    missing.append(
      "Rounds of each client: they are read with pyarrow, which is not"
      " installed; pip install 'fedjax_sim[parquet]'."
    )
    return None
  except (OSError, ValueError) as error:  # a part may vanish, or be cut off
    told = re.sub(r"\s+", " ", str(error))
    missing.append(f"Rounds of each client: they cannot be read ({told}).")
    return None
  if counted is None:
    missing.append("Rounds of each client: client_rounds.parquet is missing.")
    return None
  return Participation(*counted)


def quantiles(values: np.ndarray, of: Sequence[float]) -> list[float]:
  """Return percentiles of the values that are finite; NaN without any."""
  finite = values[np.isfinite(values)]
  if not finite.size:
    return [math.nan] * len(of)
  return [float(x) for x in np.percentile(finite, of)]
