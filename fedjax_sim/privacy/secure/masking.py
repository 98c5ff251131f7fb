"""Secure aggregation, simulated: the server adds up what it cannot read.

Every client's numbers become whole ones, modulo a power of two. Each pair of
neighbors on a ring shares a random mask, which one of them adds and the other
subtracts (Bonawitz et al. 2017, "Practical Secure Aggregation for
Privacy-Preserving Machine Learning"; a graph with few neighbors: Bell et al.
2020, "Secure Single-Server Aggregation with (Poly)Logarithmic Overhead"). One
masked message is uniform; in the sum the masks are gone.

It simulates the arithmetic, not the cryptography: masks come from the run's
seed, and keys are neither agreed on nor shared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fedjax_sim.core import (
  AggregationContext,
  Aggregator,
  Array,
  HParams,
  Key,
  PyTree,
  validate,
)

_MASK, _DROP, _ENCODE = range(3)  # what a key is for


class Code(NamedTuple):
  """How a client's numbers become whole ones, and their sum an update.

  No sum of `clients` messages leaves [-2^(bits - 1), 2^(bits - 1)).

  Attributes:
    clients: the most clients of a round.
    bits: a message's numbers are taken modulo 2^bits.
    encode: (update, weight, key, hparams) -> message, leaves int32. What an
      absent client gives may be anything.
    decode: (sum of messages, leaves int32, hparams) -> update, in float32.
    hparams: default numeric hyper-parameters.
    draws_noise: `encode` adds private noise.
  """

  clients: int
  bits: int
  encode: Callable[[PyTree, Array, Key, HParams], PyTree]
  decode: Callable[[PyTree, HParams], PyTree]
  hparams: HParams
  draws_noise: bool = False


class Received(NamedTuple):
  """All that the server has of a cohort.

  Attributes:
    total: the sum of masked messages modulo 2^bits, leaves uint32.
    arrived: shape=(clients,), uint32; by rank, 1 if the client's message
      arrived.
  """

  total: PyTree
  arrived: Array


def secure(code: Code, *, neighbors: int, dropout: float = 0.0) -> Aggregator:
  """Return an aggregator that sums masked messages and reads none of them.

  Sums of whole numbers do not round: the result has the same bits on any
  number of devices, waves and lanes.

  Args:
    code: how updates become whole numbers.
    neighbors: clients that each shares masks with, an even number; in a
      smaller cohort all others.
    dropout: probability that a client, its masks agreed on, sends nothing. As
      for clients whose report is rejected, the server then learns the masks
      that it shares with those who did, as it does from shares of its keys.

  Returns:
    The aggregator. A round with more than `code.clients` clients gives NaN,
    never a sum that has wrapped.

  Raises:
    TypeError, ValueError: an argument is out of range.
  """
  half, odd = divmod(validate.integer("neighbors", neighbors), 2)
  if odd:
    raise ValueError(
      f"neighbors={neighbors} is odd, and a ring has as many on one"
      " side as on the other; give an even number."
    )
  validate.number("dropout", dropout, ge=0, le=1)

  def encode(
    update: PyTree, weight: Array, rank: Array, context: AggregationContext
  ) -> PyTree:
    key = context.noise_key if code.draws_noise else context.key
    key = jax.random.fold_in(jax.random.fold_in(key, _ENCODE), rank)
    return code.encode(update, weight, key, context.hparams)

  def init(update: PyTree, capacity: int) -> Received:
    del capacity
    number = jnp.zeros((), jnp.float32)
    hparams = jax.tree.map(lambda _: number, code.hparams)
    key = jax.random.key(0)
    shapes = jax.eval_shape(code.encode, update, number, key, hparams)
    return Received(_zeros(shapes), jnp.zeros((code.clients,), jnp.uint32))

  def add(
    acc: Received,
    updates: PyTree,
    weights: Array,
    present: Array,
    context: AggregationContext,
  ) -> Received:
    def send(update: PyTree, weight: Array, rank: Array) -> PyTree:
      message = encode(update, weight, rank, context)
      mask = client_mask(context, message, rank, half)
      return jax.tree.map(
        lambda x, m: modulo(x.astype(jnp.uint32) + m, code.bits), message, mask
      )

    def join(total: Array, sent: Array) -> Array:
      here = arrived.reshape((-1,) + (1,) * (sent.ndim - 1))
      sent = jnp.where(here, sent, 0)
      return modulo(total + jnp.sum(sent, 0, dtype=jnp.uint32), code.bits)

    rank = context.rank
    arrived = present & ~_dropped(context)
    messages = jax.vmap(send)(updates, weights, rank)
    return Received(
      jax.tree.map(join, acc.total, messages),
      acc.arrived.at[jnp.where(arrived, rank, code.clients)].add(
        1, mode="drop"
      ),
    )

  def finish(
    acc: Received, weight: Array, count: Array, context: AggregationContext
  ) -> PyTree:
    del weight, count
    total = unmasked(acc, context, half)
    sums = jax.tree.map(lambda x: signed(x, code.bits), total)
    fits = context.cohort_size <= code.clients
    return jax.tree.map(
      lambda x: jnp.where(fits, x, jnp.nan), code.decode(sums, context.hparams)
    )

  return Aggregator(
    init,
    add,
    finish,
    hparams={**code.hparams, "dropout": float(dropout)},
    draws_noise=code.draws_noise,
    differentiable=False,
    number_bits=code.bits,
  )


def modulo(x: Array, bits: int) -> Array:
  """Return `x` modulo 2^bits; uint32."""
  return x & jnp.uint32(2**bits - 1)


def signed(x: Array, bits: int) -> Array:
  """Return `x` modulo 2^bits as a signed number; int32.

  It is within [-2^(bits - 1), 2^(bits - 1)).

  Args:
    x: uint32, of which the upper bits may be anything.
    bits: from 2 to 32.
  """
  top = lax.bitcast_convert_type(x << (32 - bits), jnp.int32)
  return top >> (32 - bits)


def client_mask(
  context: AggregationContext, like: PyTree, rank: Array, half: int
) -> PyTree:
  """Return what one client adds: masks shared with its neighbors on a ring.

  Args:
    context: the round's; its `rank` is not read.
    like: a message.
    rank: shape=(), int32; the client's.
    half: neighbors on each side of the ring.

  Returns:
    uint32, of the message's shapes, modulo 2^32. The masks of all clients add
    up to 0. A client alone has a mask of 0.
  """

  def pair(offset: Array, mask: PyTree) -> PyTree:
    after, before = rank + offset, rank - offset
    return jax.tree.map(
      lambda m, plus, minus: m + plus - minus,
      mask,
      _pair_mask(context, like, rank, after),
      _pair_mask(context, like, before, rank),
    )

  return lax.fori_loop(1, half + 1, pair, _zeros(like))


def unmasked(acc: Received, context: AggregationContext, half: int) -> PyTree:
  """Return the total without masks of pairs of which only one has arrived.

  Returns:
    uint32, leaves of the message's shapes.
  """
  size = jnp.maximum(context.cohort_size, 1)
  arrived = acc.arrived > 0

  def recover(i: Array, total: PyTree) -> PyTree:
    one = i // half
    other = (one + i % half + 1) % size

    def take() -> PyTree:
      mask = _pair_mask(context, total, one, other)
      return jax.tree.map(
        lambda x, m: jnp.where(arrived[one], x - m, x + m), total, mask
      )

    return lax.cond(arrived[one] != arrived[other], take, lambda: total)

  all_here = jnp.sum(arrived, dtype=jnp.int32) == context.cohort_size
  pairs = jnp.where(all_here, 0, size * half)
  return lax.fori_loop(0, pairs, recover, acc.total)


def _pair_mask(
  context: AggregationContext, like: PyTree, one: Array, other: Array
) -> PyTree:
  """Return what `one` adds and `other` subtracts; ranks wrap around."""
  size = jnp.maximum(context.cohort_size, 1)
  key = jax.random.fold_in(context.key, _MASK)
  for rank in (one, other):
    key = jax.random.fold_in(key, rank % size)
  leaves, structure = jax.tree.flatten(like)
  bits = [
    jax.random.bits(jax.random.fold_in(key, i), x.shape, jnp.uint32)
    for i, x in enumerate(leaves)
  ]
  return jax.tree.unflatten(structure, bits)


def _dropped(context: AggregationContext) -> Array:
  """Return whether each client of a wave drops out; shape=(lanes,), bool."""
  key = jax.random.fold_in(context.key, _DROP)
  chance = lambda rank: jax.random.uniform(jax.random.fold_in(key, rank))
  return jax.vmap(chance)(context.rank) < context.hparams["dropout"]


def _zeros(like: PyTree) -> PyTree:
  return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.uint32), like)
