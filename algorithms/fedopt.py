"""FedAdagrad, FedAdam and FedYogi: FedAvg with adaptive steps on the server.

Reddi et al. 2021, "Adaptive federated optimization" (arXiv 2003.00295),
algorithm 2. With the mean Delta of the clients' updates the server takes

    m <- beta1 m + (1 - beta1) Delta
    v <- v + Delta^2                                          FedAdagrad
    v <- v - (1 - beta2) Delta^2 sign(v - Delta^2)            FedYogi
    v <- beta2 v + (1 - beta2) Delta^2                        FedAdam
    x <- x + eta m / (sqrt(v) + tau)

from m = 0 and v = tau^2. No moment is corrected for where it began, as `adam`
and `yogi` of optax do, which `server.optimizer` of `fedavg` names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.core import (
  Algorithm,
  Array,
  PyTree,
  Task,
  in_float32,
  validate,
)
from fedjax_sim.core.tree import zeros_accumulator
from fedjax_sim.training.optimizers import Optimizer

# (v, Delta^2, numbers) -> v
Second = Callable[[Array, Array, Mapping[str, Any]], Array]


class Moments(NamedTuple):
  """Running moments of the mean update, in float32 at least.

  A short dtype would lose what is added: Adagrad's v grows in bfloat16 to 256
  times Delta^2, and no further.
  """

  m: PyTree
  v: PyTree


def fedadagrad(
  task: Task,
  client_optimizer: Optimizer,
  *,
  learning_rate: float = 0.1,
  beta1: float = 0.0,
  tau: float = 1e-3,
  weighting: str = "examples",
) -> Algorithm:
  """Return FedAvg with Adagrad on the server, as its paper has it.

  Args:
    task: what clients train.
    client_optimizer: starts anew in every round.
    learning_rate: eta, >= 0, which the paper tunes for every task. A run's
      `server.learning_rate`, which a schedule multiplies.
    beta1: decay of m, >= 0 and < 1; 0 is Adagrad without momentum.
    tau: how adaptive steps are, > 0: less with a larger one; the paper's.
    weighting: as in `fedavg`.

  Raises:
    TypeError, ValueError: a number is out of range.
  """
  made = _server(
    lambda v, square, numbers: v + square,
    learning_rate=learning_rate,
    beta1=beta1,
    tau=tau,
  )
  return fedavg(task, client_optimizer, made, weighting=weighting)


def fedadam(
  task: Task,
  client_optimizer: Optimizer,
  *,
  learning_rate: float = 0.1,
  beta1: float = 0.9,
  beta2: float = 0.99,
  tau: float = 1e-3,
  weighting: str = "examples",
) -> Algorithm:
  """Return FedAvg with Adam on the server, as its paper has it.

  Args:
    task: what clients train.
    client_optimizer: starts anew in every round.
    learning_rate: as in `fedadagrad`.
    beta1: decay of m, >= 0 and < 1; the paper's.
    beta2: decay of v, >= 0 and < 1; the paper's.
    tau: as in `fedadagrad`.
    weighting: as in `fedavg`.

  Raises:
    TypeError, ValueError: a number is out of range.
  """
  made = _server(
    lambda v, square, numbers: v + (1 - numbers["beta2"]) * (square - v),
    learning_rate=learning_rate,
    beta1=beta1,
    beta2=beta2,
    tau=tau,
  )
  return fedavg(task, client_optimizer, made, weighting=weighting)


def fedyogi(
  task: Task,
  client_optimizer: Optimizer,
  *,
  learning_rate: float = 0.1,
  beta1: float = 0.9,
  beta2: float = 0.99,
  tau: float = 1e-3,
  weighting: str = "examples",
) -> Algorithm:
  """Return FedAvg with Yogi on the server, as its paper has it.

  Args:
    task: what clients train.
    client_optimizer: starts anew in every round.
    learning_rate: as in `fedadagrad`.
    beta1: as in `fedadam`.
    beta2: as in `fedadam`.
    tau: as in `fedadagrad`.
    weighting: as in `fedavg`.

  Raises:
    TypeError, ValueError: a number is out of range.
  """
  made = _server(
    lambda v, square, numbers: (
      v - (1 - numbers["beta2"]) * square * jnp.sign(v - square)
    ),
    learning_rate=learning_rate,
    beta1=beta1,
    beta2=beta2,
    tau=tau,
  )
  return fedavg(task, client_optimizer, made, weighting=weighting)


def _server(
  second: Second, *, learning_rate: float, tau: float, **betas: float
) -> Optimizer:
  """Return the server's optimizer; its gradient is -Delta."""
  numbers = {
    "learning_rate": validate.number("learning_rate", learning_rate, ge=0),
    "tau": validate.number("tau", tau, gt=0),
    **{k: validate.number(k, x, ge=0, lt=1) for k, x in betas.items()},
  }

  def build(hparams: Mapping[str, Any]) -> optax.GradientTransformation:
    def init(params: PyTree) -> Moments:
      zeros = zeros_accumulator(params)
      start = jnp.asarray(hparams["tau"]) ** 2
      full = lambda z: jnp.full_like(z, start.astype(z.dtype))
      return Moments(zeros, jax.tree.map(full, zeros))

    def update(
      gradient: PyTree, state: Moments, params: PyTree
    ) -> tuple[PyTree, Moments]:
      del params
      gradient = in_float32(gradient)
      b1 = hparams["beta1"]
      m = jax.tree.map(lambda m, g: b1 * m - (1 - b1) * g, state.m, gradient)
      v = jax.tree.map(lambda v, g: second(v, g**2, hparams), state.v, gradient)
      step = lambda m, v: (
        hparams["learning_rate"] * m / (jnp.sqrt(v) + hparams["tau"])
      )
      return jax.tree.map(step, m, v), Moments(m, v)

    return optax.GradientTransformation(init, update)

  return Optimizer(build, numbers)
