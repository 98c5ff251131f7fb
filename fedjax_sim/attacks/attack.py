"""The contract of attacks: what Byzantine clients do."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from fedjax_sim.core import (
  Array,
  Batch,
  Examples,
  HParams,
  Key,
  PyTree,
  Task,
  returned,
)
from fedjax_sim.core.types import EMPTY
from fedjax_sim.core.update import Shares


class Honest(NamedTuple):
  """What colluding attackers know of a round.

  Attributes:
    rows: the honest clients' updates, leaves (slots, ...), in float32 or wider;
      0 in all other rows.
    present: shape=(slots,), bool; which rows are honest clients'.
    clients: shape=(), int32; how many these are, at least 1.
    attackers: shape=(), int32; how many clients attack in this round.
    mean: the plain mean of the honest updates, leaves (...).
    shares: how the coordinates are dealt to devices.
    aggregate: update -> what the server would make of the round if every
      attacker sent it. Differentiable.
  """

  rows: PyTree
  present: Array
  clients: Array
  attackers: Array
  mean: PyTree
  shares: Shares
  aggregate: Callable[[PyTree], PyTree]


class Attack(NamedTuple):
  """What Byzantine clients do, as pure functions; others stay as they are.

  For example, one whose clients send half of their update:

      def report(update, key, hparams):
        return jax.tree.map(lambda u: u / 2, update)

      Attack(report=report)

  Attributes:
    hparams: default numbers, traced; each function gets them alone.
    poison: (batch, key, hparams) -> examples that the client trains on instead,
      in every local step of every pass; with the same fields, shapes and
      dtypes. Evaluation never sees them.
    report: (update, key, hparams) -> update that it sends instead, after the
      transforms; same structure, shapes and dtypes.
    collude: (`Honest`, hparams) -> the update that all attackers send, in
      float32. They see every honest update of the round.
    by_shares: whether `collude` computes with a share of the coordinates as
      with all of them, but for sums from `Honest.shares`. No device then holds
      a whole stack of updates, if the aggregator needs none.
    asks_aggregate: whether `collude` calls `Honest.aggregate`.
    measure: task -> the task with metrics of the attack's success.
  """

  hparams: HParams = EMPTY
  poison: Callable[[Batch, Key, HParams], Examples] | None = None
  report: Callable[[PyTree, Key, HParams], PyTree] | None = None
  collude: Callable[[Honest, HParams], PyTree] | None = None
  by_shares: bool = False
  asks_aggregate: bool = False
  measure: Callable[[Task], Task] | None = None


def check_shapes(function: str, given: PyTree, like: PyTree) -> None:
  """Refuse what a function of an attack returned, if it would be broadcast.

  Args:
    function: its name in `Attack`.
    given: what it returned.
    like: what it was to be like.

  Raises:
    TypeError: names the first leaf whose shape differs.
  """
  shape = lambda x: f"shape {jnp.shape(x)}"
  if (found := returned.first_difference(given, like, shape)) is not None:
    name, one, other = found
    raise TypeError(
      f"attack.name: Attack.{function} returned {one} at {name or 'the top'},"
      f" where {other} was expected; keep structure and shapes."
    )
