"""FedAvgM, FedAdagrad, FedAdam and FedYogi against their papers, in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim.algorithms import ALGORITHMS
from fedjax_sim.core import Aggregate, Context, Members
from logistic import DIM, TASK
from problems import sgd

# Small and large ones, and coordinates that hardly move.
UPDATES = np.random.default_rng(0).normal(size=(7, DIM)) * [1, 0.1, 1e-3, 0]
ETA = 0.3
KEY = jax.random.key(0)
NOBODY = Members(jnp.zeros(0), jnp.zeros(0), jnp.zeros(0), {})


def momentum(beta=0.9):
  """Hsu et al. 2019, section 4.3."""
  w, v = np.zeros(DIM), np.zeros(DIM)
  for delta in UPDATES:
    v = beta * v + delta
    w = w + ETA * v
  return w


def adaptive(second, beta1, tau=1e-3):
  """Reddi et al. 2021, algorithm 2."""
  x, m, v = np.zeros(DIM), np.zeros(DIM), np.full(DIM, tau**2)
  for delta in UPDATES:
    m = beta1 * m + (1 - beta1) * delta
    v = second(v, delta)
    x = x + ETA * m / (np.sqrt(v) + tau)
  return x


def yogi(v, delta, beta2=0.99):
  return v - (1 - beta2) * delta**2 * np.sign(v - delta**2)


SECOND = {
  "fedadagrad": lambda v, delta: v + delta**2,
  "fedadam": lambda v, delta: 0.99 * v + 0.01 * delta**2,
  "fedyogi": yogi,
}
EXPECTED = {
  "fedavgm": momentum(),
  "fedadagrad": adaptive(SECOND["fedadagrad"], 0.0),
  "fedadam": adaptive(SECOND["fedadam"], 0.9),
  "fedyogi": adaptive(SECOND["fedyogi"], 0.9),
}


def steps(algorithm, updates=UPDATES):
  """The server after it saw the updates."""
  hparams = jax.tree.map(jnp.float32, dict(algorithm.hparams))
  server = algorithm.init(KEY, hparams)
  for delta in updates:
    mean = {"w": jnp.asarray(delta, jnp.float32)}
    aggregate = Aggregate(
      update=mean,
      buffers=(),
      statistics=(),
      weight=jnp.float32(1),
      clients=jnp.int32(1),
      members=NOBODY,
    )
    context = Context(
      hparams=hparams,
      round=jnp.int32(0),
      key=KEY,
      noise_key=KEY,
      num_clients=1,
    )
    server = algorithm.apply(server, aggregate, context)
  return server


@pytest.mark.parametrize("name", EXPECTED)
def test_the_defaults_are_the_papers(name):
  algorithm = ALGORITHMS[name](TASK, sgd(0.1), learning_rate=ETA)
  found = steps(algorithm).variables.params["w"]
  np.testing.assert_allclose(found, EXPECTED[name], rtol=1e-5)


@pytest.mark.parametrize("name", ["fedadagrad", "fedadam", "fedyogi"])
def test_moments_of_a_model_in_bfloat16_lose_nothing(name):
  """In bfloat16 256 + 1 is 256, and 256 - 1% of it and less is off by 1%."""
  halve = lambda x: x.astype(jnp.bfloat16)
  short = TASK._replace(init=lambda key: jax.tree.map(halve, TASK.init(key)))
  updates = np.ones((9, DIM))
  updates[0] = 16.0
  server = steps(ALGORITHMS[name](short, sgd(0.1)), updates)
  assert server.variables.params["w"].dtype == jnp.bfloat16
  beta1 = 0.0 if name == "fedadagrad" else 0.9
  second = SECOND[name]
  m, v = 0.0, 1e-6
  for delta in updates[:, 0]:
    m = beta1 * m + (1 - beta1) * delta
    v = second(v, delta)
  np.testing.assert_allclose(server.optimizer.m["w"], m, rtol=1e-5)
  np.testing.assert_allclose(server.optimizer.v["w"], v, rtol=1e-5)


@pytest.mark.parametrize(
  ("name", "wrong"),
  [
    ("fedavgm", {"beta": 1.0}),
    ("fedadagrad", {"tau": 0.0}),
    ("fedadam", {"beta2": 1.0}),
    ("fedyogi", {"learning_rate": -1.0}),
  ],
)
def test_wrong_numbers_are_named(name, wrong):
  ((field, value),) = wrong.items()
  with pytest.raises(ValueError, match=f"{field}={value}"):
    ALGORITHMS[name](TASK, sgd(0.1), **wrong)
