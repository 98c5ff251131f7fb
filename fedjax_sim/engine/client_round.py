"""One client's part in a round: its inputs and its outcome."""

from __future__ import annotations

import enum
from typing import NamedTuple

from fedjax_sim.core import Array, HParams, PyTree, Report, Roll
from fedjax_sim.engine.client_log import Entry


class RoundInputs(NamedTuple):
  """What all clients of a round share; on every device."""

  message: PyTree
  shared: PyTree
  hparams: HParams
  round: Array
  seed: Array
  noise_seed: Array
  roll: Roll | tuple[()] = ()  # of a keyed aggregator


class ClientPlan(NamedTuple):
  """One client's line of the plan."""

  client: Array
  version: Array
  num_examples: Array
  start: Array
  num_steps: Array
  state: PyTree
  seat: Array | tuple[()] = ()  # of a keyed aggregator


class ClientStatus(enum.IntEnum):
  """What became of a lane."""

  EMPTY = 0
  PRESENT = 1  # its client is in the aggregate
  REJECTED = 2  # its client's report is not finite
  NAN_LOSS = 3  # the update is finite, a metric is NaN


class ClientOutcome(NamedTuple):
  """What one client's round leaves for the aggregation."""

  report: Report  # with the transformed update
  aux: tuple[PyTree, ...]
  kept: PyTree  # its new row in the table of client states
  status: Array  # shape=(), int8; a `ClientStatus`
  log: Entry | tuple[()] = ()
  seat: Array | tuple[()] = ()
