"""The mechanisms of central privacy by name, and the options of each."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from fedjax_sim.privacy.accounting import usual_accountant


def options(
  *,
  clip_norm: float,
  delta: float,
  noise_multiplier: float | None = None,
  target_epsilon: float | None = None,
  accountant: str = "pld",
  per_layer: bool = False,
  denominator: float | None = None,
  max_weight: float | None = None,
  noise_weights: bool = False,
  statistics_norm: float | None = None,
  quantile: float | None = None,
  quantile_rate: float = 0.2,
  extras_fraction: float = 0.01,
  bands: int,
  buffers: int = 2,
  noise_cohort_size: int | None = None,
  population: int | None = None,
  canaries: int | None = None,
) -> dict[str, Any]:
  """Return the options, by name.

  Args:
    clip_norm: the largest norm of a client's weighted update; L2, or L1 with
      Laplace noise.
    delta: the probability with which the epsilon need not hold, in (0, 1);
      well below 1 over the number of clients.
    noise_multiplier: the noise's standard deviation, or with Laplace noise its
      scale, over the length of a contribution; None: fitted to
      `target_epsilon`.
    target_epsilon: the run ends before a round that would exceed it; None: no
      bound.
    accountant: what computes epsilon: "pld", "rdp" or "gdp".
    per_layer: clip every parameter array by itself, to equal shares.
    denominator: what the sum is divided by; None: the expected number of
      clients in a round.
    max_weight: larger weights count as this, and this as 1; None: all clients
      count 1, whatever weight they report.
    noise_weights: divide by the noisy sum of the weights instead.
    statistics_norm: clip `Report.statistics` to this norm and release them,
      too; None: they are not released.
    quantile: let the clipping norm follow this quantile of the norms, in
      (0, 1] (Andrew et al. 2021, arXiv 1905.03871); None: it stays.
    quantile_rate: the learning rate of the clipping norm.
    extras_fraction: the fraction of the privacy that each of weights,
      statistics and quantile takes.
    bands: over how many rounds noise is correlated; at most the sampler's
      period.
    buffers: how many exponentials correlate the noise, from 1 to 10; more than
      3 gain next to nothing.
    noise_cohort_size: simulate the noise, relative to the sum, of a cohort of
      this size; None: the noise is that of the run's own cohorts.
    population: the number of clients that simulated cohorts are drawn from;
      None: the run's.
    canaries: how many made-up clients are planted for an audit; None: none.
  """
  return dict(locals())


def _mechanism(
  summary: str, noise: str, without: tuple[str, ...]
) -> Callable[..., dict[str, Any]]:
  """Return `options` with a summary of its own and without some of them."""

  @functools.wraps(options)
  def mechanism(**given: Any) -> dict[str, Any]:
    return given

  own = {"accountant": usual_accountant(noise)}
  signature = inspect.signature(options)
  mechanism.__signature__ = signature.replace(  # type: ignore[attr-defined]
    parameters=[
      p.replace(default=own.get(p.name, p.default))
      for p in signature.parameters.values()
      if p.name not in without
    ]
  )
  assert options.__doc__ is not None
  details = options.__doc__.partition("\n")[2]
  mechanism.__doc__ = f"{summary}\n{details}"
  return mechanism


_BANDS, _BUFFERS = ("bands",), ("buffers",)
_EXTRAS = (
  "noise_weights",
  "statistics_norm",
  "quantile",
  "quantile_rate",
  "extras_fraction",
)
_SIMULATED = ("noise_cohort_size", "population")

MECHANISMS: dict[str, Callable[..., dict[str, Any]]] = {
  "gaussian": _mechanism(
    "Independent Gaussian noise.", "gaussian", _BANDS + _BUFFERS
  ),
  "laplace": _mechanism(
    "Independent Laplace noise; the clipping norm is L1.",
    "laplace",
    _BANDS + _BUFFERS,
  ),
  "discrete_gaussian": _mechanism(
    "Gaussian noise on whole numbers, exact to the last bit.",
    "discrete_gaussian",
    _BANDS + _BUFFERS + _EXTRAS + _SIMULATED,
  ),
  "banded": _mechanism(
    "Gaussian noise, correlated over `bands` rounds.",
    "gaussian",
    _BUFFERS + _EXTRAS,
  ),
  "blt": _mechanism(
    "Gaussian noise, correlated over all rounds by a buffered Toeplitz matrix.",
    "gaussian",
    _BANDS + _EXTRAS,
  ),
}
