"""Numeric hyper-parameters of a run: the parts' own, and as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from fedjax_sim.core import (
  Aggregator,
  Algorithm,
  HParams,
  PrivacySpec,
  PyTree,
  Task,
  Transform,
  validate,
)
from fedjax_sim.privacy.central import guard


def default_hparams(
  task: Task,
  algorithm: Algorithm,
  aggregator: Aggregator,
  transforms: Sequence[Transform],
) -> HParams:
  """Return the numeric hyper-parameters of all parts, at their defaults.

  Every part has a section of its own, so that whatever an algorithm calls its
  numbers, they hide none of another part.

  Args:
    task: what is trained.
    algorithm: the algorithm.
    aggregator: the aggregator in use.
    transforms: transforms of the client updates.
  """
  return {
    "algorithm": dict(algorithm.hparams),
    "transforms": {t.name: dict(t.hparams) for t in transforms},
    "task": dict(task.hparams),
    "aggregator": dict(aggregator.hparams),
  }


def traced_hparams(
  given: HParams | None, defaults: HParams, release: PrivacySpec | None
) -> PyTree:
  """Return hyper-parameters as arrays of one dtype.

  Args:
    given: sections that replace those of the defaults; None for none.
    defaults: all hyper-parameters of the run.
    release: of the algorithm, whose noise must stay what is counted; None if
      it is not private.

  Raises:
    TypeError, ValueError: names the number.
  """
  for section in given or {}:
    if section not in defaults:
      raise validate.UnknownNameError(
        f"hparams[{section!r}] is no section of Simulator.hparams; give"
        f" {', '.join(map(repr, defaults))}. An algorithm's own numbers are in"
        " hparams['algorithm']."
      )
  hparams = {**defaults, **(given or {})}
  expected: Any = jax.tree.structure(defaults)
  if jax.tree.structure(hparams) != expected:
    raise ValueError(
      f"hparams={hparams!r} does not have the structure of"
      f" Simulator.hparams, {defaults!r}; change values, not keys."
    )
  for path, value in jax.tree_util.tree_leaves_with_path(hparams):
    number = value.item() if hasattr(value, "item") else value
    validate.number(f"hparams{jax.tree_util.keystr(path)}", number)
  if release is not None:
    guard.check_numbers(hparams["algorithm"], defaults["algorithm"])
  dtype = jax.dtypes.canonicalize_dtype(np.float64)
  return jax.tree.map(lambda x: np.asarray(x, dtype), hparams)
