"""Algorithms some of whose clients train on false data, or report falsely."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fedjax_sim.aggregators.grouped import Grouped
from fedjax_sim.attacks.attack import Attack, check_shapes
from fedjax_sim.core import (
  Algorithm,
  Array,
  Batch,
  Client,
  Examples,
  HParams,
  Key,
  Pass,
  PyTree,
  Report,
)
from fedjax_sim.training import seal
from fedjax_sim.training.wrappers import wrap_algorithm

_SECTION = "attack"  # of the hyper-parameters
_TAG = 0x62797A61  # of the keys: no number that an algorithm would fold in


def with_false_reports(algorithm: Algorithm, attack: Attack) -> Algorithm:
  """Return the algorithm whose Byzantine clients send what the attack says.

  It has the last word, after the transforms and the algorithm's own
  `postprocess_report`. Weight, buffers and statistics stay as they are. Under
  central privacy, wrap first: the server clips what attackers send.

  Args:
    algorithm: one whose clients send an update.
    attack: its `report`; without one, the algorithm is returned as it is.

  Raises:
    ValueError: the algorithm is private already, or has no clients.
  """
  false = attack.report
  if false is None:
    return algorithm
  check_clients(algorithm)

  def postprocess_report(
    client: Client, report: Report, inner: Callable[[Report], Report]
  ) -> Report:
    report = inner(report)
    key = jax.random.fold_in(client.key, _TAG)
    true = report.update
    own = true.update if isinstance(true, Grouped) else true
    said = false(own, key, client.hparams[_SECTION])
    check_shapes("report", said, own)
    sent = _chosen(client, said, own)
    if isinstance(true, Grouped):  # attackers stay in their group
      sent = Grouped(sent, true.group)
    return report._replace(update=sent)

  return wrap_algorithm(
    algorithm,
    postprocess_report=postprocess_report,
    hparams=_numbers(algorithm, attack),
  )


def with_poisoned_data(algorithm: Algorithm, attack: Attack) -> Algorithm:
  """Return the algorithm whose Byzantine clients train on poisoned batches.

  In every local step of every pass, a survey's included.

  Args:
    algorithm: complete but for central privacy.
    attack: its `poison`; without one, the algorithm is returned as it is.

  Raises:
    ValueError: the algorithm is private already, or has no clients.
  """
  poison = attack.poison
  if poison is None:
    return algorithm
  check_clients(algorithm)
  survey = algorithm.survey
  if survey is not None:
    survey = survey._replace(
      passes=tuple(_poisoned(p, poison) for p in survey.passes)
    )
  wrapped = wrap_algorithm(algorithm, hparams=_numbers(algorithm, attack))
  return wrapped._replace(
    passes=tuple(_poisoned(p, poison) for p in algorithm.passes), survey=survey
  )


def check_clients(algorithm: Algorithm) -> None:
  """Refuse an algorithm that no client attacks.

  Raises:
    ValueError: it is private already, or pools all data.
  """
  seal.check_open(algorithm, "with_attack")
  if algorithm.requirements.pools_data:
    raise ValueError(
      "attack.name needs clients that attack, and algorithm.name pools the data"
      " of all; take another algorithm, or unset it."
    )


def _poisoned(
  walk: Pass, poison: Callable[[Batch, Key, HParams], Examples]
) -> Pass:
  """Return a pass that Byzantine clients make over poisoned batches."""

  def step(client: Client, carry: PyTree, batch: Batch, key: Key) -> PyTree:
    own = jax.random.fold_in(key, _TAG)
    examples = poison(batch, own, client.hparams[_SECTION])
    check_shapes("poison", dict(examples), dict(batch.examples))
    chosen = _chosen(client, dict(examples), dict(batch.examples))
    return walk.step(client, carry, batch._replace(examples=chosen), key)

  return walk._replace(step=step)


def _chosen(client: Client, false: PyTree, true: PyTree) -> PyTree:
  """Return what a client that attacks has, or one that does not."""

  def choose(x: Array, y: Array) -> Array:
    return jnp.where(client.byzantine, x.astype(y.dtype), y)

  return jax.tree.map(choose, false, true)


def _numbers(algorithm: Algorithm, attack: Attack) -> HParams:
  """Return the attack's numbers, unless the algorithm has them already."""
  if _SECTION in algorithm.hparams:
    return {}
  return {_SECTION: dict(attack.hparams)}
