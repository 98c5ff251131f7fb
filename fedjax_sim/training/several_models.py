"""Several models on the server: of clients, or of groups of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fedjax_sim.core import Array, Client, PyTree, Report, Variables
from fedjax_sim.core.tree import accumulator_dtype, in_dtype
from fedjax_sim.training.local import LocalState, difference


def repeated(variables: Variables, count: int) -> PyTree:
  """Return (parameters, buffers) so many times, leaves (count, ...)."""
  repeat = lambda x: jnp.broadcast_to(x, (count, *jnp.shape(x)))
  params, buffers, _ = variables
  repeats: PyTree = jax.tree.map(repeat, (params, buffers))
  return repeats


def chosen(models: PyTree, index: Array, frozen: PyTree) -> Variables:
  """Return one of the models.

  Args:
    models: (parameters, buffers), leaves (models, ...).
    index: shape=(), int32; which one.
    frozen: what does not train, the same for all.
  """
  params, buffers = jax.tree.map(lambda x: x[index], models)
  return Variables(params, buffers, frozen)


def mean(models: PyTree, weight: Array, frozen: PyTree) -> Variables:
  """Return the weighted mean of models, in their own dtypes.

  Args:
    models: (parameters, buffers), leaves (models, ...).
    weight: shape=(models,), float32, >= 0; without any, all count alike.
    frozen: what does not train.
  """
  weight = jnp.where(jnp.sum(weight) > 0, weight, 1)
  share = weight / jnp.sum(weight)

  def of(x: Array) -> Array:
    dtype = accumulator_dtype(x)
    total = jnp.tensordot(share.astype(dtype), x.astype(dtype), 1)
    return in_dtype(total, x.dtype)

  params, buffers = jax.tree.map(of, models)
  return Variables(params, buffers, frozen)


def report_with_buffers(
  report: Report, client: Client, carry: LocalState
) -> Report:
  """Return a report whose update has the change of the buffers, too.

  A mean of buffers over all clients is of no use where each model has its own.

  Args:
    report: of FedAvg's training.
    client: whose message is the model that it received.
    carry: its training.

  Returns:
    The report with the update (of parameters, of buffers).
  """
  moved = difference(carry.buffers, client.message.buffers)
  return report._replace(update=(report.update, moved), buffers=())
