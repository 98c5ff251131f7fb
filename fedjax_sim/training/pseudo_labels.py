"""Labels that two models give: of each example, by the more certain one.

The rule of FedLabels (Cho, Joshi and Dimitriadis 2023, arXiv 2307.08809).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from fedjax_sim.core import Array


class PseudoLabels(NamedTuple):
  """The predictions of two models on a batch; all shape=(batch,).

  Attributes:
    label: that of the more certain model; at a tie the received model's.
    confidence: its probability by that model.
    agree: whether both models predict the same label.
    ratio: the smaller certainty over the larger, 0 to 1.
  """

  label: Array
  confidence: Array
  agree: Array
  ratio: Array


def _inverse_entropy(probabilities: Array) -> Array:
  """Return 1 / entropy, without a division by 0."""
  logs = jnp.log(jnp.where(probabilities > 0, probabilities, 1))
  return 1 / (1e-5 - jnp.sum(probabilities * logs, axis=-1))


# How certain a model is: (batch, classes) probabilities -> (batch,).
COMPARISONS: dict[str, Callable[[Array], Array]] = {
  "entropy": _inverse_entropy,
  "variance": lambda probabilities: jnp.var(probabilities, axis=-1),
}


def pseudo_labels(
  received: Array, supervised: Array, comparison: str = "variance"
) -> PseudoLabels:
  """Return the labels of the more certain of two models.

  Args:
    received: shape=(batch, classes); the received model's probabilities.
    supervised: the same of the model trained on the labelled examples.
    comparison: a name of `COMPARISONS`.
  """
  certainty = COMPARISONS[comparison]
  theirs, own = certainty(received), certainty(supervised)
  trusted = jnp.where((own > theirs)[:, None], supervised, received)
  greater = jnp.maximum(own, theirs)
  return PseudoLabels(
    label=jnp.argmax(trusted, axis=-1),
    confidence=jnp.max(trusted, axis=-1),
    agree=jnp.argmax(received, axis=-1) == jnp.argmax(supervised, axis=-1),
    ratio=jnp.where(
      greater > 0,
      jnp.minimum(own, theirs) / jnp.where(greater > 0, greater, 1),
      1,
    ),
  )
