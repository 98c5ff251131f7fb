"""Error feedback around transforms, against float64 recursions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_sim import transforms
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.core import Transform, TransformResult
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.sampling import Sampler
from fedjax_sim.training.optimizers import optimizer
from fedjax_sim.transforms import error_feedback
from problems import (
  make_simulator,
  params_of,
  quadratic,
  quadratic_data,
  sgd,
)
from tiers import slow_but

KEY = jax.random.key(0)


def top(count):
  """Keeps the entries with the largest magnitudes, and counts rounds."""

  def apply(update, shared, state, hparams, key):
    x = update["w"]
    order = jnp.argsort(-jnp.abs(x), stable=True)
    kept = jnp.zeros(x.shape, bool).at[order[:count]].set(True)
    return TransformResult(
      {"w": jnp.where(kept, hparams["scale"] * x, 0)},
      state + 1,
      metrics={"kept": jnp.mean(kept)},
      bytes=jnp.float32(8 * count),
    )

  return Transform(
    name="top",
    hparams={"scale": 1.0},
    apply=apply,
    client_init=lambda params, hparams: jnp.zeros((), jnp.int32),
  )


def top_of(x, count):
  kept = np.argsort(-np.abs(x), kind="stable")[:count]
  out = np.zeros_like(x)
  out[kept] = x[kept]
  return out


@pytest.mark.parametrize("lanes", slow_but([3], [1, 3]))
def test_a_run_follows_the_recursion_of_each_client(lanes):
  rng = np.random.default_rng(0)
  centres = rng.normal(size=(4, 6))
  centres[3, 0] = 1e30
  curvatures = [1, 1, 1, 1e30]  # the last client's update is not finite
  cohorts = [[0, 1], [2, 3], [0, 2, 3], [1], [0, 1, 2], [0, 1]]
  task = quadratic(6)
  simulator = make_simulator(
    task,
    fedavg(task, sgd(0.5), sgd(1.0), weighting="uniform"),
    quadratic_data(centres, curvatures),
    batching=LocalBatching(batch_size=1),
    lanes=lanes,
    transforms=[error_feedback(top(2))],
    sampler=Sampler(
      sample=lambda seed, round_: np.array(cohorts[round_]),
      sizes=(3,),
      expected=2,
    ),
  )
  state = simulator.init()
  w, residual = np.zeros(6), np.zeros((4, 6))
  rounds = np.zeros(4, int)
  for round_, ids in enumerate(cohorts):
    out = simulator.dispatch(state, simulator.plan(round_, 1))
    state = out.state
    sent = []
    for k in (k for k in ids if k != 3):
      wanted = 0.5 * (centres[k] - w) + residual[k]
      sent.append(top_of(wanted, 2))
      residual[k] = wanted - sent[-1]
      rounds[k] += 1
    w = w + np.mean(sent, axis=0)
    _, (own,) = state.clients
    np.testing.assert_allclose(own.residual["w"][:4], residual, atol=1e-6)
    np.testing.assert_array_equal(own.inner[:4], rounds)
    np.testing.assert_allclose(
      params_of(simulator, state)["w"], w, rtol=1e-5, atol=1e-6
    )
    assert out.rows[0]["top/kept"] == pytest.approx(2 / 6)
    assert out.rows[0]["top/bytes"] == 16


@pytest.mark.parametrize(
  "inner",
  [
    transforms.quantize(0.8, 2),
    transforms.clip(0.1),
    transforms.lift("trace", optimizer(optax.trace, decay=0.5)),
  ],
  ids=lambda transform: transform.name,
)
def test_what_is_sent_and_what_is_kept_add_up(inner):
  wrapped = error_feedback(inner)
  assert (wrapped.name, wrapped.hparams) == (inner.name, inner.hparams)
  rng = np.random.default_rng(1)
  params = {"a": jnp.zeros((3, 4)), "b": jnp.zeros(5)}
  hparams = jax.tree.map(jnp.float32, wrapped.hparams)
  shared = wrapped.init(params, hparams)
  state = wrapped.client_init(params, hparams)
  apply = jax.jit(wrapped.apply)
  given = jax.tree.map(lambda p: np.zeros(p.shape), params)  # in float64
  sent = given
  for _ in range(20):
    update = jax.tree.map(
      lambda p: rng.normal(size=p.shape).astype(np.float32), params
    )
    result = apply(update, shared, state, hparams, KEY)
    state = result.state
    given = jax.tree.map(np.add, given, update)
    sent = jax.tree.map(lambda s, x: s + np.asarray(x, float), sent, result[0])
    for name in given:
      np.testing.assert_allclose(
        sent[name] + np.asarray(state.residual[name], float),
        given[name],
        atol=2e-5,
      )


def test_a_residual_keeps_what_a_short_dtype_rounds_away():
  params = {"w": jnp.zeros(3, jnp.bfloat16)}
  wrapped = error_feedback(transforms.clip(1e6))
  hparams = {"norm": jnp.float32(1e6)}
  state = wrapped.client_init(params, hparams)
  assert state.residual["w"].dtype == jnp.float32
  update = {"w": jnp.array([1, 2, 3], jnp.bfloat16)}
  state = state._replace(residual={"w": jnp.full(3, 2.0**-12, jnp.float32)})
  result = wrapped.apply(update, (), state, hparams, KEY)
  assert result.update["w"].dtype == jnp.bfloat16
  np.testing.assert_array_equal(result.update["w"], update["w"])
  np.testing.assert_array_equal(result.state.residual["w"], 2.0**-12)


def test_with_feedback_a_biased_transform_reaches_the_optimum():
  """Karimireddy et al. 2019: without it the smaller entry never moves."""
  centres = np.array([[1.0, 0.3], [-1.0, 0.3]])
  task = quadratic(2)

  def end(transform):
    simulator = make_simulator(
      task,
      fedavg(task, sgd(0.1), sgd(1.0), weighting="uniform"),
      quadratic_data(centres),
      batching=LocalBatching(batch_size=1),
      transforms=[transform],
      rounds_per_dispatch=200,
    )
    for out in simulator.run(simulator.init(), 200):
      state = out.state
    return params_of(simulator, state)["w"]

  np.testing.assert_allclose(end(top(1)), [0, 0], atol=1e-6)
  assert abs(end(error_feedback(top(1)))[1] - 0.3) < 0.05


def test_what_is_refused():
  with pytest.raises(TypeError, match="error_feedback: transform"):
    error_feedback(transforms.clip)  # type: ignore[arg-type]
  task = quadratic(2)
  make = lambda *chain: make_simulator(
    task,
    fedavg(task, sgd(0.1), sgd(1.0)),
    quadratic_data(np.ones((2, 2))),
    transforms=chain,
  )
  again = transforms.clip(1.0)
  with pytest.raises(ValueError, match=r"'clip' twice.*name='clip_2'"):
    make(again, error_feedback(again))
  make(again, error_feedback(again._replace(name="clip_2"))).trace()
  plain = again._replace(
    apply=lambda update, *rest: (update, (), ())  # type: ignore[arg-type]
  )
  with pytest.raises(TypeError, match=r"'clip' returned a tuple of 3.*Result"):
    make(plain).trace()
