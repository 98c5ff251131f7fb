"""A Gaussian mixture: how likely every component made an example.

The algorithm `gmm` fits it by expectation-maximization. Its parameters have
constraints that gradient steps do not keep, so other algorithms do not fit it.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from fedjax_sim.core import (
  Array,
  Examples,
  Key,
  Loss,
  Metric,
  Task,
  Variables,
  validate,
)
from fedjax_sim.models.kmeans import INITS

COVARIANCES = ("diagonal", "full")
FARTHEST = 1e15  # so that squares of gaps are far from overflowing


def gmm(
  example_shape: tuple[int, ...],
  num_classes: int,
  components: int | None = None,
  covariance: str = "diagonal",
  low: float = 0.0,
  high: float = 1.0,
  init: str = "uniform",
) -> Task:
  """Return a mixture that begins in a range known beforehand, not at data.

  `Variables.params` are float32: `weights`, shape=(components,), which add up
  to 1, `means`, shape=(components, features), and `covariances`,
  shape=(components, features), variances, if diagonal, or else
  shape=(components, features, features). `Variables.frozen` is the range, `low`
  and `high`. At first all components weigh the same and have the variance of
  uniform draws from the range. The loss is minus the log-likelihood; the logits
  are the log of weight times density, so that their softmax are the
  responsibilities of the components.

  Args:
    example_shape: shape of one input.
    num_classes: components, unless given.
    components: how many; None: as many as classes.
    covariance: `diagonal` or `full`, of each component.
    low: the least that a feature may be.
    high: the greatest.
    init: where means begin, as in `models.kmeans`: `uniform` or `spread`.

  Raises:
    TypeError, ValueError: names the field.

  Example:
    >>> task = gmm((2,), 0, components=3, covariance="full")
    >>> task.init(jax.random.key(0)).params["covariances"].shape
    (3, 2, 2)
  """
  features = math.prod(example_shape)
  field = "num_classes" if components is None else "components"
  wanted = num_classes if components is None else components
  count = validate.integer(field, wanted)
  diagonal = validate.one_of("covariance", covariance, COVARIANCES) != "full"
  low = validate.number("low", low, ge=-FARTHEST, le=FARTHEST)
  high = validate.number("high", high, gt=low, le=FARTHEST)
  draw = validate.lookup("init", init, INITS)
  variance = (high - low) ** 2 / 12

  def first(key: Key) -> Variables:
    alike = jnp.full((count, features), variance, jnp.float32)
    params = {
      "weights": jnp.full((count,), 1 / count, jnp.float32),
      "means": low + (high - low) * draw(key, count, features),
      "covariances": alike if diagonal else jax.vmap(jnp.diag)(alike),
    }
    bounds = {"low": jnp.float32(low), "high": jnp.float32(high)}
    return Variables(params, frozen=bounds)

  def logits(variables: Variables, examples: Examples) -> Array:
    x = examples["x"]
    x = x.reshape(x.shape[0], -1)
    weights, means, covariances = (
      variables.params[k] for k in ("weights", "means", "covariances")
    )
    gaps = x[:, None] - means[None]
    density = _diagonal if diagonal else _full
    least = jnp.finfo(weights.dtype).tiny
    logs = jnp.log(jnp.maximum(weights, least))
    return logs[None] + density(gaps, covariances)

  def loss(variables: Variables, examples: Examples, key: Key) -> Loss:
    del key
    value = -jax.nn.logsumexp(logits(variables, examples), axis=-1)
    return Loss(value, jnp.ones_like(value))

  def metrics(variables: Variables, examples: Examples) -> dict[str, Metric]:
    value = -jax.nn.logsumexp(logits(variables, examples), axis=-1)
    return {"loss": Metric(value, jnp.ones_like(value))}

  return Task(first, loss, metrics, logits=logits, exact=True)


def _diagonal(gaps: Array, variances: Array) -> Array:
  """Return log densities, shape=(batch, components).

  Args:
    gaps: shape=(batch, components, features); examples minus means.
    variances: shape=(components, features).
  """
  squares = jnp.sum(gaps**2 / variances[None], axis=-1)
  logs = jnp.sum(jnp.log(2 * math.pi * variances), axis=-1)
  return -0.5 * (squares + logs[None])


def _full(gaps: Array, covariances: Array) -> Array:
  """Return log densities, shape=(batch, components).

  Args:
    gaps: shape=(batch, components, features); examples minus means.
    covariances: shape=(components, features, features).
  """
  dtype = jnp.promote_types(gaps.dtype, jnp.float32)  # what LAPACK takes
  factors = jnp.linalg.cholesky(covariances.astype(dtype))
  columns = jnp.moveaxis(gaps.astype(dtype), 0, -1)
  white = jax.lax.linalg.triangular_solve(
    factors, columns, left_side=True, lower=True
  )
  squares = jnp.sum(white**2, axis=1).T
  diagonals = jnp.diagonal(factors, axis1=-2, axis2=-1)
  logs = 2 * jnp.sum(jnp.log(diagonals), axis=-1)
  constant = gaps.shape[-1] * math.log(2 * math.pi)
  return (-0.5 * (squares + logs[None] + constant)).astype(gaps.dtype)
