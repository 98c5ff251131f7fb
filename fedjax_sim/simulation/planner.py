"""Plan rounds on the host: draw cohorts and lay them out for the devices."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from fedjax_sim.core import Pass, PyTree, Sampler, errors, validate
from fedjax_sim.data import FederatedData
from fedjax_sim.engine import plan as plans
from fedjax_sim.engine import program as programs
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.engine.residency import Residency
from fedjax_sim.engine.state import RoundMetrics
from fedjax_sim.engine.virtual_devices import DeviceSplit
from fedjax_sim.privacy.accounting import promises
from fedjax_sim.simulation.dispatch import PlannedRounds, observed
from fedjax_sim.simulation.runtime import Runtime

_COPIES = 4  # of rows: sent and returned, on the devices and on the host
TARGET_SECONDS = 1.0  # of one dispatch, if its number of rounds is free


def rounds_per_dispatch(
  fixed: int | None, seconds: float, done: int, last: int, stops: Sequence[int]
) -> int:
  """Return how many rounds to plan for the next dispatch.

  Args:
    fixed: as many as this; None for about `TARGET_SECONDS`.
    seconds: what a round takes.
    done: number of rounds done.
    last: number of the run's last round.
    stops: a dispatch ends at every multiple of these numbers.
  """
  most = max(1, int(TARGET_SECONDS / seconds)) if fixed is None else fixed
  return min([most, last - done, *(s - done % s for s in stops)])


def batchings_of(
  batching: LocalBatching,
  passes: Sequence[Pass],
  splits: Sequence[FederatedData],
) -> list[LocalBatching]:
  """Return for every pass what a client does, with batches that it can fill.

  Args:
    batching: what a client does in a round.
    passes: passes of the algorithm.
    splits: for every pass, the data that it goes through.

  Raises:
    ValueError: the algorithm does not count tokens, as `work` asks for, or a
      client has no batch.
  """
  most = batching.max_tokens
  ends = [p.tokens for p in passes if p.epochs is None and p.steps is None]
  if most is not None and (not ends or None in ends):
    raise ValueError(
      f"client.max_tokens={most}: algorithm.name has local steps that do not"
      " count tokens, or a fixed number of them; unset it by"
      " --config.client.max_tokens=None, or take another algorithm."
    )
  batchings = []
  for p, data in zip(passes, splits, strict=True):
    own = batching
    if p.epochs is not None or p.steps is not None:
      own = LocalBatching(
        batch_size=batching.batch_size,
        epochs=p.epochs or 1,
        steps=p.steps,
        shuffle=batching.shuffle,
      )
    batchings.append(own.fitted(data.sizes))
  return batchings


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Cohorts:
  """Draws the clients of every round, and shows the sampler what they report.

  Attributes:
    sampler: who takes part in a round.
    seed: seed of the run.
    num_clients: number of clients that may take part.
    held: whether what is drawn is held against what the sampler promises, on
      which nothing but what is told of privacy depends.
  """

  sampler: Sampler
  seed: int
  num_clients: int
  held: bool = True

  @property
  def observes(self) -> bool:
    """Whether a round's cohort depends on the rounds before."""
    return self.sampler.observe is not None

  def first_state(self) -> PyTree:
    """Return the sampler's state before the first round; () without one.

    Raises:
      TypeError: a leaf is no array of numbers.
    """
    if self.sampler.init is None:
      return ()
    state = jax.tree.map(np.array, self.sampler.init())
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
      if leaf.dtype.kind not in "biuf":
        raise TypeError(
          f"sampler.name: Sampler.init: {jax.tree_util.keystr(path)} has"
          f" dtype {leaf.dtype}; give an array of numbers, which a checkpoint"
          " can keep."
        )
    return state

  def after(
    self, state: PyTree, planned: PlannedRounds, metrics: RoundMetrics
  ) -> PyTree:
    """Return the sampler's state after a round; the same if it has none.

    Args:
      state: the state before the round.
      planned: the round, a single one.
      metrics: on the host, with a leading axis of rounds.

    Raises:
      ValueError: the sampler fails, or the state has another shape or dtype.
    """
    if self.sampler.observe is None:
      return state
    kind = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    done, seen = planned.first, observed(planned, metrics)
    try:
      new = self.sampler.observe(state, done, *seen)
      new = jax.tree.map(np.asarray, new)
      if kind(new) != kind(state):
        raise ValueError(
          f"Sampler.observe returned {kind(new)}, and the state was"
          f" {kind(state)}; keep structure, shapes and dtypes."
        )
    except Exception as error:
      raise ValueError(
        f"sampler.name: round {done + 1}: {errors.raised(None, error)}"
      ) from error
    return new

  def draw(self, done: int, state: PyTree = ()) -> np.ndarray:
    """Return the ids of the clients in the round after `done` rounds.

    Args:
      done: number of rounds done before it.
      state: the sampler's state; () without one.

    Raises:
      ValueError: the sampler fails, or its ids are no cohort.
    """
    known = (state,) if self.observes else ()
    try:
      ids = self.sampler.sample(self.seed, done, *known)
      return validate.cohort(ids, self.num_clients)
    except Exception as error:
      raise ValueError(
        f"sampler.name: round {done + 1}: {errors.raised(None, error)}"
      ) from error

  def size(self, ids: np.ndarray) -> int:
    """Return the smallest of the sampler's sizes that holds a cohort.

    Raises:
      ValueError: none does.
    """
    for size in self.sampler.sizes:
      if len(ids) <= size:
        return size
    raise ValueError(
      f"sampler.name: {len(ids)} clients were drawn; `sizes` say at most"
      f" {self.sampler.sizes[-1]}."
    )

  @functools.cached_property
  def _witness(self) -> promises.Witness | None:
    """The witness that tests the sampler's promise; None without one."""
    if self.sampler.participation is None or not self.held:
      return None
    return promises.Witness(self.sampler, self.num_clients, self.seed)

  def check(self, first: int, cohorts: Sequence[np.ndarray]) -> None:
    """Hold cohorts against what the sampler promises.

    Args:
      first: number of rounds done before them.
      cohorts: ids of the clients, round by round.

    Raises:
      ValueError: the sampler breaks its promise.
    """
    if self._witness is not None:
      for i, cohort in enumerate(cohorts):
        self._witness.check(first + i, cohort)

  def versions(
    self, first: int, cohorts: Sequence[np.ndarray]
  ) -> list[np.ndarray]:
    """Return which version of the message each client of each round gets.

    Args:
      first: number of rounds done before them.
      cohorts: ids of the clients, round by round.
    """
    return [
      self.sampler.versions(self.seed, first + i, cohort)
      for i, cohort in enumerate(cohorts)
    ]

  def byzantine(
    self, first: int, cohorts: Sequence[np.ndarray]
  ) -> list[np.ndarray] | None:
    """Return which clients of each round attack; None: nobody ever does.

    Args:
      first: number of rounds done before them.
      cohorts: ids of the clients, round by round.
    """
    attacks = self.sampler.byzantine
    if attacks is None:
      return None
    return [
      attacks(self.seed, first + i, cohort) for i, cohort in enumerate(cohorts)
    ]

  def weights(
    self, first: int, cohorts: Sequence[np.ndarray], state: PyTree = ()
  ) -> list[np.ndarray] | None:
    """Return the factors of the weights of each client of each round.

    Args:
      first: number of rounds done before them.
      cohorts: ids of the clients, round by round.
      state: the sampler's state; () without one.

    Raises:
      ValueError: the sampler fails, or a factor is not a positive number.
    """
    if self.sampler.weights is None:
      return None
    known = (state,) if self.observes else ()
    found = []
    for i, ids in enumerate(cohorts):
      made = self.sampler.weights(self.seed, first + i, ids, *known)
      factors = np.asarray(made, np.float64)
      fits = factors.shape == ids.shape and (factors > 0).all()
      if not fits or not np.isfinite(factors).all():
        raise ValueError(
          f"sampler.name: round {first + i + 1}: Sampler.weights returned"
          f" {factors!r}; give each client of the cohort a number above 0."
        )
      found.append(factors)
    return found


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Planner:
  """Lays out rounds for the devices.

  Attributes:
    cohorts: draws the clients of every round.
    splits: for every pass, the data that it goes through.
    batchings: for every pass, what a client does.
    split: the devices, real or virtual, that clients are assigned to.
    residency: where the training examples are.
    runtime: how many rounds one call may run.
    row_bytes: what a call is sent of each client's state; 0 for nothing.
  """

  cohorts: Cohorts
  splits: Sequence[FederatedData]
  batchings: Sequence[LocalBatching]
  split: DeviceSplit
  residency: Residency
  runtime: Runtime
  row_bytes: int = 0

  @functools.cached_property
  def _shapes(self) -> dict[tuple[int, int], programs.Shape]:
    return {}

  def shape(self, lanes: int, size: int) -> programs.Shape:
    """Return the shape of the plans.

    Args:
      lanes: number of clients that a device trains at once.
      size: size of the largest cohort, one of the sampler's.
    """
    if (lanes, size) not in self._shapes:  # it looks at every client
      capacity = plans.capacity(
        [data.sizes for data in self.splits],
        self.batchings,
        size,
        lanes=lanes,
        devices=self.split.devices,
        idle=self.split.idle,
      )
      self._shapes[lanes, size] = programs.shape_of(
        capacity,
        len(self.batchings),
        1 if self.cohorts.observes else self.runtime.rounds_per_dispatch,
        self.runtime.most_rounds,
        self.residency.bytes_per_round(capacity)
        + _COPIES * self.row_bytes * size // self.split.devices,
      )
    return self._shapes[lanes, size]

  def waiting_bytes(self, lanes: int, size: int) -> int:
    """Return the bytes on a device of the call that waits for its turn.

    Args:
      lanes: number of clients that a device trains at once.
      size: size of the largest cohort, one of the sampler's.
    """
    shape = self.shape(lanes, size)
    return shape.rounds * self.residency.bytes_per_round(shape.capacity)

  def plan(
    self,
    first: int,
    most: int,
    lanes: int,
    planned: Callable[[int], object] = lambda round_: None,
    state: PyTree | None = None,
  ) -> PlannedRounds:
    """Draw and lay out the rounds that follow `first` rounds.

    Args:
      first: number of rounds done before them.
      most: number of rounds; fewer if one call cannot run as many. A single
        one if the sampler observes, as it decides on the next.
      lanes: number of clients that a device trains at once.
      planned: called with the number of every round that is planned, for work
        that the host can do while the devices are busy.
      state: the sampler's state after those rounds, needed if it observes.

    Raises:
      ValueError: the sampler fails, breaks its promise, or observes and no
        state is given.
    """
    if self.cohorts.observes and state is None:
      raise ValueError(
        f"sampler.name observes, so who takes part in round {first + 1}"
        " depends on the rounds before; call plan(first, most, state=state)."
      )
    began = time.perf_counter()
    ids = [self.cohorts.draw(first, state)]
    most = 1 if self.cohorts.observes else most
    size = self.cohorts.size(ids[0])
    shape = self.shape(lanes, size)
    for i in range(1, min(most, shape.rounds)):
      more = self.cohorts.draw(first + i)
      if self.cohorts.size(more) != size:
        break  # it runs in another program
      ids.append(more)
    self.cohorts.check(first, ids)
    laid_out, slices = plans.plan_rounds(
      [data.offsets for data in self.splits],
      self.batchings,
      ids,
      shape.capacity,
      seed=self.cohorts.seed,
      first=first,
      rounds=shape.rounds,
      versions=self.cohorts.versions(first, ids),
      weights=self.cohorts.weights(first, ids, state),
      byzantine=self.cohorts.byzantine(first, ids),
      sliced=self.residency.sliced,
    )
    for i in range(len(ids)):
      planned(first + i + 1)
    return PlannedRounds(
      first=first,
      num_rounds=len(ids),
      cohorts=laid_out,
      # Here, so that they travel while devices work on the call before.
      examples=self.residency.put(
        self.residency.gather(slices, shape.capacity, shape.rounds)
      ),
      key=(lanes, size),
      waste=plans.waste(laid_out, self.batchings, self.split.each),
      seconds=time.perf_counter() - began,
      attacked=self.cohorts.sampler.byzantine is not None,
    )
