"""Compile rounds for the plans of a run, trace them, and call them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from fedjax_sim import distributed
from fedjax_sim.core import Aggregator, Algorithm, PyTree, Transform
from fedjax_sim.data import FederatedDataset
from fedjax_sim.engine import program as programs
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.engine.client_loop import PassSpec
from fedjax_sim.engine.hparams import Schedule
from fedjax_sim.engine.residency import Residency
from fedjax_sim.engine.round import make_rounds
from fedjax_sim.engine.round_spec import RoundSpec
from fedjax_sim.engine.state import RoundMetrics, RunState
from fedjax_sim.simulation import preflight, reference
from fedjax_sim.simulation.dispatch import PlannedRounds
from fedjax_sim.simulation.row_store import RowStore

RoundFunction = Callable[..., tuple[RunState, RoundMetrics]]


def round_spec(
  algorithm: Algorithm,
  aggregator: Aggregator,
  transforms: Sequence[Transform],
  *,
  data: FederatedDataset,
  batchings: Sequence[LocalBatching],
  schedules: Mapping[str, Schedule],
  residency: Residency,
  mesh: Mesh,
  virtual: int | None,
  num_clients: int,
  log_clients: bool,
  observes: bool,
) -> RoundSpec:
  """Return the constants of a run's rounds.

  Args:
    algorithm: how clients train and the server reacts.
    aggregator: how updates become one.
    transforms: transforms of the client updates.
    data: federated data, whose `prepare` and `augment` apply to batches.
    batchings: for every pass, what a client does.
    schedules: hyper-parameter -> its schedule.
    residency: where the training examples are.
    mesh: the devices.
    virtual: number of virtual devices that stand for them; None for none.
    num_clients: number of clients that the algorithm may know of.
    log_clients: whether what each client did is kept.
    observes: whether a sampler observes what clients report.
  """
  return RoundSpec(
    algorithm=algorithm,
    aggregator=aggregator,
    transforms=transforms,
    walks=[
      PassSpec(
        source,
        batching.batch_size,
        data.prepare,
        data.augment if walked.augmented else None,
        batching.max_tokens,
      )
      for walked, source, batching in zip(
        algorithm.all_passes, residency.sources, batchings, strict=True
      )
    ],
    num_clients=num_clients,
    prepare=data.prepare,
    mesh=mesh,
    sliced=residency.sliced,
    virtual=virtual,
    schedules=schedules,
    log_clients=log_clients,
    observes=observes,
  )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Compiler:
  """Compiles rounds for the shapes of plans, and calls them.

  Attributes:
    spec: the constants of the rounds.
    shape: (lanes, cohort size) -> the shape of the plans.
    state: shapes and dtypes of a state.
    hparams: numeric hyper-parameters, as arrays.
    server_data: examples of the server's own; None if it has none.
    residency: where the training examples are.
    donate: whether states that are passed in are used up.
    rows: client states on the disk; None if they are on the devices.
    debug: whether `call` runs the reference, and nothing is compiled.
  """

  spec: RoundSpec
  shape: Callable[[int, int], programs.Shape]
  state: RunState
  hparams: PyTree
  server_data: PyTree
  residency: Residency
  donate: bool
  rows: RowStore | None = None
  debug: bool = False

  @functools.cached_property
  def function(self) -> RoundFunction:
    """The function that is compiled, as `make_rounds` returns it."""
    return make_rounds(self.spec)

  @functools.cached_property
  def traced(self) -> dict[tuple[int, int], jax.stages.Traced]:
    """(lanes, cohort size) -> what was traced for them, but not compiled."""
    return {}

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
      self.compiled[lanes, size] = self._compile(lanes, size)
    return self.compiled[lanes, size]

  def prepare(self, planned: PlannedRounds) -> float | None:
    """Compile what planned rounds need, unless `debug`.

    Returns:
      Bytes that a device sends to the others in each round; None if unknown.
    """
    return None if self.debug else self.program(*planned.key).sent_bytes

  def trace(self, lanes: int, size: int) -> None:
    """Trace the rounds; compiling them goes on from there.

    Args:
      lanes: as in `program`.
      size: as in `program`.

    Raises:
      ValueError: the algorithm, or another part, refuses what it is given.
    """
    shape, called = self.shape(lanes, size), self._called(lanes, size)
    trace = functools.partial(self._trace, shape, called)
    self.traced[lanes, size] = preflight.check_round(trace)

  def _called(self, lanes: int, size: int) -> RunState:
    """Return shapes and dtypes of the state that a call gets."""
    if self.rows is None:
      return self.state
    rounds, devices = self.shape(lanes, size).rounds, self.spec.mesh
    count = self.rows.most_rows(rounds * size, distributed.size(devices))
    return self.state._replace(clients=self.rows.call_shapes(count))

  def _trace(
    self, shape: programs.Shape, called: RunState
  ) -> jax.stages.Traced:
    return programs.trace_rounds(
      self.function,
      shape,
      state=called,
      hparams=self.hparams,
      data=self.residency.shapes(shape.capacity, shape.rounds),
      data_spec=self.residency.spec,
      server_data=self.server_data,
      mesh=self.spec.mesh,
      donate=self.donate,
    )

  def _compile(self, lanes: int, size: int) -> programs.Program:
    shape = self.shape(lanes, size)
    called = self._called(lanes, size)
    traced = self.traced.pop((lanes, size), None) or self._trace(shape, called)
    mesh, deterministic = self.spec.mesh, self.spec.virtual is not None
    return programs.compile_rounds(
      traced, shape, mesh, deterministic=deterministic
    )

  @functools.cached_property
  def _placed(self) -> PyTree:
    """Return the server's own examples, whole on every device."""
    return distributed.put(self.server_data, self.spec.mesh, P())

  def call(
    self, state: RunState, planned: PlannedRounds, hparams: PyTree
  ) -> tuple[RunState, RoundMetrics]:
    """Run planned rounds.

    Args:
      state: the state before them; used up if `Runtime.donate`.
      planned: the rounds.
      hparams: numeric hyper-parameters, as arrays.

    Raises:
      StageError: a function of the round failed, with `debug`.
      RowsError, OSError: client states on the disk cannot be read or written.
    """
    bare = state._replace(sampler=())  # it stays on the host
    put = functools.partial(distributed.put, mesh=self.spec.mesh)
    called = self._called(*planned.key)
    spec = programs.state_spec(called, self.spec.mesh)
    if self.rows is not None:
      count, clients = len(called.clients.ids), planned.cohorts.client
      some = self.rows.gather(state.clients, clients, count)
      bare = bare._replace(clients=put(some, specs=spec.clients))
    if self.debug:
      after, metrics = reference.run_rounds(
        self.spec, bare, hparams, planned, self.server_data
      )
      after = put(after, specs=spec)
    else:
      after, metrics = self.program(*planned.key).compiled(
        bare,
        put(hparams, specs=P()),
        planned.examples,
        put(planned.cohorts, specs=programs.COHORTS_SPEC),
        put(np.int32(planned.num_rounds), specs=P()),
        self._placed,
      )
    if self.rows is not None:
      trained = jax.device_get(after.clients)
      after = after._replace(clients=self.rows.scatter(state.clients, trained))
    return after._replace(sampler=state.sampler), metrics
