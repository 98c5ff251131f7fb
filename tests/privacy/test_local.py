"""Local privacy: noise against scipy, distances by brute force, real rounds."""

import math

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from dp_accounting import pld
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedjax_sim.algorithms.centralized import centralized
from fedjax_sim.algorithms.dga import dga
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.algorithms.fedlabels import fedlabels
from fedjax_sim.algorithms.fedlaw import fedlaw
from fedjax_sim.config import default_config
from fedjax_sim.config.build import build
from fedjax_sim.core import (
  Batch,
  Client,
  Purpose,
  Variables,
  noise_key_for,
  validate,
)
from fedjax_sim.data import with_few_labels
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.privacy import local
from fedjax_sim.privacy.accounting import rounded_up
from fedjax_sim.privacy.local import additive, registry
from fedjax_sim.training.stale import stale
from problems import (
  MODELS,
  blobs,
  flat,
  hparams_of,
  make_simulator,
  params_of,
  quadratic,
  quadratic_data,
  sgd,
)
from tiers import slow_but

KEY = jax.random.key(3)
UPDATE = {"b": jnp.array([3.0, 0.0]), "w": jnp.array([[0.0, -4.0, 0.0]])}


def traced(hparams):
  return jax.tree.map(jnp.float32, hparams)


def many(randomizer, weight, draws=20_000):
  """What a client sends, so many times."""
  keys = jax.random.split(KEY, draws)
  apply = jax.jit(jax.vmap(randomizer.apply, in_axes=(None, None, None, 0)))
  sent, weights = apply(
    UPDATE, jnp.float32(weight), traced(randomizer.hparams), keys
  )
  rows = [np.asarray(x).reshape(draws, -1) for x in jax.tree.leaves(sent)]
  return np.concatenate(rows, axis=1).astype(np.float64), np.asarray(weights)


# --- noise --------------------------------------------------------------------


@pytest.mark.parametrize(
  ("make", "size", "law", "length"),
  [
    (additive.gaussian, "stddev", scipy.stats.norm, 5.0),
    (additive.laplace, "scale", scipy.stats.laplace, 7.0),
  ],
)
def test_noise_and_weights(make, size, law, length):
  delta = {"delta": 1e-3} if make is additive.gaussian else {}
  bound, most = 2.0, 50.0
  randomizer = make(
    bound, epsilon=6.0, max_weight=most, weight_scale=2.0, **delta
  )
  scale = randomizer.hparams[size]
  sent, weights = many(randomizer, 30.0)
  noise = (sent - flat(UPDATE)[None] * bound / length) / (bound * scale)
  for column in noise.T:
    assert scipy.stats.kstest(column, law.cdf).pvalue > 1e-3
  across = np.corrcoef(np.column_stack([noise, weights]).T)
  assert np.abs(across - np.eye(len(across))).max() < 5 / math.sqrt(len(noise))
  # The weight's noise, put back to the ends of its range.
  assert weights.min() == np.float32(most / 10)
  assert weights.max() == most
  spread = law(30.0, scale * most / 2)
  low = int(np.sum(weights == weights.min()))
  p = spread.cdf(most / 10)
  assert scipy.stats.binomtest(low, len(weights), p).pvalue > 1e-3
  inside = weights[(weights > most / 10) & (weights < most)]
  within = lambda x: (spread.cdf(x) - p) / (spread.cdf(most) - p)
  assert scipy.stats.kstest(inside, within).pvalue > 1e-3


def test_weights_that_are_left_out_are_1():
  _, weights = many(additive.laplace(1.0, epsilon=1.0), 30.0, 10)
  np.testing.assert_array_equal(weights, 1)


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 8.0, 12.0])
@pytest.mark.parametrize("max_weight", [None, 3.0])
def test_gaussian_noise_is_what_balle_and_wang_say(epsilon, max_weight):
  delta = 1e-5
  randomizer = additive.gaussian(
    3.0, epsilon=epsilon, delta=delta, max_weight=max_weight
  )
  longest = 2.0 if max_weight is None else math.sqrt(5)
  sigma = randomizer.hparams["stddev"] / longest
  cdf = scipy.special.ndtr
  reached = cdf(0.5 / sigma - epsilon * sigma) - math.exp(epsilon) * cdf(
    -0.5 / sigma - epsilon * sigma
  )
  # The last thousandth is for the ends of the noise.
  assert reached == pytest.approx(0.999 * delta, rel=1e-6)
  assert local.guarantee(randomizer)[0] == pytest.approx(epsilon)
  assert local.guarantee(randomizer)[1] == delta
  same = additive.gaussian(
    1.0,
    stddev=randomizer.hparams["stddev"],
    delta=delta,
    max_weight=max_weight,
  )
  assert local.guarantee(same)[0] == pytest.approx(epsilon)


# --- distances ----------------------------------------------------------------

PAIR = [
  additive.gaussian(1.0, epsilon=1.0, delta=1e-5, max_weight=1.0),
  additive.laplace(1.0, epsilon=1.0, max_weight=1.0),
]
APPLY = {x.name: jax.jit(x.apply) for x in PAIR}
CLIPS = {
  per_layer: jax.jit(additive.clip_only(1.0, per_layer=per_layer).apply)
  for per_layer in (False, True)
}
floats = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)
vectors = st.fixed_dictionaries(
  {
    "b": hnp.arrays(np.float32, (2,), elements=floats),
    "w": hnp.arrays(np.float32, (2, 2), elements=floats),
  }
)
reports = st.tuples(vectors, st.floats(0, 2.0**20, width=32))
bounds = st.floats(2.0**-10, 2.0**10, width=32)


def vector(name, report, hparams):
  """A report without noise, as the one vector that is protected."""
  size = {"gaussian": "stddev", "laplace": "scale"}[name]
  hparams = {**hparams, size: 0.0, "min_weight": 0.0}
  update, weight = APPLY[name](*report, traced(hparams), KEY)
  entries = flat(update).astype(np.float64) / hparams["clip_norm"]
  share = float(weight) / hparams["max_weight"] * hparams["weight_scale"]
  return np.append(entries, share)


@given(
  one=reports,
  other=reports,
  clip_norm=bounds,
  max_weight=bounds,
  weight_scale=st.floats(2.0**-4, 2.0**4, width=32),
)
def test_no_two_reports_are_further_apart_than_the_noise_allows(
  one, other, clip_norm, max_weight, weight_scale
):
  hparams = {
    "clip_norm": clip_norm,
    "max_weight": max_weight,
    "weight_scale": weight_scale,
  }
  options = {"max_weight": max_weight, "weight_scale": weight_scale}
  normal = additive.gaussian(clip_norm, stddev=1.0, delta=1e-5, **options)
  assert normal.multiplier is not None
  x, y = (vector("gaussian", r, hparams) for r in (one, other))
  assert np.linalg.norm(x - y) <= (1 + 1e-7) / normal.multiplier
  double = additive.laplace(clip_norm, epsilon=1.0, **options)
  x, y = (vector("laplace", r, hparams) for r in (one, other))
  assert np.abs(x - y).sum() <= (1 + 1e-7) * double.hparams["scale"]


@pytest.mark.parametrize("name", ["gaussian", "laplace"])
def test_two_reports_can_be_that_far_apart(name):
  hparams = {"clip_norm": 1.0, "max_weight": 4.0, "weight_scale": 1.5}
  one = (UPDATE, 9.0)
  other = (jax.tree.map(jnp.negative, UPDATE), 0.0)
  gap = vector(name, one, hparams) - vector(name, other, hparams)
  if name == "gaussian":
    assert np.linalg.norm(gap) == pytest.approx(math.hypot(2, 1.5), rel=1e-5)
  else:
    assert np.abs(gap).sum() == pytest.approx(3.5, rel=1e-5)


@given(update=vectors, bound=bounds)
def test_clipping_never_exceeds_the_bound(update, bound):
  hparams, length = traced({"clip_norm": bound}), lambda x: np.linalg.norm(x)
  exact = flat(update).astype(np.float64)
  whole, weight = CLIPS[False](update, 7.0, hparams, KEY)
  assert length(flat(whole).astype(np.float64)) <= bound
  assert weight == 7
  if length(exact) < bound * (1 - 1e-5):
    np.testing.assert_array_equal(flat(whole), flat(update))
  layers, _ = CLIPS[True](update, 7.0, hparams, KEY)
  for name, leaf in layers.items():
    most = bound / math.sqrt(2)
    assert length(np.float64(leaf).ravel()) <= most
    if length(np.float64(update[name]).ravel()) > most:
      assert length(np.float64(leaf).ravel()) >= most * (1 - 1e-5)


# --- composition --------------------------------------------------------------


@pytest.mark.parametrize("reports", [1, 3, 40])
def test_gaussian_reports_compose_like_one_of_less_noise(reports):
  randomizer = additive.gaussian(1.0, epsilon=2.0, delta=1e-6)
  accountant = pld.PLDAccountant()
  event = dp_accounting.GaussianDpEvent(randomizer.multiplier)
  accountant.compose(event, reports)
  expected = accountant.get_epsilon(0.999e-6)
  found = local.composed(randomizer, reports)
  assert found <= expected
  assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("reports", [1, 2, 30])
def test_other_reports_compose_like_randomised_responses(epsilon, reports):
  randomizer = registry.RANDOMIZERS["privunit"](1.0, epsilon=epsilon)
  assert local.guarantee(randomizer) == (epsilon, 0)
  assert local.composed(randomizer, reports) == reports * epsilon
  delta = 1e-4
  accountant = pld.PLDAccountant(dp_accounting.NeighboringRelation.REPLACE_ONE)
  noise = 2 / (1 + math.exp(epsilon))  # a lie of two answers is half of it
  event = dp_accounting.dp_event.RandomizedResponseDpEvent(noise, 2)
  for _ in range(reports):  # of dp-accounting 0.6 a count would be lost
    accountant.compose(event)
  found = local.composed(randomizer, reports, delta)
  assert found == pytest.approx(accountant.get_epsilon(delta), abs=5e-3)
  assert found <= reports * epsilon


def test_laplace_noise_is_no_worse_than_that():
  randomizer, reports, delta = additive.laplace(1.0, epsilon=1.0), 20, 1e-5
  accountant = pld.PLDAccountant()
  accountant.compose(dp_accounting.LaplaceDpEvent(1.0), reports)
  assert local.composed(randomizer, reports, delta) >= accountant.get_epsilon(
    delta
  )


def test_the_ends_of_noise_cost_a_delta():
  """Laplace's are told, and what cannot be served is refused."""
  randomizer = additive.laplace(1.0, epsilon=1.0)
  assert local.guarantee(randomizer)[0] == pytest.approx(1.0)
  assert local.guarantee(randomizer)[1] == 1e-11
  assert local.composed(randomizer, 3) == pytest.approx(3.0)
  assert local.composed(randomizer, 3, 1e-11) == math.inf
  assert "epsilon 3 at delta 3e-11 for the 3" in local.sentence(randomizer, 3)
  with pytest.raises(ValueError, match=r"epsilon=20.0 .*<= 18"):
    additive.laplace(1.0, epsilon=20.0)
  # Of Gaussian noise many reports show more of its ends than one.
  noisy = additive.gaussian(1.0, stddev=400.0, delta=1e-8)
  assert local.composed(noisy, 1, numbers=300_000_000) < math.inf
  assert local.composed(noisy, 10_000, numbers=300_000_000) == math.inf
  task = quadratic(2)
  little = additive.gaussian(1.0, stddev=0.4, delta=1e-6)
  with pytest.raises(ValueError, match=r"local_privacy.delta=1e-06: .*least"):
    make_simulator(
      task,
      local.with_local_dp(of_weights(task), little),
      quadratic_data(CENTRES),
      batching=LocalBatching(batch_size=1),
    ).init()


def test_sentences():
  noisy = additive.gaussian(1.0, epsilon=2.0, delta=1e-6)
  many = local.composed(noisy, 40)
  assert local.sentence(noisy, 40) == (
    "epsilon 2 at delta 1e-06 for a report, epsilon"
    f" {rounded_up(many):g} at delta 1e-06 for the 40 of a client"
  )
  clip = additive.clip_only(1.0)
  assert local.composed(clip, 5) == math.inf
  assert local.sentence(clip, 5).endswith("clip alone guarantees nothing")


# --- rounds -------------------------------------------------------------------

CENTRES = np.array([[3.0, 4.0], [0.3, -0.4], [-6.0, 8.0], [0.0, 0.2]])
WEIGHTS = np.array([1.0, 2.0, 3.0, 9.0])


def of_weights(task):
  """FedAvg whose first step goes to a client's centre; weights that differ."""
  base = fedavg(task, sgd(1.0), sgd(1.0))

  def finish(client, carry):
    report = base.finish(client, carry)
    weight = jnp.asarray(WEIGHTS, jnp.float32)[client.id]
    return report._replace(weight=weight, values={"secret": weight})

  return base._replace(finish=finish)


@pytest.mark.parametrize(
  ("lanes", "devices", "late"),
  slow_but([(3, 2, True)], [(1, 1, False), (3, 2, True)]),
)
def test_a_round_is_the_mean_of_what_clients_send(lanes, devices, late):
  task = quadratic(2)
  randomizer = additive.gaussian(2.0, stddev=2.5, delta=1e-5, max_weight=4.0)
  algorithm = local.with_local_dp(of_weights(task), randomizer)
  seen = {}

  def apply(server, aggregate, context):
    seen["values"] = aggregate.members.values
    return apply_inner(server, aggregate, context)

  apply_inner = algorithm.apply
  algorithm = algorithm._replace(apply=apply)
  if late:  # everybody is, by a round
    algorithm = stale(algorithm, 1.0)
  simulator = make_simulator(
    task,
    algorithm,
    quadratic_data(CENTRES),
    batching=LocalBatching(batch_size=1),
    lanes=lanes,
    devices=devices,
  )
  outs = list(simulator.run(simulator.init(), 2))
  sent = []
  for i, centre in enumerate(CENTRES):
    key = noise_key_for(jnp.zeros(2, jnp.uint32), Purpose.CLIENT, 0, i)
    update = {"w": jnp.asarray(centre, jnp.float32)}
    weight = jnp.float32(WEIGHTS[i])
    sent.append(
      randomizer.apply(update, weight, traced(randomizer.hparams), key)
    )
  weights = np.array([float(w) for _, w in sent])
  updates = np.array([u["w"] for u, _ in sent])
  np.testing.assert_allclose(
    params_of(simulator, outs[1 if late else 0].state)["w"],
    weights @ updates / weights.sum(),
    rtol=1e-4,
    atol=1e-5,
  )
  assert simulator.compilations == 1
  assert seen["values"] == {}


def test_bounds_and_noise_are_hyper_parameters():
  task = quadratic(2)
  randomizer = additive.gaussian(1.0, stddev=1.0, delta=1e-5)
  simulator = make_simulator(
    task,
    local.with_local_dp(of_weights(task), randomizer),
    quadratic_data(CENTRES),
    batching=LocalBatching(batch_size=1),
  )
  state = simulator.init()
  for norm in (0.5, 2.0):
    own = {"local_privacy": {"clip_norm": norm, "stddev": 0.0}}
    out = simulator.dispatch(
      state, simulator.plan(0, 1), hparams_of(simulator, **own)
    )
    lengths = np.linalg.norm(CENTRES, axis=1, keepdims=True)
    np.testing.assert_allclose(
      params_of(simulator, out.state)["w"],
      np.mean(CENTRES * np.minimum(1, norm / lengths), axis=0),
      rtol=1e-5,
    )
  assert simulator.compilations == 1


CURVATURES = np.array([0.9, 0.5, 0.2, 0.7])
BETA, ZERO = 0.3, 1.5


def softmax_of_losses(randomizer, weighting="softmax", **options):
  """One round of DGA on a quadratic: after a step, w is a * centre."""
  task = quadratic(2)
  made = dga(
    task, sgd(1.0), sgd(1.0), beta=BETA, reference=ZERO, weighting=weighting
  )
  return make_simulator(
    task,
    local.with_local_dp(made, randomizer),
    quadratic_data(CENTRES, CURVATURES),
    batching=LocalBatching(batch_size=1),
    **options,
  )


@pytest.mark.parametrize(
  ("lanes", "devices"), slow_but([(3, 2)], [(1, 1), (3, 2)])
)
def test_dgas_softmax_sends_noisy_weights_and_updates(lanes, devices):
  """As FLUTE does: noise on both, the weight within its range again."""
  most, least = 1.4, 0.2
  randomizer = additive.gaussian(
    2.0, stddev=2.5, delta=1e-5, max_weight=most, min_weight=least
  )
  simulator = softmax_of_losses(randomizer, lanes=lanes, devices=devices)
  start = simulator.init()
  out = simulator.dispatch(start, simulator.plan(0, 1), simulator.hparams)
  losses = 0.5 * CURVATURES * np.sum(CENTRES**2, axis=1)
  exact = np.exp(-BETA * (losses - ZERO))
  assert exact.min() < least < most < exact.max()
  weights, updates = [], []
  for i, centre in enumerate(CENTRES):
    key = noise_key_for(jnp.zeros(2, jnp.uint32), Purpose.CLIENT, 0, i)
    update, weight = randomizer.apply(
      {"w": jnp.asarray(CURVATURES[i] * centre, jnp.float32)},
      jnp.float32(exact[i]),
      traced(randomizer.hparams),
      key,
    )
    weights.append(float(weight))
    updates.append(np.asarray(update["w"], np.float64))
  np.testing.assert_allclose(
    params_of(simulator, out.state)["w"],
    np.array(weights) @ np.array(updates) / np.sum(weights),
    rtol=1e-4,
    atol=1e-5,
  )
  assert jax.tree.leaves(out.state.server.reference) == []


def test_no_two_clients_of_dga_are_further_apart_than_the_noise_allows():
  """By brute force: what clients of all sizes send, but for the noise."""
  scale, most, clip = 1.7, 3.0, 0.5
  randomizer = additive.gaussian(
    clip, stddev=1.0, delta=1e-5, max_weight=most, weight_scale=scale
  )
  lengths = np.geomspace(1e-12, 1e12, 25)[:, None]
  angles = np.random.default_rng(0).uniform(0, np.pi, 25)
  centres = lengths * np.stack([np.cos(angles), np.sin(angles)], axis=-1)
  centres = np.concatenate([centres, -centres]).astype(np.float32)
  task = quadratic(2)
  made = dga(task, sgd(1.0), sgd(1.0), reference=0.0)
  made = local.with_local_dp(made, randomizer)
  server = made.init(KEY, traced(made.hparams))

  @jax.jit
  def sent(centre, hparams):
    client = Client(
      message=made.broadcast(server),
      state=(),
      hparams=hparams,
      id=jnp.int32(0),
      version=jnp.int32(0),
      num_examples=jnp.int32(1),
      num_steps=jnp.ones(1, jnp.int32),
      round=jnp.int32(0),
      key=KEY,
      noise_key=KEY,
    )
    batch = Batch({"x": centre[None], "a": jnp.ones(1)}, jnp.ones(1, bool))
    (walk,) = made.passes
    report = made.finish(
      client, walk.step(client, walk.start(client), batch, KEY)
    )
    report = made.postprocess_report(client, report)
    assert report.statistics == report.buffers == ()
    assert report.values == {}
    return report.update["w"], report.weight

  farthest = 0.0
  for beta, reference in ((0.7, 0.0), (-0.7, 0.0), (1e3, 9.0), (0.1, -50.0)):
    hparams = traced({**made.hparams, "beta": beta, "reference": reference})
    free = {"stddev": jnp.float32(0), "min_weight": jnp.float32(0)}
    hparams["local_privacy"] |= free
    updates, weights = jax.vmap(sent, in_axes=(0, None))(centres, hparams)
    reports = np.column_stack([updates / clip, weights * (scale / most)])
    gaps = reports[:, None].astype(np.float64) - reports[None]
    farthest = max(farthest, np.linalg.norm(gaps, axis=-1).max())
  assert randomizer.multiplier is not None
  assert farthest <= (1 + 1e-6) / randomizer.multiplier
  assert farthest > 1.1 * 2  # the weight is a part of it
  assert 1 / randomizer.multiplier == pytest.approx(math.hypot(2, scale))


def test_algorithms_that_send_more_are_refused():
  task = quadratic(2)
  clip = additive.clip_only(1.0)
  with pytest.raises(ValueError, match="'clip' .* every update by itself"):
    local.with_local_dp(fedlaw(task, sgd(1.0), sgd(1.0)), clip)
  with pytest.raises(ValueError, match="'clip': .* everybody's data at once"):
    local.with_local_dp(centralized(task, sgd(1.0)), clip)
  data = quadratic_data(CENTRES)
  algorithm = local.with_local_dp(dga(task, sgd(1.0), sgd(1.0)), clip)
  with pytest.raises(
    ValueError, match=r"send statistics, too; set .*reference"
  ):
    make_simulator(task, algorithm, data).init()
  with pytest.raises(ValueError, match=r"weigh 1, and .* set .*max_weight"):
    local.with_local_dp(
      dga(task, sgd(1.0), sgd(1.0)), additive.laplace(1.0, epsilon=1.0)
    )
  few = blobs([3, 4], 4, 3)
  labelled = MODELS["lr"](few)
  algorithm = local.with_local_dp(fedlabels(labelled, sgd(1.0), sgd(1.0)), clip)
  with pytest.raises(ValueError, match=r"send statistics, too; set it to None"):
    make_simulator(labelled, algorithm, with_few_labels(few, 0.5)).init()

  def init(key):
    return Variables({"w": jnp.zeros(2)}, buffers={"mean": jnp.zeros(2)})

  norms = task._replace(init=init)
  algorithm = local.with_local_dp(fedavg(norms, sgd(1.0), sgd(1.0)), clip)
  with pytest.raises(ValueError, match=r"send buffers, .* model\.send_buffers"):
    make_simulator(norms, algorithm, data).init()


# --- configs ------------------------------------------------------------------

MECHANISMS = {
  "clip": {},
  "gaussian": {"epsilon": 8.0, "delta": 1e-5, "max_weight": 20.0},
  "laplace": {"epsilon": 8.0},
  "privunit": {"epsilon": 8.0},
}


def digits(**fields):
  source = default_config()
  source.data.num_clients = 12
  source.server.clients_per_round = 6
  source.runtime.lanes = 2
  source.runtime.devices = 2
  for field, value in fields.items():
    source.local_privacy[field] = value
  return source


@pytest.mark.parametrize(
  "name",
  [
    "gaussian",
    "privunit",
    *(pytest.param(x, marks=pytest.mark.slow) for x in ("clip", "laplace")),
  ],
)
def test_digits_on_two_devices(name):
  if jax.device_count() < 2:
    pytest.skip("needs 2 devices")
  source = digits(mechanism=name, clip_norm=0.5, **MECHANISMS[name])
  simulator = build(source).simulator
  state = simulator.init()
  before = params_of(simulator, state)
  for out in simulator.run(state, 3):
    state = out.state
  after = params_of(simulator, state)
  assert simulator.compilations == 1
  assert np.isfinite(flat(after)).all()
  assert np.abs(flat(after) - flat(before)).max() > 0


def test_weights_by_data_are_sent_or_refused():
  own = {"mechanism": "gaussian", "clip_norm": 1.0, "epsilon": 8.0}
  source = digits(**own, delta=1e-5)
  source.algorithm.weighting = "examples"
  with pytest.raises(ValueError, match=r"weighting='examples': .* weighs 1"):
    build(source)
  source.algorithm.weighting = "uniform"
  assert build(source).local_guarantee
  source.algorithm.name, source.algorithm.weighting = "dga", None
  with pytest.raises(ValueError, match=r"weighs 1; .*max_weight"):
    build(source)
  source.local_privacy.max_weight = 1.0
  with pytest.raises(
    ValueError, match=r"too; set algorithm\.reference, such as"
  ):
    build(source)
  source.algorithm.reference = 0.0
  report = additive.gaussian(1.0, epsilon=8.0, delta=1e-5, max_weight=1.0)
  assert build(source).local_guarantee == local.sentence(report, 100)


@pytest.mark.parametrize(
  ("fields", "error", "match"),
  [
    (
      {"mechanism": "gauss"},
      validate.UnknownNameError,
      r"mechanism='gauss' .*mean 'gaussian'",
    ),
    ({"clip_norm": 1.0}, ValueError, r"clip_norm=1.0: nothing takes it"),
    (
      {"mechanism": "gaussian", "clip_norm": 1.0, "epsilon": 1.0},
      ValueError,
      r"'gaussian' lacks the argument 'local_privacy\.delta'",
    ),
    (
      {"mechanism": "laplace", "epsilon": 1.0},
      ValueError,
      r"'laplace' lacks the argument 'local_privacy\.clip_norm'",
    ),
    (
      {"mechanism": "laplace", "clip_norm": 1.0, "epsilon": 1.0, "delta": 0.1},
      validate.UnknownNameError,
      r"does not take 'local_privacy\.delta'",
    ),
    (
      {
        "mechanism": "gaussian",
        "clip_norm": 1.0,
        "epsilon": 1.0,
        "stddev": 1.0,
        "delta": 1e-5,
      },
      ValueError,
      r"epsilon=1.0 and local_privacy\.stddev=1.0: give one",
    ),
    (
      {"mechanism": "gaussian", "clip_norm": 1.0, "delta": 1e-5},
      ValueError,
      r"epsilon=None and local_privacy\.stddev=None: give one",
    ),
    (
      {
        "mechanism": "laplace",
        "clip_norm": 1.0,
        "epsilon": 1.0,
        "min_weight": 1.0,
      },
      ValueError,
      r"min_weight=1.0: every client weighs 1; set .*max_weight",
    ),
    (
      {
        "mechanism": "laplace",
        "clip_norm": 1.0,
        "epsilon": 1.0,
        "max_weight": 1.0,
        "min_weight": 2.0,
      },
      ValueError,
      r"min_weight=2.0 is out of range",
    ),
    (
      {"mechanism": "privunit", "clip_norm": 1.0, "epsilon": 1e5},
      ValueError,
      r"epsilon=100000.0 is out of range",
    ),
  ],
)
def test_configs_that_are_refused(fields, error, match):
  with pytest.raises(error, match=match):
    build(digits(**fields))


def test_a_config_of_statistics_is_refused_before_anything_is_compiled():
  source = digits(mechanism="clip", clip_norm=1.0)
  source.algorithm.name = "dga"
  with pytest.raises(ValueError, match="send statistics, too"):
    build(source)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_keeps_within_the_bound(dtype):
  update = {"w": jax.random.normal(jax.random.key(0), (1000,)).astype(dtype)}
  randomizer = additive.clip_only(1.0)
  hparams = jax.tree.map(jnp.float32, randomizer.hparams)
  sent, _ = randomizer.apply(update, jnp.float32(1), hparams, jax.random.key(1))
  assert np.linalg.norm(np.asarray(sent["w"], np.float64)) <= 1
