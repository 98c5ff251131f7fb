"""The secure aggregators that a config names."""

from __future__ import annotations

from collections.abc import Callable

from fedjax_sim.core import Aggregator, validate
from fedjax_sim.privacy.secure.distributed_gaussian import distributed_gaussian
from fedjax_sim.privacy.secure.fixed_point import fixed_point
from fedjax_sim.privacy.secure.masking import secure


def secure_sum(
  clients: int,
  *,
  clip: float,
  bits: int = 32,
  rounding: str | None = None,
  neighbors: int = 8,
  dropout: float = 0.0,
  noise_multiplier: float | None = None,
) -> Aggregator:
  """Return the plain sum of updates by simulated secure aggregation.

  Args:
    clients: the most clients of a round.
    clip: the largest coordinate of an update; with noise its largest L2 norm.
    bits: of a number that a client sends, from 2 to 32.
    rounding: `nearest` (the default) or `stochastic`; with noise always the
      latter.
    neighbors: how many clients each one shares masks with; an even number.
    dropout: the probability that a client sends nothing after all masks are
      agreed on.
    noise_multiplier: of distributed discrete Gaussian noise, the standard
      deviation of the sum's noise in units of `clip`; None: no noise.

  Raises:
    TypeError, ValueError: an argument is out of range, or does not go with
      another.
  """
  if noise_multiplier is None:
    code = fixed_point(
      clients, clip=clip, bits=bits, rounding=rounding or "nearest"
    )
  else:
    _without_noise("rounding", rounding)
    code = distributed_gaussian(
      clients, clip=clip, noise_multiplier=noise_multiplier, bits=bits
    )
  return secure(code, neighbors=neighbors, dropout=dropout)


def secure_mean(
  clients: int,
  *,
  clip: float,
  max_weight: float | None = None,
  bits: int = 32,
  rounding: str | None = None,
  neighbors: int = 8,
  dropout: float = 0.0,
  noise_multiplier: float | None = None,
) -> Aggregator:
  """Return the weighted mean of updates by simulated secure aggregation.

  With noise, the sum of updates, whatever their weights, over `clients`.

  Args:
    clients: the most clients of a round.
    clip: the largest coordinate of an update; with noise its largest L2 norm.
    max_weight: without noise, the largest weight; a greater one counts as
      this.
    bits: of a number that a client sends, from 2 to 32.
    rounding: `nearest` (the default) or `stochastic`; with noise always the
      latter.
    neighbors: how many clients each one shares masks with; an even number.
    dropout: the probability that a client sends nothing after all masks are
      agreed on.
    noise_multiplier: of distributed discrete Gaussian noise, the standard
      deviation of the sum's noise in units of `clip`; None: no noise. With
      noise the sum is divided by `clients`, and weights count nothing.

  Raises:
    TypeError, ValueError: an argument is out of range, or does not go with
      another.
  """
  if noise_multiplier is None:
    if max_weight is None:
      raise ValueError(
        "max_weight is missing; give the largest weight of a client."
      )
    code = fixed_point(
      clients,
      clip=clip,
      max_weight=max_weight,
      bits=bits,
      rounding=rounding or "nearest",
    )
  else:
    _without_noise("rounding", rounding)
    _without_noise("max_weight", max_weight)
    code = distributed_gaussian(
      clients,
      clip=clip,
      noise_multiplier=noise_multiplier,
      bits=bits,
      mean=True,
    )
  return secure(code, neighbors=neighbors, dropout=dropout)


def _without_noise(field: str, value: object) -> None:
  if value is not None:
    raise ValueError(
      f"{field}={value!r} does not go with noise_multiplier; unset one of them."
    )


def fixed_cohort(expected: float, most: int, promised: bool) -> None:
  """Refuse cohorts of varying size, whose clients each add a share of noise.

  Args:
    expected: the mean cohort size.
    most: the largest.
    promised: whether the sampler promises anything (`Sampler.participation`).

  Raises:
    ValueError: the sizes differ, or may do so.
  """
  if not promised:
    raise ValueError(
      "aggregator.noise_multiplier: every client of a cohort adds its share of"
      " the noise, and sampler.name does not promise how many there are; take"
      " 'uniform'."
    )
  if validate.number("expected", expected) != most:
    raise ValueError(
      "aggregator.noise_multiplier: every client of a cohort adds its share of"
      f" the noise, and here a cohort has {expected:g} clients on average, but"
      f" up to {most}; let sampler.name draw always as many."
    )


SECURE: dict[str, Callable[..., Aggregator]] = {
  "secure_sum": secure_sum,
  "secure_mean": secure_mean,
}
