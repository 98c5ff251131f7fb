"""The constants of a compiled round."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from jax.sharding import Mesh

from fedjax_sim.core import Aggregator, Algorithm, Transform
from fedjax_sim.data import Prepare
from fedjax_sim.engine.client_loop import PassSpec
from fedjax_sim.engine.hparams import Schedule
from fedjax_sim.engine.loops import FixedLoop


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundSpec:
  """What a round is compiled for; everything else is an array.

  Attributes:
    algorithm: how clients train and how the server makes its step.
    aggregator: how the clients' updates become one.
    transforms: what is applied to a client's update, in order.
    walks: for every pass of a round, how it reads its batches.
    num_clients: size of the population, as the algorithm sees it.
    mesh: the devices, on the axis `clients`.
    prepare: what is applied to the server's own examples.
    sliced: whether a device holds only the examples that it needs in a round.
    virtual: number of virtual devices that the plan assigns clients to. A
      device does the work of several, one after the other, and their sums are
      added in a fixed order. None if the plan is for the devices of the mesh.
    schedules: name of a hyper-parameter, such as `client.learning_rate` -> its
      schedule.
    log_clients: whether to fill `RoundMetrics.client_values`. A device then
      keeps the updates of all its clients until the end of the round.
    observes: whether to fill `RoundMetrics.observed`, for the sampler.
    first_pass: number of the first of `walks` among all passes of the round,
      which their random keys depend on.
    waves: the loop over a device's waves, for reverse mode, which then passes
      the loop over rounds too; None: as long as there are waves in use.
  """

  algorithm: Algorithm
  aggregator: Aggregator
  transforms: Sequence[Transform]
  walks: Sequence[PassSpec]
  num_clients: int
  mesh: Mesh
  prepare: Prepare
  sliced: bool
  virtual: int | None
  schedules: Mapping[str, Schedule]
  log_clients: bool
  observes: bool
  first_pass: int = 0
  waves: FixedLoop | None = None
