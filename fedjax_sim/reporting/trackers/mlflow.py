"""MLflow, a server's or a local store's; also Azure ML's and Databricks'.

Rows go out by `log_batch`, which returns when the store has them. Whether a row
arrived whose request failed, or after which the process was killed, is what the
metric history says: `unsent` asks for it before anything is sent again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fedjax_sim.core import optional, urls, validate
from fedjax_sim.reporting.trackers.protocol import (
  Opened,
  Row,
  RunFacts,
  Status,
  Tracker,
)

if TYPE_CHECKING:
  from mlflow import MlflowClient
  from mlflow.entities import Metric, Run

T = TypeVar("T")

_KEY = "fedjax_sim.key"  # the tag by which a run is found again
_PARENT = "mlflow.parentRunId"  # the tag that makes a run a child
_URI = "MLFLOW_TRACKING_URI"
_DEFAULT = "fedjax_sim"  # experiment
_EXPERIMENTS = ("MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID")
_STORES = (  # schemes of URIs
  *("http", "https", "databricks", "azureml"),
  *("sqlite", "postgresql", "mysql", "mssql"),
)
_PLUGINS = "mlflow.tracking_store"  # entry points, named for further schemes
_ALLOW_FOLDERS = "MLFLOW_ALLOW_FILE_STORE"
_OLD_STORE = "mlruns"  # MLflow's default where it holds an experiment
_TAGS = {"git.commit": "mlflow.source.git.commit"}  # as its pages look for it
_METRICS_A_BATCH = 1000  # limits of MLflow's API
_ENTRIES_A_BATCH = 100
_LONGEST = 500  # characters of a parameter or a tag, on any server
_STATUS = {"finished": "FINISHED", "failed": "FAILED", "killed": "KILLED"}


def mlflow(
  uri: str | None = None,
  experiment: str | None = None,
  run_name: str | None = None,
  run_id: str | None = None,
  timeout: int = 30,
) -> Tracker:
  """Send metrics, config and results to an MLflow server or store.

  In a job of Azure ML, or under `mlflow run`, it joins the job's run, whose id
  is in `MLFLOW_RUN_ID`. If another workdir has joined that one, it becomes a
  child of it.

  Args:
    uri: of the server (http, https, databricks, azureml) or of a database
      (sqlite, postgresql, mysql, mssql), such as sqlite:///mlflow.db, or of a
      store that a plugin of MLflow adds; None: `MLFLOW_TRACKING_URI`, or
      MLflow's own default. Folders, as file:///mlruns, are refused unless
      `MLFLOW_ALLOW_FILE_STORE` is true, as MLflow refuses them, too.
    experiment: its name, made if missing; None: `MLFLOW_EXPERIMENT_NAME`, or
      that of `MLFLOW_EXPERIMENT_ID`, or fedjax_sim.
    run_name: None: the workdir's name.
    run_id: a run to join; None: `MLFLOW_RUN_ID`, or a run of its own.
    timeout: seconds after which a request has failed; the environment's
      `MLFLOW_HTTP_REQUEST_TIMEOUT` has precedence.

  Raises:
    ModuleNotFoundError: MLflow is not installed.
    TypeError, ValueError: timeout is no whole number >= 1, or uri,
      `MLFLOW_TRACKING_URI` or MLflow's default is of another store.
  """
  optional.require("mlflow", "mlflow", "The tracker mlflow")
  validate.integer("timeout", timeout)
  _check_store(uri)
  return _MLflow(uri, experiment, run_name, run_id, timeout)


def _check_store(uri: str | None) -> None:
  """Refuse a store before the run that MLflow would refuse at its end.

  Raises:
    ValueError: names the URI, and what to give instead.
  """
  given = uri or os.environ.get(_URI, "")
  shown = f"{'uri' if uri else _URI}={urls.redacted_url(given)!r}"
  if not given:
    if not any(Path(_OLD_STORE).glob("[0-9]*/meta.yaml")):
      return  # a database then
    given = f"file:{_OLD_STORE}"
    shown = f"the folder {_OLD_STORE} here, MLflow's default without {_URI},"
  scheme, colon, _ = given.lower().partition(":")
  if scheme.partition("+")[0] in _STORES:
    return
  if scheme == "file" or not colon:
    allowed, further = _allows_folders(), f"set {_ALLOW_FOLDERS}=true"
  else:
    allowed = scheme in metadata.entry_points(group=_PLUGINS).names
    further = f"install the plugin of MLflow for {scheme}"
  if not allowed:
    raise ValueError(
      f"{shown} is of no store that MLflow writes to; give sqlite:///FILE, such"
      " as sqlite:///mlflow.db, or a server, such as http://HOST:5000; or"
      f" {further}."
    )


def _allows_folders() -> bool:
  """Return whether MLflow takes folders, which it does by a variable alone."""
  return os.environ.get(_ALLOW_FOLDERS, "").lower() in ("true", "1")


class _MLflow(Tracker):
  _client: MlflowClient
  _run_id: str

  def __init__(
    self,
    uri: str | None,
    experiment: str | None,
    run_name: str | None,
    run_id: str | None,
    timeout: int,
  ):
    self._uri, self._experiment = uri, experiment
    self._run_name, self._joined = run_name, run_id
    self._timeout = timeout
    store = uri or os.environ.get(_URI, "")
    names = (experiment, *map(os.environ.get, _EXPERIMENTS))
    named = next(filter(None, names), _DEFAULT)
    self.place = f"{urls.redacted_url(store)} {named}".strip()

  def open(self, run: RunFacts) -> Opened:
    # MLflow's client would repeat a request whose answer it did not get; we
    # ask first whether it arrived. The client reads the environment alone.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(self._timeout))
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    from mlflow import MlflowClient

    self._client = MlflowClient(tracking_uri=self._uri)
    parent = self._given()
    warning = ""
    if parent is not None and not self._claim(parent, run):
      found = self._child(parent, run)
      warning = (
        f"the run {parent.info.run_id} belongs to another workdir; this one is"
        " a child run of it."
      )
    else:
      found = parent or self._find(run)
    if found is None:
      created = self._create(run, parent)
      self._run_id = created.info.run_id
      self._describe(created, run)
      return Opened(self._run_id, warning=warning)
    self._run_id = found.info.run_id
    if found.info.status != "RUNNING":
      self._client.update_run(self._run_id, status="RUNNING")
    self._describe(found, run)
    sent = run.sent if self._run_id == run.run_id else -1
    return Opened(self._run_id, sent, self._newest(found), warning)

  def _given(self) -> Run | None:
    """Return the run that the config or the environment names, if one does."""
    given = self._joined or os.environ.get("MLFLOW_RUN_ID")
    return self._client.get_run(given) if given else None

  def _claim(self, given: Run, run: RunFacts) -> bool:
    """Return whether a given run is this workdir's; nobody's becomes its own.

    Of two that claim one at once the first one wins: a parameter, unlike a tag,
    cannot be written over.
    """
    from mlflow.entities import Param
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, ErrorCode

    owner = given.data.tags.get(_KEY, given.data.params.get(_KEY))
    if owner is not None:
      return owner == run.key
    number = given.info.run_id
    try:
      self._client.log_batch(number, params=[Param(_KEY, run.key)])
    except MlflowException as error:  # it has another value by now
      if error.error_code != ErrorCode.Name(INVALID_PARAMETER_VALUE):
        raise
    return self._client.get_run(number).data.params.get(_KEY) == run.key

  def _child(self, parent: Run, run: RunFacts) -> Run | None:
    """Return the child of another's run to join; None if there is none yet."""
    runs = self._client.search_runs(
      [parent.info.experiment_id],
      f"tags.`{_KEY}` = '{run.key}' and"
      f" tags.`{_PARENT}` = '{parent.info.run_id}'",
    )
    return runs[0] if runs else None

  def _find(self, run: RunFacts) -> Run | None:
    """Return the run of its own to join; None if there is none yet."""
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode

    if run.run_id:
      try:
        return self._client.get_run(run.run_id)
      except MlflowException as error:  # of another store
        if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
          raise
    # A process may have been killed before it noted the run's id.
    runs = self._client.search_runs(
      [self._experiment_id()], f"tags.`{_KEY}` = '{run.key}'"
    )
    return runs[0] if runs else None

  def _experiment_id(self) -> str:
    """Return the id of the experiment, made if missing."""
    name = self._experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME")
    number = os.environ.get("MLFLOW_EXPERIMENT_ID")
    if name is None and number:
      return number
    name = name or _DEFAULT
    found = self._client.get_experiment_by_name(name)
    if found is not None:
      return str(found.experiment_id)
    return self._client.create_experiment(name)

  def _create(self, run: RunFacts, parent: Run | None) -> Run:
    tags = {_KEY: run.key, "mlflow.source.name": "fedjax_sim"}
    if parent is not None:
      tags[_PARENT] = parent.info.run_id
    return self._client.create_run(
      self._experiment_id() if parent is None else parent.info.experiment_id,
      tags=tags,
      run_name=self._run_name or run.name,
    )

  def _describe(self, found: Run, run: RunFacts) -> None:
    """Send the config and the tags.

    A parameter of MLflow never changes. If a resumed run has another value, a
    tag of the same name has it.
    """
    from mlflow.entities import Param, RunTag

    params = {k: _text(v) for k, v in run.params.items()}
    before = found.data.params
    named = {_TAGS.get(k, k): _text(v) for k, v in run.tags.items()}
    tags = {_KEY: run.key, **named}
    tags |= {k: v for k, v in params.items() if k in before and before[k] != v}
    new = [Param(k, v) for k, v in params.items() if k not in before]
    for part in _parts(new, _ENTRIES_A_BATCH):
      self._client.log_batch(self._run_id, params=part)
    entries = [RunTag(k, v) for k, v in tags.items()]
    for some in _parts(entries, _ENTRIES_A_BATCH):
      self._client.log_batch(self._run_id, tags=some)

  def _newest(self, found: Run) -> int:
    """Return the newest round of which the run has a metric."""
    steps = (max(self._steps(key), default=-1) for key in found.data.metrics)
    return max(steps, default=-1)

  def _steps(self, key: str) -> set[int]:
    """Return the rounds of which the server has this metric."""
    history = self._client.get_metric_history(self._run_id, key)
    return {metric.step for metric in history}

  def unsent(self, rows: Sequence[Row]) -> list[Row]:
    keys = {key for row in rows for key in row if key != "round"}
    have = {key: self._steps(key) for key in keys}
    return [
      {
        key: value
        for key, value in row.items()
        if key == "round" or int(row["round"]) not in have[key]
      }
      for row in rows
    ]

  def send(self, rows: Sequence[Row]) -> None:
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    metrics: list[Metric] = [
      Metric(key, float(value), now, int(row["round"]))
      for row in rows
      for key, value in row.items()
      if key != "round"
    ]
    for part in _parts(metrics, _METRICS_A_BATCH):
      self._client.log_batch(self._run_id, metrics=part)

  def close(self, status: Status, files: Sequence[Path]) -> None:
    for file in files:
      self._client.log_artifact(self._run_id, str(file))
    self._client.set_terminated(self._run_id, _STATUS[status])


def _text(value: Any) -> str:
  """Return a parameter's value as text that any server takes."""
  text = str(value)
  return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def _parts(entries: Sequence[T], size: int) -> Iterator[Sequence[T]]:
  """Yield the entries in pieces of at most this size."""
  for begin in range(0, len(entries), size):
    yield entries[begin : begin + size]
