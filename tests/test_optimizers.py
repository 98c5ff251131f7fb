"""Optimizers with traced numbers, against optax with Python constants."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_sim.core import validate
from fedjax_sim.training.optimizers import (
  OPTIMIZERS,
  by_layer,
  clipped,
  descend,
  optimizer,
)

# Values other than the defaults, and arguments that switch a branch on.
NUMBERS = {
  "b1": 0.8,
  "b2": 0.95,
  "decay": 0.7,
  "eps": 1e-2,
  "eps_root": 1e-2,
  "initial_accumulator_value": 0.3,
  "initial_scale": 0.2,
  "max_norm": 0.7,
  "momentum": 0.6,
  "threshold": 4.5,
  "trust_coefficient": 0.02,
  "weight_decay": 0.05,
}
OWN = ("uncorrected_lamb",)  # which optax does not have
RATES = (0.25, 0.125)
STEPS = 5  # at the fifth, radam's threshold tells from its default
PARAMS = {
  "b": np.array([0.5, -1.0, 0.0], np.float32),
  "w": np.array([[1.0, -2.0], [0.25, 3.0]], np.float32),
}


def numbers_of(name):
  """The optimizer's numeric arguments, without the learning rate."""
  parameters = inspect.signature(OPTIMIZERS[name]).parameters
  numeric = {
    p.name
    for p in parameters.values()
    if isinstance(p.default, float) or p.name in ("momentum", "weight_decay")
  }
  return {k: NUMBERS[k] for k in numeric}


def gradients(step, dtype=np.float32):
  rng = np.random.default_rng(step)
  return jax.tree.map(lambda p: rng.normal(size=p.shape).astype(dtype), PARAMS)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_traced_numbers_give_what_optax_gives_with_constants(name):
  numbers = numbers_of(name)
  made = optimizer(name, learning_rate=1.0, **numbers)
  assert set(made.hparams) == {"learning_rate", *numbers}
  traces = []

  @jax.jit
  def run(hparams):
    traces.append(1)
    params, state = PARAMS, made.build(hparams).init(PARAMS)
    for step in range(STEPS):
      params, state = descend(
        made.build(hparams), gradients(step), state, params
      )
    return params

  for rate in RATES:
    traced = run(
      {k: np.float32(v) for k, v in numbers.items()}
      | {"learning_rate": np.float32(rate)}
    )
    plain = OPTIMIZERS[name](rate, **numbers)

    @jax.jit
    def with_constants(params, plain=plain):
      state = plain.init(params)
      for step in range(STEPS):
        updates, state = plain.update(gradients(step), state, params)
        params = optax.apply_updates(params, updates)
      return params

    params = with_constants(PARAMS)
    for key in PARAMS:
      assert np.abs(traced[key] - PARAMS[key]).max() > 1e-4
      np.testing.assert_allclose(traced[key], params[key], rtol=2e-5, atol=1e-6)
  assert len(traces) == 1


def walked(made, clip=None):
  """The parameters after some compiled steps."""
  made = made if clip is None else clipped(made, clip)

  @jax.jit
  def run(hparams):
    build = made.build(hparams)
    params, state = PARAMS, build.init(PARAMS)
    for step in range(STEPS):
      params, state = descend(build, gradients(step), state, params)
    return params

  return run({k: np.float32(v) for k, v in made.hparams.items()})


def sgd_by_hand(params, slopes, numbers):
  """torch.optim.SGD, in float64."""
  momentum = numbers.get("momentum", 0.0)
  trace = {k: np.zeros_like(p) for k, p in params.items()}
  for slope in slopes:
    for k, p in params.items():
      g = slope[k] + numbers["weight_decay"] * p
      trace[k] = momentum * trace[k] + g
      params[k] = p - numbers["learning_rate"] * trace[k]
  return params


def adam_by_hand(params, slopes, numbers):
  """torch.optim.Adam, in float64."""
  b1, b2, eps = (numbers[k] for k in ("b1", "b2", "eps"))
  m, v = ({k: np.zeros_like(p) for k, p in params.items()} for _ in range(2))
  for t, slope in enumerate(slopes, 1):
    for k, p in params.items():
      g = slope[k] + numbers["weight_decay"] * p
      m[k] = b1 * m[k] + (1 - b1) * g
      v[k] = b2 * v[k] + (1 - b2) * g**2
      root = np.sqrt(v[k] / (1 - b2**t)) + eps
      params[k] = p - numbers["learning_rate"] * m[k] / (1 - b1**t) / root
  return params


@pytest.mark.parametrize(
  ("name", "by_hand", "numbers"),
  [
    ("sgd", sgd_by_hand, {}),
    ("sgd", sgd_by_hand, {"momentum": 0.6}),
    ("adam", adam_by_hand, {"b1": 0.8, "b2": 0.95, "eps": 1e-2}),
  ],
)
@pytest.mark.parametrize("clip", [None, 0.5])
def test_weight_decay_is_torchs_where_optax_has_none(
  name, by_hand, numbers, clip
):
  numbers = {**numbers, "learning_rate": 0.25, "weight_decay": 0.3}
  slopes = [gradients(step, np.float64) for step in range(STEPS)]
  if clip is not None:  # torch clips what the loss gives, and decays later
    norms = [np.sqrt(sum((g**2).sum() for g in s.values())) for s in slopes]
    slopes = [
      {k: g * min(1, clip / norm) for k, g in slope.items()}
      for slope, norm in zip(slopes, norms, strict=True)
    ]
  start = {k: p.astype(np.float64) for k, p in PARAMS.items()}
  expected = by_hand(start, slopes, numbers)
  found = walked(optimizer(name, **numbers), clip)
  for key, value in expected.items():
    np.testing.assert_allclose(found[key], value, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(
  "name",
  [
    n
    for n in OPTIMIZERS
    if not hasattr(OPTIMIZERS[n], "__wrapped__") and n not in OWN
  ],
)
def test_a_decay_of_its_own_stays_optaxs(name):
  assert OPTIMIZERS[name] is getattr(optax, name)
  assert "weight_decay" in inspect.signature(OPTIMIZERS[name]).parameters


def test_weight_decay_is_added_to_the_gradient_whatever_the_optimizer():
  decay, rate = 0.3, 0.25
  for name, make in OPTIMIZERS.items():
    if name in OWN or make is getattr(optax, name):
      continue
    plain = getattr(optax, name)(rate)
    params, state = PARAMS, plain.init(PARAMS)
    for step in range(STEPS):
      slope = jax.tree.map(lambda g, p: g + decay * p, gradients(step), params)
      updates, state = plain.update(slope, state, params)
      params = optax.apply_updates(params, updates)
    found = walked(optimizer(name, learning_rate=rate, weight_decay=decay))
    for key in PARAMS:
      np.testing.assert_allclose(found[key], params[key], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_wide_numbers_do_not_widen_the_state(name, dtype):
  made = optimizer(name, learning_rate=0.1, **numbers_of(name))
  hparams = {k: jnp.float32(v) for k, v in made.hparams.items()}
  params = jax.tree.map(lambda p: jnp.asarray(p, dtype), PARAMS)
  state = jax.eval_shape(made.build(hparams).init, params)

  def step(params, state):
    return descend(made.build(hparams), params, state, params)

  after = jax.eval_shape(step, params, state)
  dtypes = lambda tree: jax.tree.map(lambda x: x.dtype, tree)
  assert dtypes(after) == dtypes((params, state))


@pytest.mark.usefixtures("x64")
def test_float32_parameters_train_in_a_loop_under_x64():
  made = optimizer("adam", learning_rate=0.1, b1=0.5)
  hparams = {k: jnp.asarray(v) for k, v in made.hparams.items()}
  assert hparams["b1"].dtype == jnp.float64
  params = {"w": jnp.ones(2, jnp.float32)}
  step = lambda i, carry: descend(
    made.build(hparams), carry[0], carry[1], carry[0]
  )
  start = (params, made.build(hparams).init(params))
  after, _ = jax.lax.fori_loop(0, 3, step, start)
  assert after["w"].dtype == jnp.float32
  assert np.all(after["w"] < 0.8)


def test_floats_are_traced_and_other_arguments_stay_constants():
  made = optimizer(
    "sgd", learning_rate=1, momentum=np.float32(0.5), nesterov=True
  )
  assert made.hparams == {"learning_rate": 1.0, "momentum": 0.5}
  assert all(type(v) is float for v in made.hparams.values())
  state = made.build(made.hparams).init({"w": jnp.ones(1)})
  _, state = descend(
    made.build(made.hparams), {"w": jnp.ones(1)}, state, {"w": jnp.ones(1)}
  )
  params, _ = descend(
    made.build(made.hparams), {"w": jnp.ones(1)}, state, {"w": jnp.ones(1)}
  )
  # Nesterov: trace 1, then 1.5; the second step is 1 + 0.5 * 1.5.
  np.testing.assert_allclose(params["w"], 1 - 1.75)


def test_any_factory_makes_an_optimizer():
  made = optimizer(optax.trace, decay=0.5)
  assert made.hparams == {"decay": 0.5}

  def open_ended(learning_rate, **more):
    return optax.sgd(learning_rate, **more)

  assert optimizer(open_ended, learning_rate=0.1, momentum=0.9).hparams == {
    "learning_rate": 0.1,
    "momentum": 0.9,
  }


def test_unknown_optimizer():
  with pytest.raises(
    validate.UnknownNameError, match=r"optimizer='adm' .*mean 'adam'.*sgd"
  ):
    optimizer("adm", learning_rate=0.1)


@pytest.mark.parametrize("kind", ["adam", optax.adam])
def test_unknown_argument(kind):
  with pytest.raises(
    validate.UnknownNameError,
    match=r"optimizer adam does not take 'learning_rat'.*'learning_rate'",
  ):
    optimizer(kind, learning_rat=0.1)


def test_missing_argument():
  with pytest.raises(
    ValueError, match=r"optimizer sgd lacks .*'learning_rate'"
  ):
    optimizer("sgd", momentum=0.9)


@pytest.mark.parametrize(
  ("rate", "error"),
  [
    (-0.1, ValueError),
    (float("nan"), ValueError),
    (float("inf"), ValueError),
    ("0.1", TypeError),
    (True, TypeError),
    (None, TypeError),
  ],
)
def test_a_bad_learning_rate(rate, error):
  with pytest.raises(error, match=f"learning_rate={rate!r} "):
    optimizer("sgd", learning_rate=rate)


def test_a_schedule_counts_the_steps():
  schedule = optax.linear_schedule(1.0, 0.0, 4)
  kind = optimizer("sgd", learning_rate=schedule)
  assert kind.hparams == {}
  params, state = jnp.zeros(()), kind.build({}).init(jnp.zeros(()))
  for expected in (-1.0, -1.75, -2.25, -2.5, -2.5):
    params, state = descend(kind.build({}), jnp.ones(()), state, params)
    assert params == expected


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_long_gradients_are_scaled_down(scale):
  made = clipped(optimizer("sgd", learning_rate=0.5), 2.0)
  assert made.hparams == {"learning_rate": 0.5, "max_grad_norm": 2.0}
  gradient = {"a": scale * jnp.asarray([3.0, 0.0]), "b": scale * jnp.ones(1)}
  params = jax.tree.map(jnp.zeros_like, gradient)

  @jax.jit
  def step(hparams):
    rule = made.build(hparams)
    return descend(rule, gradient, rule.init(params), params)[0]

  for norm in (2.0, 0.5):
    found = step({**made.hparams, "max_grad_norm": norm})
    length = scale * np.sqrt(10)
    expected = -0.5 * scale * min(1, norm / length) * np.array([3.0, 0.0, 1.0])
    both = np.concatenate([found["a"], found["b"]])
    np.testing.assert_allclose(both, expected, rtol=1e-6)


def test_a_norm_to_clip_to_is_positive():
  with pytest.raises(ValueError, match=r"client\.max_grad_norm=0"):
    clipped(optimizer("sgd", learning_rate=0.5), 0, "client.max_grad_norm")


LAYERS = {
  "first": {"w": np.ones(2)},
  "last": {"b": np.ones(2), "w": np.ones(2)},
}


def one_step(chosen):
  """What a step with gradient 1 takes away from each parameter."""
  params = jax.tree.map(jnp.asarray, LAYERS)
  gradient = jax.tree.map(jnp.ones_like, params)
  made = chosen.build(chosen.hparams)
  after, _ = descend(made, gradient, made.init(params), params)
  return jax.tree.map(lambda x, y: float((x - y)[0]), params, after)


def test_rates_by_layer():
  inner = optimizer("sgd", learning_rate=0.5)
  rates = (("last/w", 0.1), ("last/", 0.0))  # the first one that matches
  assert one_step(by_layer(inner, rates, LAYERS)) == {
    "first": {"w": pytest.approx(0.5)},
    "last": {"b": 0.0, "w": pytest.approx(0.05)},
  }


def test_rates_by_layer_scale_what_any_optimizer_does():
  inner = optimizer("adamw", learning_rate=0.5, weight_decay=0.1)
  usual = one_step(inner)
  scaled = one_step(by_layer(inner, (("last/", 0.1),), LAYERS))
  assert scaled["first"] == usual["first"]
  for name, value in usual["last"].items():
    assert scaled["last"][name] == pytest.approx(0.1 * value, rel=1e-5)


@pytest.mark.parametrize(
  ("rates", "message"),
  [
    ((("middle/", 0.1),), "'middle/' matches no parameter; there are first/w"),
    ((("last/", -0.1),), "factor of 'last/'=-0.1"),
    ((("last/", "x"),), "factor of 'last/'='x'"),
    ((("(", 1.0),), "no regular expression"),
    (("last/", 0.1), "holds no pairs"),
    ("last/", "holds no pairs"),
  ],
)
def test_rates_by_layer_that_are_none(rates, message):
  inner = optimizer("sgd", learning_rate=0.5)
  with pytest.raises((TypeError, ValueError), match=message):
    by_layer(inner, rates, LAYERS)
