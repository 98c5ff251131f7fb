"""Schedules of hyper-parameters, evaluated inside the round."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjax_sim.core import Array, HParams, PyTree


class Schedule(NamedTuple):
  """A factor that changes from round to round.

  Attributes:
    factor: (rounds done, state) -> shape=(), float.
    init: () -> state, arrays.
    react: (state, value of `metric`, less is better) -> state, after an
      evaluation; on the host.
    metric: its name, such as `unseen/loss`; None: it looks at the round alone.
  """

  factor: Callable[[Array, PyTree], Array]
  init: Callable[[], PyTree] = lambda: ()
  react: Callable[[PyTree, float], PyTree] = lambda state, value: state
  metric: str | None = None


def named(hparams: HParams) -> dict[str, Any]:
  """Nested hyper-parameters by names such as `client.learning_rate`."""
  path = functools.partial(jax.tree_util.keystr, simple=True, separator=".")
  leaves = jax.tree_util.tree_leaves_with_path(hparams)
  return {path(keys): value for keys, value in leaves}


def scheduled(
  schedules: Mapping[str, Schedule],
  hparams: HParams,
  round_: Array,
  states: Mapping[str, PyTree],
) -> HParams:
  """The hyper-parameters of a round.

  Args:
    schedules: hyper-parameter -> its schedule.
    hparams: the run's, arrays.
    round_: shape=(), int32; rounds done.
    states: hyper-parameter -> its schedule's state.
  """

  def scale(tree: HParams, name: str, schedule: Schedule) -> HParams:
    key, _, rest = name.partition(".")
    if rest:
      return {**tree, key: scale(tree[key], rest, schedule)}
    factor = schedule.factor(round_, states[whole])
    return {**tree, key: tree[key] * factor.astype(tree[key].dtype)}

  for whole, schedule in schedules.items():
    hparams = scale(hparams, whole, schedule)
  return hparams


def reacted(
  schedule: Schedule, state: PyTree, value: float, higher_is_better: bool
) -> PyTree:
  """A schedule's state after its metric was told; on the host."""
  new = schedule.react(state, -value if higher_is_better else value)
  return jax.tree.map(lambda n, s: np.asarray(n, s.dtype), new, state)
