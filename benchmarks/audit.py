"""How often audits accuse: of honest runs, and of too little noise.

    python -m benchmarks.audit

Nothing is trained: scores of canaries are drawn from their law, Gaussian noise
around their contributions in the rounds for which they were drawn, and audited.
For each setting: the noise, the epsilon and delta that are claimed, rounds and
participation, canaries, the noise multiplier that keeps within the epsilon, how
often an honest run was accused, how often one with noise too small by
`--quieter`, and the least epsilon that was betrayed by the latter. The noise of
a dense canary's score is a sum of many; here all are as a spike's.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from absl import app, flags

from fedjax_sim.core import PrivacySpec
from fedjax_sim.privacy.accounting import Ledger
from fedjax_sim.privacy.accounting.calibration import calibrate
from fedjax_sim.privacy.central.audit import audit
from fedjax_sim.privacy.central.canaries import Evidence, Moments
from fedjax_sim.sampling import Participation

SEEDS = flags.DEFINE_integer("seeds", 1000, "how many audits of each")
QUIETER = flags.DEFINE_float("quieter", 4.0, "the noise is so much too small")


class Setting(NamedTuple):
  """A run that is audited."""

  epsilon: float
  delta: float
  rounds: int
  participation: Participation
  canaries: int
  noise: str = "gaussian"

  def ledger(self) -> Ledger:
    """Return a ledger with the least noise that keeps within the epsilon."""
    release = calibrate(
      PrivacySpec(self.noise, 1.0),
      self.participation,
      self.rounds,
      self.delta,
      self.epsilon,
    )
    return Ledger(release, self.participation, self.delta)


SETTINGS = tuple(
  Setting(epsilon, delta, rounds, participation, canaries, *noise)
  for epsilon in (1.0, 8.0)
  for delta, rounds, participation, canaries, *noise in (
    (1e-5, 1, Participation(1.0, 1, True), 500),
    (1e-5, 1, Participation(0.2, 1, True), 500),
    (1e-5, 20, Participation(0.1, 1, True), 500),
    (1e-3, 60, Participation(0.37, 1, True), 1000),
    (1e-5, 20, Participation(0.1, 1, False), 500),
    (1e-3, 40, Participation(1.0, 4, False), 1000),
    (1e-5, 20, Participation(0.1, 1, True), 500, "laplace"),
  )
)


def drawn(setting: Setting, multiplier: float, seed: int) -> Evidence:
  """Draw the evidence of canaries whose contributions all have norm 1.

  Args:
    setting: of the run.
    multiplier: of the noise that is there.
    seed: of coins, participations and noise.
  """
  rng = np.random.default_rng(seed)
  size, (rate, period) = setting.canaries, setting.participation[:2]
  included = rng.random(size) < 0.5
  round_ = np.arange(setting.rounds)[:, None]
  turn = np.arange(size + 1) % period == round_ % period
  present = turn & (rng.random(turn.shape) < rate) & np.append(included, True)
  draw = rng.normal if setting.noise == "gaussian" else rng.laplace
  scores = present + multiplier * draw(size=present.shape)

  def moments(where: np.ndarray) -> Moments:
    counted = np.where(where, scores, 0)
    sums = (where.sum(0), counted.sum(0), (counted**2).sum(0))
    return Moments(*(jnp.asarray(x, jnp.float32) for x in sums))

  return Evidence(
    included=jnp.asarray(included),
    present=moments(present),
    absent=moments(~present),
    longest=jnp.ones(()),
    unit=jnp.ones(()),
  )


def accused(
  setting: Setting, quieter: float, seeds: int
) -> tuple[float, float]:
  """Return how often runs are accused, and the least epsilon they reveal.

  Args:
    setting: of the run.
    quieter: its noise is so much smaller than it claims.
    seeds: how many runs.
  """
  ledger = setting.ledger()
  multiplier = ledger.release.multiplier / quieter
  found = [
    audit(drawn(setting, multiplier, seed), ledger, setting.rounds, resamples=0)
    for seed in range(seeds)
  ]
  often = float(np.mean([x.accused for x in found]))
  return often, min(x.epsilon for x in found)


def main(argv: list[str]) -> None:
  """Print a row of Markdown for every setting."""
  del argv
  for setting in SETTINGS:
    rate, period, independent, _ = setting.participation
    honest, _ = accused(setting, 1.0, SEEDS.value)
    broken, least = accused(setting, QUIETER.value, SEEDS.value)
    kind = "independent" if independent else "fixed cohorts"
    cells = (
      setting.noise,
      f"{setting.epsilon:g}, {setting.delta:g}",
      f"{setting.rounds}, {rate:g} once in {period}, {kind}",
      str(setting.canaries),
      f"{setting.ledger().release.multiplier:.3g}",
      f"{honest:.1%}",
      f"{broken:.1%}",
      f"{least:.3g}",
    )
    print("|", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
  app.run(main)
