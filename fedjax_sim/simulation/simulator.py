"""A federated experiment: sample, plan, dispatch, read metrics, evaluate.

`Simulator` holds what does not change in a run; `RunState` is what does. It
puts together modules that take what they need as arguments, and are its
attributes: `account` counts epsilon, `planner` draws and lays out rounds,
`choose_lanes` chooses how many clients a device trains at once, `compiler`
compiles rounds and calls them, `states` makes and moves states, `evaluate`
evaluates them, and `react` says what follows. `arguments` and `preflight`
refuse what cannot run, and `pipeline` plans ahead.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from fedjax_sim import aggregators, core, distributed
from fedjax_sim.core import Aggregator, Algorithm, HParams, Task, Transform
from fedjax_sim.data import FederatedData, FederatedDataset
from fedjax_sim.engine import residency as residencies
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.engine.hparams import Schedule
from fedjax_sim.engine.state import RunState
from fedjax_sim.engine.traffic import Traffic, traffic
from fedjax_sim.engine.virtual_devices import DeviceSplit, split_devices
from fedjax_sim.privacy.central import guard
from fedjax_sim.simulation import account as accounts
from fedjax_sim.simulation import arguments, pipeline, preflight
from fedjax_sim.simulation.compiler import Compiler, round_spec
from fedjax_sim.simulation.dispatch import (
  DispatchResult,
  PlannedRounds,
  check_follows,
  dispatched,
  read_metrics,
)
from fedjax_sim.simulation.evaluator import Evaluator, Reaction, directions
from fedjax_sim.simulation.lanes import Chooser, Trial
from fedjax_sim.simulation.planner import (
  Cohorts,
  Planner,
  batchings_of,
  rounds_per_dispatch,
)
from fedjax_sim.simulation.run_hparams import default_hparams
from fedjax_sim.simulation.runtime import Runtime
from fedjax_sim.simulation.state import States, copier
from fedjax_sim.simulation.timing import Phases
from fedjax_sim.training import schedules


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Simulator:
  """A federated experiment, apart from its state.

  Attributes:
    task: what is trained and evaluated.
    algorithm: how clients train and the server reacts.
    data: federated data; an algorithm that pools data gets their union.
    sampler: who takes part in a round.
    batching: what a client does in a round.
    aggregator: how updates become one.
    transforms: what happens to a client's update, in order.
    seed: the run's seed, 0 to 2**32 - 1.
    noise_seed: seed of private noise, 0 to 2**32 - 1. Whoever knows it can take
      the noise off, so fix it in simulations only. None for 64 bits of the
      operating system's entropy, new for every `init`, which the state keeps.
    runtime: how fast it goes.
    schedules: hyper-parameter, such as `client.learning_rate` -> what
      multiplies it: a `Schedule`, or a function of the rounds done.
    best_metrics: metrics, such as `test/loss`: of each the best model is kept.
    revert_to_best: after a model no better by the first, go on with its best.
    log_clients: fill `DispatchResult.client_log`; devices keep all updates.
    budget: delta and largest epsilon of a private run; None counts no epsilon.
    debug: run rounds as a Python loop over clients, see `reference.py`; slow.

  Raises:
    TypeError, ValueError: arguments that do not fit each other.
  """

  task: Task
  algorithm: Algorithm
  data: FederatedDataset
  sampler: core.Sampler
  batching: LocalBatching = LocalBatching()
  aggregator: Aggregator = aggregators.weighted_mean()
  transforms: Sequence[Transform] = ()
  seed: int = 0
  noise_seed: int | None = None
  runtime: Runtime = Runtime()
  schedules: Mapping[str, Schedule | Callable[[Any], Any]] = dataclasses.field(
    default_factory=dict
  )
  best_metrics: Sequence[str] = ()
  revert_to_best: bool = False
  log_clients: bool = False
  budget: guard.Budget | None = None
  debug: bool = False

  def __post_init__(self) -> None:
    arguments.check(vars(self))
    _ = self._schedules
    self._check_privacy()
    _ = self.batchings  # checks that every client has a batch

  def _check_privacy(self) -> None:
    accounts.check_budget(self.algorithm, self.budget)
    release, noisy = self.algorithm.privacy, self.aggregator.draws_noise
    if release is None and (noisy or self.algorithm.draws_noise):
      parts = self.algorithm, self.aggregator, self.transforms, self.states
      accounts.check_noised(*parts)
    if release is None:
      return
    guard.check_noise(release, self.hparams["algorithm"], self.sampler)
    params, reverts = self.states.variables.params, self.revert_to_best
    guard.check(self.transforms, params, self._schedules, release, reverts)
    accounts.check_unwatched(self.best_metrics, self._schedules)
    self.account.check_ledger(self.seed, self.states.num_sent)

  @functools.cached_property
  def account(self) -> accounts.Account:
    """The account, which counts the epsilon of a private run."""
    return accounts.Account(
      release=self.algorithm.privacy,
      budget=self.budget,
      sampler=self.sampler,
      num_clients=self.num_clients,
    )

  @property
  def group_aggregator(self) -> Aggregator:
    """The aggregator of one group: a plain sum if the algorithm is private."""
    private = self.algorithm.privacy is not None
    return aggregators.sum_() if private else self.aggregator

  @property
  def effective_aggregator(self) -> Aggregator:
    """The aggregator in use, of all groups of clients."""
    groups = self.algorithm.requirements.groups
    return aggregators.grouped(self.group_aggregator, groups)

  @property
  def num_clients(self) -> int:
    """Number of clients that may train."""
    pooled = self.algorithm.requirements.pools_data
    return 1 if pooled else self.data.train.num_clients

  @functools.cached_property
  def splits(self) -> list[FederatedData]:
    """The data that each pass of the algorithm goes through."""
    named = self.data.all_splits
    if self.algorithm.requirements.pools_data:
      named = {name: data.pooled() for name, data in named.items()}
    return [named[p.split] for p in self.algorithm.all_passes]

  @functools.cached_property
  def batchings(self) -> list[LocalBatching]:
    """What a client does in each pass."""
    return batchings_of(self.batching, self.algorithm.all_passes, self.splits)

  @functools.cached_property
  def mesh(self) -> Mesh:
    """The devices, on the axis `clients`, and on `model` if they share one."""
    runtime = self.runtime
    return distributed.make_mesh(runtime.devices, runtime.model_devices)

  @functools.cached_property
  def _split(self) -> DeviceSplit:
    """The devices, real or virtual, that plans assign clients to."""
    virtual = self.runtime.deterministic_reduction
    return split_devices(distributed.size(self.mesh), virtual)

  @functools.cached_property
  def choose_lanes(self) -> Chooser:
    """The chooser of how many clients a device trains at once."""
    init = lambda: jax.block_until_ready(self.init())
    first = self.planner.cohorts.first_state
    return Chooser(
      wanted=1 if self.debug else self.runtime.lanes,
      trial=Trial(
        plan=lambda done, size: self.planner.plan(done, 1, size, state=first()),
        program=self.compiler.program,
        waiting_bytes=self.planner.waiting_bytes,
        seconds=lambda planned: self.dispatch(init(), planned).seconds,
      ),
      cohort_size=self.sampler.sizes[0],
      mesh=self.mesh,
    )

  @functools.cached_property
  def hparams(self) -> HParams:
    """The run's numeric hyper-parameters at their defaults, by section."""
    return default_hparams(
      self.task, self.algorithm, self.effective_aggregator, self.transforms
    )

  @functools.cached_property
  def _schedules(self) -> dict[str, Schedule]:
    return schedules.checked(self.schedules, self.hparams)

  @functools.cached_property
  def checked(self) -> bool:
    """Whether the model fits the data and the devices; nothing is compiled.

    Raises:
      DataError: the data hold numbers beyond the dtypes that JAX keeps.
      ModelError: the model does not fit.
      ValueError: a round has too many examples, or the aggregator does not
        keep to its contract.
    """
    preflight.check(
      task=self.task,
      data=self.data,
      splits=self.splits,
      batching=self.batching,
      batchings=self.batchings,
      most_clients=self.sampler.sizes[-1],
      variables=self.states.variables,
      state=self.states.placed,
      aggregator=self.group_aggregator,
      mesh=self.mesh,
      eval_batch_size=self.runtime.eval_batch_size,
    )
    _ = self._higher_is_better
    return True

  @property
  def slow_layers(self) -> list[str]:
    """Which layers are slow on this backend and what mends them, in words."""
    return preflight.slow_layers(
      self.task, self.states.variables, self.data, self.batchings
    )

  def trace(self) -> None:
    """Trace a round, as compiling it does first.

    Raises:
      ValueError: the algorithm, or another part, refuses what it is given.
    """
    cohorts, wanted = self.planner.cohorts, self.runtime.lanes
    _ = cohorts.size(cohorts.draw(0, cohorts.first_state()))
    lanes = 1 if wanted == "auto" else wanted
    self.compiler.trace(lanes, self.sampler.sizes[-1])

  @functools.cached_property
  def _higher_is_better(self) -> dict[str, bool]:
    """For every metric that is followed, whether higher is better."""
    return directions(
      self._schedules,
      self.best_metrics,
      task=self.task,
      models=lambda: self.states.models,
      data=self.data,
    )

  @functools.cached_property
  def states(self) -> States:
    """The maker of states, which also moves them between devices and host."""
    return States(
      algorithm=self.algorithm,
      transforms=self.transforms,
      schedules=self._schedules,
      hparams=self.hparams,
      best_metrics=self.best_metrics,
      seed=self.seed,
      noise_seed=self.noise_seed,
      draws_noise=self.algorithm.draws_noise or self.aggregator.draws_noise,
      num_clients=self.num_clients,
      mesh=self.mesh,
      sampler=lambda: self.planner.cohorts.first_state(),
      keeps_aggregate=self.effective_aggregator.keeps_previous,
      runtime=self.runtime,
    )

  def init(self, hparams: HParams | None = None) -> RunState:
    """Return the state before the first round.

    Raises:
      ValueError: `checked` refuses something.
    """
    _ = self.checked
    return self.states.init(hparams)

  @functools.cached_property
  def traffic(self) -> Traffic:
    """What one client receives and sends in a round, before transforms."""
    hparams = self.states.traced()["algorithm"]
    of = self.algorithm, self.states.shapes, hparams, self.num_clients
    return traffic(*of, self.aggregator.number_bits)

  @functools.cached_property
  def residency(self) -> residencies.Residency:
    """Where the training examples are."""
    of = self.algorithm.all_passes, self.splits, self.mesh, self._split.each
    return residencies.residency(self.runtime.residency, *of)

  @functools.cached_property
  def planner(self) -> Planner:
    """The planner, which draws cohorts and lays out rounds on the host."""
    return Planner(
      cohorts=Cohorts(
        sampler=self.sampler,
        seed=self.seed,
        num_clients=self.num_clients,
        held=arguments.is_private(self.algorithm, self.aggregator),
      ),
      splits=self.splits,
      batchings=self.batchings,
      split=self._split,
      residency=self.residency,
      runtime=self.runtime,
      row_bytes=self.states.sent_row_bytes,
    )

  @functools.cached_property
  def compiler(self) -> Compiler:
    """The compiler, which compiles rounds and calls them."""
    return Compiler(
      spec=round_spec(
        self.algorithm,
        self.effective_aggregator,
        self.transforms,
        data=self.data,
        batchings=self.batchings,
        schedules=self._schedules,
        residency=self.residency,
        mesh=self.mesh,
        virtual=self.runtime.deterministic_reduction,
        num_clients=self.account.public_clients,
        log_clients=self.log_clients,
        observes=self.planner.cohorts.observes,
      ),
      shape=self.planner.shape,
      state=self.states.shapes,
      hparams=self.states.traced(),
      server_data=self.data.server,
      residency=self.residency,
      donate=self.runtime.donate,
      rows=self.states.rows,
      debug=self.debug,
    )

  @property
  def compilations(self) -> int:
    """How often the round was compiled; lanes only tried not counted."""
    chosen = self.choose_lanes().lanes
    return sum(lanes == chosen for lanes, _ in list(self.compiler.compiled))

  def plan(
    self,
    first: int,
    most: int,
    lanes: int | None = None,
    state: RunState | None = None,
  ) -> PlannedRounds:
    """Draw and lay out, on the host, the rounds that follow `first` rounds.

    Args:
      first: number of rounds done before them.
      most: number of rounds; fewer if one call cannot run as many.
      lanes: number of clients that a device trains at once; None to choose.
      state: the state after `first` rounds, needed if the sampler observes.

    Raises:
      ValueError: the sampler fails, or it observes and no state is given.
    """
    lanes = self.choose_lanes().lanes if lanes is None else lanes
    # Epsilons are counted here, while the devices work.
    count = self.account.epsilon_row
    known = state and state.sampler
    return self.planner.plan(first, most, lanes, planned=count, state=known)

  def dispatch(
    self,
    state: RunState,
    planned: PlannedRounds,
    hparams: HParams | None = None,
    phases: Phases | None = None,
  ) -> DispatchResult:
    """Run planned rounds in one call.

    Args:
      state: the state before them; used up if `Runtime.donate`.
      planned: the rounds that follow it.
      hparams: sections of `hparams` with other values; None for the defaults.
      phases: measures compiling and training; None if nobody asks.

    Raises:
      ValueError: the plan is of other rounds.
    """
    phases = Phases() if phases is None else phases
    with phases("compile"):
      sent_bytes = self.compiler.prepare(planned)  # compiling is not running
    done = int(jax.device_get(state.round))
    check_follows(planned, done)
    self.account.check_round(done + planned.num_rounds)
    step = jax.profiler.StepTraceAnnotation("dispatch", step_num=done)
    with phases("train"), step:
      began = time.perf_counter()
      numbers = self.states.traced(hparams)
      state, metrics = self.compiler.call(state, planned, numbers)
      metrics = jax.device_get(metrics)
      seconds = time.perf_counter() - began
    names = [t.name for t in self.transforms]
    read = read_metrics(metrics, planned, self.traffic, names)
    if read.failure is None:
      after = self.planner.cohorts.after(state.sampler, planned, metrics)
      state = state._replace(sampler=after)
    for row in read.rows:
      row |= self.account.epsilon_row(int(row["round"]))
    return dispatched(state, planned, read, seconds, sent_bytes)

  def run(
    self,
    state: RunState,
    last: int,
    *,
    stops: Sequence[int] = (),
    hparams: HParams | None = None,
    phases: Phases | None = None,
    singles: int = 0,
  ) -> Generator[DispatchResult, RunState | None, None]:
    """Run until round `last`, one dispatch after the other.

    The next one is planned while the devices work, unless the sampler observes.
    It goes on with the state that is sent (`generator.send`), or with its own.
    A private run ends where its budget does.

    Args:
      state: the state to go on with; used up if `Runtime.donate`.
      last: number of the round to end with.
      stops: a dispatch ends at every multiple of these numbers.
      hparams: sections of `hparams` with other values; None for the defaults.
      phases: measures waiting for plans, compiling, training.
      singles: number of first dispatches of one round each, to be profiled.

    Raises:
      DivergedError: in a round no finite update, or no finite model, was left;
        after the rounds before it were yielded.
    """
    began = int(jax.device_get(state.round))
    phases = Phases() if phases is None else phases
    last = self.account.rounds_within_budget(last)
    # Here, not in the thread that plans.
    self.choose_lanes(last - began, phases)

    def count(done: int, seconds: float) -> int:
      single = done < began + singles
      fixed = 1 if single else self.runtime.rounds_per_dispatch
      return rounds_per_dispatch(fixed, seconds, done, last, stops)

    dispatches = pipeline.run(
      state,
      began,
      last,
      count=count,
      plan=lambda state, done, most: self.plan(done, most, state=state),
      dispatch=lambda state, made: self.dispatch(state, made, hparams, phases),
      phases=phases,
      ahead=not self.planner.cohorts.observes,
    )
    del state  # else it would live as long as the run
    yield from dispatches

  @functools.cached_property
  def evaluate(self) -> Evaluator:
    """The evaluator of states on the test set, seen and unseen clients."""
    return Evaluator(
      task=self.task,
      algorithm=self.algorithm,
      data=self.data,
      batchings=self.batchings,
      mesh=self.mesh,
      lanes=self.choose_lanes,
      batch_size=self.runtime.eval_batch_size,
      asked=self.runtime.residency,
      residency=self.residency.name,
      rows=self.states.rows,
    )

  @functools.cached_property
  def react(self) -> Reaction:
    """The reaction to an evaluation, which gives the state after it."""
    return Reaction(
      algorithm=self.algorithm,
      schedules=self._schedules,
      higher_is_better=self._higher_is_better,
      best_metrics=self.best_metrics,
      revert_to_best=self.revert_to_best,
      mesh=self.mesh,
      shapes=self.states.shapes,
      spec=self.states.spec,
      copied=copier(self.mesh, self.states.spec.server),
    )
