"""PrivUnit: a client's direction, sent as a random one that leans to it.

Bhowmick et al. 2018 (arXiv 1812.00984, algorithm 1, PrivUnit2): what is sent is
uniform on the cap of the sphere around the direction with some probability,
and on the rest of the sphere else. The same law in other words: with
probability `forget` uniform on all of the sphere, else on the cap. The density
is then `forget` outside of the cap and forget + (1 - forget) / area on it, with
the whole sphere as the unit of area; their ratio is e^epsilon.

A point's place is its latitude x, from 0 at the directions that are orthogonal
to the client's to pi / 2 at the client's own: the inner product is sin x, and
of uniform points x has the density cos(x)^(d - 2), smooth in any dimension.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from fedjax_sim.core import Array, HParams, Key, PyTree, validate
from fedjax_sim.core.tree import MARGIN, clip_to_unit_norm
from fedjax_sim.core.tree import tree_norm as length_of
from fedjax_sim.privacy import draws, library
from fedjax_sim.privacy.local import scalar_dp
from fedjax_sim.privacy.local.additive import checked_epsilon, checked_norm
from fedjax_sim.privacy.local.mechanism import Randomizer

_STEP = 1 / 16  # of the table's exponents
_EXPONENTS = np.arange(0, 17 + _STEP, _STEP)  # -log of a float32 draw is < 17


class Cap(NamedTuple):
  """The law of what is sent for a direction in d dimensions; float64.

  Attributes:
    edge: the cap's least latitude.
    area: log of the cap's share of the sphere.
    forget: probability of a point of all of the sphere.
    mean: length of the expectation, which points to the direction.
    latitudes: shape=(knots,); how far above `edge` a latitude is beyond which
      lies a share of e^-exponent of the cap, for exponents at equal steps.
    slopes: shape=(knots,); their derivatives by the exponent.
  """

  edge: float
  area: float
  forget: float
  mean: float
  latitudes: np.ndarray
  slopes: np.ndarray


def privunit(
  clip_norm: float, *, epsilon: float, norm_share: float | None = None
) -> Randomizer:
  """Randomize an update's direction by PrivUnit, its length by ScalarDP.

  The update, clipped in L2, is the expectation of what is sent. Every client
  weighs 1.

  Args:
    clip_norm: longest L2 norm of an update.
    epsilon: of a report.
    norm_share: the share of epsilon that the length gets; None: 0.2.

  Raises:
    TypeError, ValueError: a number is out of range.
  """
  epsilon = checked_epsilon(epsilon)
  share = validate.number(
    "norm_share",
    0.2 if norm_share is None else norm_share,
    gt=0,
    lt=1,
  )
  law = scalar_dp.levels(share * epsilon)

  def apply(
    update: PyTree, weight: Array, hparams: HParams, key: Key
  ) -> tuple[PyTree, Array]:
    bound = hparams["clip_norm"]
    share_of_bound = length_of(clip_to_unit_norm(update, bound))
    flat, unflatten = ravel_pytree(clip_to_unit_norm(update, 0.0))
    # Any direction will do for no update, but there has to be one.
    even = jnp.full_like(flat, 1 / math.sqrt(flat.size))
    direction = jnp.where(jnp.any(flat != 0), flat / (1 - MARGIN), even)
    direction_key, norm_key = jax.random.split(key)
    sent = point(
      direction, cap(flat.size, (1 - share) * epsilon), direction_key
    )
    told = bound * scalar_dp.randomize(share_of_bound, law, norm_key)
    return unflatten(told * sent), jnp.ones_like(weight)

  return Randomizer(
    name="privunit",
    hparams={"clip_norm": checked_norm(clip_norm)},
    apply=apply,
    epsilon=epsilon,
  )


def point(direction: Array, law: Cap, key: Key) -> Array:
  """Return a random vector whose expectation is the direction.

  Args:
    direction: shape=(d,), float, of length 1.
    law: from `cap`.
    key: of the draws.

  Returns:
    shape=(d,); all have the same length, 1 / `law.mean`.
  """
  normal_key, exponent_key, forget_key = jax.random.split(key, 3)
  normal = draws.normal(normal_key, direction.shape, direction.dtype)
  inner = jnp.vdot(normal, direction)
  across = normal - inner * direction
  across -= jnp.vdot(across, direction) * direction  # what rounding left of it
  distance = length_of(across)
  inside = law.edge + _latitude(
    law, jax.random.exponential(exponent_key, (), direction.dtype)
  )
  forgotten = jax.random.bernoulli(forget_key, law.forget)
  x = jnp.where(forgotten, jnp.arctan2(inner, distance), inside)
  unit = jnp.sin(x) * direction + jnp.cos(x) / distance * across
  return unit / law.mean


def _latitude(law: Cap, exponent: Array) -> Array:
  """Return a latitude above the edge; cubic between the table's knots."""
  values = jnp.asarray(law.latitudes, exponent.dtype)
  slopes = jnp.asarray(law.slopes * _STEP, exponent.dtype)
  place = exponent / _STEP
  i = jnp.clip(place.astype(jnp.int32), 0, len(law.latitudes) - 2)
  s = place - i
  left, right = values[i], values[i + 1]
  up, down = slopes[i], slopes[i + 1]
  rise = right - left
  return left + s * (
    up + s * (3 * rise - 2 * up - down + s * (up + down - 2 * rise))
  )


@functools.lru_cache(maxsize=32)
def cap(dimension: int, epsilon: float) -> Cap:
  """Return the cap whose points are of the most use, of all that keep epsilon.

  The paper splits epsilon between the cap's size and the coin; here the cap is
  the one whose vectors of the right expectation are shortest.

  Args:
    dimension: d, at least 2.
    epsilon: of the direction.

  Raises:
    ValueError: a sphere of less than two dimensions.
  """
  if dimension < 2:
    raise ValueError(
      "local_privacy.mechanism='privunit' needs an update of two numbers at"
      f" least, and the model has {dimension}; take 'gaussian'."
    )
  special = library("scipy.special")
  n = dimension - 2
  whole = float(special.betaln(0.5, (dimension - 1) / 2))
  odds = epsilon + math.log(-math.expm1(-epsilon))  # log of e^epsilon - 1

  def log_area(x: float) -> float:
    return n * math.log(math.cos(x)) + math.log(_mills(x, n)) - whole

  def log_mean(x: float) -> float:
    kept = float(special.log_expit(odds + log_area(x)))
    height = math.cos(x) / ((dimension - 1) * _mills(x, n))
    return kept + math.log(height)

  # No further than to a cap of a share of e^-(epsilon + 30).
  most = math.atan(math.sqrt(math.expm1(min(2 * (epsilon + 30) / (n + 1), 35))))
  best = library("scipy.optimize").minimize_scalar(
    lambda x: -log_mean(x),
    bounds=(0, most),
    method="bounded",
    options={"xatol": 1e-9 * most},
  )
  edge = float(best.x)
  path = library("scipy.integrate").solve_ivp(
    lambda exponent, x: _mills(edge + x, n),
    (0, _EXPONENTS[-1]),
    np.zeros(1),
    method="DOP853",
    t_eval=_EXPONENTS,
    rtol=1e-12,
    atol=1e-14 * most,
  )
  latitudes = path.y[0]
  return Cap(
    edge=edge,
    area=log_area(edge),
    forget=float(special.expit(-odds - log_area(edge))),
    mean=math.exp(log_mean(edge)),
    latitudes=latitudes,
    slopes=_mills(edge + latitudes, n),
  )


_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(96)


def _mills(x: Any, n: int) -> Any:
  """Return the integral of cos^n from x to pi / 2, divided by cos(x)^n.

  It is how fast a latitude rises with the exponent, as far as where the
  integrand falls below e^-45.
  """
  x = np.asarray(x, np.float64)[..., None]
  tangent = np.tan(x)
  reach = math.pi / 2 - x
  if n:
    reach = np.minimum(reach, 90 / n / (tangent + np.sqrt(tangent**2 + 90 / n)))
  y = reach * (_NODES + 1) / 2
  fall = -2 * np.sin(y / 2) ** 2 - tangent * np.sin(y)
  values = np.exp(n * np.log1p(np.maximum(fall, -1 + 1e-16)))
  total = np.sum(values * _WEIGHTS, axis=-1) * reach[..., 0] / 2
  return total if total.ndim else float(total)
