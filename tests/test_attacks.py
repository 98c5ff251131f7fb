"""Attacks against plain numpy, and who attacks whom in a round."""

import dataclasses
import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from fedjax_sim import aggregators, attacks, sampling
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.attacks.alie import deviations_of
from fedjax_sim.config import default_config
from fedjax_sim.config.build import build
from fedjax_sim.config.build.parts import Parts, program_of
from fedjax_sim.core import Batch, Client, Report, Shares
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.privacy.central import CentralDPConfig, with_central_dp
from problems import (
  MODELS,
  blobs,
  flat,
  make_simulator,
  params_of,
  quadratic,
  quadratic_data,
  sgd,
  train,
)
from tiers import slow_but

CLIENTS = 10
ABSENT, BYZANTINE = [4], [1, 6, 8]
HONEST = [i for i in range(CLIENTS) if i not in ABSENT + BYZANTINE]


def updates(seed=0):
  rng = np.random.default_rng(seed)
  spread = rng.uniform(0.2, 2, size=6)
  return (rng.normal(size=(CLIENTS, 6)) * spread + 0.5).astype(np.float32)


def among(ids):
  return np.isin(np.arange(CLIENTS), ids)


def split(x):
  """Leaves of one, two and no axes."""
  return {"a": x[..., :3], "b": x[..., 3:5, None], "c": x[..., 5]}


def put_together(tree):
  return np.concatenate([tree["a"], tree["b"][..., 0], [tree["c"]]])


def attacked(aggregator, attack, x, weights=None):
  """What the aggregator returns, and the row that attackers send."""
  filled = x.copy()
  filled[ABSENT] = np.nan
  under = attacks.with_collusion(aggregator, attack)

  @jax.jit
  def run(x, present, byzantine):
    return aggregators.aggregate(
      under, split(x), present, weights, byzantine=byzantine
    )

  out = run(filled, ~among(ABSENT), among(BYZANTINE))
  return put_together(jax.device_get(out))


def sent(attack, x):
  """The attackers' row: the mean of all tells it from the others."""
  out = attacked(aggregators.mean(), attack, x).astype(np.float64)
  rest = x[HONEST].astype(np.float64).sum(0)
  return (out * (len(HONEST) + len(BYZANTINE)) - rest) / len(BYZANTINE)


def numpy_row(name, perturbation, x):
  """The attackers' row in float64, as the papers find it."""
  good = x[HONEST].astype(np.float64)
  mean, std = good.mean(0), good.std(0)
  n, m = len(HONEST) + len(BYZANTINE), len(BYZANTINE)
  if name == "alie":
    s = n // 2 + 1 - m
    return mean - stats.norm.ppf((n - m - s) / (n - m)) * std
  if name == "ipm":
    return -0.5 * mean
  direction = {"unit": -mean, "std": -std, "sign": -np.sign(mean)}[perturbation]
  pairs = ((good[:, None] - good[None]) ** 2).sum(-1)

  def hidden(gamma):
    apart = ((mean + gamma * direction - good) ** 2).sum(-1)
    if name == "min_max":
      return apart.max() <= pairs.max()
    return apart.sum() <= pairs.sum(1).max()

  low, high = 0.0, 1e3
  for _ in range(100):
    middle = (low + high) / 2
    low, high = (middle, high) if hidden(middle) else (low, middle)
  assert hidden(low)
  assert not hidden(low + 1e-6)
  return mean + low * direction


COLLUSIONS = [
  ("alie", None),
  ("ipm", None),
  *((name, p) for name in ("min_max", "min_sum") for p in ("unit", "std")),
  ("min_max", "sign"),
]


def collusion(name, perturbation):
  given = {} if perturbation is None else {"perturbation": perturbation}
  return attacks.ATTACKS[name](**given)


@pytest.mark.parametrize(("name", "perturbation"), COLLUSIONS)
def test_what_attackers_agree_on_is_numpys(name, perturbation):
  x = updates()
  found = sent(collusion(name, perturbation), x)
  expected = numpy_row(name, perturbation, x)
  np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5)


def test_z_is_as_given_or_none_where_attackers_are_few():
  x = updates()
  good = x[HONEST].astype(np.float64)
  found = sent(attacks.alie(z=1.5), x)
  expected = good.mean(0) - 1.5 * good.std(0)
  np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5)
  for clients, attackers, z in ((8, 2, 0), (9, 1, 0), (6, 4, 0.4307)):
    numbers: Any = types.SimpleNamespace(
      clients=jnp.int32(clients), attackers=jnp.int32(attackers)
    )
    assert deviations_of(numbers) == pytest.approx(z, abs=1e-4)


def test_what_is_not_finite_is_left_out_as_of_anybody():
  """Two standard deviations of 3e38 are more than float32 holds."""
  x = updates(2) * 2
  weights = np.arange(1, CLIENTS + 1, dtype=np.float32)
  for aggregator, expected in (
    (aggregators.weighted_mean(), np.average(x[HONEST], 0, weights[HONEST])),
    (aggregators.median(), np.median(x[HONEST], axis=0)),
  ):
    found = attacked(aggregator, attacks.alie(z=3e38), x, weights)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_devices_may_share_the_coordinates():
  """What a device does with half of them is what all do with the whole."""
  x = updates(1)[:, :4]
  under = attacks.with_collusion(aggregators.multi_krum(f=3), attacks.min_max())
  assert under.by_shares
  run = functools.partial(
    aggregators.aggregate,
    under,
    present=jnp.asarray(~among(ABSENT)),
    byzantine=jnp.asarray(among(BYZANTINE)),
  )
  halves = np.stack(np.split(x, 2, axis=1))
  shared = jax.jit(
    jax.vmap(lambda h: run(h, shares=Shares("two")), axis_name="two")
  )(halves)
  np.testing.assert_allclose(
    np.concatenate(shared), jax.jit(run)(x), rtol=1e-4, atol=1e-6
  )


AGGREGATORS = {
  "mean": aggregators.mean,
  "median": aggregators.median,
  "trimmed_mean": lambda: aggregators.trimmed_mean(number=3),
  "krum": lambda: aggregators.krum(f=3),
  "multi_krum": lambda: aggregators.multi_krum(f=3, m=3),
  "bulyan": lambda: aggregators.bulyan(f=1),
  "dnc": lambda: aggregators.dnc(f=3),
  "geometric_median": aggregators.geometric_median,
  "norm_bounding": aggregators.norm_bounding,
  "centered_clipping": lambda: aggregators.centered_clipping(radius=2.0),
  "bucketing": lambda: aggregators.bucketing("median", size=2),
}


# How much more than the best of the known ones, where following the gradient
# through the aggregator finds more than their directions.
GAIN = {"dnc": 1.2, "geometric_median": 1.3, "multi_krum": 1.1}


@pytest.mark.parametrize("name", slow_but(["multi_krum"], AGGREGATORS))
def test_whoever_adapts_does_as_much_damage_as_any_known_attack(name):
  aggregator, x = AGGREGATORS[name](), updates(5)
  mean = x[HONEST].mean(0)
  damage = lambda attack: np.linalg.norm(attacked(aggregator, attack, x) - mean)
  longest = np.linalg.norm(x[HONEST] - mean, axis=1).max()
  assert 1.5 * np.linalg.norm(mean) < 2 * longest  # so IPM is within its bound
  pairs = [("alie", None), ("ipm", None), ("min_max", "std")]
  known = max(damage(collusion(*pair)) for pair in pairs)
  found = damage(attacks.adaptive(steps=8))
  assert found >= GAIN.get(name, 1.0) * known * (1 - 1e-4)


def adapted(aggregator, **options):
  """The aggregate under an adaptive attack, compiled."""
  attack = attacks.adaptive(steps=1, **options)
  under = attacks.with_collusion(aggregator, attack)
  there, byzantine = ~among(ABSENT), among(BYZANTINE)
  return jax.jit(
    lambda x: aggregators.aggregate(under, x, there, byzantine=byzantine)
  )


@pytest.mark.parametrize("objective", ["distance", "inner_product"])
def test_an_adaptive_attack_on_a_mean_is_as_long_as_it_may_be(objective):
  """The farthest from the mean, or the farthest against it."""
  x = updates(7)
  found = adapted(aggregators.mean(), radius=1.5, objective=objective)(x)
  good = x[HONEST].astype(np.float64)
  mean = good.mean(0)
  bound = 1.5 * np.linalg.norm(good - mean, axis=1).max()
  share = len(BYZANTINE) / (len(HONEST) + len(BYZANTINE))
  row = mean + (found - mean) / share
  assert np.linalg.norm(row - mean) == pytest.approx(bound, rel=1e-3)
  if objective == "inner_product":
    expected = mean - bound * mean / np.linalg.norm(mean)
    np.testing.assert_allclose(row, expected, rtol=1e-3, atol=1e-4)


def test_who_adapts_does_so_whatever_the_size_of_updates():
  run, x = adapted(AGGREGATORS["multi_krum"]()), updates(5)
  expected = run(x)
  for power in (100, -100):
    found = run(x * np.float32(2.0**power)) * np.float32(2.0**-power)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_success_is_counted_among_other_classes_alone():
  data = blobs([9, 8], classes=3)
  task = MODELS["lr"](data)
  assert task.logits is not None
  variables = task.init(jax.random.key(4))
  examples = {k: jnp.asarray(v) for k, v in data.train.examples.items()}
  stamped = np.array(examples["x"])
  stamped[:, -2:] = 5
  logits = task.logits(variables, {**examples, "x": jnp.asarray(stamped)})
  said = np.argmax(logits, axis=-1)
  target = int(np.bincount(said).argmax())
  measure = attacks.backdoor(3, target=target, size=2, value=5.0).measure
  assert measure is not None
  found = measure(task).metrics(variables, examples)["attack_success"]
  others = np.asarray(examples["y"]) != target
  hit = others & (said == target)
  assert hit.any()
  assert (~others & (said == target)).any()
  np.testing.assert_array_equal(found.weight, others)
  np.testing.assert_array_equal(found.total, hit)


def test_reports_are_numpys():
  x, key = updates(), jax.random.key(0)

  def call(attack: Any):
    numbers = jax.tree.map(jnp.float32, dict(attack.hparams))
    return attack.report(split(x), key, numbers)

  for attack, expected in (
    (attacks.sign_flip(2.0), -2 * x),
    (attacks.scaling(-3.0), -3 * x),
    (attacks.same_value(0.5), np.full_like(x, 0.5)),
    (attacks.backdoor(3, boost=4.0), 4 * x),
  ):
    jax.tree.map(np.testing.assert_allclose, call(attack), split(expected))
  many = {"w": np.zeros(20_000, np.float32), "v": np.zeros(9, np.float32)}
  noise: Any = attacks.gaussian(3.0)
  drawn = noise.report(many, key, {"stddev": jnp.float32(3)})
  assert stats.kstest(drawn["w"], stats.norm(scale=3).cdf).pvalue > 1e-3
  assert not np.isin(drawn["v"], drawn["w"]).any()


def test_labels_and_triggers_are_where_they_should_be():
  y, mask = np.arange(8, dtype=np.int32) % 4, np.arange(8) != 2
  x = np.arange(8 * 5, dtype=np.float32).reshape(8, 5)

  def poisoned(attack: Any, x: Any = x, seed: int = 1):
    batch = Batch({"x": jnp.asarray(x), "y": jnp.asarray(y)}, jnp.asarray(mask))
    numbers = jax.tree.map(jnp.float32, dict(attack.hparams))
    return attack.poison(batch, jax.random.key(seed), numbers)

  assert (poisoned(attacks.label_flip(4))["y"] == 3 - y).all()
  pair = poisoned(attacks.label_flip(4, source=1, target=3))["y"]
  assert (pair == np.where(y == 1, 3, y)).all()
  drawn = np.asarray(poisoned(attacks.random_labels(4))["y"])
  assert len({*drawn}) > 1
  assert drawn.max() < 4
  assert (drawn != poisoned(attacks.random_labels(4), seed=2)["y"]).any()
  made = poisoned(attacks.backdoor(4, target=2, size=2, value=9.0, share=0.45))
  stamped = np.array([1, 1, 0, 1, 0, 0, 0, 0], bool)  # 0.45 of 7 are 3
  assert (made["y"][mask] == np.where(stamped, 2, y)[mask]).all()
  expected = x.copy()
  expected[np.flatnonzero(stamped), -2:] = 9
  assert (made["x"][mask] == expected[mask]).all()
  images = np.zeros((8, 4, 4, 1), np.float32)
  square = poisoned(attacks.backdoor(4, size=2, share=1.0), images)["x"]
  assert np.asarray(square[:, 2:, 2:]).all()
  assert square.sum() == 8 * 4
  words = np.full((8, 5), 7, np.int32)
  said = poisoned(attacks.backdoor(4, size=2, token=3, share=1.0), words)["x"]
  assert (np.asarray(said) == [3, 3, 7, 7, 7]).all()


def test_who_attacks_is_a_function_of_seed_round_and_cohort():
  draw: Any = functools.partial(
    attacks.with_attackers, sampling.uniform(50, 20), 50
  )
  fixed, new = draw(0.29).byzantine, draw(0.29, "round").byzantine
  everyone = np.arange(50)
  chosen = fixed(3, 0, everyone)
  assert chosen.sum() == 14
  order = np.random.default_rng(0).permutation(50)
  assert (fixed(3, 9, order) == chosen[order]).all()
  assert (fixed(4, 0, everyone) != chosen).any()
  cohort = order[:20]
  assert new(3, 0, cohort).sum() == 5
  assert (new(3, 0, cohort[::-1])[::-1] == new(3, 0, cohort)).all()
  assert (new(3, 1, cohort) != new(3, 0, cohort)).any()
  assert draw(1.0).byzantine(0, 0, everyone).all()
  assert not draw(0.0).byzantine(0, 0, everyone).any()
  assert draw(0.02).byzantine(0, 0, everyone).sum() == 1
  with pytest.raises(ValueError, match=r"fraction=0.019 .* at least 0\.02,"):
    draw(0.019)
  with pytest.raises(ValueError, match=r"of 20 clients of a round .* 0\.05,"):
    draw(0.04, "round")
  assert draw(0.58).byzantine(0, 0, everyone).sum() == 29  # 28.99... as floats


def attacking(ids, num_clients):
  chosen = np.isin(np.arange(num_clients), ids)
  sampler = sampling.uniform(num_clients, num_clients)
  return sampler._replace(byzantine=lambda seed, round_, ids: chosen[ids])


@pytest.mark.parametrize("debug", slow_but([False], [False, True]))
def test_a_round_of_reports_and_of_collusion_is_numpys(debug):
  """Two attackers of five, on two lanes and two devices, and in a loop."""
  centers = updates(3)[:5]
  task = quadratic(6)
  algorithm = attacks.with_false_reports(
    fedavg(task, sgd(0.5), sgd(1.0)), attacks.scaling(3.0)
  )
  simulator = make_simulator(
    task,
    algorithm,
    quadratic_data(centers),
    batching=LocalBatching(batch_size=1),
    sampler=attacking([1, 4], 5),
    aggregator=attacks.with_collusion(aggregators.median(), attacks.ipm(2.0)),
    lanes=1 if debug else 2,
    devices=1 if debug else 2,
  )
  simulator = dataclasses.replace(simulator, debug=debug, log_clients=True)
  out = simulator.dispatch(simulator.init(), simulator.plan(0, 1))
  honest = 0.5 * centers[[0, 2, 3]].astype(np.float64)
  rows = [*honest, *[-2 * honest.mean(0)] * 2]  # which has the last word
  np.testing.assert_allclose(
    params_of(simulator, out.state)["w"], np.median(rows, axis=0), rtol=1e-5
  )
  assert out.rows[0]["clients_byzantine"] == 2
  assert out.client_log["byzantine"].tolist() == [0, 1, 0, 0, 1]


def test_attackers_train_on_poisoned_data_and_nobody_else_does():
  """The run is that of a data set whose attackers have the labels flipped."""
  data = blobs([9, 6, 12, 4], classes=3)
  task = MODELS["lr"](data)
  algorithm = fedavg(task, sgd(0.3), sgd(1.0))
  own = np.isin(np.repeat(np.arange(4), np.diff(data.train.offsets)), [0, 2])
  y = data.train.examples["y"]
  flipped = np.where(own, 2 - y, y)
  wrong = dataclasses.replace(
    data,
    train=dataclasses.replace(
      data.train, examples={**data.train.examples, "y": flipped}
    ),
  )
  run: Any = functools.partial(
    make_simulator,
    batching=LocalBatching(batch_size=4, epochs=2),
    lanes=2,
  )
  clean = run(task, algorithm, wrong)
  poisoned = run(
    task,
    attacks.with_poisoned_data(algorithm, attacks.label_flip(3)),
    data,
    sampler=attacking([0, 2], 4),
    devices=2,
  )
  one, other = (flat(params_of(s, train(s, 2))) for s in (clean, poisoned))
  np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def config(**fields):
  made = default_config()
  made.data.num_clients = 20
  made.data.alpha = 1.0
  made.model.name = "logistic_regression"
  made.client.learning_rate, made.client.batch_size = 0.5, 16
  made.server.rounds, made.runtime.lanes = 3, 2
  for field, value in fields.items():
    *sections, key = field.split("__")
    section = made
    for name in sections:
      section = section[name]
    section[key] = value
  return made


PARTS = Parts()


def built(**fields):
  return build(config(**fields), PARTS).simulator


def test_a_backdoor_is_learned():
  simulator = built(
    attack__name="backdoor",
    attack__boost=3.0,
    attack__fraction=0.3,
    attack__target=7,
  )
  state = simulator.init()
  success = lambda state: simulator.evaluate(state)["test/attack_success"]
  before = success(state)
  for out in simulator.run(state, 3):
    state = out.state
  assert success(state) > max(0.6, before + 0.3)


def test_numbers_share_a_program_and_fraction_0_has_that_of_no_attack():
  same = lambda *many: len({program_of(built(**x)) for x in many})
  name = "attack__name"
  assert (
    same({name: "alie", "attack__z": 1.0}, {name: "alie", "attack__z": 2.0})
    == 1
  )
  backdoor = {name: "backdoor", "attack__selection": "round"}
  assert (
    same(
      {**backdoor, "attack__fraction": 0.1, "attack__boost": 2.0},
      {**backdoor, "attack__fraction": 0.4, "attack__share": 0.1},
    )
    == 1
  )
  assert same({name: "label_flip"}, {name: "random_labels"}) == 2
  nobody = {"attack__fraction": 0.0}
  assert same({}, {name: "label_flip", **nobody}, {name: "ipm", **nobody}) == 1


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (
      {"attack__name": "label_flip", "attack__source": 1, "attack__target": 1},
      r"attack.source=1, attack.target=1: no label would change",
    ),
    (
      {"attack__name": "backdoor", "attack__size": 65},
      r"^data.name='digits': .*attack.size=65 is too large: .*at most 64",
    ),
    (
      {"attack__name": "ipm", "attack__fraction": 1.0},
      r"attack.fraction=1.0: attack.name='ipm' is made of honest updates",
    ),
    (
      {"attack__name": "sign_flip", "attack__fraction": 1e-3},
      r"attack.fraction=0.001 of \d+ clients is less than one attacker",
    ),
  ],
)
def test_attacks_that_would_do_nothing_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    built(**fields)


OWN = """
import jax
import jax.numpy as jnp
from fedjax_sim.attacks import Attack

def poison():
  return Attack(poison=lambda b, key, h: {**b.examples, "y": jnp.zeros(())})

def report():
  return Attack(report=lambda update, key, h: jax.tree.map(jnp.sum, update))

def collude():
  return Attack(collude=lambda honest, h: jax.tree.map(jnp.sum, honest.mean))
"""


@pytest.mark.parametrize("name", ["poison", "report", "collude"])
def test_what_an_own_attack_returns_is_not_broadcast(name, tmp_path):
  (tmp_path / "own.py").write_text(OWN)
  message = rf"attack.name: Attack.{name} returned shape \(\) at"
  with pytest.raises((TypeError, ValueError), match=message):
    built(attack__name=f"{tmp_path / 'own.py'}:{name}").trace()


DP = {
  "privacy__mechanism": "gaussian",
  "privacy__clip_norm": 1.0,
  "privacy__delta": 1e-3,
  "privacy__noise_multiplier": 1.0,
}


def test_central_privacy_clips_what_attackers_send():
  task = quadratic(4)
  base = fedavg(task, sgd(0.5), sgd(1.0), weighting="uniform")
  private = with_central_dp(
    attacks.with_false_reports(base, attacks.scaling(1e3)),
    CentralDPConfig(clip_norm=0.7, noise_multiplier=1.0, denominator=5.0),
  )
  numbers = jax.tree.map(jnp.float32, dict(private.hparams))
  server = private.init(jax.random.key(0), numbers)
  zero = jnp.int32(0)
  key = jax.random.key(1)
  client = Client(
    message=private.broadcast(server),
    state=(),
    hparams=numbers,
    id=zero,
    version=zero,
    num_examples=zero,
    num_steps=zero[None],
    round=zero,
    key=key,
    noise_key=key,
  )
  own = Report({"w": jnp.full(4, 1e-3)}, jnp.float32(1))
  for byzantine, norm in ((False, 2e-3 / 0.7), (True, 1.0)):
    attacker = client._replace(byzantine=byzantine)
    sent = private.postprocess_report(attacker, own).update
    np.testing.assert_allclose(np.linalg.norm(flat(sent)), norm, rtol=1e-5)


@pytest.mark.parametrize(
  ("fields", "match"),
  [
    ({"attack__name": "alie", **DP}, "'alie' replaces updates after privacy"),
    (
      {
        "attack__name": "ipm",
        "aggregator__name": "secure_mean",
        "aggregator__clip": 1.0,
      },
      "aggregator.name='secure_mean' shows none",
    ),
    (
      {"attack__name": "min_max", "server__stale_probability": 0.1},
      "server.stale_probability=0.1 lets some",
    ),
    (
      {"attack__name": "alie", "runtime__deterministic_reduction": 2},
      "unset runtime.deterministic_reduction",
    ),
    (
      {"attack__name": "ipm", "leakage__statistic": "max",
       "leakage__threshold": 1.0},
      "leakage.threshold=1.0 counts on",
    ),
    (
      {
        "attack__name": "adaptive",
        "aggregator__name": "stack",
        "algorithm__name": "fltrust",
        "data__server_clients": 2,
      },
      "follows the derivative of what aggregator.name",
    ),
    (
      {"attack__name": "sign_flip", "algorithm__name": "centralized"},
      "algorithm.name pools the data",
    ),
    (
      {"attack__name": "label_flip", "attack__source": 3},
      "attack.source=3, attack.target=None: the two",
    ),
    (
      {"attack__name": "ipm", "attack__fraction": 1.5},
      "attack.fraction=1.5 is out of range",
    ),
    (
      {"attack__name": "ipm", "attack__selection": "all"},
      "attack.selection",
    ),
  ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(fields, match):
  with pytest.raises((TypeError, ValueError), match=match):
    built(**fields)


@pytest.mark.slow
def test_all_updates_may_go_to_the_algorithm():
  """FLTrust under inner-product manipulation: the server's own example wins."""
  simulator = built(
    attack__name="ipm",
    aggregator__name="stack",
    algorithm__name="fltrust",
    data__server_clients=2,
  )
  out = next(iter(simulator.run(simulator.init(), 1)))
  assert out.rows[0]["clients_byzantine"] > 0
  assert np.linalg.norm(flat(params_of(simulator, out.state))) > 0
