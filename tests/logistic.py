"""Logistic regression on clients of other sizes, in JAX and in numpy.

Clients with more examples take more local steps, and batches at the end of an
epoch are smaller. What a paper says is written again in float64 on `gradient`
and `batches`, and compared with a compiled run of `simulate`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sim import sampling
from fedjax_sim.data import FederatedData, FederatedDataset
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.tasks import function_task
from problems import make_simulator, train

SIZES = np.array([1, 4, 7, 10, 3])
OFFSETS = np.concatenate([[0], np.cumsum(SIZES)])
COHORTS = ([0, 2, 3], [1, 3, 4], [0, 1, 2])  # of the rounds 0, 1, 2, 3, ...
WORK = LocalBatching(batch_size=3, epochs=2, shuffle=False)
DIM = 4

_rng = np.random.default_rng(7)
_client = np.repeat(np.arange(len(SIZES)), SIZES)
# Other inputs and other labels at every client.
_shift = 0.7 * _rng.normal(size=(len(SIZES), DIM))
X = (_rng.normal(size=(len(_client), DIM)) + _shift[_client]).astype(np.float32)
Y = (_rng.random(len(X)) < (1 + _client) / 6).astype(np.float32)

TASK = function_task(
  lambda key: {"w": jnp.zeros(DIM)},
  lambda params, examples: (
    jax.nn.softplus(examples["x"] @ params["w"])
    - examples["y"] * (examples["x"] @ params["w"])
  ),
)
DATA = FederatedDataset(
  name="logistic",
  train=FederatedData(examples={"x": X, "y": Y}, offsets=OFFSETS),
  num_classes=0,
  example_shape=(DIM,),
)


def batches(k):
  """The rows of client k's local steps, in order."""
  rows = np.arange(OFFSETS[k], OFFSETS[k + 1])
  epoch = [
    rows[i : i + WORK.batch_size] for i in range(0, len(rows), WORK.batch_size)
  ]
  return epoch * WORK.epochs


def all_rows(k):
  return np.arange(OFFSETS[k], OFFSETS[k + 1])


def gradient(w, rows):
  """The mean gradient over these rows, in float64."""
  x, y = X[rows].astype(np.float64), Y[rows].astype(np.float64)
  return (1 / (1 + np.exp(-x @ w)) - y) @ x / len(rows)


def loss(w, rows):
  """The mean loss over these rows, in float64."""
  z = X[rows].astype(np.float64) @ w
  return np.mean(np.logaddexp(0, z) - Y[rows] * z)


def trained(w, k, rate, gradient_of=lambda y, rows: gradient(y, rows)):
  """The parameters of client k after its local steps from w."""
  y = np.array(w, np.float64)
  for rows in batches(k):
    y = y - rate * gradient_of(y, rows)
  return y


def cohort(round_):
  return COHORTS[round_ % len(COHORTS)]


def simulate(algorithm, rounds, *, versions=None, **options):
  """The simulator, and its state after these rounds."""
  sampler = sampling.Sampler(
    sample=lambda seed, round_: np.array(cohort(round_)),
    sizes=(3,),
    expected=3.0,
  )
  if versions is not None:
    sampler = sampler._replace(versions=versions)
  options = {"batching": WORK, "sampler": sampler, "lanes": 2, **options}
  simulator = make_simulator(TASK, algorithm, DATA, **options)
  return simulator, train(simulator, rounds)


def model(algorithm, rounds, **options):
  """The global parameters after these rounds, shape=(DIM,)."""
  simulator, state = simulate(algorithm, rounds, **options)
  return np.asarray(simulator.algorithm.variables(state.server).params["w"])
