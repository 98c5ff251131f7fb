"""What an epsilon allows is within it, and no more would be."""

import pytest

from fedjax_sim.core import PrivacySpec
from fedjax_sim.privacy.accounting import Ledger
from fedjax_sim.privacy.accounting.calibration import (
  calibrate,
  calibrate_cohort,
)
from fedjax_sim.sampling import Participation, poisson, uniform


def promised(sampler) -> Participation:
  assert sampler.participation is not None
  return sampler.participation


@pytest.mark.parametrize(
  ("noise", "participation", "accountant", "rounds", "epsilon"),
  [
    ("gaussian", Participation(0.02, 1, True), "pld", 100, 2.0),
    ("gaussian", Participation(0.02, 1, True), "rdp", 100, 0.5),
    ("gaussian", Participation(0.1), "pld", 50, 8.0),
    ("gaussian", Participation(1.0, 10), "gdp", 100, 1.0),
    ("laplace", Participation(0.1, 1, True), "pld", 50, 3.0),
    ("gaussian", Participation(0.5, 1, True), "pld", 5, 60.0),
  ],
)
def test_the_least_noise(noise, participation, accountant, rounds, epsilon):
  release = PrivacySpec(noise, 1.0, rounds=rounds)
  found = calibrate(release, participation, rounds, 1e-5, epsilon, accountant)
  spent = lambda factor: Ledger(
    found._replace(multiplier=factor * found.multiplier),
    participation,
    1e-5,
    accountant,
  ).epsilon(rounds)
  assert spent(1.0) <= epsilon < spent(0.99)
  assert found._replace(multiplier=1.0) == release
  assert float(f"{found.multiplier:.4g}") == found.multiplier


def test_the_largest_cohort():
  population, rounds, epsilon = 5000, 100, 1.5
  sampler = lambda cohort: promised(poisson(population, cohort))
  release = PrivacySpec("gaussian", 1.0)
  most = calibrate_cohort(release, sampler, population, rounds, 1e-5, epsilon)
  spent = lambda cohort: Ledger(release, sampler(cohort), 1e-5).epsilon(rounds)
  assert 1 < most < population
  assert spent(most) <= epsilon < spent(most + 1)


def test_everybody():
  sampler = lambda cohort: promised(uniform(50, cohort))
  release = PrivacySpec("gaussian", 100.0)
  assert calibrate_cohort(release, sampler, 50, 3, 1e-5, 1.0) == 50


def test_what_cannot_be_reached():
  participation = Participation(1.0, 1, True)
  with pytest.raises(ValueError, match="epsilon=1e-08 .* cannot be reached"):
    calibrate(PrivacySpec("gaussian", 1.0), participation, 100, 1e-9, 1e-8)
  sampler = lambda cohort: promised(poisson(100, cohort))
  with pytest.raises(ValueError, match="one client a round spends"):
    calibrate_cohort(PrivacySpec("gaussian", 0.5), sampler, 100, 100, 1e-5, 0.1)


@pytest.mark.parametrize(
  ("fields", "words"),
  [
    ({"rounds": 0}, "rounds=0"),
    ({"epsilon": 0.0}, r"epsilon=0\.0"),
    ({"delta": 2.0}, r"delta=2\.0"),
    ({"accountant": "gdp"}, "exact only"),
  ],
)
def test_wrong_budgets(fields, words):
  budget = {"rounds": 10, "delta": 1e-5, "epsilon": 1.0} | fields
  release = PrivacySpec("gaussian", 1.0)
  with pytest.raises(ValueError, match=words):
    calibrate(release, Participation(0.1, 1, True), **budget)
