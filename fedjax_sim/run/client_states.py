"""Client states on the disk, in a workdir: whose file, and what it must keep.

A checkpoint holds where each client's row is in the file, and the file lies
beside the checkpoints. Whoever reads a checkpoint elsewhere, as a branch does,
copies its rows.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax

from fedjax_sim.config.build import Experiment
from fedjax_sim.core import PyTree
from fedjax_sim.engine.client_rows import StoredRows
from fedjax_sim.engine.state import RunState
from fedjax_sim.run.checkpoint import Checkpoints
from fedjax_sim.run.checkpoint_files import rounds_in
from fedjax_sim.simulation.row_file import FILE
from fedjax_sim.simulation.row_store import read_row
from fedjax_sim.simulation.simulator import Simulator

FOLDER = "client_states"  # in the workdir


def asked_in(workdir: Path, asked: Any) -> Any:
  """Return `runtime.state_residency` of the run in a workdir.

  What "auto" chose when the run began, it keeps: its checkpoints hold a table
  or where rows are.

  Args:
    workdir: of the run, which may not have begun.
    asked: what its config says.
  """
  if asked != "auto" or not rounds_in(workdir / "checkpoints"):
    return asked
  return "disk" if (workdir / FOLDER / FILE).exists() else "device"


def in_workdir(
  experiment: Experiment, workdir: Path, *, mirrored: bool
) -> Experiment:
  """Return the experiment with its client states' file in the workdir.

  Args:
    experiment: what the config describes.
    workdir: of the run.
    mirrored: whether a bucket gets a copy of the workdir.

  Raises:
    ValueError: it does, or clients are fine-tuned, and client states are on the
      disk.
  """
  simulator = experiment.simulator
  if simulator.mesh.is_multi_process:
    return experiment  # their states are on the devices
  asked = asked_in(workdir, simulator.runtime.state_residency)
  found, _ = simulator.states.residency
  if found == "device" and asked != "disk":
    return experiment
  runtime = dataclasses.replace(
    simulator.runtime, state_residency=asked, state_folder=workdir / FOLDER
  )
  simulator = dataclasses.replace(simulator, runtime=runtime)
  experiment = dataclasses.replace(experiment, simulator=simulator)
  _ = experiment.finetuned  # refuses states on the disk
  if mirrored and simulator.states.rows is not None:
    raise ValueError(
      "runtime.state_residency: client states are on the disk, in a file that"
      " changes while a bucket's copy of the workdir is made; leave out the"
      " bucket, or give 'device'."
    )
  return experiment


def close(simulator: Simulator) -> None:
  """Close the file of a run that ends, so that another one can have it."""
  if simulator.states.rows is not None:
    simulator.states.rows.close()


def pin_checkpoints(simulator: Simulator, checkpoints: Checkpoints) -> None:
  """Keep the rows that the checkpoints of a workdir count on.

  Args:
    simulator: of the run that goes on, whose file is there.
    checkpoints: of the workdir.
  """
  rows = simulator.states.rows
  if rows is not None:
    like = simulator.states.host_shapes
    for round_, table in checkpoints.each(like, lambda state: state.clients):
      rows.pin(round_, table)


def commit(simulator: Simulator, round_: int, state: RunState) -> None:
  """Put the rows of a state on the disk, and keep them for its checkpoint.

  Args:
    simulator: of the run.
    round_: of the checkpoint that is written next.
    state: whose checkpoint it is.
  """
  rows = simulator.states.rows
  if rows is not None:
    rows.pin(round_, state.clients)
    rows.sync()


def committed(
  simulator: Simulator, round_: int, checkpoints: Checkpoints
) -> None:
  """Give up the rows that no checkpoint counts on any more.

  Args:
    simulator: of the run.
    round_: of the newest checkpoint.
    checkpoints: of the run.
  """
  rows = simulator.states.rows
  if rows is not None:
    rows.unpin(round_, checkpoints.rounds())


def copied(simulator: Simulator, state: PyTree, workdir: Path) -> PyTree:
  """Return a checkpoint's state with its rows in the simulator's own file.

  Args:
    simulator: whose file it is.
    state: on the host, as another run's checkpoint holds it.
    workdir: of the other run.
  """
  rows = simulator.states.rows
  if rows is None:
    return state
  table = rows.imported(workdir / FOLDER, state.clients)
  return state._replace(clients=table)


def comparable(state: PyTree) -> PyTree:
  """Return a state of which equal arrays mean equal rows.

  Args:
    state: on the host. Where its rows are in a file says nothing of them: what
      counts is whether they were written, and their sums.
  """
  table = state.clients
  if not isinstance(table, StoredRows):
    return state
  written = table.records >= 0
  return state._replace(clients=table._replace(records=written))


def own_part(table: PyTree) -> PyTree:
  """Return what algorithms keep of clients, out of a checkpoint's table.

  Args:
    table: `RunState.clients`; rows on the disk stay whole.
  """
  return table if isinstance(table, StoredRows) else table[0]


def own_row(table: PyTree, client: int, workdir: Path) -> Any:
  """Return what the algorithm keeps of one client, numpy.

  Args:
    table: as `own_part` returns it.
    client: the client.
    workdir: of the run.

  Raises:
    RowsError: its row is damaged, or was given up by a run that went on.
  """
  if not isinstance(table, StoredRows):
    return jax.tree.map(lambda x: x[client], table)
  own, _ = read_row(workdir / FOLDER, table, client)
  return own
