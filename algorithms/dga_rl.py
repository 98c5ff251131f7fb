"""DGA with a policy, learned by reinforcement, that leaves clients out.

Dimitriadis et al. 2021 (arXiv 2106.07578), section 3.2, have an agent see the
clients' statistics and set their weights; its reward is whether the model is
better on validation data than with DGA's own weights. Here the action is to
leave a client out or not, so that the value of an action is a sum over clients:

    Q(statistics, action) = sum over the clients left out of theta . phi_i / n

with phi_i the client's statistics, standardized over the cohort, and their
squares. theta is the ridge regression of the rewards in a replay memory, and
the greedy action leaves out every client with theta . phi_i > 0. With
probability epsilon, which falls from round to round, the action is random.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_sim import core
from fedjax_sim.algorithms.dga import DGAState, dga
from fedjax_sim.core import (
  Aggregate,
  Algorithm,
  Array,
  Batch,
  Context,
  HParams,
  Key,
  Members,
  Requirements,
  Task,
  Variables,
  validate,
)
from fedjax_sim.core.tree import tree_where
from fedjax_sim.engine.client_log import combine
from fedjax_sim.training.optimizers import Optimizer

SEEN = ("loss", "norm", "mean", "variance")  # of a client, by the policy
FEATURES = 1 + 2 * len(SEEN)


class Memory(NamedTuple):
  """A ring buffer of the last rounds' actions and rewards.

  Attributes:
    action: shape=(rounds, FEATURES); the mean over clients of phi where left
      out, and 0 elsewhere.
    reward: shape=(rounds,).
    rounds: shape=(), int32; how many there were.
  """

  action: Array
  reward: Array
  rounds: Array


class RLState(NamedTuple):
  """DGA's server state, and the agent's."""

  dga: DGAState
  memory: Memory
  theta: Array  # shape=(FEATURES,), the policy
  epsilon: Array  # shape=(), float32


def dga_rl(
  task: Task,
  client_optimizer: Optimizer,
  server_optimizer: Optimizer,
  *,
  statistic: str = "loss",
  beta: float = 1.0,
  metric: str = "accuracy",
  epsilon: float = 0.5,
  epsilon_decay: float = 0.95,
  epsilon_least: float = 0.05,
  memory_rounds: int = 200,
  ridge: float = 0.01,
) -> Algorithm:
  """Return DGA with an agent that may leave clients out.

  The models with and without those clients are evaluated on the server's
  examples, and the better one is kept; at a tie the agent's. Needs
  `Context.server_data` and the aggregator `stack`.

  Args:
    task: what clients train.
    client_optimizer: starts anew in every round.
    server_optimizer: takes the negative weighted mean update as a gradient.
    statistic: of the softmax weights; as in `dga`.
    beta: of the softmax weights; as in `dga`.
    metric: a metric of the task; the reward is the agent's value minus DGA's,
      with the opposite sign if lower is better.
    epsilon: probability of a random action in the first round.
    epsilon_decay: factor of the distance of epsilon from `epsilon_least`,
      applied once per round.
    epsilon_least: limit of epsilon.
    memory_rounds: number of rounds that the agent remembers, at most 10^6.
    ridge: penalty of the regression.

  Raises:
    TypeError, ValueError: an argument is out of range.
  """
  inner = dga(
    task, client_optimizer, server_optimizer, statistic=statistic, beta=beta
  )
  with_model = inner.with_model
  assert with_model is not None
  validate.integer("memory_rounds", memory_rounds, le=10**6)
  share = lambda name, value: validate.number(name, value, ge=0, le=1)
  numbers = {
    "epsilon": share("epsilon", epsilon),
    "epsilon_decay": share("epsilon_decay", epsilon_decay),
    "epsilon_least": share("epsilon_least", epsilon_least),
    "ridge": validate.number("ridge", ridge, gt=0),
  }
  score = _score(task, metric)

  def init(key: Key, hparams: HParams) -> RLState:
    memory = Memory(
      jnp.zeros((memory_rounds, FEATURES)),
      jnp.zeros((memory_rounds,)),
      jnp.zeros((), jnp.int32),
    )
    epsilon = jnp.asarray(hparams["epsilon"], jnp.float32)
    theta = jnp.zeros((FEATURES,))
    return RLState(inner.init(key, hparams), memory, theta, epsilon)

  def apply(server: RLState, aggregate: Aggregate, context: Context) -> RLState:
    members, hparams = aggregate.members, context.hparams

    def model(weights: Array) -> DGAState:
      joined = combine(aggregate.update, weights)
      return inner.apply(server.dga, aggregate._replace(update=joined), context)

    phi = features(members)
    left_out = _left_out(server, members, phi, context.key)
    usual = model(members.weight)
    chosen = model(jnp.where(left_out, 0, members.weight))
    reward = score(inner.variables(chosen), context) - score(
      inner.variables(usual), context
    )
    seen = jnp.sum(jnp.where(left_out[:, None], phi, 0), axis=0)
    seen /= jnp.maximum(aggregate.clients, 1)
    memory = remember(server.memory, seen, reward)
    least = hparams["epsilon_least"]
    epsilon = least + (server.epsilon - least) * hparams["epsilon_decay"]
    return RLState(
      tree_where(reward >= 0, chosen, usual),
      memory,
      regression(memory, hparams["ridge"]).astype(server.theta.dtype),
      epsilon.astype(server.epsilon.dtype),
    )

  return inner._replace(
    init=init,
    broadcast=lambda server: inner.broadcast(server.dga),
    apply=apply,
    variables=lambda server: inner.variables(server.dga),
    with_model=lambda server, variables: server._replace(
      dga=with_model(server.dga, variables)
    ),
    hparams={**inner.hparams, **numbers},
    requirements=Requirements(all_updates=True, server_data=True),
  )


def _score(task: Task, metric: str) -> Callable[[Variables, Context], Array]:
  """Return what tells how good a model is on the server's examples, shape=().

  Args:
    task: what clients train.
    metric: one of its metrics.

  Raises:
    ValueError: whether more of it is better is not known.
  """
  if metric not in task.higher_is_better:
    known = ", ".join(sorted(task.higher_is_better))
    raise ValueError(
      f"metric={metric!r}: whether more of it is better is not known;"
      f" say so in Task.higher_is_better, or take one of {known}."
    )
  higher_is_better = task.higher_is_better[metric]

  def score(variables: Variables, context: Context) -> Array:
    examples = context.server_data
    assert examples is not None
    count = len(next(iter(examples.values())))
    batch = Batch(examples, jnp.ones(count, bool))
    metrics = core.sum_metrics(task, variables, batch)
    total, weight = validate.lookup("algorithm.metric", metric, metrics)
    value = total / jnp.where(weight > 0, weight, 1)
    return value if higher_is_better else -value

  return score


def _left_out(server: RLState, members: Members, phi: Array, key: Key) -> Array:
  """Return which clients the policy leaves out; shape=(slots,), bool.

  Args:
    server: with the policy, and the probability of a random action.
    members: the cohort.
    phi: shape=(slots, FEATURES); as `features` gives them.
    key: of the random action.
  """
  explore, coins = jax.random.split(key)
  random = jax.random.bernoulli(coins, 0.5, members.present.shape)
  left_out = jnp.where(
    jax.random.uniform(explore) < server.epsilon,
    random,
    phi @ server.theta > 0,
  )
  left_out &= members.present
  # Somebody has to stay.
  left_out &= jnp.any(members.present & ~left_out)
  return left_out


def remember(memory: Memory, action: Array, reward: Array) -> Memory:
  """Return the memory with one more round, in the place of the oldest.

  Args:
    memory: so far.
    action: shape=(FEATURES,).
    reward: shape=().
  """
  at = memory.rounds % len(memory.reward)
  # A reward that is no number would be all that the regression sees.
  finite = jnp.where(jnp.isfinite(reward), reward, 0)
  return Memory(
    memory.action.at[at].set(action),
    memory.reward.at[at].set(finite.astype(memory.reward.dtype)),
    memory.rounds + 1,
  )


def features(members: Members) -> Array:
  """Return phi of every client, shape=(slots, FEATURES); 0 for empty slots.

  Statistics are standardized over the cohort and limited to 3 deviations.
  """
  seen = jnp.stack([members.values[name] for name in SEEN], axis=-1)
  present = members.present[:, None]
  count = jnp.maximum(jnp.sum(members.present), 1)
  total = lambda x: jnp.sum(jnp.where(present, x, 0), axis=0, keepdims=True)
  mean = total(seen) / count
  gap = jnp.where(present, seen - mean, 0)
  deviation = jnp.sqrt(total(gap**2) / count)
  z = jnp.clip(gap / jnp.where(deviation > 0, deviation, 1), -3, 3)
  return jnp.where(
    present, jnp.concatenate([jnp.ones_like(z[:, :1]), z, z**2], axis=-1), 0
  )


def regression(memory: Memory, ridge: Array) -> Array:
  """Return theta, shape=(FEATURES,), that predicts rewards from actions.

  argmin sum (reward - action . theta)^2 + ridge |theta|^2; unused rows of the
  memory are 0.
  """
  x, y = memory.action, memory.reward
  gram = x.T @ x + ridge * jnp.eye(FEATURES, dtype=x.dtype)
  return jnp.linalg.solve(gram, x.T @ y)
