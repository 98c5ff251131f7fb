"""The simulator as an iterator over rounds, for scripts and notebooks."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

from fedjax_sim import core, sampling
from fedjax_sim.core import Algorithm, HParams, Task, validate
from fedjax_sim.data import FederatedDataset
from fedjax_sim.engine.state import RunState
from fedjax_sim.simulation import arguments as checks
from fedjax_sim.simulation.dispatch import Row, named
from fedjax_sim.simulation.runtime import Runtime
from fedjax_sim.simulation.simulator import Simulator

log = logging.getLogger(__name__)


def simulate(
  *,
  task: Task,
  algorithm: Algorithm,
  data: FederatedDataset,
  rounds: int,
  clients_per_round: int,
  eval_every: int = 1,
  hparams: HParams | None = None,
  sampler: core.Sampler | None = None,
  runtime: Runtime | None = None,
  **arguments: Any,
) -> Iterator[tuple[RunState, Row]]:
  """A federated run as an iterator over rounds.

      for state, metrics in simulate(task=..., algorithm=..., data=..., ...):
        print(metrics["round"], metrics["test/accuracy"])

  Args:
    task: what is trained and evaluated.
    algorithm: how clients train and the server reacts.
    data: federated data.
    rounds: how many rounds.
    clients_per_round: clients of a round, drawn uniformly.
    eval_every: evaluate after every so many rounds, and after the last.
    hparams: numeric hyper-parameters; None: the algorithm's.
    sampler: another way to draw cohorts.
    runtime: how fast; states stay valid, and a dispatch is one round.
    **arguments: more fields of `Simulator`.

  Returns:
    An iterator over the state and the metrics after each round. That of a
    private run ends where its budget does.

  Raises:
    TypeError, ValueError: arguments that do not fit each other.
    DivergedError: while iterating, a round that left nothing finite.
  """
  validate.whole("server.rounds", rounds)
  validate.whole("server.eval_every", eval_every)
  runtime = Runtime() if runtime is None else runtime
  checks.check_kinds(algorithm=algorithm, data=data, runtime=runtime)
  if sampler is None:
    size = 1 if algorithm.pooled else data.train.num_clients
    count = 1 if algorithm.pooled else clients_per_round
    sampler = sampling.uniform(size, count)
  runtime = dataclasses.replace(runtime, rounds_per_dispatch=1, donate=False)
  simulator = Simulator(
    task=task,
    algorithm=algorithm,
    data=data,
    sampler=sampler,
    runtime=runtime,
    **arguments,
  )
  _ = simulator.checked
  return _rounds(simulator, rounds, eval_every, hparams)


def _rounds(
  simulator: Simulator, rounds: int, eval_every: int, hparams: HParams | None
) -> Iterator[tuple[RunState, Row]]:
  """The iterator, behind a function that checks arguments when called."""
  rounds = simulator.account.rounds_within_budget(rounds)
  simulator.choose_lanes(rounds)
  state = simulator.init(hparams)
  for done in range(rounds):
    out = simulator.dispatch(state, simulator.plan(done, 1), hparams)
    if out.failure is not None:
      raise out.failure
    state, row = out.state, out.rows[0]
    for round_, ids in out.rejected:
      log.warning(
        "Round %d: clients left out, update not finite: %s",
        round_,
        named(ids),
      )
    if (done + 1) % eval_every == 0 or done + 1 == rounds:
      metrics = simulator.evaluate(state)
      row |= metrics
      state = simulator.react(state, metrics)
    yield state, row
