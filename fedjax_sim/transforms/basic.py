"""What happens to a client's update before it leaves the client.

Each transform is one `Transform`; the engine applies a run's transforms in
order, once per client, inside the round. Any optax transformation can be
lifted into one.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fedjax_sim.core import (
  HParams,
  Key,
  PyTree,
  Transform,
  TransformResult,
  validate,
)
from fedjax_sim.core.tree import bounded, tree_norm
from fedjax_sim.training.optimizers import Optimizer


def clip(norm: float) -> Transform:
  """Scale an update whose global L2 norm exceeds `norm` down to it.

  The metric `clip/clipped` is the fraction of the clients whose update was
  longer.

  Args:
    norm: the longest L2 norm, above 0.

  Raises:
    ValueError: a norm that is not positive.
  """
  norm = validate.number("norm", norm, gt=0.0)

  def apply(
    update: PyTree, shared: PyTree, state: PyTree, hparams: HParams, key: Key
  ) -> TransformResult:
    del shared, key
    bound = hparams["norm"]
    cut = jax.tree.map(
      lambda u, c: c.astype(u.dtype), update, bounded(update, bound)
    )
    longer = (tree_norm(update) > bound).astype(jnp.float32)
    return TransformResult(cut, state, metrics={"clipped": longer})

  return Transform(name="clip", hparams={"norm": norm}, apply=apply)


def gaussian(stddev: float) -> Transform:
  """Add independent Gaussian noise of `stddev` to every coordinate.

  A mechanism, not a guarantee: nothing here accounts for privacy.

  Args:
    stddev: the standard deviation, >= 0.

  Raises:
    ValueError: a negative standard deviation.
  """
  stddev = validate.number("stddev", stddev, ge=0.0)

  def apply(
    update: PyTree, shared: PyTree, state: PyTree, hparams: HParams, key: Key
  ) -> TransformResult:
    del shared
    leaves, treedef = jax.tree.flatten(update)
    noisy = [
      leaf
      + hparams["stddev"].astype(leaf.dtype)
      * jax.random.normal(jax.random.fold_in(key, i), leaf.shape, leaf.dtype)
      for i, leaf in enumerate(leaves)
    ]
    return TransformResult(jax.tree.unflatten(treedef, noisy), state)

  return Transform(
    name="gaussian", hparams={"stddev": stddev}, apply=apply, adds_noise=True
  )


def lift(name: str, optimizer: Optimizer) -> Transform:
  """Return an optax transformation as a client transform.

  Its state is the client's own and lasts from round to round.

  Args:
    name: its section in the run's hyper-parameters.
    optimizer: from `optimizers.optimizer`, with any optax factory.
  """

  def apply(
    update: PyTree, shared: PyTree, state: PyTree, hparams: HParams, key: Key
  ) -> TransformResult:
    del shared, key
    return TransformResult(*optimizer.build(hparams).update(update, state))

  return Transform(
    name=name,
    hparams=optimizer.hparams,
    apply=apply,
    client_init=lambda params, hparams: optimizer.build(hparams).init(params),
  )
