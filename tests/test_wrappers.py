"""Algorithms around other ones, and defaults that instances share."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim import core
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.core.types import EMPTY
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.engine.traffic import report_shapes
from fedjax_sim.training.stale import stale
from fedjax_sim.training.wrappers import wrap_algorithm
from problems import (
  flat,
  make_simulator,
  params_of,
  quadratic,
  quadratic_data,
  sgd,
  train,
)

CENTRES = np.arange(12.0).reshape(4, 3)
TASK = quadratic(3)
BASE = fedavg(TASK, sgd(0.25), sgd(1.0))


class Counted(NamedTuple):
  server: Any
  rounds: jax.Array


class Message(NamedTuple):
  inner: Any
  rounds: jax.Array


def simulator_of(algorithm, rounds=1, **more):
  return make_simulator(
    TASK,
    algorithm,
    quadratic_data(CENTRES),
    batching=LocalBatching(batch_size=1, epochs=2),
    **more,
  )


def counted(algorithm, factor=1.0):
  """Count rounds, with a state, a message, a pass and numbers of its own."""

  def postprocess_report(client, report, inner):
    report = inner(report)
    rounds = client.message.rounds.astype(jnp.float32)
    return report._replace(values={**report.values, "rounds": rounds})

  def apply(state, aggregate, context):
    server = algorithm.apply(state.server, aggregate, context)
    seen = jnp.max(aggregate.members.values["rounds"]).astype(jnp.int32)
    return Counted(server, seen + 1)

  return wrap_algorithm(
    algorithm,
    init=lambda server, key, hparams: Counted(server, jnp.int32(0)),
    message=lambda state, inner: Message(inner, state.rounds),
    passes=(core.Pass(lambda client, *c: (), lambda client, c, *_: c),),
    postprocess_report=postprocess_report,
    apply=apply,
    state_metrics=lambda state, hparams: {
      "rounds": hparams["factor"] * state.rounds
    },
    hparams={"factor": factor},
  )


def test_a_wrapped_algorithm_trains_as_it_does_alone():
  def finish(client, carry):  # its passes, its message, its numbers
    assert client.num_steps.shape == (1,)
    assert client.message._fields == core.Variables._fields
    return BASE.finish(client, carry)

  wrapped = counted(BASE._replace(finish=finish), factor=10.0)
  simulator = simulator_of(wrapped)
  state = simulator.init()
  rows: list[dict[str, float]] = []
  for out in simulator.run(state, 3):
    state, rows = out.state, rows + out.rows
  plain = simulator_of(BASE)
  np.testing.assert_allclose(
    flat(params_of(simulator, state)),
    flat(params_of(plain, train(plain, 3))),
    rtol=1e-6,
  )
  assert [row["rounds"] for row in rows] == [0, 10, 20]
  assert int(state.server.rounds) == 3


def test_a_wrapper_replaces_no_numbers():
  with pytest.raises(ValueError, match=r"has a 'factor' already"):
    counted(counted(BASE))
  with pytest.raises(ValueError, match=r"has a 'stale_probability' already"):
    stale(stale(BASE, 0.5), 0.5)


def in_a_pair():
  """FedAvg that sends more than it reports: its update and twice of it."""

  def postprocess_report(client, report):
    twice = jax.tree.map(lambda u: 2 * u, report.update)
    return report._replace(update=(report.update, twice))

  def apply(server, aggregate, context):
    one, twice = aggregate.update
    mean = jax.tree.map(lambda a, b: (a + b) / 3, one, twice)
    return BASE.apply(server, aggregate._replace(update=mean), context)

  return BASE._replace(postprocess_report=postprocess_report, apply=apply)


def test_shapes_of_reports_are_those_that_are_sent():
  algorithm = in_a_pair()
  server = jax.eval_shape(algorithm.init, jax.random.key(0), BASE.hparams)
  report = report_shapes(algorithm, server, BASE.hparams)
  one, twice = report.update
  assert one == twice == server.variables.params


def test_late_reports_of_what_is_made_after_the_transforms():
  """A stale server keeps what is sent, not what is reported."""
  ends = []
  for algorithm in (in_a_pair(), BASE):
    simulator = simulator_of(stale(algorithm, 0.5))
    ends.append(flat(params_of(simulator, train(simulator, 3))))
  np.testing.assert_allclose(ends[0], ends[1], rtol=1e-5)


def test_what_is_not_finite_after_the_transforms_is_left_out():
  def postprocess_report(client, report):
    broken = jnp.where(client.id == 2, jnp.nan, 1.0)
    update = jax.tree.map(lambda u: broken * u, report.update)
    return report._replace(update=update)

  algorithm = BASE._replace(postprocess_report=postprocess_report)
  simulator = simulator_of(algorithm)
  out = simulator.dispatch(simulator.init(), simulator.plan(0, 1))
  assert out.rows[0]["clients_rejected"] == 1
  assert np.isfinite(flat(params_of(simulator, out.state))).all()


def test_no_default_can_be_changed_in_place():
  kinds = [getattr(core, name) for name in core.__all__]
  for kind in kinds:
    for field, default in getattr(kind, "_field_defaults", {}).items():
      assert not isinstance(default, dict | list | set), (kind, field)
  report = core.Report(update=(), weight=jnp.float32(1))
  with pytest.raises(TypeError, match="item assignment"):
    report.metrics["loss"] = 1  # type: ignore[index]
  assert {**EMPTY, "a": 1} == EMPTY | {"a": 1} == {"a": 1}


def test_an_empty_mapping_is_a_pytree_without_leaves():
  assert jax.tree.leaves(EMPTY) == []
  assert jax.jit(lambda x: x)(EMPTY) is EMPTY
  assert EMPTY == {}
