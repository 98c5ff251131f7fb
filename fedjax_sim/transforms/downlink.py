"""Compression of what the server sends, with its error fed back.

Gruntkowska, Tyurin & Richtarik 2022, "EF21-P and friends: Improved theoretical
communication complexity for distributed optimization with bidirectional
compression" (arXiv 2209.15218), algorithm 1. The server and all clients keep
the same message w. With the message x that the algorithm would send, and the
transform C,

    broadcast C(x - w)
    w = w + C(x - w)

and clients train from w. What C takes off is part of the next difference, so it
is sent later: as x settles, w reaches it, if C's error is less than what it is
given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_sim.core import (
  Aggregate,
  Algorithm,
  Array,
  Context,
  HParams,
  Key,
  PyTree,
  Transform,
  TransformResult,
  Variables,
  validate,
)
from fedjax_sim.core.tree import accumulator_dtype, nbytes
from fedjax_sim.engine.traffic import message_bytes
from fedjax_sim.training.seal import check_open
from fedjax_sim.training.wrappers import wrap_algorithm

_TAG = 0x646F776E  # of the key: no number that an algorithm would fold in
_SECTION = "downlink"


class DownlinkState(NamedTuple):
  """A server, and what all clients know.

  Attributes:
    server: the algorithm's state.
    known: w, the arrays of the message that are compressed, in its dtypes.
    shared: the transforms' shared states.
    own: the transforms' own states, such as warm starts.
    bytes: shape=(), float32; what the latest broadcast takes, all of it.
  """

  server: PyTree
  known: list[Array]
  shared: tuple[PyTree, ...]
  own: tuple[PyTree, ...]
  bytes: Array


def downlink(
  algorithm: Algorithm, transforms: Sequence[Transform]
) -> Algorithm:
  """Return the algorithm with transforms of what the server broadcasts.

  Compressed are the arrays of floats in the message. Sent as they are: what is
  frozen of a model, which no message counts; its buffers, as a variance that
  was rounded may be negative; and whole numbers.

  Every client receives every broadcast, absent ones too, or it would not know
  what a difference is to be added to. So `bytes_down` counts all clients of the
  federation in every round; `downlink/bytes` is one broadcast, and times
  `clients` what the cohort alone received. The first round's message is sent
  whole.

  An entry whose difference arrives as it was gets the message's own number, as
  if that had been sent instead. So a transform that changes nothing leaves the
  run as it is without one, bit for bit.

  What an algorithm does in a private run to a message that is noisy already
  costs no privacy: make it private after this.

  Args:
    algorithm: one whose clients all get the same message.
    transforms: what happens to differences, in order. Their numbers are the
      hyper-parameters `downlink.NAME.FIELD`; of several that tell bytes, the
      last one counts.

  Raises:
    TypeError: one is no `Transform`.
    ValueError: no transform; two of one name; one that adds noise; an algorithm
      that pools data, is private already, or has messages of several versions
      (the latter where the state is made).

  Example:
    downlink(fedavg(task, sgd(0.1), sgd(1.0)), [top_k(0.01)])
  """
  chain = tuple(transforms)
  _check(algorithm, chain)

  def init(server: PyTree, key: Key, hparams: HParams) -> DownlinkState:
    del key
    known = _compressed(algorithm.broadcast(server))
    numbers = hparams[_SECTION]
    return DownlinkState(
      server,
      # A copy, as the state may be given away array by array.
      [jnp.array(x) for x in known],
      tuple(t.init(known, numbers[t.name]) for t in chain),
      tuple(t.client_init(known, numbers[t.name]) for t in chain),
      jnp.float32(message_bytes(algorithm.broadcast(server))),
    )

  def apply(
    state: DownlinkState, aggregate: Aggregate, context: Context
  ) -> DownlinkState:
    server = algorithm.apply(state.server, aggregate, context)
    message = algorithm.broadcast(server)
    wanted = _compressed(message)
    gaps = [
      (_wide(x) - _wide(w)).astype(x.dtype)
      for x, w in zip(wanted, state.known, strict=True)
    ]
    numbers = context.hparams[_SECTION]
    key = jax.random.fold_in(context.key, _TAG)
    sent, count = gaps, jnp.float32(nbytes(gaps))
    shared, own = [], []
    for i, transform in enumerate(chain):
      given = numbers[transform.name]
      result: TransformResult = transform.apply(
        sent, state.shared[i], state.own[i], given, jax.random.fold_in(key, i)
      )
      sent = result.update
      shared.append(transform.update(state.shared[i], result.aux, given))
      own.append(result.state)
      if result.bytes is not None:
        count = jnp.asarray(result.bytes, jnp.float32)
    arrived = zip(wanted, state.known, gaps, sent, strict=True)
    known = [
      jnp.where(c == gap, x, (_wide(w) + _wide(c)).astype(x.dtype))
      for x, w, gap, c in arrived
    ]
    count += message_bytes(message) - nbytes(wanted)
    return DownlinkState(server, known, tuple(shared), tuple(own), count)

  wrapped = wrap_algorithm(
    algorithm,
    init=init,
    check=lambda server, hparams: _check_versions(algorithm, server),
    apply=apply,
    state_metrics=lambda state, hparams: {"downlink/bytes": state.bytes},
    hparams={_SECTION: {t.name: dict(t.hparams) for t in chain}},
  )
  with_model = wrapped.with_model

  def replaced(state: DownlinkState, variables: Variables) -> DownlinkState:
    assert with_model is not None
    new: DownlinkState = with_model(state, variables)
    message = algorithm.broadcast(new.server)
    whole = jnp.float32(message_bytes(message))
    return new._replace(known=_compressed(message), bytes=whole)

  return wrapped._replace(
    broadcast=lambda state: _filled(
      algorithm.broadcast(state.server), state.known
    ),
    broadcast_bytes=lambda state: state.bytes,
    differentiable=algorithm.differentiable
    and all(t.differentiable for t in chain),
    with_model=with_model and replaced,
  )


def _wide(x: Array) -> Array:
  return x.astype(accumulator_dtype(x))


def _compressed(message: PyTree) -> list[Array]:
  """Return the arrays of a message that are compressed."""
  leaves = jax.tree.leaves(message)
  marks = jax.tree.leaves(_marks(message))
  return [x for x, mark in zip(leaves, marks, strict=True) if mark]


def _filled(message: PyTree, known: Sequence[Array]) -> PyTree:
  """Return the message with `known` instead of what is compressed."""
  leaves, treedef = jax.tree.flatten(message)
  marks, given = jax.tree.leaves(_marks(message)), iter(known)
  new = [
    next(given) if mark else x for x, mark in zip(leaves, marks, strict=True)
  ]
  return jax.tree.unflatten(treedef, new)


def _marks(message: PyTree) -> PyTree:
  """Return, for every array of a message, whether it is compressed."""
  is_model = lambda part: isinstance(part, Variables)
  every = lambda tree, mark: jax.tree.map(
    lambda x: mark and bool(jnp.issubdtype(x.dtype, jnp.floating)), tree
  )

  def marked(part: Any) -> PyTree:
    if not is_model(part):
      return every(part, True)
    return Variables(
      params=every(part.params, True),
      buffers=every(part.buffers, False),
      frozen=every(part.frozen, False),
    )

  return jax.tree.map(marked, message, is_leaf=is_model)


def _check(algorithm: Algorithm, transforms: Sequence[Transform]) -> None:
  """Refuse what cannot be compressed, or by what."""
  example = "transforms.top_k(0.01)"
  if not transforms:
    raise ValueError(
      f"downlink: transforms is empty; give some, such as [{example}], or"
      " leave the down-link as it is."
    )
  names: list[str] = []
  for transform in transforms:
    validate.instance("downlink: transforms", transform, Transform, example)
    if transform.name in names:
      raise ValueError(
        f"downlink: transforms has the name {transform.name!r} twice; rename"
        f" one: transform._replace(name='{transform.name}_2')."
      )
    if transform.adds_noise:
      raise ValueError(
        f"downlink.{transform.name} adds noise, which the next broadcast would"
        " take back; leave it out."
      )
    names.append(transform.name)
  check_open(algorithm, "downlink")
  if algorithm.requirements.pools_data:
    raise ValueError(
      "downlink: the algorithm pools the data of all clients, so there is no"
      " down-link; leave it out, or take another algorithm."
    )


def _check_versions(algorithm: Algorithm, server: PyTree) -> None:
  """Refuse an algorithm whose clients may hold different messages."""
  message = jax.eval_shape(algorithm.broadcast, server)
  number = jax.ShapeDtypeStruct((), jnp.int32)
  one = jax.eval_shape(algorithm.download, message, number, number)
  kinds = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
  if kinds(message) != kinds(one):
    raise ValueError(
      "downlink: clients of algorithm.name receive different messages, such as"
      " several versions of the model, and a difference can be added to one"
      " alone, which all must know; leave the down-link as it is, or take"
      " another algorithm."
    )
