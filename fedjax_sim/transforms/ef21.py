"""EF21: a client compresses how its update differs from what it sent before.

Richtarik, Sokolov & Fatkhullin 2021, "EF21: A new, simpler, theoretically
better, and practically faster error feedback" (arXiv 2106.05203), algorithm 2.
Client and server both keep g, at first 0; with the client's update u and a
compressor C whose error is less than what it is given,

    send C(u - g)
    g = g + C(u - g)

and the server takes g for the client's update. As the updates settle, u - g
goes to 0 and so does the error, where classical error feedback goes on sending
what it owes.

The paper has all clients in every round. Here the server takes the g of the
cohort alone; the g of an absent client stays until it returns.
"""

from __future__ import annotations

from typing import NamedTuple

import jax

from fedjax_sim.core import (
  HParams,
  Key,
  PyTree,
  Transform,
  TransformResult,
  validate,
)
from fedjax_sim.core.tree import zeros_accumulator


class EF21State(NamedTuple):
  """What a client keeps, and the server of it.

  Attributes:
    known: g, with the update's shapes, in float32 at least.
    inner: the own state of the transform inside.
  """

  known: PyTree
  inner: PyTree


def ef21(transform: Transform) -> Transform:
  """Wrap a transform so that it acts on what is new in a client's update.

  The result has the name, the hyper-parameters, the metrics and the bytes of
  the transform inside, and takes its place in a chain:

      transforms=[ef21(top_k(0.01))]

  Args:
    transform: one whose error is less than what it is given, such as `top_k`,
      and not one that multiplies to be unbiased.

  Raises:
    TypeError: it is no `Transform`.
    ValueError: it adds noise, which would add up from round to round.
  """
  example = "transforms.top_k(0.01)"
  validate.instance("ef21: transform", transform, Transform, example)
  if transform.adds_noise:
    raise ValueError(
      f"transforms.{transform.name}.ef21=True would add up the noise of all"
      " rounds; set it to False."
    )

  def apply(
    update: PyTree, shared: PyTree, state: PyTree, hparams: HParams, key: Key
  ) -> TransformResult:
    news = jax.tree.map(
      lambda u, g: (u.astype(g.dtype) - g).astype(u.dtype), update, state.known
    )
    result = transform.apply(news, shared, state.inner, hparams, key)
    known = jax.tree.map(
      lambda g, sent: g + sent.astype(g.dtype), state.known, result.update
    )
    sent = jax.tree.map(lambda g, u: g.astype(u.dtype), known, update)
    return result._replace(update=sent, state=EF21State(known, result.state))

  def client_init(params: PyTree, hparams: HParams) -> EF21State:
    inner = transform.client_init(params, hparams)
    return EF21State(zeros_accumulator(params), inner)

  return transform._replace(apply=apply, client_init=client_init)
