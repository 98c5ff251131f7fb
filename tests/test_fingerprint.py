"""Fingerprints: equal for one program, different for two."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.algorithms.fedprox import fedprox
from fedjax_sim.engine.fingerprint import fingerprint
from fedjax_sim.training.optimizers import optimizer
from problems import quadratic, sgd


def test_values_of_traced_numbers_do_not_count():
  task = quadratic(2)
  made = [
    fedprox(task, sgd(rate), sgd(1.0), mu=mu)
    for rate, mu in ((0.1, 0.1), (0.2, 0.3))
  ]
  assert fingerprint(made[0]) == fingerprint(made[1])


@pytest.mark.parametrize(
  "other",
  [
    lambda task: fedavg(task, sgd(0.1), sgd(1.0), weighting="uniform"),
    lambda task: fedavg(task, optimizer("adam", learning_rate=0.1), sgd(1.0)),
    lambda task: fedprox(task, sgd(0.1), sgd(1.0)),
    lambda task: fedavg(quadratic(2), sgd(0.1), sgd(1.0))._replace(
      hparams={"other": 1.0}
    ),
  ],
)
def test_other_code_or_constants_count(other):
  task = quadratic(2)
  usual = fedavg(task, sgd(0.1), sgd(1.0))
  assert fingerprint(usual) == fingerprint(fedavg(task, sgd(0.1), sgd(1.0)))
  assert fingerprint(usual) != fingerprint(other(task))


def held(value):
  return lambda x: x + value


@pytest.mark.parametrize(
  ("a", "b"),
  [
    (0.0, -0.0),
    (1, 1.0),
    (1, True),
    (np.float32(1), np.float64(1)),
    (np.zeros(2), np.zeros(3)),
    (jnp.zeros(2), jnp.ones(2)),
    ("x", b"x"),
    ([1, 2], (1, 2)),
    ({"a": 1}, {"a": 2}),
    (functools.partial(max, 1), functools.partial(max, 2)),
  ],
)
def test_what_a_function_holds_counts(a, b):
  assert fingerprint(held(a)) == fingerprint(held(a))
  assert fingerprint(held(a)) != fingerprint(held(b))


def test_a_function_may_hold_itself():
  def made(step):
    def down(n):
      return down(n - step) if n > 0 else n

    return down

  assert fingerprint(made(1)) == fingerprint(made(1))
  assert fingerprint(made(1)) != fingerprint(made(2))
