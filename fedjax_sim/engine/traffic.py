"""What travels between server and clients, in bytes, before transforms."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_sim.core import (
  Algorithm,
  Client,
  HParams,
  Purpose,
  PyTree,
  Report,
  Variables,
  key_for,
  noise_key_for,
)
from fedjax_sim.core.tree import nbytes
from fedjax_sim.engine.state import RunState


class Traffic(NamedTuple):
  """Bytes between the server and one client in a round.

  Attributes:
    down: that the client receives.
    up: that it sends.
    update: those of `up` that are the update's.
  """

  down: int
  up: int
  update: int


def first_client(
  algorithm: Algorithm, state: RunState, hparams: HParams
) -> tuple[Client, PyTree, tuple[PyTree, ...]]:
  """Client 0 before any step; its transforms' own states; its carries.

  Args:
    algorithm: what it does.
    state: a state.
    hparams: `Algorithm.hparams`.
  """
  own, transforms = jax.tree.map(lambda x: x[0], state.clients)
  client, carries = _begin(algorithm, state.server, own, hparams)
  return client, transforms, carries


def _begin(
  algorithm: Algorithm, server: PyTree, own: PyTree, hparams: HParams
) -> tuple[Client, tuple[PyTree, ...]]:
  """Return a client that keeps `own`, before any step, and its carries."""
  zero = jnp.zeros((), jnp.int32)
  client = Client(
    message=algorithm.download(algorithm.broadcast(server), zero),
    state=own,
    hparams=hparams,
    id=zero,
    version=zero,
    num_examples=zero,
    num_steps=jnp.zeros((len(algorithm.passes),), jnp.int32),
    round=zero,
    key=key_for(0, Purpose.CLIENT),
    noise_key=noise_key_for(jnp.zeros(2, jnp.uint32), Purpose.CLIENT),
  )
  carries: tuple[PyTree, ...] = ()
  for walked in algorithm.passes:
    carries += (walked.start(client, *carries),)
  return client, carries


def report_shapes(
  algorithm: Algorithm, server: PyTree, hparams: HParams
) -> Report:
  """Return shapes and dtypes of what a client reports, after postprocessing.

  Args:
    algorithm: what it does.
    server: a server state, or its shapes.
    hparams: `Algorithm.hparams`, or their shapes.
  """

  def visit(server: PyTree, hparams: HParams) -> Report:
    own = algorithm.client_init(server, hparams)
    client, carries = _begin(algorithm, server, own, hparams)
    report = algorithm.finish(client, *carries)
    return algorithm.postprocess_report(client, report)

  shapes: Report = jax.eval_shape(visit, server, hparams)
  return shapes


def traffic(algorithm: Algorithm, state: RunState, hparams: HParams) -> Traffic:
  """Return what one client receives and sends in a round, before transforms.

  What is frozen of a model does not count: clients have had it from the start.

  Args:
    algorithm: what it does.
    state: a state, or its shapes.
    hparams: `Algorithm.hparams`, or their shapes.
  """

  def visit(state: RunState, hparams: HParams) -> tuple[PyTree, Report]:
    client, _, carries = first_client(algorithm, state, hparams)
    report = algorithm.finish(client, *carries)
    return client.message, report._replace(state=(), metrics={})

  message, report = jax.eval_shape(visit, state, hparams)
  sent = [
    x._replace(frozen=()) if _is_model(x) else x
    for x in jax.tree.leaves(message, is_leaf=_is_model)
  ]
  return Traffic(nbytes(sent), nbytes(report), nbytes(report.update))


def _is_model(part: PyTree) -> bool:
  return isinstance(part, Variables)
