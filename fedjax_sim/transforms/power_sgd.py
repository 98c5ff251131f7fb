"""PowerSGD: matrices of low rank, by a step of a power iteration.

Vogels, Karimireddy & Jaggi 2019, "PowerSGD: Practical low-rank gradient
compression for distributed optimization" (arXiv 1905.13727), algorithm 1. Of a
matrix M (n x m), with Q (m x r) from the round before,

    P = orthonormal basis of M Q
    Q = M^T P
    C(M) = P Q^T = P P^T M

an orthogonal projection, so ||C(M) - M||^2 = ||M||^2 - ||P^T M||^2.

In the paper all workers have one P and one Q: they average M Q, orthogonalize,
then average M^T P, so what is decoded is a projection of the mean, of rank r.
That takes two exchanges a round and the same cohort always. Here every client
has a P and a Q of its own, and warm-starts with the Q that it kept when it last
took part: one exchange, any cohort; the mean of the clients' updates then has a
rank of up to r times the number of clients, each client's error is its own, and
for the server the work grows with the clients. A client sends as many numbers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fedjax_sim.core import (
  Array,
  HParams,
  Key,
  PyTree,
  Transform,
  TransformResult,
  validate,
)
from fedjax_sim.core.tree import scaled


def power_sgd(rank: int = 2) -> Transform:
  """Approximate every matrix of an update by one of low rank.

  Biased; the paper has it with error feedback, `error_feedback=True`. An array
  of more axes is a matrix with its last axis as columns. Vectors, and matrices
  that two factors would not make smaller, are sent as they are, as in the
  paper.

  `power_sgd/bytes` is what is sent: P and Q of each matrix in float32, and the
  other arrays as they are.

  Args:
    rank: r; no hyper-parameter, as it is compiled in.

  Raises:
    TypeError, ValueError: rank is not a whole number >= 1.
  """
  rank = validate.integer("rank", rank)

  def apply(
    update: PyTree, shared: PyTree, state: PyTree, hparams: HParams, key: Key
  ) -> TransformResult:
    del shared, hparams, key
    leaves, treedef = jax.tree.flatten(update)
    factors = iter(state)
    sent, kept, count = [], [], 0
    for x in leaves:
      whole = x.size * x.dtype.itemsize
      if not _is_factored(x, rank):
        sent.append(x)
        count += whole
        continue
      decoded, q = x, next(factors)
      both = 4 * rank * sum(_matrix(x))
      if both < whole:  # not so of half precision, perhaps
        decoded, q = _step(x, q)
      sent.append(decoded)
      kept.append(q)
      count += min(both, whole)
    result = jax.tree.unflatten(treedef, sent)
    return TransformResult(result, tuple(kept), bytes=jnp.float32(count))

  def client_init(params: PyTree, hparams: HParams) -> tuple[Array, ...]:
    del hparams
    leaves = [x for x in jax.tree.leaves(params) if _is_factored(x, rank)]
    # Any start will do, and the same for all; warm starts make up for it.
    root = jax.random.key(0)
    return tuple(
      jax.random.normal(jax.random.fold_in(root, i), (_matrix(x)[1], rank))
      for i, x in enumerate(leaves)
    )

  return Transform(
    name="power_sgd",
    hparams={},
    apply=apply,
    client_init=client_init,
    differentiable=False,
  )


def _matrix(x: Array) -> tuple[int, int]:
  """Return the rows and columns of an array of two axes or more."""
  columns = x.shape[-1]
  return x.size // columns, columns


def _is_factored(x: Array, rank: int) -> bool:
  return x.ndim >= 2 and x.size > 0 and rank * sum(_matrix(x)) < x.size


def _step(x: Array, q: Array) -> tuple[Array, Array]:
  """Return an array as it is decoded, and the Q to begin with next time.

  Args:
    x: an array of two axes or more.
    q: shape=(columns, rank), float32.
  """
  near_one, inverse = scaled(x)
  m = near_one.reshape(_matrix(x))
  p, _ = jnp.linalg.qr(m @ q.astype(m.dtype))
  new = m.T @ p
  decoded = (p @ new.T).reshape(x.shape) / inverse
  # A basis of Q spans the same and loses no digits where columns are nearly
  # parallel. An update of zeros has no directions: those of before are kept.
  basis, _ = jnp.linalg.qr(new)
  warm = jnp.where(jnp.any(new != 0), basis, q)
  return decoded.astype(x.dtype), warm.astype(q.dtype)
