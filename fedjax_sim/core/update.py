"""Transforms of one update, and aggregators of many."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
from jax import lax

from fedjax_sim.core.types import EMPTY, Array, HParams, Key, PyTree


class TransformResult(NamedTuple):
  """What a transform makes of one client's update.

  Attributes:
    update: the transformed update, with the structure, shapes and dtypes of the
      one before.
    state: the client's own state for its next round; `()` keeps nothing.
    aux: what the server learns besides the update, such as the indicator bit of
      adaptive clipping; `Transform.update` gets its mean over the clients.
    metrics: name -> shape=(), float; its mean over the clients is the round's
      metric `TRANSFORM/NAME`.
    bytes: shape=(); what the update takes when it is sent, which is the round's
      metric `TRANSFORM/bytes`. Of several transforms that say so, the last one
      decides on `bytes_up`. None: as much as before.
  """

  update: PyTree
  state: PyTree = ()
  aux: PyTree = ()
  metrics: Mapping[str, Array] = EMPTY
  bytes: Array | None = None


class Transform(NamedTuple):
  """A pure function on a client's update: clip, quantize, noise.

  For example, one that halves every update:

      def apply(update, shared, state, hparams, key):
        return TransformResult(jax.tree.map(lambda u: u / 2, update))

      Transform(name="half", hparams={}, apply=apply)

  Attributes:
    name: its section in the run's hyper-parameters; no other transform of the
      run may have it. `transform._replace(name="again")` renames one.
    hparams: its default numeric hyper-parameters.
    apply: (update, shared, state, hparams, key) -> `TransformResult`.
    init: (params, hparams) -> shared state, held by the server and known to
      all clients.
    client_init: (params, hparams) -> one client's own state before it first
      takes part, such as the residual of error feedback.
    update: (shared, mean of aux over clients, hparams) -> shared state, once
      a round.
    adds_noise: whether it adds random noise, which error feedback would take
      back.
    differentiable: whether its result has a derivative in the update; False
      where numbers are rounded, so that `hypergradient` refuses it.
  """

  name: str
  hparams: HParams
  apply: Callable[[PyTree, PyTree, PyTree, HParams, Key], TransformResult]
  init: Callable[[PyTree, HParams], PyTree] = lambda params, hparams: ()
  client_init: Callable[[PyTree, HParams], PyTree] = lambda params, hparams: ()
  update: Callable[[PyTree, PyTree, HParams], PyTree] = (
    lambda shared, aux, hparams: shared
  )
  adds_noise: bool = False
  differentiable: bool = True


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Shares:
  """How the coordinates of a stack are dealt to devices.

  In `finish` of an aggregator with `Aggregator.by_shares` each device has all
  rows for a share of the coordinates, and here is what it learns of the others.

  Attributes:
    axis: the axis that `shard_map` or `vmap` has for the devices; None where
      all coordinates are here.
  """

  axis: str | None = None

  def sum(self, x: Array) -> Array:
    """Return the sum of what all devices give, the same on each."""
    return x if self.axis is None else lax.psum(x, self.axis)

  def max(self, x: Array) -> Array:
    """Return the largest of what all devices give; it has no derivative."""
    x = lax.stop_gradient(x)
    return x if self.axis is None else lax.pmax(x, self.axis)

  def part(self, x: Array) -> Array:
    """Return a device's part of a sum that each of them has whole."""
    return x if self.axis is None else x / lax.axis_size(self.axis)


class AggregationContext(NamedTuple):
  """What an aggregator knows of a round.

  Attributes:
    key: the aggregator's key in this round.
    noise_key: its key of private noise in this round (`noise_key_for`).
    slot: shape=(), int32; in `add`, the first of the wave's consecutive slots
      on its device; 0 in `finish`.
    rank: int32; each client's rank in the cohort when clients are sorted by
      id. In `add` shape=(lanes,), in `finish` shape=(slots,), in the order of
      the rows of a stack over all devices. Empty lanes have
      rank >= cohort_size. Ranks depend neither on lanes nor devices.
    cohort_size: shape=(), int32; number of clients in the cohort, those that
      are rejected included.
    hparams: `Aggregator.hparams`, traced.
    previous: what `finish` returned in the last round that had clients, zeros
      before the first; `()` without `Aggregator.keeps_previous`.
    shares: in `finish`, how the coordinates are dealt to devices.
    byzantine: bool, with the shapes of `rank`; which clients attack in this
      round, which only an attack looks at. `()` where nobody asks.
  """

  key: Key
  noise_key: Key
  slot: Array
  rank: Array
  cohort_size: Array
  hparams: HParams
  previous: PyTree = ()
  shares: Shares = Shares()
  byzantine: PyTree = ()


class Aggregator(NamedTuple):
  """How a cohort's updates become one.

  By default accumulators are sums, which the engine adds over devices. An
  aggregator that needs all updates keeps a stack of them instead, with a
  leading axis of client slots, which the engine concatenates over devices.

  Random numbers that depend on `AggregationContext.rank` rather than on `slot`
  are the same for any number of lanes and devices.

  Attributes:
    init: (update of one client, capacity) -> accumulator on one device.
      `capacity` is the number of client slots on that device.
    add: (accumulator, updates (lanes, ...), weights (lanes,), present
      (lanes,), `AggregationContext`) -> accumulator. Rows of absent clients may
      hold anything.
    finish: (accumulator, sum of weights, number of clients,
      `AggregationContext`) -> update.
    needs_all_updates: whether the accumulator is a stack.
    coordinatewise: whether `finish` treats every coordinate of a stack by
      itself, as a median does, and takes leaves of any trailing shape. Each
      device then finishes a share of the coordinates, and none ever holds the
      whole stack. What `finish` draws at random may depend on rows, but not on
      coordinates.
    by_shares: as `coordinatewise`, for a `finish` that needs to know of all
      coordinates no more than sums, such as the distances between rows, which
      it takes from `AggregationContext.shares`. Leaves of a stack with one
      dimension, of scalar parameters, are whole on every device.
    keeps_previous: whether the context holds the last round's result, which
      is then a part of the run's state.
    number_bits: bits that every number of an update takes when it is sent, as
      of masked ones, whatever transforms made of it; None: it is sent as they
      say.
    min_clients: the smallest cohort for which the aggregator keeps its
      promise; a run whose cohorts are all smaller is refused.
    reduces: whether `finish` returns one update. Otherwise it returns the
      stack, leaves (slots, ...), for an algorithm whose `apply` reduces it.
    weighted_mean: whether `finish` returns the weighted mean of the updates.
    hparams: default numeric hyper-parameters, which the context holds traced.
    draws_noise: whether private noise is drawn from the context's `noise_key`.
      The algorithm then gets what `finish` returns, which alone is covered, and
      neither weights nor values of clients: all weigh 1.
    differentiable: as in `Transform`.
  """

  init: Callable[[PyTree, int], PyTree]
  add: Callable[[PyTree, PyTree, Array, Array, AggregationContext], PyTree]
  finish: Callable[[PyTree, Array, Array, AggregationContext], PyTree]
  needs_all_updates: bool = False
  coordinatewise: bool = False
  reduces: bool = True
  weighted_mean: bool = False
  hparams: HParams = EMPTY
  draws_noise: bool = False
  differentiable: bool = True
  by_shares: bool = False
  keeps_previous: bool = False
  number_bits: int | None = None
  min_clients: int = 1

  @property
  def finishes_shares(self) -> bool:
    """Whether each device finishes a share of the coordinates."""
    return self.coordinatewise or self.by_shares
