"""What travels between server and clients, in bytes, before compression."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from fedjax_sim.base import (
  Algorithm,
  Client,
  HParams,
  Purpose,
  PyTree,
  Report,
  key_for,
)
from fedjax_sim.round import RunState


def traffic(
  algorithm: Algorithm, state: RunState, hparams: HParams
) -> tuple[int, int]:
  """Bytes that one client receives and sends in a round, uncompressed.

  Args:
    algorithm: what it does.
    state: a state, or its shapes.
    hparams: the hyper-parameters, or their shapes.
  """
  passes = len(algorithm.passes)

  def visit(state: RunState, hparams: HParams) -> tuple[PyTree, Report]:
    zero = jnp.zeros((), jnp.int32)
    client = Client(
      message=algorithm.download(algorithm.broadcast(state.server), zero),
      state=jax.tree.map(lambda x: x[0], state.clients[0]),
      hparams=hparams,
      id=zero,
      version=zero,
      num_examples=zero,
      num_steps=jnp.zeros((passes,), jnp.int32),
      round=zero,
      key=key_for(state.seed, Purpose.CLIENT),
    )
    carries: tuple[PyTree, ...] = ()
    for walked in algorithm.passes:
      carries += (walked.start(client, *carries),)
    report = algorithm.finish(client, *carries)
    return client.message, report._replace(state=(), metrics={})

  message, report = jax.eval_shape(visit, state, hparams)
  return nbytes(message), nbytes(report)


def nbytes(tree: PyTree) -> int:
  """Bytes of all arrays, or of all shapes, in the tree."""
  return sum(
    math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )
