"""The derivative of a validation loss, after rounds, in the run's numbers.

R rounds are a function of the server's rate, its momentum, the clients' rate
and the weights of clients, and so is the loss of the model that they leave.
This is its gradient, through the rounds as they are: what a round draws
(cohorts, batches, noise) is held fixed.

- Forward mode carries one tangent a number through the round's own loops. It
  costs about a run for each number, and the memory of a run for each.
- Reverse mode costs a few runs, whatever the count of numbers. It cannot pass
  a loop of a length that only the devices know, so local steps, waves and
  rounds become scans over the largest numbers of the plan (`engine/loops.py`),
  and it computes steps, waves and rounds once more instead of keeping them.

Maclaurin et al. 2015, "Gradient-based hyperparameter optimization through
reversible learning" (arXiv 1502.03492); Franceschi et al. 2017, "Forward and
reverse gradient-based hyperparameter optimization" (arXiv 1703.01785).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sim.core import (
  Array,
  HParams,
  PyTree,
  Variables,
  compensated,
  validate,
)
from fedjax_sim.engine import hparams as numbers
from fedjax_sim.engine import program as programs
from fedjax_sim.engine.evaluation import EvaluationSet, as_blocks
from fedjax_sim.engine.loops import FixedLoop
from fedjax_sim.engine.round import make_rounds
from fedjax_sim.engine.round_spec import RoundSpec
from fedjax_sim.engine.state import RoundMetrics, RunState
from fedjax_sim.engine.tracing import with_constants
from fedjax_sim.simulation import derivatives
from fedjax_sim.simulation.derivatives import WEIGHTS
from fedjax_sim.simulation.dispatch import PlannedRounds
from fedjax_sim.simulation.simulator import Simulator
from fedjax_sim.simulation.state import noise_words
from fedjax_sim.training import client_weights

# Numbers up to which forward mode is as fast; see docs/hypergradients.md.
MOST_FORWARD = 2
MOST_LANES = 16  # clients trained at once, where the run leaves it open

ValidationLoss = str | Callable[[Variables], Array]


class Hypergradient(NamedTuple):
  """A validation loss after rounds, and its gradient.

  Attributes:
    value: the loss.
    gradient: for every name, a float; `weights`: shape=(num_clients,), float.
    state: the run's state after the rounds.
  """

  value: float
  gradient: dict[str, Any]
  state: RunState


def hypergradient(
  simulator: Simulator,
  rounds: int,
  *,
  of: Sequence[str],
  loss: ValidationLoss = "test",
  mode: str = "auto",
  state: RunState | None = None,
  rematerialize: bool = True,
) -> Hypergradient:
  """Return a validation loss after rounds, and its gradient in numbers.

  Example:
    >>> found = hypergradient(
    ...   simulator, 10, of=("server.learning_rate", "server.momentum")
    ... )
    >>> found.gradient["server.momentum"]

  Args:
    simulator: the run; nothing of it changes.
    rounds: number of rounds.
    of: names of the run's numbers, such as `server.learning_rate`,
      `client.learning_rate` or `transforms.clip.norm`, and `weights`: a factor
      for each client's weight, at ones.
    loss: a set, `test`, `unseen`, `seen` (each client with the model that it
      would use) or `server` (the server's own examples), of which the task's
      `loss` is taken as evaluations do, the mean over all examples; or a
      function of the global model's `Variables`, shape=().
    mode: `forward`, `reverse`, or `auto`: `forward` for up to 2 numbers.
    state: what the rounds go on from, held fixed; None for a new run.
    rematerialize: whether reverse mode computes steps, waves and rounds once
      more instead of keeping all that they computed.

  Raises:
    TypeError, ValueError: an argument is wrong, or something has no derivative.
    DivergedError: the loss, the gradient, or a client's update is not finite.
  """
  function = hypergradient_function(
    simulator,
    rounds,
    of=of,
    loss=loss,
    mode=mode,
    rematerialize=rematerialize,
  )
  return function(state=state)


def hypergradient_function(
  simulator: Simulator,
  rounds: int,
  *,
  of: Sequence[str],
  loss: ValidationLoss = "test",
  mode: str = "auto",
  rematerialize: bool = True,
) -> HypergradientFunction:
  """Return the function of numbers whose value is a `Hypergradient`.

  What an optimizer of those numbers calls: only the first call compiles.

  Example:
    >>> function = hypergradient_function(
    ...   simulator, 10, of=["server.learning_rate"]
    ... )
    >>> rate = function.defaults["server.learning_rate"]
    >>> for _ in range(5):
    ...   found = function({"server.learning_rate": rate})
    ...   rate *= np.exp(-0.1 * np.sign(found.gradient["server.learning_rate"]))

  Args:
    simulator: as in `hypergradient`, like the other arguments.
    rounds: number of rounds.
    of: names of the run's numbers.
    loss: the validation loss.
    mode: `forward`, `reverse` or `auto`.
    rematerialize: see `hypergradient`.

  Raises:
    TypeError, ValueError: an argument is wrong, or something has no derivative.
  """
  rounds = validate.integer("rounds", rounds)
  paths = derivatives.check(simulator, rounds, of)
  derivatives.check_loss(loss, simulator)
  validate.one_of("mode", mode, ("auto", "forward", "reverse"))
  validate.boolean("rematerialize", rematerialize)
  size = len(paths) + (simulator.num_clients - 1) * (WEIGHTS in paths)
  if mode == "auto":
    mode = "forward" if size <= MOST_FORWARD else "reverse"
  return HypergradientFunction(
    simulator=simulator,
    rounds=rounds,
    paths=paths,
    loss=loss,
    reverse=mode == "reverse",
    rematerialize=rematerialize,
  )


class _Lengths(NamedTuple):
  """The loops of a plan: what reverse mode compiles for.

  Attributes:
    steps: for every pass, local steps of a client, at most.
    waves: waves of a round, at most.
  """

  steps: tuple[int, ...]
  waves: int


class _Program(NamedTuple):
  """A compiled function, and the arguments that it always gets."""

  compiled: Any
  arguments: tuple[PyTree, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class HypergradientFunction:
  """A function of numbers: the validation loss after rounds, and its gradient.

  Attributes:
    simulator: the run.
    rounds: number of rounds.
    paths: name -> path of the number in `Simulator.hparams`; of `weights`, "".
    loss: the validation loss.
    reverse: whether the gradient is computed in reverse mode.
    rematerialize: see `hypergradient`.
  """

  simulator: Simulator
  rounds: int
  paths: Mapping[str, str]
  loss: ValidationLoss
  reverse: bool
  rematerialize: bool

  @functools.cached_property
  def defaults(self) -> dict[str, Any]:
    """The run's own numbers by name; `weights`: ones, shape=(num_clients,)."""
    own = numbers.named(self.simulator.hparams)
    return {
      name: np.ones(self.simulator.num_clients)
      if name == WEIGHTS
      else float(own[path])
      for name, path in self.paths.items()
    }

  @property
  def compilations(self) -> int:
    """How often something was compiled."""
    return len(self._programs)

  @property
  def device_bytes(self) -> int:
    """Memory of the largest program so far, by XLA, in bytes; 0 before."""
    each = [programs.device_bytes(p.compiled) for p in self._programs.values()]
    return max(each, default=0)

  def __call__(
    self,
    values: Mapping[str, Any] | None = None,
    *,
    state: RunState | None = None,
  ) -> Hypergradient:
    """Return the loss after the rounds, and its gradient, at some numbers.

    Args:
      values: name -> number; those left out, and None, are the run's own.
      state: what the rounds go on from, held fixed; None for a new run.

    Raises:
      TypeError, ValueError: a number is wrong.
      DivergedError: the loss, the gradient, or a client's update is not finite.
    """
    inputs, hparams = self._numbers(values)
    own = self._own.states
    if state is None:
      first, start = 0, self._first
    else:
      first = int(jax.device_get(state.round))
      start = own.to_devices(self.simulator.states.to_host(state))
      start = start._replace(sampler=())
    last = first + self.rounds
    self.simulator.account.check_round(last)
    planned = self._own.plan(first, self.rounds, lanes=self._lanes)
    given = inputs, hparams, start, planned.cohorts
    program = self._program(planned, given, begins=state is None)
    found = program.compiled(*given, *program.arguments)
    gradient, (loss, after, metrics) = found
    after = self._checked(inputs, loss, gradient, after, metrics, first)
    return Hypergradient(
      value=float(loss),
      gradient={
        k: np.asarray(g) if g.ndim else float(g) for k, g in gradient.items()
      },
      state=after,
    )

  @functools.cached_property
  def _lanes(self) -> int:
    lanes = self.simulator.runtime.lanes
    most = self.simulator.sampler.sizes[-1]
    return min(most, MOST_LANES if lanes == "auto" else lanes)

  @functools.cached_property
  def _own(self) -> Simulator:
    """The run on one device, whose plans have exactly `rounds` rounds."""
    simulator = self.simulator
    algorithm, sampler = simulator.algorithm, simulator.sampler
    if WEIGHTS in self.paths:
      algorithm = client_weights.with_client_weights(algorithm)
    return dataclasses.replace(
      simulator,
      algorithm=algorithm,
      sampler=sampler._replace(sizes=sampler.sizes[-1:]),
      log_clients=False,
      debug=False,
      runtime=dataclasses.replace(
        simulator.runtime,
        lanes=self._lanes,
        devices=1,
        deterministic_reduction=None,
        residency="device",
        state_residency="device",
        rounds_per_dispatch=self.rounds,
        donate=False,
      ),
    )

  @functools.cached_property
  def _first(self) -> tuple[Any, ...]:
    """The seeds of a new run."""
    _ = self.simulator.checked
    states = self._own.states
    words = noise_words(states.noise_seed, states.draws_noise)
    return np.uint32(states.seed), words

  @functools.cached_property
  def _programs(self) -> dict[tuple[_Lengths, bool], _Program]:
    return {}

  def _numbers(
    self, values: Mapping[str, Any] | None
  ) -> tuple[dict[str, np.ndarray], PyTree]:
    """Return the numbers that are differentiated, and all others, as arrays."""
    wanted = derivatives.checked_values(values or {}, self.defaults)
    hparams: HParams = self.simulator.hparams
    for name, path in self.paths.items():
      if name != WEIGHTS:
        hparams = numbers.changed(hparams, path, wanted[name])
    dtype = jax.dtypes.canonicalize_dtype(np.float64)
    inputs = {name: np.asarray(x, dtype) for name, x in wanted.items()}
    return inputs, self.simulator.states.traced(hparams)

  def _program(
    self, planned: PlannedRounds, given: tuple[Any, ...], *, begins: bool
  ) -> _Program:
    """Return what was compiled for such plans, or compile it."""
    steps = np.asarray(planned.cohorts.num_steps)
    found = tuple(steps.reshape(-1, steps.shape[-1]).max(axis=0).tolist())
    lengths = _Lengths(found, int(np.max(planned.cohorts.num_waves)))
    for (known, began), program in self._programs.items():
      fits = known.waves >= lengths.waves and all(
        a >= b for a, b in zip(known.steps, lengths.steps, strict=True)
      )
      if began == begins and (fits or not self.reverse):
        return program
    program = self._compile(lengths, planned, given, begins)
    self._programs[lengths, begins] = program
    return program

  def _spec(self, lengths: _Lengths) -> RoundSpec:
    """Return the constants of the rounds."""
    spec = self._own.compiler.spec
    if not self.reverse:
      return spec
    fixed = functools.partial(FixedLoop, rematerialize=self.rematerialize)
    return dataclasses.replace(
      spec,
      waves=fixed(max(1, lengths.waves)),
      walks=[
        walk._replace(fixed=fixed(max(1, steps)))
        for walk, steps in zip(spec.walks, lengths.steps, strict=True)
      ],
    )

  def _compile(
    self,
    lengths: _Lengths,
    planned: PlannedRounds,
    given: tuple[Any, ...],
    begins: bool,
  ) -> _Program:
    """Compile the value and the gradient."""
    rounds = make_rounds(self._spec(lengths))
    measure, examples = self._measure()
    _, hparams, start, _ = given
    constants: list[Any] = []
    begin: Callable[..., RunState] = lambda constants, start, hparams: start
    if begins:
      states = self._own.states
      initial = lambda seeds, own: states.initial(seeds[0], seeds[1], own)
      constants, begin = with_constants(initial, (start, hparams))

    def value(
      inputs: Mapping[str, Array],
      hparams: HParams,
      start: PyTree,
      cohorts: PyTree,
      constants: list[Any],
      data: PyTree,
      server_data: PyTree,
      examples: PyTree,
    ) -> tuple[Array, tuple[Array, RunState, RoundMetrics]]:
      for name, path in self.paths.items():
        if name != WEIGHTS:
          hparams = numbers.changed(hparams, path, inputs[name])
      state = begin(constants, start, hparams)
      if WEIGHTS in inputs:
        path = f"{numbers.ALGORITHM}.{client_weights.NAME}"
        hparams = numbers.changed(hparams, path, inputs[WEIGHTS])
      state, metrics = rounds(
        state, hparams, data, cohorts, jnp.int32(self.rounds), server_data
      )
      loss = derivatives.scalar(measure(state, examples))
      return loss, (loss, state, metrics)

    gradient = (jax.grad if self.reverse else jax.jacfwd)(value, has_aux=True)
    data = planned.examples
    arguments = constants, data, self._own.data.server, examples
    with derivatives.explained(self.reverse):
      traced = jax.jit(gradient).trace(*given, *arguments)
    return _Program(traced.lower().compile(), arguments)

  def _measure(self) -> tuple[Callable[[RunState, PyTree], Array], PyTree]:
    """Return the loss of a state, to be traced, and what it reads besides."""
    if not isinstance(self.loss, str):
      loss, variables = self.loss, self._own.algorithm.variables
      return lambda state, examples: loss(variables(state.server)), ()
    own, name = self._own, self.loss
    size = own.runtime.eval_batch_size
    part = (
      as_blocks(own.data.server, size)
      if name == "server" and own.data.server is not None
      else own.evaluate.parts[name]
    )
    evaluation = EvaluationSet(
      own.task,
      own.algorithm,
      part,
      mesh=own.mesh,
      lanes=self._lanes,
      batch_size=size,
      personal=name == "seen",
      prepare=own.data.prepare,
      rematerialize=self.rematerialize if self.reverse else None,
    )

    def mean(state: RunState, sent: PyTree) -> Array:
      table = evaluation.table(state)
      out = evaluation.program(state.server, table, sent.examples, sent.plan)
      loss = compensated.rounded(out.sums)["loss"]
      total, weight = jax.tree.map(jnp.sum, loss)
      return total / jnp.where(weight > 0, weight, 1)

    return mean, evaluation.sent(*evaluation.pieces)

  def _checked(
    self,
    inputs: Mapping[str, Any],
    loss: Array,
    gradient: Mapping[str, Array],
    state: RunState,
    metrics: RoundMetrics,
    first: int,
  ) -> RunState:
    """Return the state, on the run's own devices.

    Raises:
      DivergedError: something is not finite.
    """
    seen = jax.device_get(metrics)
    derivatives.check_rounds(inputs, seen.rejected, seen.finite, first)
    derivatives.check_finite(inputs, loss, gradient)
    if self.simulator.mesh.devices.size == 1:
      return state
    return self.simulator.states.to_devices(self._own.states.to_host(state))
