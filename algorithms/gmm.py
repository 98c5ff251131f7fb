"""Federated Gaussian mixtures: one iteration of online EM per round.

A client computes the responsibilities r_k of all components for its examples
(E step), and reports the means over its examples of

    r_k,    r_k (x - mu_k),    r_k (x - mu_k) (x - mu_k)^T.

Up to the shift by mu_k these are the sufficient statistics s of the mixture.
The server goes a part of the way to the clients' mean, and takes the parameters
that fit best (M step):

    s <- s + rate (mean of s_i - s),    theta <- M(s)

(Cappe and Moulines 2009, "On-line expectation-maximization algorithm for latent
data models", arXiv 0712.4273; with clients, Dieuleveut et al. 2021, "Federated
expectation maximization with heterogeneity mitigation and variance reduction",
arXiv 2111.02083, here without compression and variance reduction). With all
clients and a rate of 1 a round is an iteration of EM on the pooled data
(Dempster et al. 1977). With few clients a round, the rate should fall, as by
`server.schedule`.

The shift makes no difference to the result. It keeps digits in float32, and
statistics short, so that less noise suffices with `privacy.central`: all that a
client reports is then clipped as one vector.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sim import core
from fedjax_sim.core import (
  Aggregate,
  Algorithm,
  Array,
  Batch,
  Client,
  Context,
  Report,
  Task,
  Variables,
  compensated,
  validate,
)
from fedjax_sim.training.local import WEIGHTINGS, metric
from fedjax_sim.training.statistics import Sums, check_model, sum_pass

_LEAST_TOTAL = 1e-3  # of all responsibilities, which add up to 1 without noise


class Moments(NamedTuple):
  """What examples say of every component.

  Attributes:
    counts: shape=(components,); the sum of responsibilities.
    gaps: shape=(components, features); the weighted sum of example minus mean.
    scatter: shape=(components, features); the weighted sum of its squares. With
      full covariances that of products, the lower triangle,
      shape=(components, features (features + 1) / 2).
  """

  counts: Array
  gaps: Array
  scatter: Array


def gmm(
  task: Task,
  *,
  learning_rate: float = 1.0,
  min_variance: float = 1e-6,
  weighting: str = "examples",
  count_weight: float = 1.0,
  scatter_weight: float = 1.0,
  least_share: float = 0.0,
) -> Algorithm:
  """Return expectation-maximization of a Gaussian mixture.

  After a round means are clipped to the task's range, and variances lie between
  `min_variance` and what data of that range can have; of full covariances that
  holds for the eigenvalues. Without noise neither changes anything.

  Args:
    task: a mixture, as `models.gmm` makes.
    learning_rate: how much of the way statistics go, from 0 to 1; 1 is EM. A
      run's `server.learning_rate`, which a schedule multiplies.
    min_variance: added to variances, as scikit-learn's `reg_covar`, > 0.
    weighting: as in `fedavg`; with `examples` and all clients, the means are
      those of the pooled data.
    count_weight: scale of the responsibilities in a report relative to the
      gaps, > 0; without clipping and noise it has no effect.
    scatter_weight: the same of the products.
    least_share: components whose weight is no more keep mean and covariance,
      and weigh so much; in [0, 1).

  Raises:
    TypeError, ValueError: names the field.
  """
  logits = check_model(
    task,
    {"weights", "means", "covariances"},
    {"low", "high"},
    function="logits",
    model="gmm",
    message="algorithm.name='gmm' fits a mixture, and the model is none that it"
    " may fit",
  )
  hparams = {
    "server": {
      "learning_rate": validate.number(
        "learning_rate", learning_rate, ge=0, le=1
      )
    },
    "min_variance": validate.number("min_variance", min_variance, gt=0),
    "count_weight": validate.number("count_weight", count_weight, gt=0),
    "scatter_weight": validate.number("scatter_weight", scatter_weight, gt=0),
    "least_share": validate.number("least_share", least_share, ge=0, lt=1),
  }
  weigh = validate.lookup("weighting", weighting, WEIGHTINGS)
  shapes = jax.eval_shape(task.init, jax.random.key(0)).params
  components, features = shapes["means"].shape
  diagonal = len(shapes["covariances"].shape) == 2
  lower = np.tril_indices(features)

  def zero(client: Client) -> Moments:
    means = client.message.params["means"]
    scatter = jnp.zeros((components, len(lower[0])), means.dtype)
    return Moments(means[:, 0], means, means if diagonal else scatter)

  def term(client: Client, batch: Batch) -> Moments:
    logs = core.in_float32(logits(client.message, batch.examples))
    own = jnp.where(batch.mask[:, None], jax.nn.softmax(logs), 0)
    x = batch.examples["x"].reshape(len(own), -1)
    gaps = core.in_float32(x[:, None] - client.message.params["means"][None])
    weighted = own[..., None] * gaps
    if diagonal:
      scatter = jnp.sum(weighted * gaps, axis=0)
    else:
      products = jnp.einsum("nkd,nke->kde", weighted, gaps, precision="highest")
      scatter = products[:, lower[0], lower[1]]
    return Moments(jnp.sum(own, axis=0), jnp.sum(weighted, axis=0), scatter)

  def finish(client: Client, carry: Sums) -> Report:
    counts, gaps, scatter = compensated.rounded(carry.terms)
    examples = jnp.maximum(jnp.sum(counts), 1)
    return Report(
      update=Moments(
        client.hparams["count_weight"].astype(counts.dtype) * counts / examples,
        gaps / examples,
        client.hparams["scatter_weight"].astype(counts.dtype)
        * (scatter / examples),
      ),
      weight=weigh(client, metric(carry.loss)),
      metrics={"loss": metric(carry.loss)},
    )

  def apply(
    server: Variables, aggregate: Aggregate, context: Context
  ) -> Variables:
    numbers = context.hparams
    counts, gaps, scatter = aggregate.update
    counts = counts / numbers["count_weight"].astype(counts.dtype)
    scatter = scatter / numbers["scatter_weight"].astype(counts.dtype)
    if not diagonal:
      whole = jnp.zeros((components, features, features), scatter.dtype)
      whole = whole.at[:, lower[0], lower[1]].set(scatter)
      scatter = whole.at[:, lower[1], lower[0]].set(scatter)
    # Clipping shortens all of a report alike; dividing by the sum undoes it.
    total = jnp.sum(counts)
    some = total > _LEAST_TOTAL
    rate = numbers["server"]["learning_rate"].astype(counts.dtype)
    rate = jnp.where(some, rate, 0)
    step = rate / jnp.where(some, total, 1)

    before = core.in_float32(server.params)
    floor = numbers["min_variance"].astype(counts.dtype)
    ridge = floor if diagonal else floor * jnp.eye(features)[None]
    stretch = lambda v: v.reshape(-1, *[1] * (scatter.ndim - 1))
    old = stretch(before["weights"]) * (before["covariances"] - ridge)
    weights = (1 - rate) * before["weights"] + step * counts
    full = weights > numbers["least_share"].astype(counts.dtype)
    divisor = jnp.where(full, weights, 1)
    moved = step * gaps / divisor[:, None]
    spread = ((1 - rate) * old + step * scatter) / stretch(divisor)
    if diagonal:
      spread = spread - moved**2
    else:
      spread = spread - moved[:, :, None] * moved[:, None, :]

    low, high = server.frozen["low"], server.frozen["high"]
    widest = floor + (high - low) ** 2 / 4 * (1 if diagonal else features)
    limit = _limit_variances if diagonal else _limit_eigenvalues
    covariances = limit(spread + ridge, floor, widest.astype(counts.dtype))
    means = jnp.clip(before["means"] + moved, low, high)
    kept = jnp.maximum(weights, numbers["least_share"].astype(counts.dtype))
    kept = jnp.where(some, kept / jnp.sum(kept), before["weights"])
    after = {
      "weights": kept,
      "means": jnp.where(full[:, None], means, before["means"]),
      "covariances": jnp.where(
        stretch(full), covariances, before["covariances"]
      ),
    }
    params = jax.tree.map(
      lambda new, x: new.astype(x.dtype), after, server.params
    )
    return server._replace(params=params)

  return Algorithm(
    init=lambda key, hparams: task.init(key),
    broadcast=lambda server: server,
    passes=(sum_pass(task, zero, term),),
    finish=finish,
    apply=apply,
    variables=lambda server: server,
    with_model=lambda server, variables: variables,
    hparams=hparams,
  )


def _limit_variances(variances: Array, least: Array, most: Array) -> Array:
  """Return variances, shape=(components, features), within limits."""
  return jnp.clip(variances, least, most)


def _limit_eigenvalues(covariances: Array, least: Array, most: Array) -> Array:
  """Return covariances whose eigenvalues are within limits.

  Those that are already are returned as they are, without rounding.

  Args:
    covariances: shape=(components, features, features), symmetric.
    least: shape=(); smallest eigenvalue.
    most: shape=(); largest.
  """
  values, vectors = jnp.linalg.eigh(covariances)
  inside = jnp.clip(values, least, most)
  changed = jnp.einsum(
    "kde,ke,kfe->kdf", vectors, inside, vectors, precision="highest"
  )
  # Rounding in `eigh` is no reason to change anything.
  slack = 1e-5 * jnp.max(jnp.abs(values), axis=-1, keepdims=True)
  fits = jnp.all((values >= 0) & (values >= least - slack), axis=-1)
  fits &= jnp.all(values <= most + slack, axis=-1)
  return jnp.where(fits[:, None, None], covariances, changed)
