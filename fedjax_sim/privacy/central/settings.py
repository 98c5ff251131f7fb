"""The settings of central privacy, checked, and what they amount to."""

from __future__ import annotations

import dataclasses
import functools

from fedjax_sim.core import PrivacySpec, validate
from fedjax_sim.privacy.accounting import MOST_MULTIPLIER, NOISES
from fedjax_sim.privacy.central import integers
from fedjax_sim.privacy.central.canaries import Canaries
from fedjax_sim.privacy.central.factorization import Strategy


@dataclasses.dataclass(frozen=True, kw_only=True)
class CentralDPConfig:
  """What central privacy does to clients' contributions and to their sum.

  Attributes:
    clip_norm: no weighted update is longer: L2, or L1 under Laplace noise.
    noise_multiplier: the standard deviation of the noise over the length of a
      contribution, both of the whole that is released; with Laplace the scale;
      with a `strategy` that of the independent noise it is made of. 0: none.
    denominator: what the sum is divided by: the expected number of clients.
    noise: `gaussian`, `laplace`, or `discrete_gaussian`: contributions and
      noise are whole numbers, which a sum does not round.
    strategy: correlates the noise of the rounds; None: it is independent.
    per_layer: clip every parameter array by itself, to equal shares.
    max_weight: larger weights count as this, and this as 1; None: all clients
      count 1, whatever weight they report.
    noise_weights: divide by the noisy sum of the weights instead, but never by
      less than 1.
    statistics_norm: clip `Report.statistics` to it and release them, too.
    quantile: let the clipping norm follow this quantile of the norms.
    quantile_rate: how fast.
    extras_fraction: the fraction of the privacy that each of weight,
      statistics and quantile takes.
    simulated: (cohort, population) whose noise is simulated: the noise is as
      large, relative to the sum, as `noise_multiplier` would be for that
      cohort. The epsilon is that of a run with such a cohort.
    canaries: clients that are made up, for an audit; None: there are none.
    most_clients: the most clients of a round, for whose sum discrete Gaussian
      noise needs room; None with other noise.

  Raises:
    TypeError, ValueError: names the field.
  """

  clip_norm: float
  noise_multiplier: float
  denominator: float
  noise: str = "gaussian"
  strategy: Strategy | None = None
  per_layer: bool = False
  max_weight: float | None = None
  noise_weights: bool = False
  statistics_norm: float | None = None
  quantile: float | None = None
  quantile_rate: float = 0.2
  extras_fraction: float = 0.01
  simulated: tuple[float, float] | None = None
  canaries: Canaries | None = None
  most_clients: int | None = None

  def __post_init__(self) -> None:
    validate.number("clip_norm", self.clip_norm, gt=0)
    validate.number(
      "noise_multiplier",
      self.noise_multiplier,
      ge=0,
      le=MOST_MULTIPLIER,
    )
    validate.number("denominator", self.denominator, gt=0)
    validate.one_of("noise", self.noise, NOISES)
    validate.boolean("per_layer", self.per_layer)
    validate.boolean("noise_weights", self.noise_weights)
    for field in ("max_weight", "statistics_norm"):
      if getattr(self, field) is not None:
        validate.number(field, getattr(self, field), gt=0)
    if self.quantile is not None:
      validate.number("quantile", self.quantile, gt=0)
      validate.number("quantile", self.quantile, le=1)
    validate.number("quantile_rate", self.quantile_rate, ge=0)
    validate.number("extras_fraction", self.extras_fraction, gt=0)
    if self.num_extras * self.extras_fraction >= 1:
      raise ValueError(
        f"extras_fraction={self.extras_fraction}: {self.num_extras} numbers"
        " besides the update take all of the privacy; lower it."
      )
    if self.noise_weights and self.max_weight is None:
      raise ValueError(
        "noise_weights=True, but without max_weight every"
        " client weighs 1; set both, or neither."
      )
    if self.quantile is not None and self.per_layer:
      raise ValueError(
        f"quantile={self.quantile} follows the norm of the whole"
        " update; it does not go with per_layer=True."
      )
    for field, kind, example in (
      ("strategy", Strategy, "factorization.banded(rounds, bands)"),
      ("canaries", Canaries, "Canaries(1000, sampler.participation)"),
    ):
      if getattr(self, field) is not None:
        validate.instance(
          f"CentralDPConfig.{field}", getattr(self, field), kind, example
        )
    if self.strategy is not None and (self.noise != "gaussian" or self.extras):
      raise ValueError(
        "Correlated noise is Gaussian, and for the update alone:"
        " noise_weights, statistics_norm and quantile"
        " do not go with it."
      )
    self._check_discrete()
    if self.simulated is not None and self.canaries is not None:
      raise ValueError(
        "canaries audit the noise that there is, and"
        " noise_cohort_size tells the epsilon of another; unset one of"
        " them."
      )
    if self.simulated is not None:
      if not isinstance(self.simulated, tuple) or len(self.simulated) != 2:
        raise TypeError(
          f"CentralDPConfig.simulated={self.simulated!r}; give a tuple of two"
          " numbers, cohort and population."
        )
      cohort, population = self.simulated
      validate.number("noise_cohort_size", cohort, gt=0, le=population)

  def _check_discrete(self) -> None:
    """Refuse what discrete noise cannot do."""
    if self.noise != "discrete_gaussian":
      if self.most_clients is not None:
        raise ValueError(
          f"CentralDPConfig.most_clients={self.most_clients} is of"
          f" noise='discrete_gaussian', and it is {self.noise!r}; leave it out."
        )
      return
    for field, given in (
      ("noise_weights", self.noise_weights),
      ("statistics_norm", self.statistics_norm is not None),
      ("quantile", self.quantile is not None),
      ("noise_cohort_size", self.simulated is not None),
    ):
      if given:
        raise ValueError(
          f"noise='discrete_gaussian' adds noise to whole numbers,"
          f" the clipped updates' alone, and as much as it is made for; unset"
          f" {field}, or take 'gaussian'."
        )
    if self.most_clients is None:
      raise ValueError(
        "CentralDPConfig.most_clients=None with noise='discrete_gaussian',"
        " whose sums need room for all; give the most clients of a round."
      )
    validate.integer("CentralDPConfig.most_clients", self.most_clients)
    _ = self.grid

  @property
  def order(self) -> int:
    """The order of the norm that is clipped: 1 with Laplace noise, else 2."""
    return 1 if self.noise == "laplace" else 2

  @functools.cached_property
  def grid(self) -> integers.Grid | None:
    """The grid of whole-number contributions; None: they are floats."""
    if self.most_clients is None:
      return None
    planted = self.canaries.size + 1 if self.canaries else 0  # the worst case
    return integers.grid(self.most_clients + planted, self.noise_multiplier)

  @property
  def extras(self) -> tuple[str, ...]:
    """What is released besides the update."""
    wanted = {
      "statistics": self.statistics_norm is not None,
      "weight": self.noise_weights,
      "below": self.quantile is not None,
    }
    return tuple(name for name, there in wanted.items() if there)

  @property
  def num_extras(self) -> int:
    """The number of extras."""
    return len(self.extras)

  def multipliers(self) -> tuple[float, float]:
    """Return the multipliers of the update and each extra, of 1 for the whole.

    Gaussian: parts with multipliers m_k are together as private as one part
    with (sum of m_k^-2)^(-1/2) (arXiv 1905.03871, Theorem 1); Laplace: with
    (sum of 1/m_k)^-1.
    """
    power = 1.0 if self.noise == "laplace" else 0.5
    rest = 1 - self.num_extras * self.extras_fraction
    return rest**-power, self.extras_fraction**-power

  @property
  def release(self) -> PrivacySpec:
    """What accountants have to know of a round's release."""
    strategy = self.strategy
    return PrivacySpec(
      noise=self.noise,
      multiplier=self.noise_multiplier,
      sensitivity=strategy and strategy.sensitivity,
      bands=1 if strategy is None else strategy.bands,
      rounds=strategy and strategy.rounds,
      simulated=self.simulated,
      most_clients=self.most_clients,
    )

  def __fingerprint__(self) -> tuple[object, ...]:
    """Return what a round is compiled for; all else are hyper-parameters."""
    released = self.extras, self.max_weight is None, self.extras_fraction
    return (
      (self.noise, self.per_layer, *released),
      (self.strategy, self.grid, self.canaries),
    )

  @property
  def hparams(self) -> dict[str, float]:
    """The numeric hyper-parameters, which are traced."""
    scale = 1.0
    if self.simulated is not None:
      scale = self.denominator / self.simulated[0]
    numbers = {
      "clip_norm": self.clip_norm,
      "noise_multiplier": self.noise_multiplier,
      "noise_scale": scale,
      "denominator": self.denominator,
    }
    if self.max_weight is not None:
      numbers["max_weight"] = self.max_weight
    if self.statistics_norm is not None:
      numbers["statistics_norm"] = self.statistics_norm
    if self.quantile is not None:
      numbers["quantile"] = self.quantile
      numbers["quantile_rate"] = self.quantile_rate
    return numbers
