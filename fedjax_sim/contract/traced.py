"""Checks of a round that is traced: shapes and dtypes, stage by stage.

Each function of the part is wrapped in one that compares what it returns with
what the contract says, as shapes and dtypes, while the round is traced; so the
message names the function, and not the loop of the engine that would break.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_sim.core import (
  Algorithm,
  Batch,
  Client,
  Key,
  Pass,
  PyTree,
  Report,
  Transform,
  TransformResult,
  returned,
)
from fedjax_sim.core.errors import FedjaxSimError
from fedjax_sim.engine.plan import at_round
from fedjax_sim.engine.round import run_round
from fedjax_sim.engine.round_spec import RoundSpec
from fedjax_sim.simulation.simulator import Simulator


class TraceError(FedjaxSimError, ValueError):
  """A function raised an error, which is the cause; names the function."""


class ChangedError(FedjaxSimError, TypeError):
  """A function returns another structure, shape or dtype than it may."""


def trace(simulator: Simulator) -> None:
  """Trace a round whose functions are looked at.

  Raises:
    ChangedError: one returns another structure, shape or dtype than it may.
    TraceError: one raises an error.
  """
  planned = simulator.plan(0, 1, 1)
  spec = looked_at(simulator.compiler.spec)
  state = simulator.states.shapes._replace(sampler=())
  data, cohort = planned.examples, at_round(planned.cohorts, 0)
  cohort = jax.tree.map(jnp.asarray, cohort)
  jax.eval_shape(
    lambda state, numbers, data, server: run_round(
      spec, state, numbers, cohort, data, server
    ),
    state,
    simulator.states.traced(),
    data,
    simulator.data.server,
  )


def alike(what: str, made: PyTree, like: PyTree, remedy: str) -> None:
  """Refuse a tree of another structure, or with other shapes and dtypes.

  Args:
    what: who returned it, in words.
    made: what was returned.
    like: what it has to be like.
    remedy: how to mend it; follows "; ".

  Raises:
    ChangedError: names the first leaf that differs.
  """
  kind = lambda x: f"{jnp.result_type(x)}{list(jnp.shape(x))}"
  if (found := returned.first_difference(made, like, kind)) is not None:
    name, one, other = found
    raise ChangedError(
      f"{what} {name or 'as a whole'} as {one}, which was {other}; {remedy}"
    )
  one_tree: Any = jax.tree.structure(made)
  other_tree: Any = jax.tree.structure(like)
  if one_tree != other_tree:
    raise ChangedError(
      f"{what} with another structure, {one_tree}, where it was {other_tree};"
      f" {remedy}"
    )


_KEEP = (
  "keep structure, shapes and dtypes, for example by new.astype(old.dtype)"
)


def looked_at(spec: RoundSpec) -> RoundSpec:
  """Return the constants of a round, with functions that are looked at."""
  return dataclasses.replace(
    spec,
    algorithm=_algorithm(spec.algorithm),
    transforms=[_transform(t) for t in spec.transforms],
    aggregator=spec.aggregator._replace(
      add=_staged("add", spec.aggregator.add),
      finish=_staged("finish of the aggregator", spec.aggregator.finish),
    ),
  )


def _staged(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
  """Return the function with errors that name it."""

  def call(*given: Any) -> Any:
    try:
      return function(*given)
    except (TraceError, ChangedError):
      raise
    except Exception as error:
      raise TraceError(name) from error

  return call


def _at(function: Callable[..., Any]) -> str:
  """Return where a function begins, " (FILE, line N)"; "" if it has no code."""
  code = getattr(inspect.unwrap(function), "__code__", None)
  if code is None:
    return ""
  return f" ({Path(code.co_filename).name}, line {code.co_firstlineno})"


def _pass(walked: Pass, suffix: str) -> Pass:
  take = _staged(f"step{suffix}", walked.step)
  who = f"step{suffix}{_at(walked.step)}"

  def step(client: Client, carry: PyTree, batch: Batch, key: Key) -> PyTree:
    after = take(client, carry, batch, key)
    alike(f"{who} returns its carry", after, carry, _KEEP)
    return after

  return walked._replace(
    start=_staged(f"start{suffix}", walked.start), step=step
  )


def _algorithm(algorithm: Algorithm) -> Algorithm:
  several = len(algorithm.passes) > 1
  survey = algorithm.survey
  if survey is not None:
    survey = survey._replace(
      passes=tuple(_pass(p, " of the survey") for p in survey.passes),
      finish=_staged("finish of the survey", survey.finish),
      message=_staged("message of the survey", survey.message),
    )
  take = _staged("finish", algorithm.finish)
  react = _staged("apply", algorithm.apply)
  finisher = f"finish{_at(algorithm.finish)}"
  server_step = f"apply{_at(algorithm.apply)}"

  def finish(client: Client, *carries: PyTree) -> Report:
    report = take(client, *carries)
    if not isinstance(report, Report):
      raise ChangedError(
        f"{finisher} returns a {type(report).__name__}; let it return"
        " Report(update, weight, state=client.state)"
      )
    alike(
      f"{finisher} returns what a client keeps,",
      report.state,
      client.state,
      "Report.state must be like what Algorithm.client_init returns",
    )
    if jnp.shape(report.weight):
      raise ChangedError(
        f"{finisher} returns a Report.weight of shape"
        f" {jnp.shape(report.weight)}; give one number, shape ()"
      )
    return report

  def apply(server: PyTree, *given: Any) -> PyTree:
    after = react(server, *given)
    alike(
      f"{server_step} returns the server's state",
      after,
      server,
      _KEEP,
    )
    return after

  return algorithm._replace(
    broadcast=_staged("broadcast", algorithm.broadcast),
    download=_staged("download", algorithm.download),
    passes=tuple(
      _pass(walked, f" of pass {i}" if several else "")
      for i, walked in enumerate(algorithm.passes)
    ),
    finish=finish,
    survey=survey,
    postprocess_report=_staged(
      "postprocess_report", algorithm.postprocess_report
    ),
    apply=apply,
  )


def _transform(transform: Transform) -> Transform:
  do = _staged(f"transform {transform.name}", transform.apply)
  learn = _staged(f"update of transform {transform.name}", transform.update)

  def apply(update: PyTree, shared: PyTree, state: PyTree, *given: Any) -> Any:
    result = do(update, shared, state, *given)
    if not isinstance(result, TransformResult):
      raise ChangedError(
        f"Transform.apply returns a {type(result).__name__}; let it return"
        " TransformResult(update, state)"
      )
    where = f"Transform.apply{_at(transform.apply)} returns the"
    alike(f"{where} update", result.update, update, _KEEP)
    remedy = "keep those of what Transform.client_init returns"
    alike(f"{where} client's state", result.state, state, remedy)
    return result

  def update(shared: PyTree, *given: Any) -> PyTree:
    after = learn(shared, *given)
    where = f"Transform.update{_at(transform.update)} returns the"
    alike(f"{where} shared state", after, shared, _KEEP)
    return after

  return transform._replace(apply=apply, update=update)
