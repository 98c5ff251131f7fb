"""Local privacy by clipping and noise: Gaussian, Laplace, and no noise.

A client's report is one vector: its update in units of `clip_norm` and, beside
it, its weight in units of `max_weight / weight_scale`. Noise on every entry is
as large as the longest distance of two such vectors asks for.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from fedjax_sim.core import Array, HParams, Key, PyTree, validate
from fedjax_sim.core.tree import bounded, tree_norm
from fedjax_sim.privacy import draws, library
from fedjax_sim.privacy.local.mechanism import Randomizer

# Beyond, float32 knows no difference from no privacy, or from noise alone.
LEAST_EPSILON, MOST_EPSILON = 1e-3, 1e4
# With more, the ends of Laplace noise betray more often than that.
MOST_LAPLACE, LAPLACE_DELTA = 18.0, 1e-11


def checked_norm(clip_norm: float) -> float:
  """Return `clip_norm`, if it is positive."""
  return validate.number("clip_norm", clip_norm, gt=0)


def checked_epsilon(epsilon: float) -> float:
  """Return `epsilon`, if mechanisms can be computed with it."""
  return validate.number("epsilon", epsilon, ge=LEAST_EPSILON, le=MOST_EPSILON)


def gaussian(
  clip_norm: float,
  *,
  delta: float,
  epsilon: float | None = None,
  stddev: float | None = None,
  max_weight: float | None = None,
  min_weight: float | None = None,
  weight_scale: float | None = None,
) -> Randomizer:
  """Add Gaussian noise to the update, clipped in L2, and to the weight.

  Two updates are at most 2 apart, in units of `clip_norm`, and two weights
  `weight_scale`: two reports sqrt(4 + weight_scale^2). The noise is the least
  that gives epsilon and delta (Balle and Wang 2018, arXiv 1805.06530).

  Args:
    clip_norm: longest L2 norm of an update.
    delta: of a report, above 0.
    epsilon: of a report; or give `stddev`.
    stddev: standard deviation of the noise, in units of `clip_norm`.
    max_weight: greatest weight; None: every client weighs 1.
    min_weight: least weight that is sent, above 0; None: a tenth of
      `max_weight`. What the noise takes out of the range is put back to its
      ends, which costs no privacy.
    weight_scale: a larger one makes the weight's noise smaller against its
      range, and the update's larger; None: 1.

  Raises:
    TypeError, ValueError: a number is out of range; both or neither of epsilon
      and stddev; a weight's field without `max_weight`.
    ImportError: the extra `privacy` is missing.
  """
  delta = validate.number("delta", delta, gt=0, lt=1)
  weights = _weights(max_weight, min_weight, weight_scale)
  longest = math.hypot(2, weights.get("weight_scale", 0))
  if (epsilon is None) == (stddev is None):
    raise ValueError(
      f"epsilon={epsilon} and stddev={stddev}: give"
      " one of them, the other follows."
    )
  if epsilon is not None:
    calibrated = library("dp_accounting").get_sigma_gaussian
    stddev = longest * calibrated(checked_epsilon(epsilon), draws.KEPT * delta)
  stddev = validate.number("stddev", stddev, ge=1e-6, le=1e6)
  return Randomizer(
    name="gaussian",
    hparams={"clip_norm": checked_norm(clip_norm), "stddev": stddev, **weights},
    apply=_with_noise("stddev", 2, draws.normal),
    multiplier=stddev / longest,
    delta=delta,
    exposure=functools.partial(draws.gaussian_exposure, longest / stddev),
    weighs=max_weight is not None,
  )


def laplace(
  clip_norm: float,
  *,
  epsilon: float,
  max_weight: float | None = None,
  min_weight: float | None = None,
  weight_scale: float | None = None,
) -> Randomizer:
  """Add Laplace noise to the update, clipped in L1, and to the weight.

  Two reports are at most 2 + `weight_scale` apart in L1; noise of that over
  epsilon gives epsilon with delta 0 (Dwork et al. 2006). Drawn noise is
  bounded: that of `draws` costs a delta of `LAPLACE_DELTA` a report.

  Args:
    clip_norm: longest L1 norm of an update.
    epsilon: of a report, at most `MOST_LAPLACE`.
    max_weight: greatest weight; None: every client weighs 1.
    min_weight: least weight that is sent, above 0; None: a tenth of
      `max_weight`.
    weight_scale: a larger one makes the weight's noise smaller against its
      range, and the update's larger; None: 1.

  Raises:
    TypeError, ValueError: a number is out of range, or a weight's field is
      given without `max_weight`.
  """
  epsilon = validate.number(
    "epsilon", epsilon, ge=LEAST_EPSILON, le=MOST_LAPLACE
  )
  weights = _weights(max_weight, min_weight, weight_scale)
  scale = (2 + weights.get("weight_scale", 0)) / epsilon
  return Randomizer(
    name="laplace",
    hparams={"clip_norm": checked_norm(clip_norm), "scale": scale, **weights},
    apply=_with_noise("scale", 1, draws.laplace),
    epsilon=epsilon,
    delta=LAPLACE_DELTA,
    exposure=functools.partial(draws.laplace_exposure, epsilon),
    weighs=max_weight is not None,
  )


def _weights(
  most: float | None, least: float | None, scale: float | None
) -> dict[str, float]:
  """Return the hyper-parameters of a weight that is sent; none if it is not."""
  if most is None:
    for field, value in (("min_weight", least), ("weight_scale", scale)):
      if value is not None:
        raise ValueError(
          f"{field}={value}: every client weighs 1; set"
          f" max_weight, or set {field} to None."
        )
    return {}
  most = validate.number("max_weight", most, gt=0)
  least = most / 10 if least is None else least
  scale = 1.0 if scale is None else scale
  return {
    "max_weight": most,
    "min_weight": validate.number("min_weight", least, gt=0, le=most),
    "weight_scale": validate.number("weight_scale", scale, gt=0, le=1e3),
  }


def _with_noise(
  size: str,
  order: int,
  draw: Callable[..., Array],
) -> Callable[[PyTree, Array, HParams, Key], tuple[PyTree, Array]]:
  """Return a `Randomizer.apply` that clips an update, and adds noise.

  Args:
    size: the hyper-parameter that says how large the noise is.
    order: 1 or 2; of the norm that is clipped.
    draw: (key, shape, dtype) -> noise of size 1.
  """

  def apply(
    update: PyTree, weight: Array, hparams: HParams, key: Key
  ) -> tuple[PyTree, Array]:
    bound, noise = hparams["clip_norm"], hparams[size]
    update = bounded(update, bound, order)
    # As `tree.fits`: a last look, and else a report that is left out.
    fits = tree_norm(update, order) <= bound
    update = jax.tree.map(lambda x: jnp.where(fits, x, jnp.nan), update)
    leaves, treedef = jax.tree.flatten(update)
    noisy = [
      leaf
      + (noise * bound).astype(leaf.dtype)
      * draw(jax.random.fold_in(key, 1 + i), leaf.shape, leaf.dtype)
      for i, leaf in enumerate(leaves)
    ]
    update = jax.tree.unflatten(treedef, noisy)
    if "max_weight" not in hparams:
      return update, jnp.ones_like(weight)
    most = hparams["max_weight"]
    stretch = noise * most / hparams["weight_scale"]
    weight = jnp.clip(weight, 0, most)
    weight += stretch * draw(
      jax.random.fold_in(key, 0), weight.shape, weight.dtype
    )
    return update, jnp.clip(weight, hparams["min_weight"], most)

  return apply


def clip_only(clip_norm: float, *, per_layer: bool = False) -> Randomizer:
  """Clip the update in L2, without noise and without any guarantee.

  Args:
    clip_norm: longest L2 norm of an update.
    per_layer: clip every array by itself, of n arrays each to `clip_norm`
      over sqrt(n), so that all of them keep within `clip_norm`.

  Raises:
    TypeError, ValueError: no positive norm, or `per_layer` is no bool.
  """
  per_layer = validate.boolean("per_layer", per_layer)

  def apply(
    update: PyTree, weight: Array, hparams: HParams, key: Key
  ) -> tuple[PyTree, Array]:
    del key
    bound = hparams["clip_norm"]
    if not per_layer:
      return bounded(update, bound), weight
    share = bound / math.sqrt(len(jax.tree.leaves(update)))
    return jax.tree.map(lambda leaf: bounded(leaf, share), update), weight

  hparams = {"clip_norm": checked_norm(clip_norm)}
  return Randomizer(name="clip", hparams=hparams, apply=apply, weighs=True)
