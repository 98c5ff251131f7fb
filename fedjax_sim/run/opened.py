"""Open a run: its model, its metrics and its predictions, in any process.

The workdir is only read, and may be that of a run that goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from fedjax_sim import reporting
from fedjax_sim.config import build
from fedjax_sim.core import PyTree, Task, Variables, validate
from fedjax_sim.core.errors import one_line
from fedjax_sim.data import workdir_on_disk
from fedjax_sim.engine.state import RunState
from fedjax_sim.run import client_states
from fedjax_sim.run.changes import stored_config
from fedjax_sim.run.checkpoint_files import first_line
from fedjax_sim.run.checkpoint_reader import (
  CheckpointReader,
  Restored,
  StateChangedError,
)
from fedjax_sim.run.resume import data_digest
from fedjax_sim.run.workdir import (
  STUDY_FILE,
  WorkdirError,
  finished_summary,
)
from fedjax_sim.simulation.simulator import Simulator
from fedjax_sim.tasks.prediction import Predictor

Wanted = Callable[[RunState], PyTree]

BEST = "best"
_ELSEWHERE = (
  " Opening a run takes its data; if they lie elsewhere now, give that place by"
  " data_path, on the command line by --data-path."
)
_ONE_DEVICE = {  # what does not change the model, and another machine may lack
  "runtime.devices": 1,
  "runtime.model_devices": None,
  "runtime.deterministic_reduction": None,
  "runtime.lanes": 1,
  "server.client_log": False,
  "model.initial": None,  # the checkpoint holds what became of it
  "model.initial_only": None,
}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class OpenedRun:
  """A run as a checkpoint left it; `load` makes it.

  Attributes:
    folder: the workdir.
    config: complete, but for the section `trackers`, which is empty.
    round: rounds done when the model was the opened one.
    metrics: metric -> shape=(rows,), float64, a row of `metrics.jsonl` each,
      NaN where a row lacks the metric; and `round`, int64.
    summary: content of `summary.json`; None if the run is not finished.
    simulator: the experiment, on one device.
    server: the algorithm's server state; leaves on the host.
    clients: what every client keeps, leaves (clients, ...); with client states
      on the disk a `StoredRows`, see `client_state`; None if clients have no
      models of their own, or of the best model.
  """

  folder: Path
  config: ConfigDict
  round: int
  metrics: Mapping[str, np.ndarray]
  summary: Mapping[str, Any] | None
  simulator: Simulator
  server: PyTree
  clients: PyTree | None

  @property
  def task(self) -> Task:
    """What was trained."""
    return self.simulator.task

  @functools.cached_property
  def variables(self) -> Variables:
    """The global model; leaves on the host."""
    variables: Variables = jax.device_get(
      self.simulator.algorithm.variables(self.server)
    )
    return variables

  @property
  def params(self) -> PyTree:
    """The trained parameters of the global model; leaves on the host."""
    return self.variables.params

  def predict(
    self, examples: Mapping[str, Any], client: int | str | None = None
  ) -> Any:
    """Return the model's outputs for examples as the data set stores them.

    Args:
      examples: field -> (n, ...), such as `{"x": images}`; see
        `fedjax_sim.predict`.
      client: index or name of a training client whose own model predicts; None
        for the global model.

    Returns:
      Outputs of `Task.logits`, shape=(n, ...), on the host.

    Raises:
      TypeError, ValueError: the task has no logits, an example is not as it is
        stored, or the client is unknown or has no model of its own.

    Example:
      fs.load("runs/digits").predict({"x": np.zeros((1, 64))}).shape  # (1, 10)
    """
    variables = self.variables if client is None else self._own(client)
    size = self.config.runtime.eval_batch_size
    return self.predictor(jax.device_put(variables), examples, batch_size=size)

  @functools.cached_property
  def predictor(self) -> Predictor:
    """The prediction of any variables of the task.

    Raises:
      ValueError: the task has no logits.
    """
    if self.task.logits is None:
      raise ValueError(
        f"model.name={self.config.model.name!r}: its task has no logits, so"
        " nothing can be predicted; make it by nnx_task or linen_task, or give"
        " it Task.logits. The parameters are there all the same."
      )
    return Predictor(self.task, self.simulator.data)

  def client_state(self, client: int | str) -> PyTree:
    """Return what the algorithm keeps of a client that has a model of its own.

    Args:
      client: index or name of a training client.

    Returns:
      Its row of `clients`, numpy; of rows on the disk this one alone is read.

    Raises:
      ValueError: the client is unknown or has no model of its own.
      RowsError: its row is damaged, or was given up by a run that went on.

    Example:
      fs.load("runs/ditto").client_state(3).params
    """
    if self.simulator.algorithm.personal is None:
      raise ValueError(
        f"client={client!r}: algorithm.name={self.config.algorithm.name!r}"
        " gives clients no models of their own; leave it out."
      )
    if self.clients is None:
      raise ValueError(
        f"client={client!r}: of the best model the clients' own ones are not"
        f" kept; open the run without round={BEST!r}."
      )
    row = _index(client, self.simulator.data.train.names, self.simulator)
    return client_states.own_row(self.clients, row, self.folder)

  def _own(self, client: int | str) -> Variables:
    """Return the variables that a client would use itself."""
    own, algorithm = self.client_state(client), self.simulator.algorithm
    row = _index(client, self.simulator.data.train.names, self.simulator)
    message = algorithm.broadcast(self.server)
    mine = algorithm.download(message, jnp.int32(0), jnp.int32(row))
    assert algorithm.personal is not None
    return algorithm.personal(mine, own)

  def __repr__(self) -> str:
    """Return where the run is and how far it is; arrays are left out."""
    state = "unfinished" if self.summary is None else "finished"
    return f"OpenedRun({str(self.folder)!r}, round={self.round}, {state})"


def load(
  workdir: str | os.PathLike[str],
  round: int | str | None = None,
  *,
  data_path: str | os.PathLike[str] | None = None,
) -> OpenedRun:
  """Open a run, to look at its model and metrics and to predict.

  The experiment is rebuilt from the workdir's config, which takes the run's
  data set. Nothing is written, and the run may be going on.

  Args:
    workdir: of the run.
    round: which model: None for the last checkpoint's, a round of which there
      is a checkpoint, "best" for the best by the first of
      `server.best_metrics`, or "best/METRIC" for the best by another.
    data_path: instead of the config's `data.path`, where the data lie now.

  Raises:
    WorkdirError: the folder holds no run, no such checkpoint, or no best model;
      or the experiment cannot be rebuilt, as its data are missing.
    TypeError, ValueError: `round` is something else, or the workdir is a URL.
    StateChangedError: the checkpoint is of another version's state.

  Warns:
    UserWarning: the data are not those that the run has, or a checkpoint is
      damaged.

  Example:
    run = fs.load("runs/digits")
    run.predict({"x": images}).argmax(axis=1)
  """
  folder = workdir_on_disk(workdir, "workdir")

  def restore(simulator: Simulator, wanted: Wanted) -> Restored:
    number = round if isinstance(round, int) else None
    with contextlib.closing(CheckpointReader(folder / "checkpoints")) as reader:
      like = simulator.states.host_shapes
      return newest(folder, reader, like, wanted, number)

  return opened(folder, round, restore, data_path)


def opened(
  folder: Path,
  round: int | str | None,
  restore: Callable[[Simulator, Wanted], Restored],
  data_path: str | os.PathLike[str] | None,
) -> OpenedRun:
  """Open the run in a folder; arguments and errors are those of `load`.

  Args:
    folder: of the run.
    round: which model.
    restore: (simulator, state -> the wanted part of it) -> that part of the
      checkpoint to open.
    data_path: where the data lie now.
  """
  best = isinstance(round, str) and round.partition("/")[0] == BEST
  if round is not None and not best:
    if isinstance(round, str):
      raise ValueError(f"round={round!r}: give a number, {BEST!r} or None.")
    validate.integer("round", round, ge=0)
  config = stored_config(folder)
  if config is None:
    raise WorkdirError(
      f"{folder} holds no run: there is no config.json; give the --workdir of"
      " one."
    )
  simulator = rebuild(folder, config, data_path, hint=_ELSEWHERE)
  personal = simulator.algorithm.personal is not None and not best
  metric = _best_metric(folder, simulator, str(round)) if best else ""

  def wanted(state: RunState) -> PyTree:
    model = state.watch.best[metric] if best else state.server
    own = client_states.own_part(state.clients) if personal else None
    return model, own

  restored = restore(simulator, wanted)
  model, clients = restored.state
  done = restored.round
  if best:
    done, model = int(model.round), model.server
    if done < 0:
      raise WorkdirError(
        f"The run in {folder} has no best model yet; wait for an evaluation, or"
        " open a round."
      )
  if restored.facts["data"] != data_digest(simulator):
    warnings.warn(
      f"The data are not those that the run in {folder} was begun with; what"
      " is predicted may mean something else.",
      stacklevel=3,
    )
  return OpenedRun(
    folder=folder,
    config=config,
    round=done,
    metrics=_metrics(folder / "metrics.jsonl"),
    summary=finished_summary(folder, config.server.rounds),
    simulator=simulator,
    server=model,
    clients=clients,
  )


def _best_metric(folder: Path, simulator: Simulator, text: str) -> str:
  """Return the metric of "best", the first one, or of "best/METRIC"."""
  kept = simulator.best_metrics
  metric = text.partition("/")[2] or (kept[0] if kept else "")
  if not kept:
    raise WorkdirError(
      f"The run in {folder} keeps no best model, as server.best_metrics is not"
      " set; open a round."
    )
  validate.one_of(f"round={text!r}: metric", metric, kept)
  return metric


def _changed(config: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
  """Return a config with other values of some fields.

  Args:
    config: complete.
    changes: "section.field" -> its value.
  """
  tree = config.to_dict()
  for field, value in changes.items():
    section, key = field.split(".")
    tree[section][key] = value
  return ConfigDict(tree)


def rebuild(
  folder: Path,
  config: ConfigDict,
  data_path: str | os.PathLike[str] | None = None,
  runtime: Mapping[str, Any] | None = None,
  hint: str = "",
) -> Simulator:
  """Return the simulator of a run, on one device.

  Args:
    folder: the workdir, for messages.
    config: of the run, complete.
    data_path: instead of the config's `data.path`.
    runtime: fields of the section `runtime` to take instead of the run's; None
      for one device. With several processes all of them call this function.
    hint: what to do where its data are missing, for the message.

  Raises:
    WorkdirError: its data, or its own code, are missing or have changed.
  """
  changes: dict[str, Any] = dict(_ONE_DEVICE)
  if data_path is not None:
    changes["data.path"] = os.fspath(data_path)
  changes |= {f"runtime.{k}": v for k, v in (runtime or {}).items()}
  asked = config.runtime.state_residency
  changes["runtime.state_residency"] = client_states.asked_in(folder, asked)
  try:
    return build.build(_changed(config, changes)).simulator
  except (TypeError, ValueError, OSError, ImportError) as error:
    fix = hint if isinstance(error, FileNotFoundError) else ""
    raise WorkdirError(
      f"The run in {folder} cannot be rebuilt: {one_line(error)}{fix}"
    ) from error


def newest(
  folder: Path,
  reader: CheckpointReader,
  like: PyTree,
  wanted: Any,
  round_: int | None,
) -> Restored:
  """Return the checkpoint of a round, or the newest that is whole.

  A run that goes on may remove one while it is read.

  Args:
    folder: of the run, for messages.
    reader: of its checkpoints.
    like: a state of the same structure, shapes and dtypes.
    wanted: state -> the part of it that is read.
    round_: which one; None for the newest.

  Raises:
    WorkdirError: there is none, or it is damaged.
  """
  failed: dict[int, Exception] = {}
  while True:
    there = reader.rounds()
    left = [r for r in there if r not in failed and round_ in (None, r)]
    if not left:
      break
    try:
      return reader.read(left[-1], like, wanted)
    except (MemoryError, PermissionError, StateChangedError):
      raise
    except Exception as error:  # whatever a torn file makes orbax raise
      failed[left[-1]] = error
      if reader.rounds()[-1:] == left[-1:] and round_ is None:
        warnings.warn(
          f"The checkpoint of round {left[-1]} in {folder} is damaged"
          f" ({first_line(error)}); the one before is opened.",
          stacklevel=3,
        )
  listed = ", ".join(map(str, there)) or "none"
  if round_ in there:
    raise WorkdirError(
      f"round={round_}: its checkpoint in {folder} is damaged"
      f" ({first_line(failed[round_])}); there are {listed}."
    )
  if round_ is not None:
    raise WorkdirError(
      f"round={round_}: {folder} has no checkpoint of it; there are {listed}."
      " server.snapshot_every keeps more of them."
    )
  if (folder.parent.parent / STUDY_FILE).exists():
    raise WorkdirError(
      f"{folder} is a run of a study, which keeps its state; open it by"
      f" fs.load({str(folder.parent.parent)!r}, run={folder.name!r})."
    )
  whole = " whole" if failed else ""
  raise WorkdirError(
    f"{folder} has no{whole} checkpoint; wait for the run's first one, or run"
    " it again."
  )


def _metrics(path: Path) -> dict[str, np.ndarray]:
  """Return the metrics of a file as arrays, metric -> (rows,)."""
  rows = reporting.read_metrics(path) if path.exists() else []
  names = dict.fromkeys(name for row in rows for name in row)
  return {
    "round": np.array([int(row["round"]) for row in rows], np.int64),
    **{
      name: np.array([row.get(name, np.nan) for row in rows], np.float64)
      for name in names
      if name != "round"
    },
  }


def _index(
  client: int | str, names: Sequence[str] | None, simulator: Simulator
) -> int:
  """Return the index of a client that is given by index or name."""
  count = simulator.num_clients
  if not isinstance(client, str):
    return validate.integer("client", client, ge=0, le=count - 1)
  known = list(names or (f"client {i}" for i in range(count)))
  if client in known:
    return known.index(client)
  near = difflib.get_close_matches(client, known, n=3, cutoff=0.5)
  hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
  raise validate.UnknownNameError(
    f"client={client!r} is none of the {count} training clients.{hint} Give a"
    " name or an index."
  )
