"""Error feedback: what a transform takes off an update is sent later.

Seide et al. 2014, "1-bit stochastic gradient descent and its application to
data-parallel distributed training of speech DNNs" (Interspeech), add the error
of quantizing a gradient to the next one; Karimireddy et al. 2019, "Error
feedback fixes SignSGD and other gradient compression schemes" (arXiv
1901.09847, algorithm 1), prove that any compressor then converges as none does.
"""

from __future__ import annotations

from typing import NamedTuple

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
from fedjax_sim.core.tree import zeros_accumulator


class FeedbackState(NamedTuple):
  """What a client keeps.

  Attributes:
    residual: what it has not sent yet, with the update's shapes, in float32 at
      least.
    inner: the own state of the transform inside.
  """

  residual: PyTree
  inner: PyTree


def error_feedback(transform: Transform) -> Transform:
  """Wrap a transform so that a client sends later what it took off.

  With the client's update u, its residual e (at first 0) and the transform C:

      p = u + e
      send C(p)
      e = p - C(p)

  Sent and kept together are all updates so far, whatever C is. A client's
  residual is part of its own state, stays as it is in rounds without the
  client, and does not change where the client is left out of a round.

  The result has the name, the hyper-parameters, the metrics and the bytes of
  the transform inside, and takes its place in a chain:

      transforms=[error_feedback(quantize(0.9, bits=4))]

  Args:
    transform: one whose error is less than what it is given, in the mean. The
      residual grows without end with `random_k(unbiased=True)`, or few levels
      of `qsgd` or `rotated`. Noise would be taken back in the next round, so
      put `gaussian` outside.

  Raises:
    TypeError: it is no `Transform`.
    ValueError: it adds noise.
  """
  example = "transforms.quantize(0.9)"
  validate.instance("error_feedback: transform", transform, Transform, example)
  if transform.adds_noise:
    raise ValueError(
      f"transforms.{transform.name}.error_feedback=True would take the noise"
      " back in the next round; set it to False."
    )

  def apply(
    update: PyTree, shared: PyTree, state: PyTree, hparams: HParams, key: Key
  ) -> TransformResult:
    wanted = jax.tree.map(jnp.add, state.residual, update)
    given = jax.tree.map(lambda p, u: p.astype(u.dtype), wanted, update)
    result = transform.apply(given, shared, state.inner, hparams, key)
    residual = jax.tree.map(
      lambda p, sent: p - sent.astype(p.dtype), wanted, result.update
    )
    return result._replace(state=FeedbackState(residual, result.state))

  def client_init(params: PyTree, hparams: HParams) -> FeedbackState:
    inner = transform.client_init(params, hparams)
    return FeedbackState(zeros_accumulator(params), inner)

  return transform._replace(apply=apply, client_init=client_init)
