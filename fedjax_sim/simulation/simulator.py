"""A federated experiment: sample, plan, dispatch, read metrics, evaluate.

`Simulator` holds what does not change in a run and the programs compiled for
it; `RunState` is what does. It puts together modules that take what they need
as arguments: `arguments` and `preflight` refuse what cannot run, `account`
counts epsilon, `planner` draws and lays out rounds, `lanes` chooses how many
clients a device trains at once, `compiler` compiles rounds and calls them,
`pipeline` plans ahead, `state` makes and moves states, `evaluator` evaluates.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from fedjax_sim import aggregators, core, distributed
from fedjax_sim.core import (
  Aggregator,
  Algorithm,
  HParams,
  PyTree,
  Task,
  Transform,
  Variables,
  validate,
)
from fedjax_sim.data import FederatedData, FederatedDataset
from fedjax_sim.engine import plan as plans
from fedjax_sim.engine import program as programs
from fedjax_sim.engine import residency as residencies
from fedjax_sim.engine.batching import LocalWork
from fedjax_sim.engine.client_metrics import ClientMetrics
from fedjax_sim.engine.evaluation import EvaluationSet
from fedjax_sim.engine.hparams import Schedule
from fedjax_sim.engine.program import Program
from fedjax_sim.engine.state import RoundMetrics, RunState
from fedjax_sim.engine.traffic import Traffic, traffic
from fedjax_sim.privacy import accounting
from fedjax_sim.privacy.central import audit as audits
from fedjax_sim.privacy.central import guard
from fedjax_sim.simulation import (
  account,
  arguments,
  compiler,
  evaluator,
  lanes,
  monitor,
  pipeline,
  planner,
  preflight,
)
from fedjax_sim.simulation import state as states
from fedjax_sim.simulation.dispatch import (
  Dispatch,
  Planned,
  Row,
  dispatched,
  observed,
  read_metrics,
)
from fedjax_sim.simulation.runtime import Runtime
from fedjax_sim.simulation.timing import Phases
from fedjax_sim.training import schedules


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Simulator:
  """A federated experiment, apart from its state.

  Attributes:
    task: what is trained and evaluated.
    algorithm: how clients train and the server reacts.
    data: federated data; an algorithm that is `pooled` gets their union.
    sampler: who takes part in a round.
    work: what a client does in a round.
    aggregator: how updates become one.
    transforms: what happens to a client's update, in order.
    seed: the run's seed, 0 to 2**32 - 1.
    noise_seed: seed of private noise, 0 to 2**32 - 1. Whoever knows it can take
      the noise off, so fix it in simulations only. None for 64 bits of the
      operating system's entropy, new for every `init`, which the state keeps.
    runtime: how fast it goes.
    schedules: hyper-parameter, such as `client.learning_rate` -> what
      multiplies it: a `Schedule`, or a function of the rounds done.
    best_metric: metric of an evaluation, such as `unseen/accuracy`; the state
      keeps the model with the best value. None to keep none.
    fall_back: go on with the best model after an evaluation without a better
      value.
    log_clients: fill `Dispatch.client_log`, for which devices keep the updates
      of a round's clients.
    budget: delta, and perhaps the largest epsilon, of a private algorithm;
      every round's metrics then have its epsilon. None to count no epsilon.

  Raises:
    TypeError, ValueError: arguments that do not fit each other.
  """

  task: Task
  algorithm: Algorithm
  data: FederatedDataset
  sampler: core.Sampler
  work: LocalWork = LocalWork()
  aggregator: Aggregator = aggregators.weighted_mean()
  transforms: Sequence[Transform] = ()
  seed: int = 0
  noise_seed: int | None = None
  runtime: Runtime = Runtime()
  schedules: Mapping[str, Schedule | Callable[[Any], Any]] = dataclasses.field(
    default_factory=dict
  )
  best_metric: str | None = None
  fall_back: bool = False
  log_clients: bool = False
  budget: guard.Budget | None = None

  def __post_init__(self) -> None:
    arguments.check_seeds(self.seed, self.noise_seed)
    arguments.check_options(self.log_clients, self.fall_back, self.best_metric)
    kinds = {field: getattr(self, field) for field in arguments.KINDS}
    arguments.check_kinds(**kinds)
    arguments.check_transforms(self.transforms)
    arguments.check_parts(
      self.algorithm, self.aggregator, self.data, self.runtime
    )
    arguments.check_sampler(self.sampler, self.num_clients)
    arguments.check_unobserved(self.sampler, self.algorithm, self.aggregator)
    arguments.check_fall_back(self.fall_back, self.best_metric)
    _ = self._schedules
    self._check_privacy()
    _ = self.works  # checks that every client has a batch

  def _check_privacy(self) -> None:
    account.check_budget(self.algorithm, self.budget)
    release = self.algorithm.release
    if release is None:
      return
    guard.check_noise(release, self.hparams, self.sampler)
    guard.check(
      self.transforms,
      self._variables.params,
      self._schedules,
      release,
      self.fall_back,
    )
    self.check_unwatched()
    self._account.check_ledger(self.seed, self.num_parameters)

  def check_unwatched(self) -> None:
    """Refuse to follow metrics of training clients, as privacy requires.

    Raises:
      ValueError: names the field that follows one.
    """
    account.check_unwatched(self.best_metric, self._schedules)

  # --- what follows from the arguments ---------------------------------------

  @functools.cached_property
  def _account(self) -> account.Account:
    return account.Account(
      release=self.algorithm.release,
      budget=self.budget,
      sampler=self.sampler,
      num_clients=self.num_clients,
    )

  @property
  def ledger(self) -> accounting.Ledger | None:
    """The ledger that counts a private run's epsilon; None without one."""
    return self._account.ledger

  def spent(self, rounds: int) -> Row:
    """Return the epsilon after a number of rounds as a row of metrics.

    It is empty if no epsilon holds; see `Account.epsilon_row`.
    """
    return self._account.epsilon_row(rounds)

  def allowed(self, rounds: int) -> int:
    """Return how many of a number of rounds the privacy budget allows.

    Raises:
      ValueError: the noise was made for fewer rounds.
    """
    return self._account.rounds_within_budget(rounds)

  def audit(self, state: RunState) -> audits.Audit | None:
    """Measure what the canaries of a private run reveal; None without any."""
    return self._account.audit(state)

  @property
  def uncovered(self) -> list[str]:
    """What a run reveals of its clients that no epsilon would cover."""
    return account.uncovered(
      self.data,
      self.transforms,
      self.runtime,
      self.state_shapes.clients,
      log_clients=self.log_clients,
    )

  @property
  def joined_by(self) -> Aggregator:
    """The aggregator in use: a plain sum if the algorithm is private."""
    if self.algorithm.release is None:
      return self.aggregator
    return aggregators.sum_()

  @property
  def num_clients(self) -> int:
    """Number of clients that may train."""
    return 1 if self.algorithm.pooled else self.data.train.num_clients

  @functools.cached_property
  def splits(self) -> list[FederatedData]:
    """For every pass of the algorithm, the data that it goes through."""
    named = self.data.all_splits
    if self.algorithm.pooled:
      named = {name: data.pooled() for name, data in named.items()}
    return [named[p.split] for p in self.algorithm.passes]

  @functools.cached_property
  def works(self) -> list[LocalWork]:
    """For every pass, what a client does."""
    return planner.works_of(self.work, self.algorithm.passes, self.splits)

  @functools.cached_property
  def mesh(self) -> Mesh:
    """The devices, on the axis `clients`, and on `model` if they share one."""
    runtime = self.runtime
    return distributed.make_mesh(runtime.devices, runtime.model_devices)

  @functools.cached_property
  def _dealt(self) -> plans.Dealt:
    """The devices, real or virtual, that plans deal clients to."""
    virtual = self.runtime.deterministic_reduction
    return plans.dealt(distributed.size(self.mesh), virtual)

  @property
  def lane_choice(self) -> lanes.Choice:
    """Number of clients that a device trains at once, and why."""
    return self.choose_lanes()

  def choose_lanes(
    self, rounds: float = math.inf, phases: Phases | None = None
  ) -> lanes.Choice:
    """Return `lane_choice`; with "auto" the first call measures it.

    Args:
      rounds: number of rounds of the run, of whose time choosing takes a small
        share on a CPU; infinite if unknown.
      phases: measures what it takes; None if nobody asks.
    """
    phases = Phases() if phases is None else phases
    if not self._choices:
      with phases("lanes"):
        self._choices.append(self._choose(rounds, phases))
    return self._choices[0]

  @functools.cached_property
  def _choices(self) -> list[lanes.Choice]:
    return []

  def _choose(self, rounds: float, phases: Phases) -> lanes.Choice:
    if self.runtime.lanes != "auto":
      return lanes.Choice(self.runtime.lanes, "as given")

    def seconds(planned: Planned) -> float:
      state = jax.block_until_ready(self.init())
      return self.dispatch(state, planned).seconds

    trial = lanes.Trial(
      plan=lambda done, size: self._plan(
        self._cohorts.first_state(), done, 1, size
      ),
      program=self.program,
      waiting_bytes=self.waiting_bytes,
      seconds=seconds,
    )
    size = self.sampler.sizes[0]
    return lanes.measured(trial, size, self.mesh, rounds, phases)

  @functools.cached_property
  def hparams(self) -> HParams:
    """The run's numeric hyper-parameters at their defaults."""
    return states.default_hparams(
      self.task, self.algorithm, self.joined_by, self.transforms
    )

  @functools.cached_property
  def _schedules(self) -> dict[str, Schedule]:
    return schedules.checked(self.schedules, self.hparams)

  def _traced(self, hparams: HParams | None) -> PyTree:
    return states.traced_hparams(hparams, self.hparams, self.algorithm.release)

  @functools.cached_property
  def checked(self) -> bool:
    """Whether the model fits the data and the devices; nothing is compiled.

    Raises:
      DataError: the data hold numbers beyond the dtypes that JAX keeps.
      ModelError: the model does not fit.
      ValueError: a round has too many examples, or the aggregator does not
        keep to its contract.
    """
    preflight.check_data(
      self.task,
      self.data,
      self.splits,
      self.work,
      self.works,
      self.sampler.sizes[-1],
    )
    preflight.check_model(
      self.task,
      self._variables,
      self.joined_by,
      self.state_shapes,
      self.mesh,
      self.data,
      self.works,
      self.runtime.eval_batch_size,
    )
    _ = self._higher_is_better
    return True

  @property
  def slow_layers(self) -> list[str]:
    """Which layers are slow on this backend and what mends them, in words."""
    return preflight.slow_layers(
      self.task, self._variables, self.data, self.works
    )

  def trace(self) -> None:
    """Trace a round, as compiling it does first.

    Raises:
      ValueError: the algorithm, or another part, refuses what it is given.
    """
    first = self._cohorts.draw(0, self._cohorts.first_state())
    _ = self._cohorts.size(first)
    wanted = self.runtime.lanes
    lanes = 1 if wanted == "auto" else wanted
    shape = self._planner.shape(lanes, self.sampler.sizes[-1])
    self._compiler.trace(shape)

  @functools.cached_property
  def metric_names(self) -> dict[str, str]:
    """Metric of an evaluation -> the task's metric that it is made of."""
    metrics = preflight.metrics_of(self.task, self._variables, self.data)
    return evaluator.metric_names(metrics, self.data)

  @functools.cached_property
  def _higher_is_better(self) -> dict[str, bool]:
    """For every metric that is followed, whether higher is better."""
    wanted = evaluator.followed(self._schedules, self.best_metric)
    names = self.metric_names if wanted else {}
    return monitor.directions(wanted, names, self.task)

  # --- state -----------------------------------------------------------------

  def _init(
    self, seed: jax.Array, noise_seed: jax.Array, hparams: HParams
  ) -> RunState:
    return states.initial_state(
      seed,
      noise_seed,
      hparams,
      algorithm=self.algorithm,
      transforms=self.transforms,
      schedules=self._schedules,
      keeps_best=self.best_metric is not None,
      table_rows=states.table_rows(self.num_clients, self.mesh),
    )

  @functools.cached_property
  def _jitted_init(self) -> Callable[..., RunState]:
    where = distributed.shardings(self.mesh, self._state_spec)
    init: Callable[..., RunState] = jax.jit(self._init, out_shardings=where)
    return init

  def init(self, hparams: HParams | None = None) -> RunState:
    """Return the state before the first round.

    Raises:
      ValueError: `checked` refuses something.
    """
    _ = self.checked
    words = states.noise_words(self.noise_seed, self.draws_noise)
    state = self._jitted_init(
      np.uint32(self.seed), words, self._traced(hparams)
    )
    return state._replace(sampler=self._cohorts.first_state())

  @property
  def draws_noise(self) -> bool:
    """Whether any private noise is drawn."""
    return self.algorithm.draws_noise or self.joined_by.draws_noise

  @property
  def noise_origin(self) -> str:
    """Where private noise comes from, for summaries; "" without any."""
    return states.noise_origin(self.noise_seed, self.draws_noise)

  @functools.cached_property
  def _state_spec(self) -> RunState:
    return programs.state_spec(self.state_shapes, self.mesh)

  def place(self, state: PyTree) -> RunState:
    """Put a state on the devices that is on the host, as from `fetch`."""
    return states.to_devices(
      state, self.num_clients, self.mesh, self._state_spec
    )

  def fetch(self, state: RunState) -> RunState:
    """Return the state on the host, with a row for every client.

    All processes have to call it.
    """
    return states.to_host(state, self.num_clients)

  @functools.cached_property
  def _copied(self) -> Callable[[PyTree], PyTree]:
    return states.copier(self.mesh, self._state_spec)

  def copy(self, state: RunState) -> RunState:
    """Return a copy of a state, for whoever keeps it while a run uses it up."""
    copied: RunState = self._copied(state._replace(sampler=()))
    return copied._replace(sampler=state.sampler)

  @functools.cached_property
  def fetched_shapes(self) -> RunState:
    """Shapes and dtypes of what `fetch` returns."""
    shapes = states.host_shapes(self.state_shapes, self.num_clients)
    return shapes._replace(sampler=self._cohorts.first_state())

  @functools.cached_property
  def state_shapes(self) -> RunState:
    """Shapes and dtypes of a state's arrays on the devices."""
    return states.shapes_of(self._init, self.seed, self._traced(None))

  @property
  def _variables(self) -> Variables:
    """Shapes and dtypes of the global model."""
    return self.algorithm.variables(self.state_shapes.server)

  @property
  def num_parameters(self) -> int:
    """Number of trained parameters of the global model."""
    return states.count(self._variables.params)

  @functools.cached_property
  def traffic(self) -> Traffic:
    """What one client receives and sends in a round, before transforms."""
    return traffic(self.algorithm, self.state_shapes, self._traced(None))

  @property
  def bytes_per_client(self) -> tuple[int, int]:
    """Bytes that one client receives and sends, before transforms."""
    return self.traffic.down, self.traffic.up

  # --- rounds ----------------------------------------------------------------

  @functools.cached_property
  def residency(self) -> residencies.Residency:
    """Where the training examples are."""
    name, passes = self.runtime.residency, self.algorithm.passes
    return residencies.residency(
      name, passes, self.splits, self.mesh, self._dealt.each
    )

  @functools.cached_property
  def compiled(self) -> dict[tuple[int, int], Program]:
    """(lanes, cohort size) -> what was compiled for them so far."""
    return {}

  @functools.cached_property
  def function(self) -> compiler.RoundFunction:
    """The pure function of up to R rounds, as `make_rounds` describes it."""
    return compiler.round_function(
      self.algorithm,
      self.joined_by,
      self.transforms,
      data=self.data,
      works=self.works,
      schedules=self._schedules,
      residency=self.residency,
      mesh=self.mesh,
      virtual=self.runtime.deterministic_reduction,
      num_clients=self._account.public_clients,
      log_clients=self.log_clients,
      observes=self._cohorts.observes,
    )

  @functools.cached_property
  def _compiler(self) -> compiler.Compiler:
    return compiler.Compiler(
      function=self.function,
      state=self.state_shapes,
      hparams=self._traced(None),
      server_data=self.data.server,
      residency=self.residency,
      mesh=self.mesh,
      runtime=self.runtime,
    )

  @functools.cached_property
  def _cohorts(self) -> planner.Cohorts:
    return planner.Cohorts(
      sampler=self.sampler, seed=self.seed, num_clients=self.num_clients
    )

  @functools.cached_property
  def _planner(self) -> planner.Planner:
    return planner.Planner(
      cohorts=self._cohorts,
      splits=self.splits,
      works=self.works,
      dealt=self._dealt,
      residency=self.residency,
      runtime=self.runtime,
    )

  def program(self, lanes: int, size: int) -> Program:
    """Return the compiled round.

    Args:
      lanes: number of clients that a device trains at once.
      size: size of the largest cohort, one of the sampler's.
    """
    if (lanes, size) not in self.compiled:
      shape = self._planner.shape(lanes, size)
      self.compiled[lanes, size] = self._compiler.compile(shape)
    return self.compiled[lanes, size]

  def waiting_bytes(self, lanes: int, size: int) -> int:
    """Return the bytes on a device of the call that waits for its turn."""
    return self._planner.waiting_bytes(lanes, size)

  @property
  def compilations(self) -> int:
    """How often the round was compiled; lanes only tried not counted."""
    return sum(lanes == self.lane_choice.lanes for lanes, _ in self.compiled)

  def plan(
    self,
    first: int,
    most: int,
    lanes: int | None = None,
    state: RunState | None = None,
  ) -> Planned:
    """Draw and lay out, on the host, the rounds that follow `first` rounds.

    Args:
      first: number of rounds done before them.
      most: number of rounds; fewer if one call cannot run as many, a single one
        if the sampler observes.
      lanes: number of clients that a device trains at once; None for
        `lane_choice`.
      state: the state after `first` rounds, needed if the sampler observes.

    Raises:
      ValueError: the sampler observes, and no state is given; or it fails.
    """
    if self._cohorts.observes and state is None:
      raise ValueError(
        f"server.sampling observes, so who takes part in round {first + 1}"
        " depends on the rounds before; call plan(first, most, state=state)."
      )
    return self._plan(
      () if state is None else state.sampler, first, most, lanes
    )

  def _plan(
    self, sampler: PyTree, first: int, most: int, lanes: int | None = None
  ) -> Planned:
    """Plan rounds, as `plan` does, with the sampler's state."""
    lanes = self.lane_choice.lanes if lanes is None else lanes
    # Epsilons are counted here, while the devices work.
    return self._planner.plan(
      first, most, lanes, planned=self.spent, state=sampler
    )

  def _call(
    self, state: RunState, planned: Planned, hparams: HParams | None
  ) -> tuple[RunState, RoundMetrics]:
    program, numbers = self.program(*planned.key), self._traced(hparams)
    return self._compiler.call(program, state, planned, numbers)

  def dispatch(
    self,
    state: RunState,
    planned: Planned,
    hparams: HParams | None = None,
    phases: Phases | None = None,
  ) -> Dispatch:
    """Run planned rounds in one call.

    Args:
      state: the state before them; used up if `Runtime.donate`.
      planned: the rounds that follow it.
      hparams: numeric hyper-parameters; None for the defaults.
      phases: measures compiling and training; None if nobody asks.

    Raises:
      ValueError: the plan is of other rounds.
    """
    phases = Phases() if phases is None else phases
    with phases("compile"):
      program = self.program(*planned.key)  # compiling is not running
    done = int(jax.device_get(state.round))
    if planned.first != done:
      raise ValueError(
        f"The plan is of round {planned.first + 1}, the state of round {done};"
        " plan the rounds that follow the state."
      )
    last = done + planned.num_rounds
    self._account.check_round(last)
    step = jax.profiler.StepTraceAnnotation("dispatch", step_num=done)
    with phases("train"), step:
      began = time.perf_counter()
      state, metrics = self._call(state, planned, hparams)
      metrics = jax.device_get(metrics)
      seconds = time.perf_counter() - began
    chain = [t.name for t in self.transforms]
    read = read_metrics(metrics, planned, self.traffic, chain)
    if self._cohorts.observes and read.failure is None:
      state = self._observed(state, planned, metrics)
    for row in read.rows:
      row |= self.spent(int(row["round"]))
    return dispatched(state, planned, read, seconds, program.sent_bytes)

  def _observed(
    self, state: RunState, planned: Planned, metrics: RoundMetrics
  ) -> RunState:
    """Return the state after the sampler has seen the one planned round."""
    one = jax.tree.map(lambda x: x[0], metrics)
    seen = observed(planned.cohorts.client[0], one)
    after = self._cohorts.after(state.sampler, planned.first, *seen)
    return state._replace(sampler=after)

  def run(
    self,
    state: RunState,
    last: int,
    *,
    stops: Sequence[int] = (),
    hparams: HParams | None = None,
    phases: Phases | None = None,
    singles: int = 0,
  ) -> Generator[Dispatch, RunState | None, None]:
    """Run until round `last`, one dispatch after the other.

    The next dispatch is planned while the devices work on this one, unless the
    sampler observes, whose every round follows from those before. It goes
    on with the state that is sent to it (`generator.send`), or with its own.
    A private run ends where its budget does.

    Args:
      state: the state to go on with; used up if `Runtime.donate`.
      last: number of the round to end with.
      stops: a dispatch ends at every multiple of these numbers, since
        something is to be done there.
      hparams: numeric hyper-parameters; None for the defaults.
      phases: measures waiting for plans, compiling, training.
      singles: number of first dispatches that have one round each, to be
        profiled.

    Raises:
      DivergedError: in a round no finite update, or no finite model, was left;
        after the rounds before it were yielded.
    """
    began = int(jax.device_get(state.round))
    phases = Phases() if phases is None else phases
    last = self.allowed(last)
    # Here, not in the thread that plans.
    self.choose_lanes(last - began, phases)

    def count(done: int, seconds: float) -> int:
      if done < began + singles:
        return 1
      fixed = self.runtime.rounds_per_dispatch
      return planner.rounds_per_dispatch(fixed, seconds, done, last, stops)

    dispatches = pipeline.run(
      state,
      began,
      last,
      count=count,
      plan=lambda state, done, most: self._plan(state.sampler, done, most),
      dispatch=lambda state, planned: self.dispatch(
        state, planned, hparams, phases
      ),
      phases=phases,
      ahead=not self._cohorts.observes,
    )
    del state  # else it would live as long as the run
    yield from dispatches

  # --- evaluation ------------------------------------------------------------

  @functools.cached_property
  def evaluated(self) -> dict[str, FederatedData]:
    """`test`, `seen` and `unseen`, as far as the data have them."""
    return evaluator.evaluation_data(self.data, self.runtime.eval_batch_size)

  @functools.cached_property
  def evaluation_room(self) -> float:
    """Bytes that one of `evaluated` may take on a device."""
    given, name = self.runtime.residency, self.residency.name
    sets = len(self.evaluated)
    return residencies.evaluation_room(given, name, self.mesh, sets)

  @functools.cached_property
  def evaluation_sets(self) -> dict[str, EvaluationSet]:
    """What evaluates each of `evaluated`."""
    if not self.evaluated:
      return {}
    return evaluator.evaluation_sets(
      self.evaluated,
      task=self.task,
      algorithm=self.algorithm,
      data=self.data,
      works=self.works,
      mesh=self.mesh,
      lanes=self.lane_choice.lanes,
      batch_size=self.runtime.eval_batch_size,
      room=self.evaluation_room,
    )

  def evaluate(
    self, state: RunState, sets: Collection[str] | None = None
  ) -> Row:
    """Evaluate a state on the central test set and on seen and unseen clients.

    Args:
      state: the state.
      sets: which of `evaluation_sets`; None for all.
    """
    return evaluator.evaluate(self.evaluation_sets, state, sets)

  def evaluate_clients(self, state: RunState, name: str) -> ClientMetrics:
    """Return the metrics of every client of `seen` or `unseen`.

    Raises:
      UnknownNameError: the data have no such set.
    """
    return validate.lookup("evaluation set", name, self.evaluation_sets)(state)

  def react(
    self, state: RunState, metrics: Row, *, ends: bool = False
  ) -> RunState:
    """Return the state after an evaluation; see `evaluator.Reaction`.

    Args:
      state: the state that was evaluated.
      metrics: what the evaluation measured.
      ends: whether the run ends here, so that the model stays as it is.
    """
    return self._reaction(state, metrics, ends=ends)

  @functools.cached_property
  def _reaction(self) -> evaluator.Reaction:
    return evaluator.Reaction(
      algorithm=self.algorithm,
      schedules=self._schedules,
      higher_is_better=self._higher_is_better,
      best_metric=self.best_metric,
      fall_back=self.fall_back,
      mesh=self.mesh,
      shapes=self.state_shapes,
      spec=self._state_spec,
      copied=states.copier(self.mesh, self._state_spec.server),
    )

  @property
  def watched_metrics(self) -> list[str]:
    """Metrics that the best model or a schedule follows."""
    return list(self._higher_is_better)

  def best(self, state: RunState) -> Row:
    """Return round and value of the best model as `best/...`, if any."""
    return evaluator.best_row(self.best_metric, state)
