"""What a private run refuses, and what it says that it does not cover."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedjax_sim import aggregators, attacks, sampling, simulate, transforms
from fedjax_sim.algorithms.centralized import centralized
from fedjax_sim.algorithms.dga import dga
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.algorithms.fedlaw import fedlaw
from fedjax_sim.cli import describe
from fedjax_sim.config import complete, flags
from fedjax_sim.config.build import build
from fedjax_sim.core import Transform, TransformResult
from fedjax_sim.privacy.central import CentralDPConfig, guard, with_central_dp
from fedjax_sim.privacy.central.canaries import Canaries
from fedjax_sim.privacy.central.factorization import banded
from fedjax_sim.privacy.central.guard import Budget
from fedjax_sim.privacy.local import with_local_dp
from fedjax_sim.privacy.local.additive import laplace
from fedjax_sim.privacy.secure import distributed_gaussian
from fedjax_sim.simulation.account import Account
from fedjax_sim.simulation.simulator import Simulator
from fedjax_sim.training import schedules
from fedjax_sim.training.stale import stale
from problems import hparams_of, quadratic, quadratic_data, sgd
from test_features import DIGITS

TASK = quadratic(3)
DATA = quadratic_data([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]])
PLAIN = fedavg(TASK, sgd(1.0), sgd(1.0))


def settings(**more):
  defaults = {"clip_norm": 1.0, "noise_multiplier": 1.0, "denominator": 2.0}
  return CentralDPConfig(**(defaults | more))


def simulator(algorithm=None, **more):
  defaults: dict[str, Any] = {
    "task": TASK,
    "algorithm": algorithm or with_central_dp(PLAIN, settings()),
    "data": DATA,
    "sampler": sampling.poisson(4, 2),
    "budget": Budget(delta=1e-3),
  }
  return Simulator(**(defaults | more))


def with_buffers():
  """FedAvg of a model that keeps a count."""

  def loss(variables, examples, key):
    plain = TASK.loss(variables._replace(buffers=()), examples, key)
    return plain._replace(buffers=variables.buffers)

  def init(key):
    return TASK.init(key)._replace(buffers={"mean": jnp.zeros(())})

  return fedavg(TASK._replace(init=init, loss=loss), sgd(1.0), sgd(1.0))


# --- algorithms ---------------------------------------------------------------


@pytest.mark.parametrize(
  ("make", "more", "message"),
  [
    (lambda: stale(PLAIN, 0.1), {}, r"server.stale_probability.*unset one"),
    (
      lambda: fedlaw(TASK, sgd(1.0), sgd(1.0)),
      {},
      "every client's update by itself",
    ),
    (lambda: centralized(TASK, sgd(1.0)), {}, "pools the data"),
    (
      lambda: dga(TASK, sgd(1.0), sgd(1.0)),
      {"statistics_norm": 1.0},
      r"set privacy.max_weight",
    ),
    (lambda: with_central_dp(PLAIN, settings()), {}, "private already"),
  ],
)
def test_algorithms_that_see_their_clients(make, more, message):
  with pytest.raises(ValueError, match=message):
    with_central_dp(make(), settings(**more))


@pytest.mark.parametrize(
  ("make", "more", "message"),
  [
    (with_buffers, {}, r"the model has buffers.*group norm"),
    (
      lambda: dga(TASK, sgd(1.0), sgd(1.0)),
      {"max_weight": 1.0},
      r"set privacy.statistics_norm",
    ),
    (
      lambda: PLAIN,
      {"statistics_norm": 1.0},
      r"privacy.statistics_norm=1.0.*no statistics",
    ),
  ],
)
def test_reports_that_hold_more_than_an_update(make, more, message):
  private = with_central_dp(make(), settings(**more))
  with pytest.raises(ValueError, match=message):
    simulator(private).init()


# --- settings -----------------------------------------------------------------


@pytest.mark.parametrize(
  ("more", "message"),
  [
    ({"clip_norm": 0.0}, r"clip_norm=0"),
    ({"noise_multiplier": -1.0}, r"noise_multiplier=-1"),
    ({"denominator": 0.0}, r"denominator=0"),
    ({"noise": "cauchy"}, r"noise='cauchy' is unknown"),
    ({"noise_weights": True}, r"noise_weights=True.*max_weight"),
    ({"quantile": 1.5}, r"quantile=1.5"),
    ({"quantile": 0.5, "per_layer": True}, r"per_layer=True"),
    (
      {"quantile": 0.5, "extras_fraction": 1.0},
      r"extras_fraction=1.0.*lower it",
    ),
    (
      {"quantile": 0.5, "strategy": banded(4, 2)},
      r"Correlated noise.*quantile",
    ),
    ({"noise": "laplace", "strategy": banded(4, 2)}, "Correlated noise"),
    ({"simulated": (20.0, 10.0)}, r"noise_cohort_size=20"),
    (
      {
        "simulated": (20.0, 40.0),
        "canaries": Canaries(20, sampling.Participation(0.5)),
      },
      r"canaries audit the noise that there is",
    ),
  ],
)
def test_settings_that_contradict_each_other(more, message):
  with pytest.raises(ValueError, match=message):
    settings(**more)


# --- experiments --------------------------------------------------------------


def learner():
  """A transform whose shared state follows the clients' aux."""
  return Transform(
    name="learner",
    hparams={},
    apply=lambda update, shared, state, hparams, key: TransformResult(
      update, state, jnp.float32(1)
    ),
    init=lambda params, hparams: jnp.zeros(()),
    update=lambda shared, aux, hparams: shared + aux,
  )


@pytest.mark.parametrize(
  ("more", "message"),
  [
    ({"aggregator": aggregators.median()}, r"aggregator.name; leave it"),
    ({"transforms": [learner()]}, r"transforms.learner learns.*quantile"),
    (
      {"schedules": {"privacy.noise_multiplier": schedules.step(every=2)}},
      "the accountant counts on",
    ),
    (
      {"sampler": sampling.uniform(4, 2, min_clients=1)},
      r"sampler.name promises nothing",
    ),
    ({"budget": Budget(delta=0.5)}, r"privacy.delta=0.5"),
    (
      {
        "algorithm": with_central_dp(PLAIN, settings(strategy=banded(4, 2))),
        "sampler": sampling.cyclic(4, 2),
        "best_metrics": ("test/loss",),
        "revert_to_best": True,
      },
      r"server.revert_to_best=True goes back .* correlated noise",
    ),
  ],
)
def test_experiments_of_which_no_epsilon_would_hold(more, message):
  with pytest.raises(ValueError, match=message):
    simulator(**more)


def test_what_learns_nothing_from_clients_may_stay():
  kept = simulator(
    transforms=[transforms.quantize(0.5), transforms.clip(1.0)],
    schedules={"privacy.clip_norm": schedules.step(every=2)},
  )
  assert kept.account.ledger.epsilon(1) > 0


def test_a_budget_needs_a_private_algorithm():
  with pytest.raises(ValueError, match=r"budget is of a private algorithm"):
    simulator(PLAIN)


def test_numbers_that_the_ledger_does_not_know():
  made = simulator()
  numbers = made.hparams["algorithm"]["privacy"] | {"noise_multiplier": 0.5}
  hparams = hparams_of(made, privacy=numbers)
  with pytest.raises(ValueError, match=r"'noise_multiplier'.*=0.5 is not 1.0"):
    made.init(hparams)


def test_a_run_ends_at_its_budget():
  made = simulator()
  epsilons = [made.account.ledger.epsilon(r) for r in range(8)]
  made = simulator(budget=Budget(delta=1e-3, epsilon=epsilons[3] + 1e-6))
  rows = [row for out in made.run(made.init(), 7) for row in out.rows]
  assert [row["round"] for row in rows] == [1, 2, 3]
  told = [row["privacy/epsilon"] for row in rows]
  np.testing.assert_allclose(told, epsilons[1:4], rtol=1.1e-3)
  state = made.init()
  for out in made.run(state, 3):
    state = out.state
  with pytest.raises(ValueError, match="Round 4 would exceed the privacy"):
    made.dispatch(state, made.plan(3, 1))


@given(rounds=st.integers(1, 10**6))
def test_rows_are_counted_not_before_and_little_later(rounds):
  assert rounds <= guard.counted(rounds) < rounds * (1 + 1 / 32)
  assert guard.counted(rounds) <= guard.counted(rounds + 1)
  if rounds <= 64:
    assert guard.counted(rounds) == rounds


def test_few_rounds_are_counted_and_round_ends_among_them():
  found = {guard.counted(r) for r in range(1, 10_001)}
  assert len(found) < 64 + 120 * 2.2
  assert {100, 150, 200, 250, 300, 500, 1000, 1500, 2000, 5000} <= found


def account(budget, **changes):
  release = with_central_dp(PLAIN, settings(noise_multiplier=4.0)).privacy
  assert release is not None
  return Account(
    release=release._replace(**changes),
    budget=budget,
    sampler=sampling.poisson(4, 2),
    num_clients=4,
  )


def epsilons_of(made, rounds):
  return [made.epsilon_row(r).get("privacy/epsilon") for r in rounds]


def test_a_row_does_not_depend_on_the_end_of_the_run():
  """So a run that gets more rounds has the rows of one that always had them."""
  rounds = range(1, 101)
  found, longer, endless = (
    epsilons_of(account(Budget(delta=1e-3, rounds=end)), rounds)
    for end in (101, 104, None)
  )
  assert found == longer == endless
  made = account(Budget(delta=1e-3))
  exact = [made.ledger.told(r) for r in rounds]
  assert all(a >= b for a, b in zip(found, exact, strict=True))
  assert found[64] > exact[64]  # round 65 counts as round 66
  assert made.exact_row(65) == {"privacy/epsilon": exact[64]}


@pytest.mark.parametrize(
  ("budget", "changes"),
  [
    (Budget(delta=1e-3, epsilon=4.29), {}),
    (Budget(delta=1e-3), {"rounds": 101}),
    (Budget(delta=1.0115e-11), {}),
  ],
)
def test_a_row_is_of_no_round_beyond_what_holds(budget, changes):
  """Round 101 would count as 102: too many for budget, noise or delta."""
  made = account(budget, **changes)
  exact = [made.ledger.told(r) for r in (100, 101)]
  assert epsilons_of(made, (99, 100, 101)) == [exact[0], *exact]
  assert budget.epsilon is None or exact[1] <= budget.epsilon


def test_correlated_noise_is_for_so_many_rounds():
  part = sampling.cyclic(4, 2)
  private = with_central_dp(PLAIN, settings(strategy=banded(4, 2)))
  made = simulator(private, sampler=part)
  with pytest.raises(ValueError, match=r"server.rounds=5.*made for 4 rounds"):
    next(made.run(made.init(), 5))


def test_without_noise_no_epsilon_is_told():
  made = simulator(with_central_dp(PLAIN, settings(noise_multiplier=0.0)))
  (out,) = made.run(made.init(), 1)
  assert "privacy/epsilon" not in out.rows[0]


def test_a_simulated_cohort_is_called_so():
  made = simulator(
    with_central_dp(PLAIN, settings(simulated=(200.0, 1000.0))),
    sampler=sampling.poisson(4, 2),
    budget=Budget(delta=1e-4),
  )
  (out,) = made.run(made.init(), 1)
  assert "privacy/epsilon" not in out.rows[0]
  larger = guard.ledger(
    made.algorithm.privacy._replace(simulated=None),
    sampling.poisson(1000, 200),
    made.budget,
    1000,
  )
  assert out.rows[0]["privacy/simulated_epsilon"] == larger.told(1)


# --- configs ------------------------------------------------------------------

PRIVATE = {
  "server.rounds": "5",
  "privacy.mechanism": "gaussian",
  "privacy.clip_norm": "1.0",
  "privacy.delta": "0.001",
  "privacy.noise_multiplier": "1.0",
}


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"privacy.mechanism": "None"}, r"privacy.clip_norm=1.0: nothing takes it"),
    ({"privacy.mechanism": "magic"}, r"privacy.mechanism='magic' is unknown"),
    ({"privacy.clip_norm": "None"}, r"lacks the argument 'privacy.clip_norm'"),
    ({"privacy.delta": "None"}, r"lacks the argument 'privacy.delta'"),
    (
      {"privacy.noise_multiplier": "None"},
      r"needs privacy.noise_multiplier, or privacy.target_epsilon",
    ),
    ({"privacy.delta": "0.1"}, r"privacy.delta=0.1"),
    ({"privacy.delta": "1e-30"}, r"privacy.delta=1e-30 is lost in rounding"),
    (
      {"algorithm.weighting": "examples"},
      r"algorithm.weighting='examples'.*privacy.max_weight",
    ),
    ({"privacy.bands": "3"}, r"'gaussian' does not take 'privacy.bands'"),
    ({"privacy.mechanism": "banded"}, r"lacks the argument 'privacy.bands'"),
    ({"privacy.mechanism": "blt"}, r"set sampler.name='cyclic'"),
    (
      {"privacy.mechanism": "banded", "privacy.bands": "3"},
      r"privacy.bands=3",
    ),
    ({"privacy.population": "99"}, r"set privacy.noise_cohort_size"),
    ({"privacy.noise_cohort_size": "2"}, r"is below server.clients_per_round"),
    (
      {"privacy.noise_cohort_size": "5000"},
      r"exceeds the population of \d+; set privacy.population",
    ),
    (
      {"privacy.target_epsilon": "0.00001"},
      r"privacy.target_epsilon=1e-05: the first round",
    ),
    (
      {
        "server.best_metrics": "test/loss,seen/accuracy",
        "data.heldout_fraction": "0.2",
      },
      r"server.best_metrics\[1\]='seen/accuracy' is measured on clients",
    ),
    (
      {
        "client.schedule": "plateau(metric='seen/loss')",
        "data.heldout_fraction": "0.2",
      },
      r"='seen/loss' is measured on clients",
    ),
    ({"aggregator.name": "median"}, r"privacy.mechanism adds noise.*plain"),
    ({"privacy.quantile_rate": "0.5"}, r"nothing without privacy.quantile;"),
    (
      {"privacy.extras_fraction": "0.5"},
      r"privacy.extras_fraction=0.5 does nothing without",
    ),
    ({"privacy.noise_multiplier": "1e30"}, r"noise_multiplier=1e\+30 is out"),
    (
      {
        "privacy.noise_cohort_size": "50",
        "privacy.denominator": "1.0",
      },
      r"privacy.denominator=1.0: privacy.noise_cohort_size",
    ),
    (
      {
        "privacy.noise_cohort_size": "5000",
        "privacy.population": "10000",
        "privacy.delta": "1e-5",
        "sampler.name": "cyclic_poisson",
        "sampler.groups": "3",
      },
      r"noise_cohort_size=5000 exceeds the 3333.33",
    ),
    (
      {
        "server.clients_per_round": "90",
        "privacy.noise_cohort_size": "90",
        "privacy.population": "900",
        "privacy.delta": "1e-4",
      },
      r"where everybody takes part in every round: that does not say",
    ),
    ({"sampler.min_clients": "2"}, r"sampler.name promises"),
    ({"algorithm.name": "centralized"}, r"pools the data"),
    (
      {
        "local_privacy.mechanism": "clip",
        "local_privacy.clip_norm": "1.0",
      },
      r"trusts the server .* local_privacy.mechanism='clip' does not",
    ),
    (
      {"aggregator.name": "secure_sum", "aggregator.clip": "1.0"},
      r"aggregator.name; leave it at 'weighted_mean'",
    ),
    (
      {
        "privacy.mechanism": "discrete_gaussian",
        "sampler.name": "poisson",
        "sampler.population": "200",
      },
      r"sampler.population=200 hides .*take 'gaussian'",
    ),
    (
      {"privacy.noise_multiplier": "0.1"},
      r"privacy.delta=0.001: .*give a larger .*noise_multiplier than 0.1",
    ),
  ],
)
def test_configs_of_which_no_epsilon_would_hold(changes, message):
  with pytest.raises(ValueError, match=message) as caught:
    build(flags.load(str(DIGITS), PRIVATE | changes))
  assert "\n" not in str(caught.value)


def test_the_noise_is_fitted_to_an_epsilon():
  changes = {
    "privacy.noise_multiplier": "None",
    "privacy.target_epsilon": "2.0",
  }
  made = build(flags.load(str(DIGITS), PRIVATE | changes)).simulator
  assert made.account.ledger is not None
  assert 1.98 < made.account.ledger.epsilon(5) <= 2.0
  assert made.account.rounds_within_budget(5) == 5


def test_a_budget_shortens_the_run():
  ledger = build(flags.load(str(DIGITS), PRIVATE)).simulator.account.ledger
  assert ledger is not None
  between = (ledger.epsilon(3) + ledger.epsilon(4)) / 2
  changes = {"privacy.target_epsilon": str(between)}
  made = build(flags.load(str(DIGITS), PRIVATE | changes))
  assert made.timetable.rounds == 3
  assert made.timetable.wanted == 5


def test_what_is_not_covered_is_named():
  changes = {
    "data.heldout_fraction": "0.2",
    "data.server_clients": "4",
    "replay.steps": "1",
    "transforms.quantize.sparsity": "0.5",
    "server.client_log": "True",
    "runtime.lanes": "'auto'",
  }
  made = build(flags.load(str(DIGITS), PRIVATE | changes))
  told = ", ".join(made.uncovered)
  for name in ("train/*", "clients", "seen/*", "quantize/*", "client_rounds"):
    assert name in told
  assert "lanes" in told
  assert "server's examples" in told
  assert build(flags.load(str(DIGITS), {})).uncovered == []


def test_local_privacy_and_thresholds_of_leakage():
  changes = {
    "local_privacy.mechanism": "gaussian",
    "local_privacy.clip_norm": "1.0",
    "local_privacy.epsilon": "8.0",
    "local_privacy.delta": "1e-5",
    "leakage.statistic": "max",
    "leakage.threshold": "1.0",
  }
  with pytest.raises(
    ValueError, match=r"leakage.threshold=1.0.*does not cover"
  ):
    build(flags.load(str(DIGITS), changes))


LOCAL = {
  "local_privacy.mechanism": "gaussian",
  "local_privacy.clip_norm": "1.0",
  "local_privacy.epsilon": "8.0",
  "local_privacy.delta": "1e-5",
}


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"server.best_metrics": "seen/accuracy,test/loss"},
      r"server.best_metrics\[0\]='seen/accuracy' is measured",
    ),
    (
      {"server.best_metrics": "test/loss,seen/accuracy"},
      r"server.best_metrics\[1\]='seen/accuracy' is measured",
    ),
    (
      {"server.schedule": "plateau(metric='seen/loss')"},
      r"='seen/loss' is measured on clients that train",
    ),
    ({"local_privacy.delta": "0.5"}, r"local_privacy.delta=0.5 would allow"),
  ],
)
def test_what_local_privacy_would_not_cover(changes, message):
  held_out = {"data.heldout_fraction": "0.2"}
  with pytest.raises(ValueError, match=message):
    build(flags.load(str(DIGITS), LOCAL | held_out | changes))
  told = build(flags.load(str(DIGITS), LOCAL | held_out)).uncovered
  assert "seen/*" in told


def test_clipping_alone_may_follow_anything():
  changes = {
    "local_privacy.mechanism": "clip",
    "local_privacy.clip_norm": "1.0",
    "server.best_metrics": "seen/accuracy",
    "data.heldout_fraction": "0.2",
  }
  made = build(flags.load(str(DIGITS), changes))
  assert made.local_guarantee.startswith("none")
  assert made.uncovered == []


def test_noise_other_than_what_is_told():
  private = with_central_dp(PLAIN, settings())
  numbers = {**private.hparams["privacy"], "noise_multiplier": 0.01}
  less = private._replace(hparams={**private.hparams, "privacy": numbers})
  with pytest.raises(ValueError, match=r"=0.01 is not the 1.0"):
    simulator(less)
  simulated = settings(simulated=(200.0, 1000.0), denominator=1.0)
  with pytest.raises(ValueError, match=r"privacy.denominator=1.0.*cohort, 2"):
    simulator(with_central_dp(PLAIN, simulated), budget=Budget(delta=1e-4))
  with pytest.raises(ValueError, match=r"noise_cohort_size=1 is below"):
    simulator(with_central_dp(PLAIN, settings(simulated=(1.0, 10.0))))


def test_cohorts_in_turns_are_simulated():
  changes = {
    "sampler.name": "cyclic",
    "privacy.noise_cohort_size": "500",
    "privacy.population": "2000",
    "privacy.delta": "1e-4",
  }
  made = build(flags.load(str(DIGITS), PRIVATE | changes)).simulator
  assert made.account.ledger is not None
  assert made.account.ledger.participation.period == 4


def test_another_strategy_is_another_account():
  one, other = (
    guard.ledger(
      settings(strategy=banded(8, bands)).release,
      sampling.cyclic(4, 2),
      Budget(delta=1e-3),
      4,
    ).facts(4)
    for bands in (1, 2)
  )
  assert one["sensitivity"] != other["sensitivity"]
  assert one["bands"] != other["bands"]


def test_what_is_no_such_object():
  with pytest.raises(TypeError, match=r"settings is a dict; give.*Central"):
    with_central_dp(PLAIN, {"clip_norm": 1.0})  # type: ignore[arg-type]
  with pytest.raises(TypeError, match=r"budget is a float; give.*Budget"):
    simulator(budget=1e-3)
  for field, value in (
    ("strategy", "banded"),
    ("canaries", 100),
    ("simulated", (5,)),
  ):
    with pytest.raises(TypeError, match=f"CentralDPConfig.{field}"):
      settings(**{field: value})


def test_local_noise_around_central_noise():
  with pytest.raises(ValueError, match=r"server's noise is fitted to"):
    with_local_dp(with_central_dp(PLAIN, settings()), laplace(1.0, epsilon=2.0))


def test_simulate_ends_at_the_budget():
  private = with_central_dp(PLAIN, settings())
  rounds = list(
    simulate(
      task=TASK,
      algorithm=private,
      data=DATA,
      rounds=10,
      clients_per_round=2,
      sampler=sampling.poisson(4, 2),
      budget=Budget(delta=1e-3, epsilon=6.0),
    )
  )
  assert 0 < len(rounds) < 10
  assert rounds[-1][1]["privacy/epsilon"] <= 6.0


def test_the_noise_of_secure_aggregation_is_told():
  changes = {
    "aggregator.name": "secure_mean",
    "aggregator.clip": "1.0",
    "aggregator.noise_multiplier": "1.0",
  }
  told = build(flags.load(str(DIGITS), changes)).secure_noise
  assert told.startswith("rho 0.5")
  assert "no epsilon" in told
  with pytest.raises(ValueError, match=r"aggregator.bits=8.*give more bits"):
    build(flags.load(str(DIGITS), changes | {"aggregator.bits": "8"}))


def test_local_guarantees_are_told():
  changes = {
    "local_privacy.mechanism": "laplace",
    "local_privacy.clip_norm": "1.0",
    "local_privacy.epsilon": "2.0",
    "server.rounds": "30",
    "sampler.name": "cyclic",
  }
  made = build(flags.load(str(DIGITS), changes))
  # 90 clients in turns of 18 or 20: a client takes part once in 5 rounds.
  assert made.local_guarantee == (
    "epsilon 2 at delta 1e-11 for a report, epsilon 12 at delta 6e-11 for the 6"
    " of a client"
  )
  assert build(flags.load(str(DIGITS), {})).local_guarantee == ""


def test_a_description_tells_the_guarantee():
  made = build(flags.load(str(DIGITS), PRIVATE))
  text = describe.describe(made)
  assert made.simulator.account.ledger is not None
  assert made.simulator.account.ledger.describe(5) in text
  assert "noise multiplier 1\n" in text
  assert "not covered by epsilon" in text


# --- how many clients there are -----------------------------------------------

IN_ADVANCE = {
  "sampler.name": "poisson",
  "sampler.population": "100",
}


def test_what_may_not_depend_on_how_many_clients_there_are():
  """The digits have 90: rate, noise, mean and context are those of 100."""
  made = build(flags.load(str(DIGITS), PRIVATE | IN_ADVANCE)).simulator
  assert made.account.ledger is not None
  assert made.account.ledger.adjacency == "add-or-remove"
  assert made.account.ledger.participation.rate == 0.2
  assert made.sampler.expected == 18
  assert made.hparams["algorithm"]["privacy"]["denominator"] == 20
  assert made.account.public_clients == 100
  public = build(
    flags.load(str(DIGITS), PRIVATE | {"sampler.name": "poisson"})
  ).simulator
  assert public.account.ledger is not None
  assert public.account.ledger.adjacency == "zero-out"
  assert public.account.public_clients == 90


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"sampler.name": "uniform"},
      r"does not take 'sampler.population'",
    ),
    ({"privacy.denominator": "18.0"}, r"denominator=18 is the mean .* as 20"),
    ({"sampler.population": "10"}, r"server.clients_per_round=20"),
    (
      {"privacy.noise_cohort_size": "50", "privacy.delta": "1e-4"},
      r"sampler.population=100 is of the cohort that is trained",
    ),
  ],
)
def test_what_would_tell_how_many_clients_there_are(changes, message):
  with pytest.raises(ValueError, match=message):
    build(flags.load(str(DIGITS), PRIVATE | IN_ADVANCE | changes))


LOCAL = {
  "local_privacy.mechanism": "gaussian",
  "local_privacy.clip_norm": "1.0",
  "local_privacy.stddev": "3.0",
  "local_privacy.delta": "1e-5",
}
SECURE = {
  "aggregator.name": "secure_mean",
  "aggregator.clip": "1.0",
  "aggregator.noise_multiplier": "1.0",
}


@pytest.mark.parametrize(
  ("private", "changes", "message"),
  [
    (
      LOCAL,
      {"transforms.adaptive_clip.quantile": "0.5"},
      "adaptive_clip learns",
    ),
    (
      SECURE,
      {"transforms.adaptive_clip.quantile": "0.5"},
      "adaptive_clip lear",
    ),
    (SECURE, {"algorithm.name": "scaffold"}, "clients send statistics, too"),
    (SECURE, {"algorithm.name": "fednova"}, "clients send statistics, too"),
    (
      SECURE,
      {"algorithm.name": "hierarchical"},
      "a sum for each group of clients, with the noise of its own clients",
    ),
    (SECURE, {"algorithm.name": "centralized"}, "pools the data of all"),
    (
      SECURE,
      {"algorithm.weighting": "examples"},
      r"algorithm.weighting='examples': .*every client weighs 1; set it",
    ),
    (
      SECURE,
      {"algorithm.name": "dga", "algorithm.reference": "0.0"},
      r"algorithm.weighting='softmax': .*every client weighs 1; set it",
    ),
    (
      LOCAL,
      {"sampler.name": "stratified"},
      r"sampler.name='stratified' draws .*\('sizes'\).*'gaussian' covers",
    ),
    (
      LOCAL,
      {"sampler.name": "by_size"},
      r"sampler.name='by_size' draws clients by what they hold",
    ),
    (
      SECURE,
      {"sampler.name": "by_size"},
      r"to tell without noise, and aggregator.noise_multiplier=1.0 covers",
    ),
    (
      LOCAL | {"local_privacy.max_weight": "20.0"},
      {"algorithm.name": "fedshuffle"},
      r"algorithm.name='fedshuffle' is told the mean number .*='gaussian'",
    ),
    (
      PRIVATE | {"privacy.max_weight": "20.0"},
      {"algorithm.name": "fedshuffle"},
      r"mean number of examples of all clients.*privacy.mechanism='gaussian'",
    ),
    (
      PRIVATE | IN_ADVANCE,
      {"attack.name": "sign_flip"},
      r"sampler.population=100 hides .* attack.fraction=0.2 is of them",
    ),
  ],
)
def test_what_would_go_around_the_noise(private, changes, message):
  """Numbers of clients that no noise covers, in the model or in a cohort."""
  with pytest.raises(ValueError, match=message):
    build(flags.load(str(DIGITS), private | changes))


def test_clients_may_be_told_apart_by_nothing_that_they_hold():
  """Such samplers stay where clients do not add noise, or clip alone."""
  clip = {"local_privacy.mechanism": "clip", "local_privacy.clip_norm": "1.0"}
  build(flags.load(str(DIGITS), clip | {"sampler.name": "by_size"}))
  equal = {"algorithm.name": "fedshuffle", "privacy.mechanism": "gaussian"}
  made = build(flags.load(str(DIGITS), PRIVATE | equal))
  assert made.config.algorithm.weighting == "uniform"


def test_an_own_sampler_that_is_told_labels_promises_nothing(tmp_path):
  path = tmp_path / "mine.py"
  path.write_text(
    "from fedjax_sim import sampling\n\n\n"
    "def by_labels(num_clients, clients_per_round, label_counts):\n"
    "  return sampling.uniform(num_clients, clients_per_round)\n"
  )
  changes = {"sampler.name": f"{path}:by_labels"}
  with pytest.raises(ValueError, match=r"is told which labels clients have"):
    build(flags.load(str(DIGITS), PRIVATE | changes))


def test_an_own_algorithm_is_told_no_number_that_is_hidden(tmp_path):
  path = tmp_path / "mine.py"
  path.write_text(
    "from fedjax_sim.algorithms.fedavg import fedavg\n\n\n"
    "def mine(task, client_optimizer, server_optimizer, num_clients):\n"
    "  return fedavg(\n"
    "    task, client_optimizer, server_optimizer, weighting='uniform'\n"
    "  )\n"
  )
  changes = PRIVATE | IN_ADVANCE | {"algorithm.name": f"{path}:mine"}
  with pytest.raises(ValueError, match=r"population=100 hides.*'num_clients'"):
    build(flags.load(str(DIGITS), changes))


def test_with_attackers_the_number_of_clients_is_public():
  """Of 4 clients 1 attacks, of 5 perhaps another one."""
  hidden = sampling.poisson(4, 2, population=10)
  attacked = attacks.with_attackers(hidden, 4, fraction=0.25)
  made = simulator(sampler=attacked)
  assert made.account.ledger is not None
  assert made.account.ledger.adjacency == "zero-out"


def test_a_private_server_sees_no_evaluation_of_training_clients():
  seen: dict[str, float] = {}

  def on_eval(server, metrics):
    seen.update(metrics)
    return server

  private = with_central_dp(PLAIN._replace(on_eval=on_eval), settings())
  made = simulator(private)
  names = ("test/loss", "seen/loss", "finetuned/loss/mean", "unseen/loss")
  made.react(made.init(), dict.fromkeys(names, 1.0))
  assert set(seen) == {"test/loss", "unseen/loss"}


def test_noise_is_counted_on_all_numbers_that_are_sent():
  """64 pixels' histograms of 32 cells, whatever the model's size."""
  histograms = {
    "model.name": "quantiles",
    "model.hidden_sizes": "None",
    "algorithm.name": "quantiles",
    "algorithm.bins": "32",
  }
  made = build(flags.load(str(DIGITS), histograms | SECURE))
  assert made.simulator.states.num_parameters == 64 * 3
  grid = distributed_gaussian.grid(20, 1.0)
  rho = distributed_gaussian.zcdp(grid, 64 * 32, least=20)
  assert made.secure_noise.startswith(f"rho {rho:.3g} ")
  assert made.simulator.states.num_sent == 64 * 32
  central = build(flags.load(str(DIGITS), histograms | PRIVATE)).simulator
  assert central.states.num_sent == 64 * 32


def test_weights_are_kept_where_a_mechanism_sends_them(tmp_path):
  """Whatever its bound on weights is called."""
  path = tmp_path / "mine.py"
  path.write_text(
    "from fedjax_sim.privacy.local import additive\n\n\n"
    "def mine(clip_norm, stddev=1.0, delta=1e-5, heaviest=9.0):\n"
    "  return additive.gaussian(\n"
    "    clip_norm, delta=delta, stddev=stddev, max_weight=heaviest\n"
    "  )\n"
  )
  fields = {
    "local_privacy.mechanism": f"{path}:mine",
    "local_privacy.clip_norm": "1.0",
  }
  weighting = lambda more: (
    complete(flags.load(str(DIGITS), fields | more)).algorithm.weighting
  )
  assert weighting({}) == "examples"
  assert weighting({"local_privacy.heaviest": "5"}) == "examples"
  assert (
    complete(flags.load(str(DIGITS), LOCAL)).algorithm.weighting == "uniform"
  )
