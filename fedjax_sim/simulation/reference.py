"""The round as a plain Python loop over clients, to find what is wrong in it.

Nothing is compiled, lanes and waves do not exist, and every function of the
task, the algorithm, the transforms and the aggregator gets arrays with values:
it can print them and stop in a debugger. An error names the stage that it comes
from, and the client. The functions, the plan and the server's step are those of
the compiled round, so results differ by the rounding of floats alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sim import distributed
from fedjax_sim.core import (
  Array,
  Batch,
  Client,
  Examples,
  Key,
  Pass,
  PyTree,
  compensated,
  errors,
)
from fedjax_sim.core.errors import FedjaxSimError
from fedjax_sim.engine import aggregation
from fedjax_sim.engine.aggregation import CohortSums, PerClient
from fedjax_sim.engine.client_round import (
  ClientPlan,
  ClientStatus,
  RoundInputs,
  train_client,
)
from fedjax_sim.engine.plan import CohortPlan, at_round
from fedjax_sim.engine.round import run_round
from fedjax_sim.engine.round_spec import RoundSpec
from fedjax_sim.engine.state import RoundMetrics, RunState
from fedjax_sim.simulation.dispatch import PlannedRounds
from fedjax_sim.tasks.fast_layers import as_written

F = TypeVar("F", bound=Callable[..., Any])


class StageError(FedjaxSimError, RuntimeError):
  """A function of the round failed; the message says which, and for whom."""

  exit_code = 1


@dataclasses.dataclass
class _Position:
  """Where the loop is.

  Attributes:
    round: number of the round, from 1.
    client: id of the client that trains; None for the server.
    step: local steps of the pass so far.
  """

  round: int = 0
  client: int | None = None
  step: int = 0

  @contextlib.contextmanager
  def stage(self, name: str) -> Iterator[None]:
    """Name the stage, the round and the client of an error."""
    try:
      yield
    except StageError:
      raise
    except Exception as error:
      who = "" if self.client is None else f", client {self.client}"
      raise StageError(
        f"Round {self.round}{who}, {name}: {errors.raised(None, error)}"
      ) from error

  def named(self, name: str, function: F) -> F:
    """Return the function with errors that name the stage."""

    @functools.wraps(function)
    def call(*args: Any) -> Any:
      with self.stage(name):
        return function(*args)

    return call  # type: ignore[return-value]

  def named_pass(self, walked: Pass, suffix: str) -> Pass:
    """Return the pass with errors that name the local step."""

    def start(client: Client, *carries: PyTree) -> PyTree:
      self.step = 0
      with self.stage(f"start{suffix}"):
        return walked.start(client, *carries)

    def step(client: Client, carry: PyTree, batch: Batch, key: Key) -> PyTree:
      self.step += 1
      with self.stage(f"step {self.step}{suffix}"):
        return walked.step(client, carry, batch, key)

    return walked._replace(start=start, step=step)


def _with_stages(spec: RoundSpec, at: _Position) -> RoundSpec:
  """Return the constants, with functions whose errors name their stage."""
  algorithm, aggregator = spec.algorithm, spec.aggregator
  several = len(algorithm.passes) > 1
  survey = algorithm.survey
  if survey is not None:
    survey = survey._replace(
      passes=tuple(at.named_pass(p, " of the survey") for p in survey.passes),
      finish=at.named("finish of the survey", survey.finish),
      message=at.named("message of the survey", survey.message),
    )
  return dataclasses.replace(
    spec,
    algorithm=algorithm._replace(
      broadcast=at.named("broadcast", algorithm.broadcast),
      download=at.named("download", algorithm.download),
      passes=tuple(
        at.named_pass(walked, f" of pass {i}" if several else "")
        for i, walked in enumerate(algorithm.passes)
      ),
      finish=at.named("finish", algorithm.finish),
      survey=survey,
      postprocess_report=at.named("postprocess", algorithm.postprocess_report),
      apply=at.named("apply", algorithm.apply),
    ),
    aggregator=aggregator._replace(
      add=at.named("add", aggregator.add),
      finish=at.named("finish of the aggregator", aggregator.finish),
    ),
    transforms=[
      t._replace(
        apply=at.named(f"transform {t.name}", t.apply),
        update=at.named(f"update of transform {t.name}", t.update),
      )
      for t in spec.transforms
    ],
    mesh=distributed.make_mesh(1, None),
    virtual=None,
  )


def run_rounds(
  spec: RoundSpec,
  state: RunState,
  hparams: PyTree,
  planned: PlannedRounds,
  server_data: PyTree,
) -> tuple[RunState, RoundMetrics]:
  """Run planned rounds, one client after the other, without compiling.

  Args:
    spec: the constants of the rounds.
    state: the state before them; anywhere.
    hparams: numeric hyper-parameters, as arrays.
    planned: the rounds.
    server_data: the server's own examples; None if it has none.

  Returns:
    The state after them, on the default device, and their metrics with a
    leading axis of rounds.

  Raises:
    StageError: a function of the algorithm, of a transform or of the aggregator
      raised an error, which is its cause.
  """
  at = _Position()
  staged = _with_stages(spec, at)
  state, data = jax.device_get((state, planned.examples))
  state = jax.tree.map(jnp.asarray, state._replace(sampler=()))
  data, server_data = jax.tree.map(jnp.asarray, (data, server_data))
  hparams = jax.tree.map(jnp.asarray, hparams)
  metrics = []
  for r in range(planned.num_rounds):
    at.round, at.client = planned.first + r + 1, None
    here = _at(data, r) if spec.sliced else data
    cohort = jax.tree.map(jnp.asarray, at_round(planned.cohorts, r))
    train = functools.partial(_train_cohort, at)
    with as_written():
      state, seen = run_round(
        staged, state, hparams, cohort, here, server_data, train
      )
    metrics.append(jax.device_get(seen))
  return state, jax.tree.map(lambda *x: np.stack(x), *metrics)


def _train_cohort(
  at: _Position,
  spec: RoundSpec,
  given: RoundInputs,
  data: Mapping[str, Examples],
  states: PyTree,
  cohort: CohortPlan,
  rank: Array,
) -> tuple[CohortSums, Array, PerClient]:
  """Train a cohort, as `aggregation.train_cohort` does, in a Python loop.

  The clients come in the order of their slots: device, wave, lane.
  """
  client = np.asarray(cohort.client)
  # An empty cohort has the shapes of an empty lane.
  places = list(zip(*np.nonzero(client >= 0), strict=True)) or [(0, 0, 0)]
  sums: CohortSums | None = None
  rows = []
  for place in places:
    at.client = int(client[place])
    examples = _at(data, place[0]) if spec.sliced else data
    plan = ClientPlan(*_at((*cohort[:7], states), place))
    out = train_client(spec, plan, given, examples, cohort.order)
    rows.append(aggregation.per_client(out))
    if sums is None:
      sums = aggregation.zero_sums(spec.aggregator, out, client.size)
    slot = jnp.int32(np.ravel_multi_index(place, client.shape))
    here = given.aggregation._replace(
      slot=slot,
      rank=rank[place][None],
      byzantine=cohort.byzantine[place][None] > 0,
    )
    lane = jax.tree.map(lambda x: x[None], out)
    sums = aggregation.add_wave(spec.aggregator, sums, lane, here, out)
  at.client = None
  assert sums is not None

  def grid(*each: Array) -> Array:
    filled = np.zeros((*client.shape, *each[0].shape), each[0].dtype)
    filled[tuple(np.transpose(places))] = np.stack(each)
    return jnp.asarray(filled)

  kept: PerClient = jax.tree.map(grid, *rows)
  counts = jnp.bincount(kept.status.ravel(), length=len(ClientStatus))
  sums = sums._replace(
    metrics=compensated.rounded(sums.metrics),
    weight=compensated.rounded(sums.weight),
  )
  if spec.aggregator.finishes_shares:
    count = counts[ClientStatus.PRESENT].astype(jnp.int32)
    known = sums.weight, count, given.aggregation
    update = spec.aggregator.finish(sums.update, *known)
    sums = sums._replace(update=update)
  if spec.log_clients:
    log = aggregation.log_columns(spec, given, kept, sums.logged)
    kept = kept._replace(log=log)
  return sums._replace(logged=()), counts, kept


def _at(tree: PyTree, index: Any) -> Any:
  """Return the tree with all leaves indexed."""
  return jax.tree.map(lambda x: x[index], tree)
