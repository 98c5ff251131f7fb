"""Local training: what a client does with its own data in most algorithms.

Several steps of an optimizer on mini-batches, starting from the server's
parameters (McMahan et al. 2017, arXiv 1602.05629, `ClientUpdate`). Algorithms
that differ in the gradient alone pass `gradient_hook`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_sim import core
from fedjax_sim.core import (
  Array,
  Batch,
  Client,
  Key,
  Metric,
  Pass,
  PyTree,
  Report,
  Task,
  Variables,
  compensated,
  validate,
)
from fedjax_sim.core.compensated import Total
from fedjax_sim.core.tree import zeros_accumulator
from fedjax_sim.training import optimizers

GradientHook = Callable[[Client, PyTree, PyTree], PyTree]


GetModel = Callable[[Client], Variables]


# (client, its model, batch) -> shape=(); differentiated in the model's params.
ExtraLoss = Callable[[Client, Variables, Batch], Array]


class Observer(NamedTuple):
  """What an algorithm sums up over a client's local steps.

  Attributes:
    zero: the sum of no steps.
    term: (client, gradient, loss) -> what a step adds. The gradient is the one
      that the optimizer gets; the loss is a `Metric` of the batch.
  """

  zero: PyTree
  term: Callable[[Client, PyTree, Metric], PyTree]


class LocalState(NamedTuple):
  """A client's carry through its local steps."""

  params: PyTree
  buffers: PyTree
  optimizer: PyTree
  loss: Total  # of a `Metric`, summed over the steps; see `metric`
  observed: PyTree = ()  # a `Total` of the observer's terms, if there is one


class LocalTraining(NamedTuple):
  """The client's part of an `Algorithm`: one pass, and its report."""

  local_pass: Pass
  finish: Callable[[Client, LocalState], Report]


# (client, its summed loss) -> its weight in means, shape=(), float32.
WEIGHTINGS: dict[str, Callable[[Client, Metric], Array]] = {
  "examples": lambda client, loss: client.num_examples.astype(jnp.float32),
  "tokens": lambda client, loss: loss.weight,
  "uniform": lambda client, loss: jnp.ones((), jnp.float32),
}


def zero_metric() -> Total:
  """Return a `Metric` of nothing yet, to which `compensated.add` adds."""
  zero = jnp.zeros((), jnp.float32)
  return compensated.zeros(Metric(zero, zero))


def metric(total: Total) -> Metric:
  """Return the `Metric` that was summed, shape=(), float32 at least."""
  summed: Metric = compensated.rounded(total)
  return summed


def difference(after: PyTree, before: PyTree) -> PyTree:
  """Return `after - before`, leaf by leaf: a client's update."""
  return jax.tree.map(jnp.subtract, after, before)


def local_training(
  task: Task,
  optimizer: optimizers.Optimizer,
  *,
  gradient_hook: GradientHook | None = None,
  weighting: str = "examples",
  get_model: Callable[[Client], Variables] = lambda client: client.message,
  observer: Observer | None = None,
  extra_loss: ExtraLoss | None = None,
) -> LocalTraining:
  """Return mini-batch training from the server's parameters.

  Args:
    task: what is trained.
    optimizer: the client's optimizer; its state starts anew every round. Its
      hyper-parameters are read from `hparams["client"]`.
    gradient_hook: (client, params, gradient) -> gradient, before the optimizer.
    weighting: a client's weight: its number of `examples`; its `tokens`, the
      sum of the loss's weights over its steps; or `uniform`.
    get_model: client -> the `Variables` that it starts from.
    observer: what to sum up over the steps, in `LocalState.observed`.
    extra_loss: what is added to the loss of every step, but not to the one that
      is reported.

  Raises:
    UnknownNameError: no such weighting.
  """
  weigh = validate.lookup("weighting", weighting, WEIGHTINGS)
  validate.instance("task", task, Task, "function_task(init, loss)")
  optimizers.check("client_optimizer", optimizer)

  def start(client: Client, *earlier: PyTree) -> LocalState:
    del earlier
    params, buffers, _ = get_model(client)
    state = optimizer.build(client.hparams["client"]).init(params)
    observed = () if observer is None else compensated.zeros(observer.zero)
    return LocalState(params, buffers, state, zero_metric(), observed)

  def step(
    client: Client, carry: LocalState, batch: Batch, key: Key
  ) -> LocalState:
    def loss(params: PyTree) -> tuple[Array, tuple[PyTree, Metric]]:
      variables = Variables(params, carry.buffers, get_model(client).frozen)
      value, aux = core.mean_loss(task, variables, batch, key)
      if extra_loss is not None:
        value = value + extra_loss(client, variables, batch).astype(value.dtype)
      return value, aux

    gradient, (buffers, total) = jax.grad(loss, has_aux=True)(carry.params)
    if gradient_hook is not None:
      gradient = gradient_hook(client, carry.params, gradient)
    observed = carry.observed
    if observer is not None:
      term = observer.term(client, gradient, total)
      observed = compensated.add(observed, term)
    params, state = optimizers.descend(
      optimizer.build(client.hparams["client"]),
      gradient,
      carry.optimizer,
      carry.params,
    )
    seen = compensated.add(carry.loss, total)
    return LocalState(params, buffers, state, seen, observed)

  def finish(client: Client, carry: LocalState) -> Report:
    loss = metric(carry.loss)
    return Report(
      update=difference(carry.params, get_model(client).params),
      weight=weigh(client, loss),
      buffers=carry.buffers,
      metrics={"loss": loss},
    )

  return LocalTraining(
    Pass(start, step, tokens=lambda carry: metric(carry.loss).weight), finish
  )


class Following(NamedTuple):
  """A pass's carry, and what the client knows from the passes before it."""

  known: PyTree
  carry: PyTree


def following(
  walk: Pass,
  known: Callable[..., PyTree],
  informed: Callable[[Client, PyTree], Client],
) -> Pass:
  """Return a pass whose client knows something from the passes before it.

  Args:
    walk: the pass; its carry becomes `Following.carry`.
    known: (client, *carries of the passes before) -> what it knows.
    informed: (client, what it knows) -> the client that `walk` sees.

  Example:
    >>> following(
    ...   training.local_pass,
    ...   lambda client, losses: jnp.argmin(losses),
    ...   lambda client, best: client._replace(message=client.message[best]),
    ... )
  """

  def start(client: Client, *earlier: PyTree) -> Following:
    knowledge = known(client, *earlier)
    return Following(knowledge, walk.start(informed(client, knowledge)))

  def step(
    client: Client, carry: Following, batch: Batch, key: Key
  ) -> Following:
    client = informed(client, carry.known)
    return carry._replace(carry=walk.step(client, carry.carry, batch, key))

  tokens = walk.tokens
  return walk._replace(
    start=start,
    step=step,
    tokens=tokens and (lambda carry: tokens(carry.carry)),
  )


def full_gradient(
  task: Task,
  *,
  weighting: str = "examples",
  get_model: GetModel = lambda client: client.message,
) -> LocalTraining:
  """Return local training that computes a client's full gradient.

  It is the mean over all of the client's data, at the model that it received;
  the batch size only bounds memory. The report's update is the negative
  gradient, so that a server optimizer sees the gradient.

  Args:
    task: what is differentiated.
    weighting: as in `local_training`.
    get_model: as in `local_training`.
  """
  weigh = validate.lookup("weighting", weighting, WEIGHTINGS)

  def start(client: Client, *earlier: PyTree) -> LocalState:
    del earlier
    params, buffers, _ = get_model(client)
    return LocalState(zeros_accumulator(params), buffers, (), zero_metric())

  def step(
    client: Client, carry: LocalState, batch: Batch, key: Key
  ) -> LocalState:
    def loss(params: PyTree) -> tuple[Array, tuple[PyTree, Metric]]:
      variables = Variables(params, carry.buffers, get_model(client).frozen)
      return core.mean_loss(task, variables, batch, key)

    gradient, (buffers, total) = jax.grad(loss, has_aux=True)(
      get_model(client).params
    )
    # Not the gradient of the sum, which a model's dtype may be too short for.
    summed = jax.tree.map(
      lambda acc, g: acc + total.weight.astype(acc.dtype) * g.astype(acc.dtype),
      carry.params,
      gradient,
    )
    seen = compensated.add(carry.loss, total)
    return LocalState(summed, buffers, (), seen)

  def finish(client: Client, carry: LocalState) -> Report:
    loss = metric(carry.loss)
    weight = jnp.where(loss.weight > 0, loss.weight, 1)
    return Report(
      update=jax.tree.map(
        lambda g, p: (-g / weight.astype(g.dtype)).astype(p.dtype),
        carry.params,
        get_model(client).params,
      ),
      weight=weigh(client, loss),
      buffers=carry.buffers,
      metrics={"loss": loss},
    )

  return LocalTraining(Pass(start, step, epochs=1), finish)


def full_loss(
  task: Task, *, get_model: GetModel = lambda client: client.message
) -> Pass:
  """Return a pass that measures a client's loss, and trains nothing.

  It is over all of the client's data, at the model that it received, in
  training mode; the batch size only bounds memory.

  Args:
    task: whose loss.
    get_model: as in `local_training`.

  Returns:
    A pass whose carry is what `mean_of` makes the mean loss of.
  """

  def start(client: Client, *earlier: PyTree) -> Total:
    del client, earlier
    return zero_metric()

  def step(client: Client, carry: Total, batch: Batch, key: Key) -> Total:
    _, (_, total) = core.mean_loss(task, get_model(client), batch, key)
    return compensated.add(carry, total)

  return Pass(start, step, epochs=1, augmented=False)


def mean_of(loss: Total) -> Array:
  """Return the mean of a summed loss, shape=(), float32; 0 of nothing."""
  total, weight = metric(loss)
  return total / jnp.where(weight > 0, weight, 1)
