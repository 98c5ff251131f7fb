"""Sums of whole numbers with discrete Gaussian noise, and what they cost."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from fedjax_sim import sampling
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.config import flags
from fedjax_sim.config.build import build
from fedjax_sim.core import PrivacySpec
from fedjax_sim.privacy import central
from fedjax_sim.privacy import library as privacy_library
from fedjax_sim.privacy.accounting import Ledger, accountants, calibration
from fedjax_sim.privacy.accounting.accountants import Step
from fedjax_sim.privacy.central import CentralDPConfig, contribution, integers
from fedjax_sim.privacy.central.canaries import Canaries
from fedjax_sim.privacy.central.factorization import banded
from fedjax_sim.privacy.central.guard import Budget
from fedjax_sim.privacy.secure import discrete_gaussian
from fedjax_sim.simulation.simulator import Simulator
from fedjax_sim.training import schedules
from problems import (
  flat,
  hparams_of,
  make_simulator,
  params_of,
  quadratic,
  quadratic_data,
  sgd,
  train,
)
from test_features import DIGITS

CLIENTS, DIM = 7, 5
TASK = quadratic(DIM)
PLAIN = fedavg(TASK, sgd(1.0), sgd(0.5), weighting="uniform")
CENTRES = np.random.default_rng(0).normal(size=(CLIENTS, DIM))
DATA = quadratic_data(CENTRES)


def settings(**more):
  usual: dict[str, Any] = {
    "clip_norm": 8.0,
    "noise_multiplier": 1.0,
    "denominator": 7.0,
  }
  discrete = {"noise": "discrete_gaussian", "most_clients": CLIENTS}
  return CentralDPConfig(**(usual | discrete | more))


def simulator(algorithm=None, **more):
  usual: dict[str, Any] = {
    "task": TASK,
    "algorithm": algorithm or central.with_central_dp(PLAIN, settings()),
    "data": DATA,
    "sampler": sampling.poisson(CLIENTS, 3),
    "budget": Budget(delta=1e-3),
  }
  return Simulator(**(usual | more))


# --- the grid -----------------------------------------------------------------


@pytest.mark.parametrize("clients", [1, 20, 5000])
@pytest.mark.parametrize("multiplier", [0.0, 0.3, 1.0, 40.0])
def test_a_grid_is_the_finest_that_fits(clients, multiplier):
  made = integers.grid(clients, multiplier)

  def largest(scale):
    noise = multiplier * scale
    if noise > discrete_gaussian.MOST_STDDEV:
      return math.inf
    return clients * scale + (noise and discrete_gaussian.reach(noise))

  assert made.scale == 2 ** round(math.log2(made.scale))
  assert largest(made.scale) < 2**31
  assert made.scale == 2**26 or largest(2 * made.scale) >= 2**31


def test_rounding_never_lengthens_an_update_beyond_the_scale():
  """Whose numbers are all just above half a step."""
  made = integers.grid(CLIENTS, 2.0**11)
  dimension = 16
  unit = made.unit(dimension)
  assert made.scale == 256
  rounded = jax.jit(made.in_steps)
  step = math.floor(unit / math.sqrt(dimension)) - 0.5
  longest: Any = 0.0
  for up in range(dimension + 1):  # so many numbers a step longer
    steps = np.full(dimension, step + 1e-3)
    steps[:up] += 1
    if np.linalg.norm(steps) > unit:
      break
    update = {"x": jnp.asarray(steps / unit, jnp.float32)}
    moved = rounded(update)["x"]
    assert moved.dtype == jnp.int32
    longest = max(longest, np.linalg.norm(np.asarray(moved, np.float64)))
  assert unit < longest <= made.scale
  assert bool(made.fits({"x": moved}))
  assert not bool(made.fits({"x": jnp.array([made.scale, 1], jnp.int32)}))


@pytest.mark.parametrize(
  ("clients", "multiplier", "dimension", "message"),
  [
    (20, 1.0, 10**9, r"524288 steps.* 1000000000 numbers.* 15811 .*1%"),
    (
      CLIENTS,
      1e5,
      DIM,
      r"7 clients and .*=100000 .* 4 steps",
    ),
    (20, 1e6, 3, r"20 clients .*noise_multiplier=1e\+06 fits no grid"),
    (2**31, 1.0, 3, r"2147483648 clients .* fits no grid"),
  ],
)
def test_grids_that_are_too_coarse(clients, multiplier, dimension, message):
  with pytest.raises(ValueError, match=message):
    integers.grid(clients, multiplier).unit(dimension)


# --- the round ----------------------------------------------------------------


@functools.cache
def trained(noise, lanes, devices):
  kind = {"noise": noise}
  if noise != "discrete_gaussian":
    kind["most_clients"] = None
  made = make_simulator(
    TASK,
    central.with_central_dp(PLAIN, settings(**kind)),
    DATA,
    lanes=lanes,
    devices=devices,
  )
  return flat(params_of(made, train(made, 3)))


LAYOUTS = [(4, 1), (2, 2)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_has_the_same_bits_in_any_layout(layout):
  one = trained("discrete_gaussian", 1, 1)
  assert np.all(np.isfinite(one))
  assert np.any(one != 0)
  np.testing.assert_array_equal(trained("discrete_gaussian", *layout), one)


def test_a_sum_of_floats_has_not():
  """So that the test above tests something."""
  one = trained("gaussian", 1, 1)
  assert any(np.any(trained("gaussian", *layout) != one) for layout in LAYOUTS)


@pytest.mark.parametrize("multiplier", [0.05, 1.0, 30.0])
def test_what_the_server_gets_is_the_sum_with_discrete_noise(multiplier):
  """Whole numbers of steps, from one draw and from two."""
  dimension, clip = 20_000, 2.0
  task = quadratic(dimension)
  made = make_simulator(
    task,
    central.with_central_dp(
      fedavg(task, sgd(1.0), sgd(1.0), weighting="uniform"),
      settings(clip_norm=clip, noise_multiplier=multiplier, denominator=1.0),
    ),
    quadratic_data(np.zeros((2, dimension))),  # nobody moves
  )
  noise = flat(params_of(made, train(made, 1))).astype(np.float64)
  grid = integers.grid(CLIENTS, multiplier)
  steps = noise / clip * grid.unit(dimension)
  np.testing.assert_allclose(steps, np.round(steps), atol=0.3)
  steps = np.round(steps)
  assert stats.kstest(steps / grid.stddev, "norm").pvalue > 1e-3
  assert abs(steps.std() / grid.stddev - 1) < 4 / math.sqrt(2 * dimension)


def test_a_client_that_is_too_long_is_left_out(monkeypatch):
  """A device that clipped to a longer norm would be noticed."""
  broken = lambda update, bound, order: jax.tree.map(
    lambda x: jnp.where(jnp.abs(x).max() > 1, 1.01, 0.5) * x / 2, update
  )
  monkeypatch.setattr(contribution, "clip_to_unit_norm", broken)
  centres = np.zeros((CLIENTS, DIM))
  centres[:, 0] = [1, 1, 1, 2, 2, 1, 1]  # 2 are 1.01 long
  for noise in ("discrete_gaussian", "gaussian"):
    kind: dict[str, Any] = {"noise": noise, "noise_multiplier": 0.0}
    if noise == "gaussian":
      kind["most_clients"] = None
    made = make_simulator(
      TASK,
      central.with_central_dp(PLAIN, settings(clip_norm=1.0, **kind)),
      quadratic_data(centres),
      lanes=2,
    )
    (out,) = made.run(made.init(), 1)
    ((_, rejected),) = out.rejected
    assert list(rejected) == [3, 4]
    moved = params_of(made, out.state)["w"][0]
    np.testing.assert_allclose(moved, 5 * 0.25 / 7 * 0.5, rtol=1e-6)


def test_canaries_are_summed_with_the_clients():
  part: Any = sampling.uniform(CLIENTS, CLIENTS).participation
  found: Any = {}
  for noise, most in (("discrete_gaussian", CLIENTS), ("gaussian", None)):
    kind = settings(
      noise=noise,
      most_clients=most,
      noise_multiplier=0.0,
      canaries=Canaries(DIM, part),
    )
    made = make_simulator(TASK, central.with_central_dp(PLAIN, kind), DATA)
    found[noise] = train(made, 1).server.audit.present.total
    assert most is None or kind.grid.clients == CLIENTS + DIM + 1
  assert np.abs(found["gaussian"]).max() > 0.99
  np.testing.assert_allclose(
    found["discrete_gaussian"], found["gaussian"], rtol=1e-4, atol=1e-4
  )


def test_an_audit_of_discrete_noise_is_a_bound_of_it():
  part: Any = sampling.uniform(CLIENTS, CLIENTS).participation
  kind = settings(
    noise="discrete_gaussian",
    most_clients=CLIENTS,
    noise_multiplier=4.0,
    canaries=Canaries(60, part),
  )
  task = quadratic(60)
  algorithm = fedavg(task, sgd(1.0), sgd(1.0), weighting="uniform")
  made = make_simulator(
    task,
    central.with_central_dp(algorithm, kind),
    quadratic_data(np.ones((CLIENTS, 60))),
  )
  made = dataclasses.replace(made, budget=Budget(delta=1e-3))
  found = made.account.audit(train(made, 1))
  assert found is not None
  assert 0.99 < found.longest <= 1
  assert 0 < found.claimed < math.inf
  assert not found.accused


# --- the account --------------------------------------------------------------


def law(stddev, moved, size):
  x = np.arange(-size, size + 1)
  weights = np.exp(-((x - moved) ** 2) / (2 * stddev**2))
  return weights / weights.sum()


def divergence(alpha, p, q):
  logs = alpha * np.log(p) + (1 - alpha) * np.log(q)
  return np.log(np.sum(np.exp(logs))) / (alpha - 1)


def formulas(multiplier, rate=1.0, fixed=False):
  step = Step("discrete_gaussian", multiplier, rate, fixed)
  orders, divergences = accountants._renyi_divergences(step)
  assert all(order == int(order) >= 2 for order in orders)
  return dict(zip(orders, divergences, strict=True))


@pytest.mark.parametrize("rate", [0.01, 0.3, 1.0])
@pytest.mark.parametrize(("stddev", "moved"), [(0.5, 1), (3.3, 2), (20.0, 31)])
def test_moments_of_whole_orders_are_a_gaussians(stddev, moved, rate):
  """Sums over the exact laws, of both orders of neighbors."""
  found = formulas(stddev / moved, rate)
  size = math.ceil(25 * stddev)
  base = law(stddev, 0, size)
  mixed = (1 - rate) * base + rate * law(stddev, moved, size)
  for alpha in (2, 3, 5):
    exact = divergence(alpha, mixed, base)
    np.testing.assert_allclose(exact, found[alpha], rtol=1e-6)
    other = divergence(alpha, base, mixed)
    assert other <= found[alpha] * (1 + 1e-9)


def test_and_of_vectors_that_are_moved_along_no_axis():
  stddev, rate = 2.5, 0.2
  x, y = (law(stddev, moved, 60) for moved in (2, 3))
  base = np.outer(law(stddev, 0, 60), law(stddev, 0, 60))
  mixed = (1 - rate) * base + rate * np.outer(x, y)
  found = formulas(stddev / math.hypot(2, 3), rate)
  for alpha in (2, 4):
    exact = divergence(alpha, mixed.ravel(), base.ravel())
    np.testing.assert_allclose(exact, found[alpha], rtol=1e-6)


def test_a_client_of_a_fixed_cohort_may_become_another():
  """Who is drawn with rate q: (1 - q) P + q P moved either way."""
  stddev, moved, rate = 4.0, 3, 0.25
  found = formulas(stddev / (2 * moved), rate, fixed=True)
  base = law(stddev, 0, 60)
  one, other = (
    (1 - rate) * base + rate * law(stddev, m, 60) for m in (moved, -moved)
  )
  for alpha in (2, 3, 6):
    assert divergence(alpha, one, other) <= found[alpha]


@pytest.mark.parametrize(("clients", "rounds"), [(20, 500), (1000, 3)])
def test_epsilon_is_that_of_gaussians_of_whole_orders(clients, rounds):
  delta = 1e-5
  part: Any = sampling.poisson(1000, clients).participation
  found = Ledger(PrivacySpec("discrete_gaussian", 1.0), part, delta, "rdp")
  library = privacy_library("dp_accounting")
  accountant = privacy_library("dp_accounting.rdp").RdpAccountant(
    range(2, 200),
    library.NeighboringRelation.ADD_OR_REMOVE_ONE,
  )
  event = library.GaussianDpEvent(1.0)
  if clients < 1000:
    event = library.PoissonSampledDpEvent(part.rate, event)
  accountant.compose(event, rounds)
  expected = accountant.get_epsilon(0.999 * delta)
  assert found.epsilon(rounds) == pytest.approx(expected, rel=1e-9)
  exact = Ledger(PrivacySpec("gaussian", 1.0), part, delta).epsilon(rounds)
  assert exact < found.epsilon(rounds) < 1.25 * exact
  assert found.rounds_within(expected, 2 * rounds) == rounds


def test_draws_are_part_of_delta():
  """(1 + e^epsilon) times the distance of all rounds' draws, at most 0.1 %."""
  release: Any = central.with_central_dp(
    PLAIN, settings(noise_multiplier=20.0)
  ).privacy
  one = discrete_gaussian.distance(integers.grid(CLIENTS, 20.0).stddev)
  assert release.distance == pytest.approx(DIM * one)
  part: Any = sampling.uniform(CLIENTS, CLIENTS).participation
  rounds = 10
  for delta, served in ((1e-16, True), (1e-22, False)):
    ledger = Ledger(release, part, delta, "rdp")
    perfect = dataclasses.replace(ledger, release=release._replace(distance=0))
    epsilon = perfect.epsilon(rounds)
    needed = 1000 * rounds * release.distance * (1 + math.exp(epsilon))
    assert (needed < delta) == served
    assert ledger.epsilon(rounds) == (epsilon if served else math.inf)
    if not served:
      with pytest.raises(ValueError, match=r"^delta=1e-22: draws .* larger"):
        ledger.check_draws(rounds, None)
      assert ledger.describe(rounds).startswith("none: draws of the noise")


def test_the_usual_accountant_is_one_that_can():
  assert simulator().account.ledger.accountant == "rdp"
  part: Any = sampling.poisson(1000, 20).participation
  release = calibration.calibrate(
    PrivacySpec("discrete_gaussian", 1.0), part, 100, 1e-5, 2.0
  )
  spent = Ledger(release, part, 1e-5, "rdp").epsilon(100)
  assert 1.99 < spent <= 2.0


# --- what is refused ----------------------------------------------------------


@pytest.mark.parametrize(
  ("more", "message"),
  [
    ({"noise_weights": True, "max_weight": 2.0}, "unset noise_weights"),
    ({"statistics_norm": 1.0}, "unset statistics_norm"),
    ({"quantile": 0.5}, "unset quantile"),
    ({"simulated": (100.0, 1000.0)}, "unset noise_cohort_size"),
    ({"strategy": banded(4, 2)}, "Correlated noise is Gaussian"),
    ({"most_clients": None}, "most_clients=None .* give the most clients"),
    ({"most_clients": 0}, "CentralDPConfig.most_clients=0"),
    ({"noise": "gaussian"}, "most_clients=7 is of noise='discrete_gaussian'"),
    ({"noise_multiplier": 1e7}, "fits no grid"),
  ],
)
def test_settings_that_discrete_noise_does_not_go_with(more, message):
  with pytest.raises(ValueError, match=message):
    settings(**more)


@pytest.mark.parametrize(
  ("more", "message"),
  [
    (
      {"budget": Budget(delta=1e-3, accountant="pld")},
      "'pld' counts .*'rdp'",
    ),
    (
      {"budget": Budget(delta=1e-3, accountant="gdp")},
      "'gdp' counts .*'rdp'",
    ),
    ({"budget": Budget(delta=1e-21)}, r"privacy.delta=1e-21: draws .*larger"),
    ({"most": 2}, r"most_clients=2 is below the \d clients"),
    ({"schedule": "noise_multiplier"}, "schedule of privacy.noise_multiplier"),
  ],
)
def test_runs_that_discrete_noise_does_not_go_with(more, message):
  most = more.pop("most", CLIENTS)
  if name := more.pop("schedule", None):
    more["schedules"] = {f"privacy.{name}": schedules.cosine(10)}
  algorithm = central.with_central_dp(PLAIN, settings(most_clients=most))
  with pytest.raises(ValueError, match=message):
    _ = simulator(algorithm, **more)


def test_a_model_that_is_too_large_for_its_noise_is_refused():
  with pytest.raises(ValueError, match=r"4 steps, and rounding its 5 numbers"):
    central.with_central_dp(PLAIN, settings(noise_multiplier=1e5))


def test_other_noise_in_a_call_is_refused():
  made = simulator()
  numbers = made.hparams["algorithm"]["privacy"] | {"noise_multiplier": 2.0}
  hparams = hparams_of(made, privacy=numbers)
  with pytest.raises(ValueError, match=r"noise_multiplier'\]=2.0 is not 1.0"):
    made.init(hparams)


def test_a_config_is_fitted_to_its_epsilon():
  fields = {
    "server.rounds": "30",
    "sampler.name": "poisson",
    "privacy.mechanism": "discrete_gaussian",
    "privacy.clip_norm": "1.0",
    "privacy.target_epsilon": "8.0",
    "privacy.delta": "0.001",
  }
  made: Any = build(flags.load(str(DIGITS), fields)).simulator
  assert made.account.rounds_within_budget(30) == 30
  told = made.account.ledger.describe(30)
  assert told.startswith("(8, 0.001)-DP")
  assert "RDP" in told
  assert made.algorithm.privacy.most_clients == made.sampler.sizes[-1]
