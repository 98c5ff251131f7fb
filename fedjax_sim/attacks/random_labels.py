"""Random labels: attackers train on labels that say nothing."""

from __future__ import annotations

import jax

from fedjax_sim.attacks.attack import Attack
from fedjax_sim.attacks.labels import labels_of, need_classes
from fedjax_sim.core import Batch, Examples, HParams, Key


def random_labels(num_classes: int) -> Attack:
  """Train on labels that are drawn uniformly, anew in every local step.

  Args:
    num_classes: how many classes there are.

  Raises:
    ValueError: there are no classes.
  """
  need_classes(num_classes)

  def poison(batch: Batch, key: Key, hparams: HParams) -> Examples:
    del hparams
    y = labels_of(batch.examples)
    drawn = jax.random.randint(key, y.shape, 0, num_classes, y.dtype)
    return {**batch.examples, "y": drawn}

  return Attack(poison=poison)
