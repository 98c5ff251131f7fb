"""Small problems with known answers, and a short way to run them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim import aggregators, sampling
from fedjax_sim.core import Algorithm, Metric, Task
from fedjax_sim.data import FederatedData, FederatedDataset
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.engine.state import RunState
from fedjax_sim.models.logistic_regression import logistic_regression
from fedjax_sim.models.mlp import mlp
from fedjax_sim.simulation.runtime import Runtime
from fedjax_sim.simulation.simulator import Simulator
from fedjax_sim.tasks import function_task
from fedjax_sim.training.optimizers import optimizer


def sgd(rate):
  return optimizer("sgd", learning_rate=float(rate))


def quadratic(dim) -> Task:
  """Loss a/2 ||w - b||^2 of an example (a, b); client optimum: mean of b."""

  def loss(params, examples):
    gap = params["w"][None] - examples["x"]
    return 0.5 * examples["a"] * jnp.sum(gap**2, axis=-1)

  return function_task(lambda key: {"w": jnp.zeros((dim,))}, loss)


def counting_steps(task: Task) -> Task:
  """The task, with a count of local steps in its buffers and its metrics."""

  def init(key):
    return task.init(key)._replace(buffers={"steps": jnp.int32(0)})

  def loss(variables, examples, key):
    made = task.loss(variables._replace(buffers=()), examples, key)
    return made._replace(buffers={"steps": variables.buffers["steps"] + 1})

  def metrics(variables, examples):
    ones = jnp.ones(len(examples["x"]), jnp.float32)
    return {"steps": Metric(ones * variables.buffers["steps"], ones)}

  return task._replace(init=init, loss=loss, metrics=metrics)


def quadratic_data(centres, curvatures=None, copies=1) -> FederatedDataset:
  """Client k holds `copies` of the example (curvature_k, centre_k)."""
  centres = np.asarray(centres, np.float32)
  if curvatures is None:
    curvatures = np.ones(len(centres))
  train = FederatedData(
    examples={
      "x": np.repeat(centres, copies, axis=0),
      "a": np.repeat(np.asarray(curvatures, np.float32), copies),
    },
    offsets=np.arange(len(centres) + 1) * copies,
  )
  return FederatedDataset(
    name="quadratic",
    train=train,
    num_classes=0,
    example_shape=centres.shape[1:],
  )


def blobs(
  sizes, features=6, classes=3, seed=0, dtype=np.float32
) -> FederatedDataset:
  """Clients of these sizes with Gaussian classes."""
  rng = np.random.default_rng(seed)
  count = int(np.sum(sizes))
  y = rng.integers(0, classes, count)
  means = rng.normal(size=(classes, features))
  x = means[y] + 0.7 * rng.normal(size=(count, features))
  return FederatedDataset(
    name="blobs",
    train=FederatedData(
      examples={"x": x.astype(dtype), "y": y.astype(np.int32)},
      offsets=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
    ),
    num_classes=classes,
    example_shape=(features,),
  )


def make_simulator(
  task: Task,
  algorithm: Algorithm,
  data: FederatedDataset,
  *,
  clients_per_round=None,
  batching=None,
  lanes=1,
  devices=1,
  aggregator=None,
  transforms=(),
  seed=0,
  rounds_per_dispatch=1,
  sampler=None,
) -> Simulator:
  if devices == 2 > jax.device_count():
    pytest.skip(f"needs 2 devices, there is {jax.device_count()}")
  count = 1 if algorithm.requirements.pools_data else data.train.num_clients
  return Simulator(
    task=task,
    algorithm=algorithm,
    data=data,
    sampler=sampler or sampling.uniform(count, clients_per_round or count),
    batching=batching or LocalBatching(batch_size=4),
    aggregator=aggregator or aggregators.weighted_mean(),
    transforms=transforms,
    seed=seed,
    noise_seed=seed,
    runtime=Runtime(
      lanes=lanes,
      devices=devices,
      rounds_per_dispatch=rounds_per_dispatch,
      donate=False,
    ),
  )


def train(simulator: Simulator, rounds: int, hparams=None) -> RunState:
  state = simulator.init(hparams)
  for out in simulator.run(state, rounds, hparams=hparams):
    state = out.state
  return state


def hparams_of(simulator: Simulator, **own) -> dict:
  """The run's hyper-parameters with other numbers of the algorithm."""
  numbers = {**simulator.hparams["algorithm"], **own}
  return {**simulator.hparams, "algorithm": numbers}


def params_of(simulator: Simulator, state: RunState):
  return jax.device_get(simulator.algorithm.variables(state.server).params)


def flat(tree) -> np.ndarray:
  return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


MODELS = {
  "lr": lambda data: logistic_regression(data.example_shape, data.num_classes),
  "mlp": lambda data: mlp(data.example_shape, data.num_classes, (8,)),
}


def normal(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def check_same(one, other, *arguments, tolerance=1e-12):
  """Both functions' values, and their gradients of a sum of sines."""

  def of(function):
    def value(*a):
      out = function(*a)
      return jnp.sum(jnp.sin(out)), out

    numbers = tuple(range(len(arguments)))
    return jax.jit(jax.grad(value, numbers, has_aux=True))(*arguments)

  found = (jax.tree.leaves(jax.device_get(of(each))) for each in (one, other))
  for a, b in zip(*found, strict=True):
    assert a.shape == b.shape
    atol = tolerance * (1 + abs(b).max(initial=0))
    np.testing.assert_allclose(a, b, rtol=0, atol=atol)
