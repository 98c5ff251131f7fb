"""Runs on the same clients: against dp-accounting and closed forms."""

import json
import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting import pld
from scipy import integrate, optimize, stats

from fedjax_sim.cli.main import main
from fedjax_sim.config import flags
from fedjax_sim.privacy.accounting import accountants, composition
from fedjax_sim.privacy.accounting.accountants import Step
from fedjax_sim.privacy.accounting.composition import Account
from fedjax_sim.run import experiment
from test_features import DIGITS


def account(step, count=1, name="a", adjacency="zero-out", seed=0, **draws):
  drawn = {"seed": seed, "clients": 90, "sampling": "poisson"} | draws
  return Account(name, step, count, adjacency, drawn)


# --- independent runs ---------------------------------------------------------

KINDS = {
  "gaussian": dp_accounting.GaussianDpEvent,
  "laplace": dp_accounting.LaplaceDpEvent,
}


@pytest.mark.parametrize(
  "steps",
  [
    [(Step("gaussian", 1.0, 0.02), 100), (Step("gaussian", 4.0, 0.3), 20)],
    [(Step("gaussian", 5.0), 10), (Step("laplace", 8.0), 2)],
    [
      (Step("laplace", 3.0, 0.1), 30),
      (Step("gaussian", 2.0, 0.05), 50),
      (Step("gaussian", 9.0), 1),
    ],
  ],
)
def test_runs_of_several_kinds_are_as_dp_accounting_has_them(steps):
  theirs = pld.PLDAccountant(value_discretization_interval=1e-4)
  for step, count in steps:
    event = KINDS[step.noise](step.multiplier)
    if step.rate < 1:
      event = dp_accounting.PoissonSampledDpEvent(step.rate, event)
    theirs.compose(event, count)
  expected = theirs.get_epsilon(1e-5)
  accounts = [
    account(step, count, seed=i) for i, (step, count) in enumerate(steps)
  ]
  ours = composition.epsilon(accounts, 1e-5)
  assert ours == pytest.approx(expected, rel=3e-3)
  alone = [composition.epsilon([one], 1e-5) for one in accounts]
  assert max(alone) < ours < sum(alone) * 1.001
  assert composition.epsilon(accounts[::-1], 1e-5) == pytest.approx(ours)


def test_halves_of_a_run_are_the_run():
  for step in (
    Step("gaussian", 1.0, 0.02),
    Step("gaussian", 2.0, 0.1, fixed=True),
    Step("laplace", 4.0, 0.2),
    Step("gaussian", 6.0),
  ):
    whole = accountants.epsilon("pld", step, 50, 1e-5)
    halves = [account(step, 20, seed=0), account(step, 30, seed=1)]
    assert composition.epsilon(halves, 1e-5) == pytest.approx(whole, rel=1e-3)


def test_gaussian_noise_for_everybody_is_in_closed_form():
  """Precisions add up; theorem 8 of Balle and Wang 2018."""
  runs = [account(Step("gaussian", 3.0), 2), account(Step("gaussian", 5.0), 9)]
  mu = math.sqrt(2 / 9 + 9 / 25)
  epsilon = composition.epsilon(runs, 1e-5)
  low, high = mu / 2 - epsilon / mu, -mu / 2 - epsilon / mu
  delta = stats.norm.cdf(low) - math.exp(epsilon) * stats.norm.cdf(high)
  assert delta == pytest.approx(0.999e-5, rel=1e-6)  # the rest is for ends


def test_discrete_noise_has_no_loss_distribution_here():
  runs = [account(Step("gaussian", 3.0), 2)]
  runs.append(account(Step("discrete_gaussian", 3.0), 2))
  with pytest.raises(ValueError, match="discrete_gaussian.*leave it out"):
    composition.epsilon(runs, 1e-5)


def test_nothing_and_no_noise():
  assert composition.epsilon([], 1e-5) == 0
  assert composition.epsilon([account(Step("gaussian", 1.0), 0)], 1e-5) == 0
  silent = account(Step("gaussian", 0.0, 0.1), 3)
  loud = account(Step("gaussian", 1.0, 0.1), 3)
  assert composition.epsilon([loud, silent], 1e-5) == math.inf


# --- the same seed, the same cohorts ------------------------------------------


def test_runs_with_the_same_cohorts_are_one_draw_of_both():
  """Two sums in one round, of one draw, by quadrature of their density.

  Counted as drawn anew the two would cost less than they do.
  """
  rate, one, other = 0.1, 1.5, 2.0
  shift = math.hypot(1 / one, 1 / other)  # along which the two tell apart

  def divergence(epsilon):
    start = math.log1p(math.expm1(epsilon) / rate) / shift + shift / 2
    excess = lambda x: (
      rate * stats.norm.pdf(x, shift)
      + (1 - rate - math.exp(epsilon)) * stats.norm.pdf(x)
    )
    return integrate.quad(excess, start, start + 20)[0] - 1e-5

  exact = optimize.brentq(divergence, 1e-3, 10.0)
  runs = [account(Step("gaussian", m, rate)) for m in (one, other)]
  together = composition.epsilon(runs, 1e-5)
  assert together == pytest.approx(exact, rel=1e-3)
  anew = [runs[0], account(runs[1].step, seed=1)]
  assert composition.epsilon(anew, 1e-5) < 0.95 * together


def test_a_longer_run_goes_on_alone():
  long = account(Step("gaussian", 2.0, 0.1), 40)
  short = account(Step("gaussian", 1.5, 0.1), 10)
  both = (2.0**-2 + 1.5**-2) ** -0.5
  expected = [
    account(Step("gaussian", both, 0.1), 10, seed=1),
    account(Step("gaussian", 2.0, 0.1), 30, seed=2),
  ]
  assert composition.epsilon([long, short], 1e-5) == pytest.approx(
    composition.epsilon(expected, 1e-5), rel=1e-9
  )
  loud = [account(Step("laplace", m, 0.1)) for m in (3.0, 6.0)]
  assert composition.epsilon(loud, 1e-5) == pytest.approx(
    composition.epsilon([account(Step("laplace", 2.0, 0.1))], 1e-5), rel=1e-9
  )


@pytest.mark.parametrize(
  ("other", "words"),
  [
    ({"clients_per_round": 3}, r"a and b draw clients with the same seed=0"),
    ({"rate": 0.2}, r"give each run a seed of its own"),
    ({"noise": "laplace"}, r"in a way that is not accounted for"),
  ],
)
def test_cohorts_that_depend_on_each_other_otherwise(other, words):
  step = Step(other.pop("noise", "gaussian"), 2.0, other.pop("rate", 0.1))
  runs = [
    account(Step("gaussian", 2.0, 0.1)),
    account(step, name="b", **other),
  ]
  with pytest.raises(ValueError, match=words):
    composition.epsilon(runs, 1e-5)


def test_the_same_noise_cancels():
  runs = [
    account(Step("gaussian", 2.0, 0.1), name=name)._replace(noise_seed=7)
    for name in "ab"
  ]
  with pytest.raises(ValueError, match=r"a and b .* privacy.noise_seed=7: it"):
    composition.epsilon(runs, 1e-5)
  assert composition.epsilon(runs[:1], 1e-5) > 0


def test_what_holds_for_all_is_told():
  kinds = lambda *names: composition.adjacency(
    [account(Step("gaussian", 1.0), adjacency=name) for name in names]
  )
  assert kinds("replace-one", "replace-one") == "replace-one"
  assert kinds("add-or-remove") == "add-or-remove"
  assert kinds("replace-one", "zero-out") == "zero-out"
  assert kinds("add-or-remove", "replace-one") == "zero-out"


def test_a_replaced_client_bounds_one_that_is_left_out():
  """Of a fixed size: who is silent is one of those who could be there."""
  x = np.linspace(-12.0, 16.0, 200_001)
  density = lambda mean: stats.norm.pdf(x, mean, 2.0)
  rate, delta = 0.1, 1e-4
  there = (1 - rate) * density(0) + rate * density(2)
  silent = (1 - rate) * density(0) + rate * density(1)
  excess = lambda e: (
    np.maximum(there - math.exp(e) * silent, 0).sum() * (x[1] - x[0]) - delta
  )
  attained = optimize.brentq(excess, 1e-4, 10.0)
  fixed = account(Step("gaussian", 1.0, rate, fixed=True))
  assert 0 < attained <= composition.epsilon([fixed], delta)


# --- workdirs -----------------------------------------------------------------

PRIVATE = {
  "server.rounds": "2",
  "sampler.name": "poisson",
  "server.eval_every": "2",
  "privacy.mechanism": "gaussian",
  "privacy.clip_norm": "1.0",
  "privacy.delta": "0.001",
  "privacy.noise_multiplier": "1.0",
}


@pytest.mark.usefixtures("no_pictures")
def test_a_study_of_two_runs(tmp_path, capsys):
  """One that ended, and one that was stopped, which counts as whole."""
  experiment.run(flags.load(str(DIGITS), PRIVATE), tmp_path / "one")
  changes = {"privacy.noise_multiplier": "2.0", "seed": "1"}
  with pytest.raises(ZeroDivisionError):  # before the first round
    experiment.run(
      flags.load(str(DIGITS), PRIVATE | changes),
      tmp_path / "other",
      lambda round_: print(1 / round_),
    )
  assert not (tmp_path / "other" / "summary.json").exists()
  capsys.readouterr()
  folders = [str(tmp_path / name) for name in ("one", "other")]
  assert main(["privacy", "compose", *folders, "--delta=1e-3"]) == 0
  out = capsys.readouterr().out
  rate = 20 / 90
  expected = accountants.together(
    [
      (Step("gaussian", 1.0, rate), 2),
      (Step("gaussian", 2.0, rate), 2),
    ],
    1e-3,
  )
  told = float(out.split("\n")[0].split()[1])
  assert expected <= told <= expected * 1.001
  assert "for leaving out what one client sends" in out
  assert "by PLD, of all 2 runs together" in out

  for arguments, words in (
    ([folders[0], folders[0], "--delta=1e-3"], "name every workdir once"),
    (["--delta=1e-3"], "name the runs' workdirs"),
    ([*folders], "--delta=... is missing"),
    ([*folders, "--delta=0.5"], "give less than 1/90"),
    ([str(tmp_path), "--delta=1e-3"], "name the workdirs of private runs"),
  ):
    assert main(["privacy", "compose", *arguments]) != 0
    assert words in capsys.readouterr().err

  path = tmp_path / "one" / "privacy.json"
  facts = json.loads(path.read_text())
  path.write_text(json.dumps(facts | {"simulated": [10.0, 20.0]}))
  with pytest.raises(ValueError, match="of a simulated cohort"):
    composition.read(path.parent)
  path.write_text("{}")
  with pytest.raises(ValueError, match="is damaged"):
    composition.read(path.parent)
