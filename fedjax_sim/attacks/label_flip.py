"""Label flipping: attackers train on wrong labels.

Biggio, Nelson and Laskov 2012, "Poisoning attacks against support vector
machines" (arXiv 1206.6389); in federated learning as y -> C - 1 - y, with C
classes (Fang et al. 2020, "Local model poisoning attacks to Byzantine-robust
federated learning", arXiv 1911.11815, section 5.1), or from one class to
another (Tolpegin et al. 2020, arXiv 2007.08432).
"""

from __future__ import annotations

import jax.numpy as jnp

from fedjax_sim.attacks.attack import Attack
from fedjax_sim.attacks.labels import class_number, labels_of, need_classes
from fedjax_sim.core import Batch, Examples, HParams, Key


def label_flip(
  num_classes: int, source: int | None = None, target: int | None = None
) -> Attack:
  """Train on flipped labels: y becomes C - 1 - y, or `source` becomes `target`.

  Args:
    num_classes: how many classes there are, C.
    source: the class whose labels are changed; None: all are.
    target: the class that they get; set with `source`.

  Raises:
    TypeError, ValueError: there is no such class, one of the two is missing, or
      they are the same.

  Example:
    label_flip(10, source=5, target=3)
  """
  need_classes(num_classes)
  if (source is None) != (target is None):
    raise ValueError(
      f"source={source}, target={target}: the two belong together; set both,"
      " or neither."
    )
  pair = None
  if source is not None:
    pair = (
      class_number("source", source, num_classes),
      class_number("target", target, num_classes),
    )
    if pair[0] == pair[1]:
      raise ValueError(
        f"source={source}, target={target}: no label would change; set target"
        " to another class."
      )

  def poison(batch: Batch, key: Key, hparams: HParams) -> Examples:
    del key, hparams
    y = labels_of(batch.examples)
    if pair is None:
      flipped = num_classes - 1 - y
    else:
      flipped = jnp.where(y == pair[0], pair[1], y)
    return {**batch.examples, "y": flipped}

  return Attack(poison=poison)
