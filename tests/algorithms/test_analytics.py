"""Quantiles and heavy hitters: what numpy counts, and with noise nearly."""

import collections

import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim import sampling
from fedjax_sim.algorithms.heavy_hitters import heavy_hitters
from fedjax_sim.algorithms.quantiles import quantiles
from fedjax_sim.data import FederatedData, FederatedDataset
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.models.gbdt import gbdt as gbdt_task
from fedjax_sim.models.gmm import gmm as gmm_task
from fedjax_sim.models.heavy_hitters import heavy_hitters as places
from fedjax_sim.models.quantiles import quantiles as quantiles_task
from fedjax_sim.privacy.central import CentralDPConfig, with_central_dp
from fedjax_sim.tasks import with_compute_dtype
from fedjax_sim.tasks.freezing import with_frozen_dtype
from problems import make_simulator, params_of
from tiers import slow_but

SIZES = [3, 50, 8, 1, 40, 6]
ENDS = np.cumsum([0, *SIZES])
PROBABILITIES = (0.1, 0.5, 0.95)


def dataset(x, y):
  return FederatedDataset(
    name="own",
    train=FederatedData(
      examples={"x": x, "y": y}, offsets=ENDS.astype(np.int64)
    ),
    num_classes=0,
    example_shape=x.shape[1:],
  )


RNG = np.random.default_rng(0)
NUMBERS = RNG.gamma(2.0, size=(sum(SIZES), 2)).astype(np.float32)
WORDS = np.minimum(RNG.zipf(1.6, (sum(SIZES), 4)) * 7919 % 1000, 999)
WORDS = WORDS.astype(np.int32)
DATA = dataset(NUMBERS, WORDS[:, 0])
TOKENS = dataset(WORDS, WORDS[:, 0])


def simulator_of(task, algorithm, data, **others):
  others.setdefault("batching", LocalBatching(batch_size=16))
  return make_simulator(task, algorithm, data, **others)


def last(simulator, rounds):
  *_, out = simulator.run(simulator.init(), rounds)
  return out.state


# --- quantiles ----------------------------------------------------------------


def test_quantiles_are_numpys_up_to_a_cell():
  task = quantiles_task((2,), 0, PROBABILITIES, low=0.0, high=10.0)
  algorithm = quantiles(task, bins=500)
  simulator = simulator_of(task, algorithm, DATA, lanes=2, devices=2)
  found = params_of(simulator, last(simulator, 2))["quantiles"]
  expected = np.quantile(NUMBERS, PROBABILITIES, axis=0, method="inverted_cdf")
  np.testing.assert_allclose(found, expected.T, atol=10 / 500 + 1e-5)


def test_quantiles_of_a_cohort_and_of_clients_that_count_the_same():
  task = quantiles_task((2,), 0, PROBABILITIES, feature=1, high=10.0)
  sampler = sampling.uniform(len(SIZES), 2)
  algorithm = quantiles(task, bins=500, weighting="uniform", decay=0.5)
  simulator = simulator_of(task, algorithm, DATA, sampler=sampler)
  values, weights = [], []
  for round_ in range(3):  # each client weighs 1, and twice as much a round on
    for i in sampler.sample(simulator.seed, round_):
      values.append(NUMBERS[ENDS[i] : ENDS[i + 1], 1])
      weights.append(np.full(SIZES[i], 2.0**round_ / SIZES[i]))
  expected = np.quantile(
    np.concatenate(values),
    PROBABILITIES,
    weights=np.concatenate(weights),
    method="inverted_cdf",
  )
  found = params_of(simulator, last(simulator, 3))["quantiles"]
  np.testing.assert_allclose(found[0], expected, atol=10 / 500 + 1e-5)


def test_numbers_beyond_the_range_count_at_its_ends():
  task = quantiles_task((2,), 0, (0.05, 0.99), low=1.0, high=2.0, feature=0)
  simulator = simulator_of(task, quantiles(task, bins=10), DATA)
  found = params_of(simulator, last(simulator, 1))["quantiles"][0]
  assert 1.0 <= found[0] <= 1.1
  assert 1.9 <= found[1] <= 2.0


def test_noise_moves_ranks_as_far_as_the_docstring_says():
  task = quantiles_task((2,), 0, PROBABILITIES, feature=0, high=10.0)
  clients, bins, multiplier = len(SIZES), 40, 0.02
  config = CentralDPConfig(
    clip_norm=1.0, noise_multiplier=multiplier, denominator=clients
  )
  algorithm = quantiles(task, bins=bins, weighting="uniform")
  private = with_central_dp(algorithm, config)
  simulator = simulator_of(task, private, DATA)
  *_, out = simulator.run(simulator.init(), 1)
  assert out.rows[-1]["train/clipped"] == 0  # no histogram is longer than 1
  found = params_of(simulator, out.state)["quantiles"][0]
  exact = simulator_of(task, algorithm, DATA)
  assert not np.allclose(
    params_of(exact, last(exact, 1))["quantiles"], found, atol=1e-6
  )
  weights = np.repeat(1 / np.array(SIZES), SIZES) / clients
  for p, q in zip(PROBABILITIES, found, strict=True):
    rank = weights @ (NUMBERS[:, 0] <= q)
    cell = weights @ (np.abs(NUMBERS[:, 0] - q) <= 10 / bins)
    i = q / 10 * bins
    deviation = (
      multiplier / clients * np.sqrt(i * (1 - p) ** 2 + (bins - i) * p**2)
    )
    assert abs(rank - p) <= 4 * deviation + cell


# --- heavy hitters ------------------------------------------------------------


def shares_of(words, weights=None):
  """Value -> share, the greatest first."""
  weights = np.ones(len(words)) if weights is None else weights
  total: dict[int, float] = collections.defaultdict(float)
  for value, weight in zip(words.tolist(), weights.tolist(), strict=True):
    total[value] += weight / weights.sum()
  return dict(sorted(total.items(), key=lambda pair: -pair[1]))


@pytest.mark.parametrize("branching", slow_but([10], [10, 1000]))
def test_all_values_with_a_greater_share_are_found(branching):
  """Digit by digit, and by one histogram."""
  task = places((4,), 0, hitters=50, domain=1000)
  algorithm = heavy_hitters(task, branching=branching, min_share=0.02)
  simulator = simulator_of(task, algorithm, DATA, lanes=2, devices=2)
  levels = 3 if branching == 10 else 1
  state = last(simulator, levels + 1)
  params = params_of(simulator, state)
  expected = {
    k: v for k, v in shares_of(DATA.train.examples["y"]).items() if v > 0.02
  }
  assert 3 < len(expected) < 50
  found = params["values"][params["values"] >= 0].tolist()
  assert set(found) == set(expected)
  np.testing.assert_allclose(
    params["shares"][: len(found)], [expected[v] for v in found], rtol=1e-5
  )
  assert (params["shares"][len(found) :] == 0).all()
  assert (np.diff(params["shares"]) <= 0).all()
  told = simulator.algorithm.state_metrics(state.server, {})
  assert told["hitters/found"] == len(expected)
  np.testing.assert_allclose(
    told["hitters/covered"], sum(expected.values()), rtol=1e-5
  )


def test_examples_may_hold_many_values_and_padding():
  ignored = int(WORDS[0, 0])
  task = places((4,), 0, hitters=3, field="x", domain=1000, ignored=ignored)
  algorithm = heavy_hitters(task, branching=40, weighting="tokens")
  sampler = sampling.uniform(len(SIZES), 3)
  simulator = simulator_of(task, algorithm, TOKENS, sampler=sampler)
  params = params_of(simulator, last(simulator, 4))
  # The first round finds prefixes; the last three count what continues them.
  first = sampler.sample(simulator.seed, 0)
  words = lambda ids: np.concatenate(
    [WORDS[ENDS[i] : ENDS[i + 1]].ravel() for i in ids]
  )
  kept = lambda x: x[x != ignored]
  prefixes = list(shares_of(kept(words(first)) // 40))[:3]
  later = np.concatenate(
    [sampler.sample(simulator.seed, r) for r in range(1, 4)]
  )
  counted = shares_of(kept(words(later)))
  expected = [v for v in counted if v // 40 in prefixes][:3]
  np.testing.assert_allclose(
    params["shares"], [counted[v] for v in expected], rtol=1e-5
  )
  assert set(params["values"].tolist()) == set(expected)
  loss = 1 - np.isin(kept(WORDS.ravel()), expected).mean()
  out = task.metrics(
    simulator.algorithm.variables(last(simulator, 4).server),
    {"x": jnp.asarray(WORDS), "y": jnp.asarray(WORDS[:, 0])},
  )["loss"]
  np.testing.assert_allclose(
    out.total.sum() / out.weight.sum(), loss, rtol=1e-5
  )


def test_noise_adds_no_values_above_its_bound():
  task = places((4,), 0, hitters=8, domain=1000)
  clients, multiplier, branching = len(SIZES), 0.1, 40
  deviation = multiplier / clients
  bound = deviation * np.sqrt(2 * np.log(8 * branching))
  algorithm = heavy_hitters(
    task, branching=branching, min_share=1.25 * bound, weighting="uniform"
  )
  config = CentralDPConfig(
    clip_norm=1.0, noise_multiplier=multiplier, denominator=clients
  )
  private = with_central_dp(algorithm, config)
  simulator = simulator_of(task, private, DATA)
  *_, out = simulator.run(simulator.init(), 2)
  assert out.rows[-1]["train/clipped"] == 0  # no votes are longer than 1
  params = params_of(simulator, out.state)
  weights = np.repeat(1 / np.array(SIZES), SIZES)
  shares = shares_of(DATA.train.examples["y"], weights)
  sure = {v for v, s in shares.items() if s > 2.5 * bound}
  found = params["values"][params["values"] >= 0].tolist()
  assert sure
  assert sure <= set(found) <= set(shares)
  for value, share in zip(found, params["shares"], strict=False):
    assert share != pytest.approx(shares[value], abs=1e-7)
    assert abs(share - shares[value]) < 5 * deviation


def test_what_is_wrong_is_said():
  task = places((4,), 0, domain=10)
  with pytest.raises(ValueError, match="model.domain=1000"):
    task.check({"y": np.array([3, 999])})
  with pytest.raises(ValueError, match="float32"):
    places((4,), 0, domain=10, field="x").check({"x": NUMBERS})
  with pytest.raises(ValueError, match="ascending"):
    quantiles_task((2,), 0, (0.5, 0.5))
  with pytest.raises(ValueError, match="feature=2"):
    quantiles_task((2,), 0, feature=2)
  with pytest.raises(ValueError, match="model.name='quantiles'"):
    quantiles(task)
  with pytest.raises(ValueError, match="model.name='heavy_hitters'"):
    heavy_hitters(quantiles_task((2,), 0))


# --- all of them --------------------------------------------------------------


@pytest.mark.parametrize(
  "task",
  [
    gbdt_task((300,), 2),  # in bfloat16 feature 299 is feature 300
    gmm_task((2,), 3),
    places((4,), 1000),
    quantiles_task((2,), 0, (0.5, 0.999)),  # in bfloat16 0.999 is 1
  ],
)
@pytest.mark.parametrize("lower", [with_compute_dtype, with_frozen_dtype])
def test_numbers_that_count_to_the_last_digit_are_not_rounded(task, lower):
  field = lower.__name__.removeprefix("with_")
  with pytest.raises(ValueError, match=rf"runtime\.{field}='bfloat16' would"):
    lower(task, jnp.bfloat16)
