"""FLUTE's optimizers and schedules: rows of the converter in docs/flute.md.

As `test_flute.py`, with torch's and FLUTE's optimizers in numpy.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_sim.engine import hparams as engine_hparams
from fedjax_sim.training import schedules
from fedjax_sim.training.lamb import uncorrected_lamb
from fedjax_sim.training.optimizers import descend, optimizer


def traced(hparams):
  return jax.tree.map(jnp.float32, hparams)


# --- optimizers ---------------------------------------------------------------

PARAMS = {"b": np.array([0.5, -1.0, 0.2]), "w": np.array([[1.0, -2.0], [3, 1]])}


def slopes(step, growing=0.0):
  rng = np.random.default_rng(7)
  drawn = {k: rng.normal(size=p.shape) for k, p in PARAMS.items()}
  if growing:  # every entry's square is larger than all before
    return {k: g * (1 + growing) ** step for k, g in drawn.items()}
  rng = np.random.default_rng(step)
  return {k: rng.normal(size=p.shape) for k, p in PARAMS.items()}


def moments(m, v, g, t, b1, b2):
  m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
  return m, v, 1 - b1**t, 1 - b2**t


def sgd_of_flute(p, g, state, t, n):
  g = g + n.get("weight_decay", 0) * p
  state["buffer"] = n.get("momentum", 0) * state.get("buffer", 0) + g
  return p - n["lr"] * state["buffer"]


def adam_of_flute(p, g, state, t, n):
  """torch.optim.Adam; `amsgrad` keeps the greatest uncorrected moment."""
  g = g + n.get("weight_decay", 0) * p
  m, v, c1, c2 = moments(
    state.get("m", 0), state.get("v", 0), g, t, n["b1"], n["b2"]
  )
  most = np.maximum(state.get("most", 0), v) if n.get("amsgrad") else v
  state.update(m=m, v=v, most=most)
  return p - n["lr"] * m / c1 / (np.sqrt(most / c2) + n["eps"])


def adamax_of_flute(p, g, state, t, n):
  g = g + n.get("weight_decay", 0) * p
  m = n["b1"] * state.get("m", 0) + (1 - n["b1"]) * g
  u = np.maximum(n["b2"] * state.get("u", 0), np.abs(g) + n["eps"])
  state.update(m=m, u=u)
  return p - n["lr"] / (1 - n["b1"] ** t) * m / u


def adamw_of_flute(p, g, state, t, n):
  """adamW.py: decay comes after the step, of what the step has made."""
  m, v, c1, c2 = moments(
    state.get("m", 0), state.get("v", 0), g, t, n["b1"], n["b2"]
  )
  state.update(m=m, v=v)
  p = p - n["lr"] * math.sqrt(c2) / c1 * m / (np.sqrt(v) + n["eps"])
  return p - n["lr"] * n.get("weight_decay", 0) * p


def lamb_of_flute(p, g, state, t, n):
  """lamb.py: no correction of the moments, and a norm of at most 10."""
  m, v, _, _ = moments(
    state.get("m", 0), state.get("v", 0), g, t, n["b1"], n["b2"]
  )
  state.update(m=m, v=v)
  way = m / (np.sqrt(v) + n["eps"]) + n.get("weight_decay", 0) * p
  trust = np.minimum(np.linalg.norm(p), 10) / np.linalg.norm(way)
  return p - n["lr"] * trust * way


def lars_of_flute(p, g, state, t, n):
  """Of torchlars, around torch.optim.SGD."""
  norm, decay = np.linalg.norm(p), n.get("weight_decay", 0)
  trust = 0.001 * norm / (np.linalg.norm(g) + decay * norm + 1e-8)
  g = trust * (g + decay * p)
  state["buffer"] = n.get("momentum", 0) * state.get("buffer", 0) + g
  return p - n["lr"] * state["buffer"]


def walked_by_flute(step, numbers, growing=0.0):
  params = dict(PARAMS)
  states: dict[str, dict[str, np.ndarray]] = {k: {} for k in params}
  for t in range(1, 6):
    own = slopes(t, growing)
    params = {
      k: step(p, own[k], states[k], t, numbers) for k, p in params.items()
    }
  return params


def walked(kind, numbers, growing=0.0):
  made = optimizer(kind, **numbers)

  @jax.jit
  def run(hparams):
    build = made.build(hparams)
    params = jax.tree.map(jnp.float32, PARAMS)
    state = build.init(params)
    for t in range(1, 6):
      own = jax.tree.map(jnp.float32, slopes(t, growing))
      params, state = descend(build, own, state, params)
    return params

  return run(traced(made.hparams))


MOMENTS = {"b1": 0.8, "b2": 0.95, "eps": 1e-8}


def check_optimizer(step, flutes, kind, ours, growing=0.0):
  expected = walked_by_flute(step, flutes, growing)
  found = walked(kind, ours, growing)
  for key, start in PARAMS.items():
    assert np.abs(expected[key] - start).max() > 1e-2
    np.testing.assert_allclose(found[key], expected[key], rtol=2e-5, atol=1e-5)


def test_sgd():
  numbers = {"momentum": 0.6, "weight_decay": 0.05}
  check_optimizer(
    sgd_of_flute, {"lr": 0.1} | numbers, "sgd", {"learning_rate": 0.1} | numbers
  )


def test_adam_and_adamax():
  numbers = MOMENTS | {"weight_decay": 0.05}
  ours = {"learning_rate": 0.1} | numbers
  check_optimizer(adam_of_flute, {"lr": 0.1} | numbers, "adam", ours)
  check_optimizer(adamax_of_flute, {"lr": 0.1} | numbers, "adamax", ours)


def test_amsgrad():
  """Only while moments grow: optax keeps the greatest corrected one."""
  flutes = {"lr": 0.1, "amsgrad": True} | MOMENTS
  ours = {"learning_rate": 0.1} | MOMENTS
  check_optimizer(adam_of_flute, flutes, optax.amsgrad, ours, growing=1.0)
  expected = walked_by_flute(adam_of_flute, flutes)
  found = walked(optax.amsgrad, ours)
  assert np.abs(found["w"] - expected["w"]).max() > 1e-3


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_adamw(decay):
  lr = 0.2
  kept = 1 - lr * decay
  check_optimizer(
    adamw_of_flute,
    {"lr": lr, "weight_decay": decay} | MOMENTS,
    "adamw",
    {"learning_rate": lr * kept, "weight_decay": decay / kept} | MOMENTS,
  )


def test_lamb():
  flutes = {"lr": 0.1} | MOMENTS
  check_optimizer(
    lamb_of_flute, flutes, "lamb", {"learning_rate": 0.1} | MOMENTS
  )
  # With decay the numbers carry over once moments need no correction.
  numbers = {"b1": 0.5, "b2": 0.6, "eps": 1e-8, "weight_decay": 0.5}
  w = PARAMS["w"]
  build = optax.lamb(0.1, **numbers)
  update = jax.jit(build.update)
  state, gaps = build.init(jnp.float32(w)), []
  theirs: dict[str, np.ndarray] = {}
  for t in range(1, 41):
    own = slopes(t)["w"]
    ours, state = update(jnp.float32(own), state, jnp.float32(w))
    other = lamb_of_flute(w, own, theirs, t, {"lr": 0.1} | numbers) - w
    gaps.append(np.abs(ours - other).max() / np.abs(other).max())
  assert gaps[0] > 0.01
  assert gaps[round(5 / (1 - 0.6))] < 0.01
  assert gaps[-1] < 1e-5


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_uncorrected_lamb(scale):
  """At once, with decay, and with norms beyond 10."""
  numbers = {"b1": 0.5, "b2": 0.6, "eps": 1e-6, "weight_decay": 0.5}
  p = scale * PARAMS["w"]
  build = uncorrected_lamb(0.1, **numbers)
  state = build.init(jnp.float32(p))
  theirs: dict[str, np.ndarray] = {}
  ours = jnp.float32(p)
  for t in range(1, 6):
    own = slopes(t)["w"]
    update, state = build.update(jnp.float32(own), state, ours)
    ours = ours + update
    p = lamb_of_flute(p, own, theirs, t, {"lr": 0.1} | numbers)
  np.testing.assert_allclose(ours, p, rtol=1e-5)
  assert (np.linalg.norm(p) > 10) == (scale > 1)
  zeros = jnp.zeros(3)  # as biases begin: trust is 1
  first, _ = build.update(jnp.ones(3), build.init(zeros), zeros)
  np.testing.assert_allclose(first, -0.1 * 0.5 / (0.4**0.5 + 1e-6), rtol=1e-5)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_lars(momentum):
  """With optax, momentum is 0.9 where none is given, FLUTE's 0."""
  check_optimizer(
    lars_of_flute,
    {"lr": 20.0, "momentum": momentum},
    "lars",
    {"learning_rate": 20.0, "momentum": momentum},
  )


# --- schedules ----------------------------------------------------------------


def factors(text, rounds):
  schedule = schedules.parse("server.schedule", text)
  at = jax.jit(lambda done: schedule.factor(done, schedule.init()))
  return [float(at(jnp.int32(t))) for t in range(rounds)]


def test_step_lr_and_multi_step_lr():
  gamma = 0.5
  steps = [gamma ** (t // 3) for t in range(10)]
  np.testing.assert_allclose(factors("step(every=3, factor=0.5)", 10), steps)
  many = [gamma ** sum(t >= m for m in (2, 7)) for t in range(10)]
  np.testing.assert_allclose(
    factors("multi_step(at=(2, 7), factor=0.5)", 10), many
  )


def test_rampup_keep_expdecay_keep():
  """FLUTE's first round has rate 0, and all that follow come a round later."""
  peak, floor, sr, si, sf = 0.4, 0.02, 3, 5, 9

  def rate(t):
    if t < sr:
      return peak * t / sr
    if t < si:
      return peak
    if t < sf:
      return peak * math.exp(math.log(floor / peak) / (sf - si) * (t - si))
    return floor

  text = (
    f"ramp_keep_decay(ramp={sr}, keep={si - sr}, decay={sf - si},"
    f" floor={floor / peak})"
  )
  found = peak * np.array(factors(text, 12))
  assert rate(0) == 0
  np.testing.assert_allclose(found, [rate(t + 1) for t in range(12)], rtol=1e-5)


@pytest.mark.parametrize("patience", [0, 2])
def test_patience(patience):
  """ReduceLROnPlateau of torch waits for one bad value more."""
  losses = [3.0, 2.0, 2.5, 2.4, 2.0, 2.1, 1.9, 2.0, 2.0, 2.0, 2.0, 2.0]
  factor, best, bad, rate = 0.5, math.inf, 0, 1.0
  schedule = schedules.plateau("x", patience=patience + 1, factor=factor)
  state = jax.device_get(schedule.init())
  for loss in losses:
    best, bad = (loss, 0) if loss < best else (best, bad + 1)
    if bad > patience:
      rate, bad = rate * factor, 0
    state = engine_hparams.reacted(
      schedule, state, loss, higher_is_better=False
    )
    assert float(schedule.factor(jnp.int32(0), state)) == rate
  assert rate < 1


def test_ss_config():
  """Of the server's scheduler, a step a round; clients' begins anew."""
  start, stop, initial, final = 2, 6, 0.1, 0.4

  def rate(t):
    share = min(max((t - start) / (stop - start), 0), 1)
    return initial + (final - initial) * share

  text = (
    f"linear(begin={start}, rounds={stop - start}, start={initial / final})"
  )
  found = final * np.array(factors(text, 9))
  np.testing.assert_allclose(found, [rate(t) for t in range(9)], rtol=1e-5)
