"""Compile rounds for the plans of a run, trace them, and call them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from fedjax_sim import distributed
from fedjax_sim.core import Aggregator, Algorithm, PyTree, Transform
from fedjax_sim.data import FederatedDataset
from fedjax_sim.engine import plan as plans
from fedjax_sim.engine import program as programs
from fedjax_sim.engine import round as rounds
from fedjax_sim.engine.batching import LocalWork
from fedjax_sim.engine.client_loop import Walk
from fedjax_sim.engine.hparams import Schedule
from fedjax_sim.engine.residency import Residency
from fedjax_sim.engine.state import RoundMetrics, RunState
from fedjax_sim.simulation import preflight
from fedjax_sim.simulation.dispatch import Planned
from fedjax_sim.simulation.runtime import Runtime

RoundFunction = Callable[..., tuple[RunState, RoundMetrics]]


def round_function(
  algorithm: Algorithm,
  aggregator: Aggregator,
  transforms: Sequence[Transform],
  *,
  data: FederatedDataset,
  works: Sequence[LocalWork],
  schedules: Mapping[str, Schedule],
  residency: Residency,
  mesh: Mesh,
  virtual: int | None,
  num_clients: int,
  log_clients: bool,
) -> RoundFunction:
  """Return the pure function of several rounds, as `make_rounds` describes it.

  Args:
    algorithm: how clients train and the server reacts.
    aggregator: how updates become one.
    transforms: transforms of the client updates.
    data: federated data, whose `prepare` and `augment` apply to batches.
    works: for every pass, what a client does.
    schedules: hyper-parameter -> its schedule.
    residency: where the training examples are.
    mesh: the devices.
    virtual: number of virtual devices that stand for them; None for none.
    num_clients: number of clients that the algorithm may know of.
    log_clients: whether what each client did is kept.
  """
  return rounds.make_rounds(
    algorithm,
    aggregator,
    transforms,
    walks=[
      Walk(
        source,
        work.batch_size,
        data.prepare,
        data.augment if walked.augmented else None,
        work.max_tokens,
      )
      for walked, source, work in zip(
        algorithm.passes, residency.sources, works, strict=True
      )
    ],
    num_clients=num_clients,
    prepare=data.prepare,
    mesh=mesh,
    sliced=residency.sliced,
    virtual=virtual,
    schedules=schedules,
    log_clients=log_clients,
  )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Compiler:
  """Compiles a function of rounds for the shapes of plans, and calls it.

  Attributes:
    function: the function, as `round_function` returns it.
    shape: (lanes, cohort size) -> the shape of the plans.
    state: shapes and dtypes of a state.
    hparams: numeric hyper-parameters, as arrays.
    server_data: examples of the server's own; None if it has none.
    residency: where the training examples are.
    mesh: the devices.
    runtime: whether states are used up, and sums are deterministic.
  """

  function: RoundFunction
  shape: Callable[[int, int], programs.Shape]
  state: RunState
  hparams: PyTree
  server_data: PyTree
  residency: Residency
  mesh: Mesh
  runtime: Runtime

  @functools.cached_property
  def compiled(self) -> dict[tuple[int, int], programs.Program]:
    """(lanes, cohort size) -> what was compiled for them so far."""
    return {}

  def program(self, lanes: int, size: int) -> programs.Program:
    """Return the compiled rounds.

    Args:
      lanes: number of clients that a device trains at once.
      size: size of the largest cohort, one of the sampler's.
    """
    if (lanes, size) not in self.compiled:
      self.compiled[lanes, size] = self._compile(self.shape(lanes, size))
    return self.compiled[lanes, size]

  def _compile(self, shape: programs.Shape) -> programs.Program:
    return programs.compile_rounds(
      self.function,
      shape,
      state=self.state,
      hparams=self.hparams,
      data=self.residency.shapes(shape.capacity, shape.rounds),
      data_spec=self.residency.spec,
      server_data=self.server_data,
      mesh=self.mesh,
      donate=self.runtime.donate,
      deterministic=self.runtime.deterministic_reduction is not None,
    )

  def trace(self, lanes: int, size: int) -> None:
    """Trace the rounds, as compiling them does first.

    Args:
      lanes: as in `program`.
      size: as in `program`.

    Raises:
      ValueError: the algorithm, or another part, refuses what it is given.
    """
    shape = self.shape(lanes, size)
    preflight.check_round(
      self.function,
      self.state,
      self.hparams,
      self.residency.shapes(shape.capacity, shape.rounds),
      plans.blank(shape.capacity, shape.passes, shape.rounds),
      np.int32(0),
      self.server_data,
    )

  @functools.cached_property
  def _placed(self) -> PyTree:
    """Return the server's own examples, whole on every device."""
    return distributed.put(self.server_data, self.mesh, P())

  def call(
    self, state: RunState, planned: Planned, hparams: PyTree
  ) -> tuple[RunState, RoundMetrics]:
    """Run planned rounds.

    Args:
      state: the state before them; used up if `Runtime.donate`.
      planned: the rounds.
      hparams: numeric hyper-parameters, as arrays.
    """
    put = functools.partial(distributed.put, mesh=self.mesh)
    program = self.program(*planned.key)
    result: tuple[RunState, RoundMetrics] = program.compiled(
      state,
      put(hparams, specs=P()),
      planned.examples,
      put(planned.cohorts, specs=programs.COHORTS_SPEC),
      put(np.int32(planned.num_rounds), specs=P()),
      self._placed,
    )
    return result
