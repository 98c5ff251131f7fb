"""All of it in a script: a `Simulator` of one's own objects trains the digits.

python docs/own/script.py
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_sim import (
  Aggregator,
  LocalBatching,
  Runtime,
  Sampler,
  Simulator,
  Task,
  Variables,
  optimizer,
)
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.core import Loss
from fedjax_sim.data import load_digits
from fedjax_sim.tasks.losses import classification_metrics, cross_entropy
from fedjax_sim.tasks.metrics import with_metrics


def linear_task(features, classes) -> Task:
  """Return a linear classifier, from plain functions."""

  def init(key):
    weight = 0.01 * jax.random.normal(key, (features, classes))
    return Variables({"weight": weight, "bias": jnp.zeros((1, classes))})

  def logits(variables, examples):  # (batch, classes)
    return examples["x"] @ variables.params["weight"] + variables.params["bias"]

  def loss(variables, examples, key):  # of each example, and its weight
    value, weight = cross_entropy(logits(variables, examples), examples)
    return Loss(value, weight)

  def metrics(variables, examples):
    return classification_metrics(logits(variables, examples), examples)

  return Task(init, loss, metrics, logits=logits)


def surety(logits, examples):
  """Return the probability that the model gives its answer, shape=(batch,)."""
  return jnp.max(jax.nn.softmax(logits), axis=1)


def sign_mean() -> Aggregator:
  """How many more clients go up than down, by coordinate; it streams."""

  def add(acc, updates, weights, present, context):
    signs = jax.tree.map(
      lambda u: jnp.where(present.reshape(-1, *(1,) * (u.ndim - 1)), u, 0),
      jax.tree.map(jnp.sign, updates),
    )
    return jax.tree.map(lambda a, s: a + jnp.sum(s, axis=0), acc, signs)

  return Aggregator(
    init=lambda update, capacity: jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype), update
    ),
    add=add,
    finish=lambda acc, weight, count, context: jax.tree.map(
      lambda a: a / jnp.maximum(count, 1), acc
    ),
  )


def in_turn(num_clients, size) -> Sampler:
  """Clients one after the other, `size` a round."""
  sample = lambda seed, round_: (round_ * size + np.arange(size)) % num_clients
  return Sampler(sample, sizes=(size,), expected=size)


def heavy_ball(learning_rate, friction):
  """Momentum, put together of optax's parts."""
  return optax.chain(
    optax.trace(decay=1 - friction), optax.scale(-learning_rate)
  )


def main(rounds: int = 60) -> float:
  """Trains; returns the accuracy on the test set."""
  data = load_digits(num_clients=50, alpha=1.0)
  task = linear_task(64, data.num_classes)
  task = with_metrics(task, [surety])
  algorithm = fedavg(
    task,
    client_optimizer=optimizer(heavy_ball, learning_rate=0.1, friction=0.5),
    server_optimizer=optimizer("sgd", learning_rate=0.1),
  )
  simulator = Simulator(
    task=task,
    algorithm=algorithm,
    data=data,
    sampler=in_turn(data.train.num_clients, 10),
    aggregator=sign_mean(),
    batching=LocalBatching(batch_size=8),
    runtime=Runtime(lanes=1),
  )
  for out in simulator.run(simulator.init(), rounds, stops=[10]):
    done = out.rows[-1]["round"]
    if done % 10 == 0 or done == rounds:
      metrics = simulator.evaluate(out.state)
      print(done, metrics["test/accuracy"], metrics["test/surety"])
  return metrics["test/accuracy"]


if __name__ == "__main__":
  main(*map(int, sys.argv[1:]))
