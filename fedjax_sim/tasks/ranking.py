"""Metrics of rankings: an example is a list of candidates, some relevant.

Area under the ROC curve, mean reciprocal rank and normalized discounted
cumulative gain, as the MIND competition has them (Wu et al. 2020, "MIND: a
large-scale dataset for news recommendation"). Candidates with equal scores
share their places: a metric is its mean over all orders of them, so that no
order of the data counts.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from fedjax_sim.core import Array, Metric, in_float32

HIGHER_IS_BETTER = dict.fromkeys(
  ("accuracy", "auc", "mrr", "ndcg5", "ndcg10"), True
)


def ranking_metrics(
  scores: Array, relevant: Array, present: Array
) -> dict[str, Metric]:
  """Return `auc`, `mrr`, `ndcg5`, `ndcg10` and `accuracy` of each list.

  `mrr` is the mean of 1 / place over the relevant candidates, and `accuracy`
  says whether the first is relevant. Lists whose candidates are all relevant,
  or none of them, have the weight 0. Where a score is NaN, so are the metrics.

  Args:
    scores: shape=(batch, candidates), float.
    relevant: shape=(batch, candidates), bool.
    present: shape=(batch, candidates), bool; False for padding.

  Example:
    >>> some = jnp.ones((1, 3), bool)
    >>> found = ranking_metrics(
    ...   jnp.array([[0.1, 0.9, 0.4]]), jnp.array([[True, False, False]]), some
    ... )
    >>> float(found["auc"].total[0]), float(found["mrr"].total[0])
    (0.0, 0.3333333432674408)
  """
  scores = in_float32(scores)
  relevant = relevant & present
  others = present & ~relevant
  number = lambda x: in_float32(x.sum(-1))
  clicks, misses = number(relevant), number(others)
  valid = in_float32((clicks > 0) & (misses > 0))
  # Of every candidate: how many precede it, and how many share its place.
  theirs, own = scores[:, jnp.newaxis, :], scores[:, :, jnp.newaxis]
  beside = present[:, jnp.newaxis, :]
  above = jnp.sum((theirs > own) & beside, axis=-1)
  alike = jnp.maximum(jnp.sum((theirs == own) & beside, axis=-1), 1)

  def over_relevant(gains: np.ndarray) -> Array:
    """Return the sum over relevant candidates of the gain of their place."""
    sums = jnp.asarray(np.append(0, np.cumsum(gains)), scores.dtype)
    gain = (sums[above + alike] - sums[above]) / in_float32(alike)
    return jnp.sum(jnp.where(relevant, gain, 0), axis=-1)

  places = np.arange(1, scores.shape[-1] + 1)
  discounts = 1 / np.log2(places + 1)
  behind = beside & others[:, jnp.newaxis, :]
  pairs = jnp.sum(
    jnp.where(behind, (theirs < own) + 0.5 * (theirs == own), 0), axis=-1
  )
  found = {
    "accuracy": over_relevant(places == 1),
    "auc": jnp.sum(jnp.where(relevant, pairs, 0), axis=-1)
    / jnp.maximum(clicks * misses, 1),
    "mrr": over_relevant(1 / places) / jnp.maximum(clicks, 1),
  }
  for most in (5, 10):
    gains = np.where(places <= most, discounts, 0)
    best = jnp.asarray(np.append(0, np.cumsum(gains)), scores.dtype)
    ideal = best[jnp.sum(relevant, axis=-1)]
    total = over_relevant(gains)
    found[f"ndcg{most}"] = total / jnp.where(ideal > 0, ideal, 1)
  # Comparisons with NaN are false, which would put it in the first place.
  unknown = jnp.any(jnp.isnan(scores) & present, axis=-1)
  told = lambda x: jnp.where(valid > 0, jnp.where(unknown, jnp.nan, x), 0)
  return {k: Metric(told(x), valid) for k, x in found.items()}
