"""Open a run by itself, from its own folder or from that of a study."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import jax
import numpy as np

from fedjax_sim.core import PyTree, validate
from fedjax_sim.data import workdir_on_disk
from fedjax_sim.engine.state import RunState
from fedjax_sim.run import opened
from fedjax_sim.run.checkpoint_reader import CheckpointReader, Restored
from fedjax_sim.run.opened import OpenedRun, Wanted
from fedjax_sim.run.workdir import WorkdirError
from fedjax_sim.simulation.simulator import Simulator
from fedjax_sim.studies.record import checkpoints_of, read_study


def load(
  workdir: str | os.PathLike[str],
  round: int | str | None = None,
  *,
  run: int | str | None = None,
  data_path: str | os.PathLike[str] | None = None,
) -> OpenedRun:
  """Open a run, to look at its model and metrics and to predict.

  The experiment is rebuilt from the run's config, which takes its data set.
  Nothing is written, and the run may be going on.

  Args:
    workdir: of the run; or of a study, with `run`.
    round: which model: None for the last checkpoint's, a round of which there
      is a checkpoint, "best" for the best by the first of
      `server.best_metrics`, or "best/METRIC" for the best by another. Of a run
      of a study only the last and the best are kept.
    run: which run of a study: its name, such as "007", or its number.
    data_path: instead of the config's `data.path`, where the data lie now.

  Raises:
    WorkdirError: the folder holds no run, no such checkpoint, or no best model;
      or the experiment cannot be rebuilt, as its data are missing.
    UnknownNameError: the study has no such run.
    TypeError, ValueError: `round` is something else, or the workdir is a URL.
    StateChangedError: the checkpoint is of another version's state.

  Warns:
    UserWarning: the data are not those that the run has, or a checkpoint is
      damaged.

  Example:
    run = fs.load("runs/digits")
    run.predict({"x": images}).argmax(axis=1)
    fs.load("studies/rates", run="007").metrics["test/accuracy"]
  """
  folder = workdir_on_disk(workdir, "workdir")
  found = read_study(folder)
  if run is None:
    if found is not None:
      raise WorkdirError(
        f"{folder} holds a study of {len(found['runs'])} runs; name one, such"
        f" as run={found['runs'][0]['name']!r}."
      )
    return opened.load(workdir, round, data_path=data_path)
  if found is None:
    raise WorkdirError(f"run={run!r}: {folder} holds no study; leave run out.")
  runs = {entry["name"]: entry for entry in found["runs"]}
  name = run if isinstance(run, str) else _name(run, list(runs))
  entry = runs[validate.one_of("run", name, list(runs))]
  own = folder / "runs" / entry["name"]
  place = checkpoints_of(folder, entry["program"])
  if not place.is_dir():  # it did not go as a row
    return opened.load(own, round, data_path=data_path)
  if isinstance(round, int):
    raise WorkdirError(
      f"round={round}: a study keeps the last model of its runs, and the best"
      " ones; leave it out, or run that config by itself."
    )
  rows = [r["name"] for r in found["runs"] if r["program"] == entry["program"]]
  row = rows.index(entry["name"])

  def restore(simulator: Simulator, wanted: Wanted) -> Restored:
    return _row(folder, place, simulator, wanted, row, len(rows))

  return opened.opened(own, round, restore, data_path)


def _name(run: int, names: list[str]) -> str:
  validate.integer("run", run, ge=0, le=len(names) - 1)
  return names[run]


def _row(
  folder: Path,
  place: Path,
  simulator: Simulator,
  wanted: Wanted,
  row: int,
  count: int,
) -> Restored:
  """Return the wanted part of a run's state in the newest checkpoint."""
  like: RunState = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((count, *np.shape(x)), x.dtype),
    simulator.states.host_shapes,
  )

  def with_round(state: RunState) -> PyTree:
    return wanted(state), state.round

  with contextlib.closing(CheckpointReader(place)) as reader:
    read = opened.newest(folder, reader, like, with_round, None)
  part, done = jax.tree.map(lambda x: x[row], read.state)
  return Restored(int(done), part, read.facts)
