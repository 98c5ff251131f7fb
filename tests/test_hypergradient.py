"""Gradients through rounds are those of finite differences, in float64.

Clients of the logistic problem have 1 to 10 examples, cohorts 3 of 5 clients in
2 lanes: steps, waves and an empty lane that do nothing.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedjax_sim as fs
from fedjax_sim import aggregators, sampling, transforms
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.algorithms.fedprox import fedprox
from fedjax_sim.algorithms.scaffold import scaffold
from fedjax_sim.engine.loops import FixedLoop, repeat
from fedjax_sim.privacy.secure.aggregators import secure_sum
from fedjax_sim.simulation import derivatives
from fedjax_sim.simulation.dispatch import DivergedError
from fedjax_sim.simulation.runtime import Runtime
from fedjax_sim.training.optimizers import optimizer
from logistic import DATA, OFFSETS, SIZES, TASK, WORK, X, Y, gradient
from problems import make_simulator, params_of, sgd, train

RATES = "server.learning_rate", "client.learning_rate"
HELDOUT = {"x": X[::3], "y": Y[::3]}


def simulator(algorithm, **options):
  data = dataclasses.replace(DATA, test=HELDOUT)
  options = {"sampler": sampling.uniform(len(SIZES), 3), **options}
  return make_simulator(
    TASK, algorithm, data, **{"batching": WORK, "lanes": 2, **options}
  )


def momentum(rate, share):
  return optimizer("sgd", learning_rate=rate, momentum=share)


FEDAVG = fedavg(TASK, sgd(0.3), momentum(0.8, 0.5))


def differences(function, step=1e-5):
  """The gradient by central finite differences, at the run's own numbers."""
  found = {}
  for name, default in function.defaults.items():
    at = lambda x, name=name: function({name: x}).value
    steps = step * np.eye(np.size(default)).reshape(-1, *np.shape(default))
    slopes = [(at(default + e) - at(default - e)) / (2 * step) for e in steps]
    found[name] = np.reshape(slopes, np.shape(default))
  return found


def case(name, algorithm, *of):
  return pytest.param(algorithm, (*RATES, *of), id=name)


ADAM = optimizer("adam", learning_rate=0.1, b1=0.8, eps=0.01)
CASES = [
  case("momentum", FEDAVG, "server.momentum", "weights"),
  case(
    "adam", fedprox(TASK, momentum(0.3, 0.4), ADAM, mu=0.2), "mu", "weights"
  ),
  case("scaffold", scaffold(TASK, sgd(0.3), sgd(0.8)), "weights"),
]


@pytest.mark.integration
@pytest.mark.parametrize(("algorithm", "of"), CASES)
def test_both_modes_are_finite_differences(x64, algorithm, of):
  run = simulator(algorithm)
  forward, reverse = (
    fs.hypergradient_function(run, 2, of=of, mode=mode)
    for mode in ("forward", "reverse")
  )
  one, other = forward(), reverse()
  state = train(run, 2)
  assert one.value == pytest.approx(run.evaluate(state)["test/loss"], rel=1e-12)
  assert one.value == pytest.approx(other.value, rel=1e-14)
  for found in (one, other):
    np.testing.assert_allclose(
      params_of(run, found.state)["w"], params_of(run, state)["w"], rtol=1e-12
    )
  for name, expected in differences(forward).items():
    scale = np.abs(expected).max()
    assert scale > 1e-3
    for found in (one, other):
      np.testing.assert_allclose(
        found.gradient[name], expected, rtol=1e-6, atol=1e-7 * scale
      )
  assert forward.compilations == 1


def test_one_round_of_one_step_in_closed_form(x64):
  # w = s c u with u the mean of -gradients at 0, weighted by sizes; so the
  # derivatives in s and in c are u . g(w) times the other one.
  batching = dataclasses.replace(WORK, batch_size=10, epochs=1)
  run = simulator(fedavg(TASK, sgd(0.3), sgd(0.8)), batching=batching)
  run = dataclasses.replace(run, sampler=sampling.uniform(5, 5))
  found = fs.hypergradient(run, 1, of=(*RATES, "weights"), mode="reverse")
  each = [
    -gradient(np.zeros(4), np.arange(*OFFSETS[k : k + 2])) for k in range(5)
  ]
  share = SIZES / SIZES.sum()
  u = share @ each
  w = 0.8 * 0.3 * u
  x, y = HELDOUT["x"].astype(np.float64), HELDOUT["y"].astype(np.float64)
  slope = (1 / (1 + np.exp(-x @ w)) - y) @ x / len(x)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-6)  # float32
  close(found.gradient[RATES[0]], 0.3 * u @ slope)
  close(found.gradient[RATES[1]], 0.8 * u @ slope)
  expected = 0.24 * share * ((each - u) @ slope)
  close(found.gradient["weights"], expected)


def test_a_run_goes_on_and_a_loss_may_be_a_function(x64):
  run = simulator(FEDAVG)
  state = train(run, 1)
  loss = lambda variables: jnp.sum(variables.params["w"] ** 2)
  found = fs.hypergradient(run, 1, of=RATES[:1], loss=loss, state=state)
  after = train(run, 2)
  w, before = (params_of(run, s)["w"] for s in (after, state))
  assert int(found.state.round) == 2
  np.testing.assert_allclose(found.value, w @ w, rtol=1e-12)
  # A step of SGD with momentum is in proportion to the rate.
  np.testing.assert_allclose(
    found.gradient[RATES[0]], 2 * w @ (w - before) / 0.8, rtol=1e-10
  )


def test_iterations_that_are_not_needed_spoil_nothing(x64):
  counts = jnp.array([0, 1, 3])

  def total(ends):
    one = lambda n, end: repeat(
      n, lambda i, s, end: s + jnp.sqrt(end - i), 0.0, end, FixedLoop(4)
    )
    return jnp.sum(jax.vmap(one)(counts, ends))

  # Iteration n is not needed, and its root is of 0.
  found = jax.jit(jax.grad(total))(counts.astype(float))
  expected = [sum(0.5 / np.sqrt(n - i) for i in range(n)) for n in (0, 1, 3)]
  np.testing.assert_allclose(found, expected)


@pytest.mark.integration
def test_what_is_not_kept_needs_less_memory():
  run = simulator(FEDAVG)
  run = dataclasses.replace(run, sampler=sampling.uniform(5, 5))
  once, again = (
    fs.hypergradient_function(
      run, 16, of=["weights"], mode="reverse", rematerialize=again
    )
    for again in (False, True)
  )
  np.testing.assert_allclose(
    once().gradient["weights"], again().gradient["weights"], atol=1e-6
  )
  assert again.device_bytes < once.device_bytes


RUN = simulator(FEDAVG)
REFUSED = {
  "unknown name": (RUN, {"of": ["server.momentom"]}, "Did you mean 'server.mo"),
  "whole number": (RUN, {"of": ["client.epochs"]}, "whole numbers, such as"),
  "twice": (RUN, {"of": ["weights", "weights"]}, "'weights' twice"),
  "no list": (RUN, {"of": "weights"}, "of='weights' names no numbers"),
  "mode": (RUN, {"mode": "backward"}, "mode='backward' is unknown"),
  "set": (RUN, {"loss": "unseen"}, "loss='unseen' is unknown.*Known: test"),
  "rounds": (RUN, {"rounds": 0}, "rounds=0 is out of range"),
  "rounding": (
    simulator(FEDAVG, transforms=[transforms.quantize(0.5)]),
    {},
    "transforms.quantize rounds numbers",
  ),
  "rounding down": (
    simulator(transforms.downlink(FEDAVG, [transforms.qsgd()])),
    {},
    "downlink rounds numbers",
  ),
  "integers": (
    simulator(FEDAVG, aggregator=secure_sum(3, clip=1.0)),
    {},
    "aggregator.name rounds numbers",
  ),
  "no weights": (
    simulator(FEDAVG, aggregator=aggregators.median()),
    {"of": ["weights"]},
    "aggregator.name takes no weighted mean",
  ),
  "devices": (
    dataclasses.replace(RUN, runtime=Runtime(devices=2)),
    {},
    "runtime.devices=2: hypergradients are computed on one device",
  ),
  "host": (
    dataclasses.replace(RUN, runtime=Runtime(residency="host")),
    {},
    "runtime.residency='host'",
  ),
  "followers": (
    dataclasses.replace(
      RUN,
      schedules={"client.learning_rate": fs.schedules.plateau("test/loss")},
    ),
    {},
    "the schedule of client.learning_rate follows evaluations",
  ),
}


@pytest.mark.parametrize(
  ("run", "arguments", "message"), REFUSED.values(), ids=REFUSED
)
def test_what_has_no_derivative_is_refused(run, arguments, message):
  arguments = {"rounds": 1, "of": RATES, **arguments}
  with pytest.raises((TypeError, ValueError), match=message):
    fs.hypergradient_function(run, **arguments)


def test_wrong_numbers_are_refused():
  function = fs.hypergradient_function(RUN, 1, of=["weights", *RATES])
  for values, message in (
    ({"weights": np.ones(4)}, "weights has shape"),
    ({"weights": -np.ones(5)}, "negative or not finite"),
    ({"server.rate": 1.0}, "Did you mean 'server.learning_rate'"),
    ({RATES[0]: float("nan")}, "server.learning_rate=nan"),
    ({RATES[0]: np.ones(2)}, r"has shape \(2,\); give one number"),
  ):
    with pytest.raises(ValueError, match=message):
      function(values)
  assert function.compilations == 0


def test_what_diverges_is_an_error():
  function = fs.hypergradient_function(RUN, 1, of=RATES[1:])
  with pytest.raises(DivergedError, match="Round 1: the global model is not"):
    function({RATES[1]: 1e38})
  at = {"mu": 0.5}
  with pytest.raises(DivergedError, match=r"Round 5: 2 clients .* \(mu=0.5\)"):
    derivatives.check_rounds(at, [0, 2], [True, True], first=3)
  with pytest.raises(DivergedError, match="The derivative in mu is not finite"):
    derivatives.check_finite(at, jnp.ones(()), {"mu": jnp.array(jnp.nan)})
