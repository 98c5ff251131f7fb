"""Rounds of two exchanges: the cohort answers a survey, then it trains.

See `core.Survey`. The survey is a cohort's training with other passes, whose
updates are empty: the mean of the reported statistics is all that is left.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax

from fedjax_sim.core import (
  Aggregator,
  Array,
  Client,
  Examples,
  PyTree,
  Report,
  Survey,
  returned,
)
from fedjax_sim.core.tree import divide
from fedjax_sim.engine.aggregation import TrainCohort
from fedjax_sim.engine.client_round import RoundInputs
from fedjax_sim.engine.plan import CohortPlan
from fedjax_sim.engine.round_spec import RoundSpec
from fedjax_sim.engine.virtual_devices import isolate_compilation

_NO_UPDATES = Aggregator(
  init=lambda update, capacity: (),
  add=lambda acc, updates, weights, present, context: acc,
  finish=lambda acc, weight, count, context: acc,
)


class Surveyed(NamedTuple):
  """What is left to train with after the survey.

  Attributes:
    spec: the constants of the round, without the survey.
    given: what all clients have in common, with the second message.
    cohort: the plan of the other passes.
    mean: of the answers; () if there was no survey.
  """

  spec: RoundSpec
  given: RoundInputs
  cohort: CohortPlan
  mean: PyTree = ()


def after_survey(
  spec: RoundSpec,
  given: RoundInputs,
  data: Mapping[str, Examples],
  states: PyTree,
  cohort: CohortPlan,
  rank: Array,
  train: TrainCohort,
) -> Surveyed:
  """Let the cohort answer the algorithm's survey, if it has one.

  Args:
    spec: the constants of the round, with the walks of all passes.
    given: what all clients of the round have in common.
    data: source -> examples, as in `train_cohort`.
    states: the clients' rows of the table of client states.
    cohort: the plan of the round, with all passes.
    rank: the clients' ranks in the cohort.
    train: trains a cohort.
  """
  survey = spec.algorithm.survey
  if survey is None:
    return Surveyed(spec, given, cohort)
  count = len(survey.passes)
  asked = dataclasses.replace(
    spec,
    algorithm=spec.algorithm._replace(
      passes=survey.passes,
      finish=_answer(survey),
      postprocess_report=lambda client, report: report,
      survey=None,
    ),
    aggregator=_NO_UPDATES,
    transforms=(),
    walks=spec.walks[:count],
    log_clients=False,
    observes=False,
  )
  own, _ = states
  first, rest = _split_passes(cohort, count)
  with jax.named_scope("survey"):
    sums, _, _ = train(asked, given, data, (own, ()), first, rank)

  def join() -> tuple[PyTree, PyTree]:
    mean = divide(sums.statistics, sums.weight)
    return survey.message(given.message, mean), mean

  message, mean = isolate_compilation(spec.virtual, given.round, join)
  training = dataclasses.replace(
    spec,
    algorithm=spec.algorithm._replace(survey=None),
    walks=spec.walks[count:],
    first_pass=count,
  )
  return Surveyed(training, given._replace(message=message), rest, mean)


def _answer(survey: Survey) -> Callable[..., Report]:
  """Return the `finish` of a survey, whose reports hold the answer alone."""

  def finish(client: Client, *carries: PyTree) -> Report:
    report = survey.finish(client, *carries)
    if not isinstance(report, Report):
      raise TypeError(
        f"Survey.finish returned {returned.described(report)}; let it return"
        " Report(update=(), weight=..., statistics=...)."
      )
    return Report((), report.weight, statistics=report.statistics)

  return finish


def _split_passes(
  cohort: CohortPlan, count: int
) -> tuple[CohortPlan, CohortPlan]:
  """Return the plan of the first `count` passes, and that of the others."""

  def part(passes: slice) -> CohortPlan:
    return cohort._replace(
      start=cohort.start[..., passes],
      num_steps=cohort.num_steps[..., passes],
      order=cohort.order[passes],
    )

  return part(slice(count)), part(slice(count, None))
