"""Tokens are replaced by predictions: which, how many, and without gradient."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.core import Loss, Task, Variables
from fedjax_sim.data import FederatedData, FederatedDataset
from fedjax_sim.models.char_lstm import char_lstm
from fedjax_sim.tasks.scheduled_sampling import with_scheduled_sampling
from fedjax_sim.training import schedules
from problems import flat, make_simulator, params_of, sgd

TOKENS = 7
X = np.array([[1, 2, 3, 4, 5], [6, 1, 2, 0, 0]])
Y = np.array([[2, 3, 4, 5, 6], [1, 2, 3, 0, 0]])


def echo() -> Task:
  """Predicts x + 1, after 6 again 1; its loss spells the text it was given."""

  def logits(variables, examples):
    following = examples["x"] % (TOKENS - 1) + 1
    return 1e3 * jax.nn.one_hot(following, TOKENS) * variables.params

  def loss(variables, examples, key):
    assert set(examples) == {"x", "y"}
    digits = TOKENS ** jnp.arange(examples["x"].shape[1])
    value = jnp.sum(examples["x"] * digits[None], axis=1).astype(float)
    return Loss(value * variables.params, jnp.ones(len(value)))

  init = lambda key: Variables(jnp.ones(()))
  return Task(init, loss, lambda *_: {}, logits=logits)


def read(task, chance, key=0, x=X, y=Y):
  """The texts that the task was trained on."""
  size = len(x)
  examples = {
    "x": jnp.asarray(x),
    "y": jnp.asarray(y),
    "scheduled_sampling": jnp.full(size, chance),
  }
  value = task.loss(
    Variables(jnp.ones(())), examples, jax.random.key(key)
  ).value
  spelt = np.asarray(value).astype(int)
  return spelt[:, None] // TOKENS ** np.arange(x.shape[1]) % TOKENS


@pytest.mark.slow
def test_never_and_always():
  task = with_scheduled_sampling(echo(), 0.5)
  np.testing.assert_array_equal(read(task, 0.0), X)
  # Each token follows the true one before it; padding stays.
  wrong = ((X + 3) % (TOKENS - 1) + 1) * (X > 0)
  always = read(task, 1.0, x=wrong)
  expected = np.roll(wrong, 1, axis=1) % (TOKENS - 1) + 1
  expected[:, 0] = wrong[:, 0]
  np.testing.assert_array_equal(always, np.where(wrong > 0, expected, 0))


@pytest.mark.slow
def test_how_often():
  task = with_scheduled_sampling(echo(), 0.5)
  x = np.ones((4, 5), int) * 3  # its prediction is 4
  draws = np.stack([read(task, 0.3, key, x, x) for key in range(500)])
  share = (draws[:, :, 1:] == 4).mean()
  assert abs(share - 0.3) < 4 * np.sqrt(0.3 * 0.7 / draws[:, :, 1:].size)
  assert (draws[:, :, 0] == 3).all()


def test_no_gradient_through_the_predictions():
  task = with_scheduled_sampling(echo(), 1.0)
  examples = {"x": jnp.asarray(X), "y": jnp.asarray(Y)}
  examples["scheduled_sampling"] = jnp.ones(len(X))

  def loss(p):
    return task.loss(Variables(p), examples, jax.random.key(0)).value.sum()

  texts = read(task, 1.0)
  spelt = (texts * TOKENS ** np.arange(5)).sum()
  assert float(jax.grad(loss)(jnp.ones(()))) == pytest.approx(spelt)


def test_padding_is_no_prediction():
  task = echo()
  likes_padding = task._replace(
    logits=lambda v, e: 1e3 * jax.nn.one_hot(0 * e["x"], TOKENS) * v.params
  )
  found = read(with_scheduled_sampling(likes_padding, 1.0), 1.0)
  assert (found[X > 0] > 0).all()


def texts(clients=4, each=3) -> FederatedDataset:
  x = np.tile(np.arange(1, 6), (clients * each, 1))
  train = FederatedData(
    examples={"x": x.astype(np.int32), "y": (x + 1).astype(np.int32)},
    offsets=np.arange(clients + 1) * each,
  )
  return FederatedDataset(
    name="texts", train=train, num_classes=TOKENS, example_shape=(5,)
  )


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_the_chance_follows_its_schedule(devices):
  data = texts()
  base = char_lstm((5,), TOKENS, embedding=2, units=(4,))
  task = with_scheduled_sampling(base, 0.8)

  def simulator_of(task, **arguments):
    made = make_simulator(
      task, fedavg(task, sgd(0.5), sgd(1.0)), data, devices=devices
    )
    return dataclasses.replace(made, **arguments)

  start = simulator_of(
    task,
    schedules={"task.scheduled_sampling": schedules.linear(rounds=2, begin=1)},
  )
  plain = simulator_of(base)
  states, chances = [start.init(), plain.init()], []
  same = []
  for r in range(4):
    outs = [
      s.dispatch(state, s.plan(r, 1))
      for s, state in zip((start, plain), states, strict=True)
    ]
    states = [out.state for out in outs]
    chances.append(outs[0].rows[0]["task/scheduled_sampling"])
    ends = [
      flat(params_of(s, state))
      for s, state in zip((start, plain), states, strict=True)
    ]
    same.append(np.allclose(ends[0], ends[1], rtol=1e-5, atol=1e-7))
  np.testing.assert_allclose(chances, [0, 0, 0.4, 0.8], rtol=1e-6)
  assert same == [True, True, False, False]
  assert start.compilations == 1


def test_refusals():
  with pytest.raises(ValueError, match=r"model\.scheduled_sampling=1\.5"):
    with_scheduled_sampling(echo(), 1.5)
  silent = echo()._replace(logits=None)
  with pytest.raises(ValueError, match="tells no logits"):
    with_scheduled_sampling(silent, 0.5)
  task = with_scheduled_sampling(echo(), 0.5)
  with pytest.raises(ValueError, match=r"'y' \(2,\) and logits \(2, 5, 7\)"):
    read(task, 0.5, y=Y[:, 0])
