"""Numeric hyper-parameters by name, and schedules of them in the round.

A run's hyper-parameters have one section for each part that owns some:
`algorithm`, `transforms`, `task` and `aggregator`. Each part sees its own
section alone, so names of one never hide those of another.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjax_sim.core import Array, HParams, PyTree

ALGORITHM = "algorithm"  # the section of the algorithm's own numbers


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
  """Return nested hyper-parameters by path, such as `transforms.clip.norm`."""
  path = functools.partial(jax.tree_util.keystr, simple=True, separator=".")
  leaves = jax.tree_util.tree_leaves_with_path(hparams)
  return {path(keys): value for keys, value in leaves}


def path_of(name: str, paths: Container[str]) -> str | None:
  """Return the path of a hyper-parameter; None if the run has none such.

  The prefix `algorithm.` may be left out: `client.learning_rate` is
  `algorithm.client.learning_rate`.

  Args:
    name: as a user gives it.
    paths: those of the run, as `named` returns them.
  """
  for path in (name, f"{ALGORITHM}.{name}"):
    if path in paths:
      return path
  return None


def short_name(path: str, paths: Container[str]) -> str:
  """Return the shortest name that `path_of` takes for a path."""
  name = path.removeprefix(f"{ALGORITHM}.")
  return name if path_of(name, paths) == path else path


def changed(hparams: HParams, path: str, value: Any) -> HParams:
  """Return nested hyper-parameters with another value at a path.

  Args:
    hparams: the hyper-parameters.
    path: as in `named`.
    value: what replaces the one there.
  """
  key, _, rest = path.partition(".")
  new = changed(hparams[key], rest, value) if rest else value
  return {**hparams, key: new}


def scheduled(
  schedules: Mapping[str, Schedule],
  hparams: HParams,
  round_: Array,
  states: Mapping[str, PyTree],
) -> HParams:
  """Return the hyper-parameters of a round.

  Args:
    schedules: name of a hyper-parameter, see `path_of` -> its schedule.
    hparams: the run's, arrays.
    round_: shape=(), int32; rounds done.
    states: hyper-parameter -> its schedule's state.
  """
  paths = named(hparams)
  for short, schedule in schedules.items():
    path = path_of(short, paths)
    assert path is not None
    factor = schedule.factor(round_, states[short])
    value = paths[path]
    hparams = changed(hparams, path, value * factor.astype(value.dtype))
  return hparams


def reacted(
  schedule: Schedule, state: PyTree, value: float, higher_is_better: bool
) -> PyTree:
  """Return a schedule's state after an evaluation, on the host.

  Args:
    schedule: the schedule.
    state: its state before.
    value: value of its metric.
    higher_is_better: direction of the metric.
  """
  new = schedule.react(state, -value if higher_is_better else value)
  return jax.tree.map(lambda n, s: np.asarray(n, s.dtype), new, state)
