"""Transforms of one update, and aggregators of many."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from fedjax_sim.core.types import Array, HParams, Key, PyTree


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
  metrics: dict[str, Array] = {}
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
  """

  name: str
  hparams: HParams
  apply: Callable[[PyTree, PyTree, PyTree, HParams, Key], TransformResult]
  init: Callable[[PyTree, HParams], PyTree] = lambda params, hparams: ()
  client_init: Callable[[PyTree, HParams], PyTree] = lambda params, hparams: ()
  update: Callable[[PyTree, PyTree, HParams], PyTree] = (
    lambda shared, aux, hparams: shared
  )


class Roll(NamedTuple):
  """What a keyed aggregator knows of a round.

  Attributes:
    key: the aggregator's key in this round.
    seats: shape=(), int32; the clients of the cohort, whatever becomes of
      them. In the order of their ids they have the seats 0, 1, ...
    hparams: `Aggregator.hparams`, traced.
    noise_key: the aggregator's key of private noise (`noise_key_for`).
  """

  key: Key
  seats: Array
  hparams: HParams
  noise_key: Key


class Aggregator(NamedTuple):
  """How a cohort's updates become one.

  A streaming aggregator's accumulator is summed over devices; a stacked one's
  has a leading axis of clients and is concatenated over devices.

  Attributes:
    init: (update of one client, capacity) -> accumulator, on one device.
      `capacity` is the number of client slots on that device.
    add: (accumulator, updates (lanes, ...), weights (lanes,), present
      (lanes,), slot) -> accumulator. `slot` is the first of the wave's
      consecutive slots. Absent clients' rows may hold anything.
    finish: (accumulator, sum of weights, number of clients) -> update.
    stacked: see above.
    by_coordinate: of a stacked one: `finish` treats every coordinate by itself,
      as a median does, and takes leaves of any trailing shape. Then each
      device finishes its share of the coordinates, and none ever has the
      whole stack.
    joins: `finish` gives one update; otherwise the stack itself, leaves
      (slots, ...), for an algorithm that is `stacked`.
    weighted_mean: `finish` gives the weighted mean of the updates.
    keyed: of a streaming one: it draws random numbers. `add` and `finish` get
      one argument more, a `Roll`, and instead of `slot` `add` gets the lanes'
      seats, shape=(lanes,), int32; those of empty lanes are not below
      `Roll.seats`. Seats do not depend on lanes or devices.
    hparams: default numeric hyper-parameters, told in the `Roll`.
    draws_noise: private noise is drawn from `Roll.noise_key`.
  """

  init: Callable[[PyTree, int], PyTree]
  add: Callable[..., PyTree]
  finish: Callable[..., PyTree]
  stacked: bool = False
  by_coordinate: bool = False
  joins: bool = True
  weighted_mean: bool = False
  keyed: bool = False
  hparams: HParams = {}
  draws_noise: bool = False
