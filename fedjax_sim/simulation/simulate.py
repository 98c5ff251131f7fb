"""The simulator as an iterator over rounds, for scripts and notebooks."""

from __future__ import annotations

import contextlib
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
) -> Iterator[tuple[RunState | None, Row]]:
  """Run federated rounds, as an iterator over them.

      for state, metrics in simulate(task=..., algorithm=..., data=..., ...):
        print(metrics["round"], metrics["test/accuracy"])

  Between evaluations many rounds run in one call of the compiled program, while
  the next ones are planned; states in between do not exist outside of it. So
  `eval_every=10` is not only fewer evaluations, but faster rounds.

  Args:
    task: what is trained and evaluated.
    algorithm: how clients train and the server reacts.
    data: federated data.
    rounds: number of rounds.
    clients_per_round: number of clients of a round, drawn uniformly.
    eval_every: evaluate after every so many rounds, and after the last.
    hparams: numeric hyper-parameters; None for the algorithm's.
    sampler: another way to draw cohorts; `clients_per_round` is then unused.
    runtime: how fast; None for the default.
    **arguments: more fields of `Simulator`, such as `debug=True`.

  Returns:
    An iterator over the state and the metrics after each round. The state is
    None after a round that is not evaluated; a state stays valid while the run
    goes on. A private run ends where its budget does.

  Raises:
    TypeError, ValueError: arguments that do not fit each other.
    DivergedError: while iterating, a round that left nothing finite.
  """
  validate.integer("server.rounds", rounds)
  validate.integer("server.eval_every", eval_every)
  runtime = Runtime() if runtime is None else runtime
  checks.check_kinds(algorithm=algorithm, data=data, runtime=runtime)
  if sampler is None:
    size = 1 if algorithm.requirements.pools_data else data.train.num_clients
    count = 1 if algorithm.requirements.pools_data else clients_per_round
    sampler = sampling.uniform(size, count)
  # Plans with room for more rounds than there ever are would be sent in vain.
  most = min(runtime.most_rounds, eval_every)
  runtime = dataclasses.replace(runtime, most_rounds=most)
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
) -> Iterator[tuple[RunState | None, Row]]:
  """Yield the rounds; a generator, while `simulate` checks when it is called.

  Args:
    simulator: the experiment.
    rounds: number of rounds.
    eval_every: evaluate after every so many rounds, and after the last.
    hparams: numeric hyper-parameters; None for the defaults.
  """
  rounds, done = simulator.account.rounds_within_budget(rounds), 0
  state = simulator.init(hparams)
  run = simulator.run(state, rounds, stops=[eval_every], hparams=hparams)
  del state  # the run uses it up
  sent: RunState | None = None
  with contextlib.closing(run):
    while done < rounds:
      out = run.send(sent)
      done += len(out.rows)
      for round_, ids in out.rejected:
        log.warning(
          "Round %d: clients left out, update not finite: %s",
          round_,
          named(ids),
        )
      if out.failure is not None:
        yield from ((None, row) for row in out.rows)
        raise out.failure
      sent, shown = out.state, None
      if done % eval_every == 0 or done == rounds:
        metrics = simulator.evaluate(sent)
        out.rows[-1] |= metrics
        sent = simulator.react(sent, metrics, ends=done == rounds)
        shown = simulator.states.copy(sent) if done < rounds else sent
      yield from ((None, row) for row in out.rows[:-1])
      yield shown, out.rows[-1]
