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


def first_client(
  algorithm: Algorithm, state: RunState, hparams: HParams
) -> tuple[Client, PyTree, tuple[PyTree, ...]]:
  """Client 0 before any step; its transforms' own states; its carries.

  Args:
    algorithm: what it does.
    state: a state.
    hparams: the hyper-parameters.
  """
  zero = jnp.zeros((), jnp.int32)
  own, transforms = jax.tree.map(lambda x: x[0], state.clients)
  client = Client(
    message=algorithm.download(algorithm.broadcast(state.server), zero),
    state=own,
    hparams=hparams,
    id=zero,
    version=zero,
    num_examples=zero,
    num_steps=jnp.zeros((len(algorithm.passes),), jnp.int32),
    round=zero,
    key=key_for(state.seed, Purpose.CLIENT),
  )
  carries: tuple[PyTree, ...] = ()
  for walked in algorithm.passes:
    carries += (walked.start(client, *carries),)
  return client, transforms, carries


def traffic(
  algorithm: Algorithm, state: RunState, hparams: HParams
) -> tuple[int, int]:
  """Bytes that one client receives and sends in a round, uncompressed.

  Args:
    algorithm: what it does.
    state: a state, or its shapes.
    hparams: the hyper-parameters, or their shapes.
  """

  def visit(state: RunState, hparams: HParams) -> tuple[PyTree, Report]:
    client, _, carries = first_client(algorithm, state, hparams)
    report = algorithm.finish(client, *carries)
    return client.message, report._replace(state=(), metrics={})

  message, report = jax.eval_shape(visit, state, hparams)
  return nbytes(message), nbytes(report)


def nbytes(tree: PyTree) -> int:
  """Bytes of all arrays, or of all shapes, in the tree."""
  return sum(
    math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )
