"""FLUTE's numbers: each row of the converter in docs/flute.md, in numpy.

A row says how a number of a FLUTE config becomes one here. FLUTE's arithmetic
is written down in float64, as its code has it, and compared with what ours does
with the converted number.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim import aggregators
from fedjax_sim.algorithms.apfl import Own, apfl
from fedjax_sim.algorithms.dga import dga
from fedjax_sim.algorithms.dga_rl import dga_rl
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.algorithms.fedprox import fedprox
from fedjax_sim.core import Batch, Client, Loss, Metric, Task, Variables
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.privacy import local
from fedjax_sim.privacy.central import CentralDPConfig, with_central_dp
from fedjax_sim.privacy.leakage.measurement import log_ratio
from fedjax_sim.privacy.local import additive
from fedjax_sim.tasks import function_task
from fedjax_sim.training.optimizers import clipped
from fedjax_sim.training.replay import replay
from fedjax_sim.training.stale import stale
from fedjax_sim.transforms import quantize
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

KEY = jax.random.key(0)
CENTRES = np.array([[1.0, 2.0], [-1.0, 0.5], [3.0, -2.0], [0.0, 4.0]])
CURVATURES = np.array([1.0, 0.5, 0.25, 0.8])


def traced(hparams):
  return jax.tree.map(jnp.float32, hparams)


# --- DGA ----------------------------------------------------------------------

RATE = 0.5


def client_of_flute(centre, a, examples, batch):
  """A round of plain SGD: the update, sum of mean losses, all gradients."""
  w, loss, gradients = np.zeros(2), 0.0, []
  for _ in range(examples // batch):
    loss += 0.5 * a * np.sum((w - centre) ** 2)
    gradients.append(a * (w - centre))
    w = w - RATE * gradients[-1]
  return w, loss, np.array(gradients)


def statistic_of_flute(name, loss, gradients, examples, smooth):
  """`training_weight` of dga.py, from sums over the round's gradients."""
  if name == "train_loss":
    return loss / examples
  g = RATE * gradients.sum(0) if smooth else gradients
  mean, squares = g.mean(), (g**2).mean()
  magnitude = np.sqrt(squares)
  statistics = {"mag_mean_loss": mean, "mag_var_loss": squares - magnitude**2}
  return statistics.get(name, magnitude)


EXAMPLES, STEPS = 6, 3


@pytest.mark.parametrize(
  ("flute", "smooth", "batch", "ours", "divisor"),
  [
    ("train_loss", False, 2, "loss", 2),  # the batch size
    ("mag_mean_loss", False, 2, "mean", RATE * STEPS),
    ("mag_mean_loss", True, 2, "mean", 1),
    ("mag_loss", False, EXAMPLES, "magnitude", RATE),  # one step
    ("mag_loss", True, 2, "magnitude", 1),
    ("mag_var_loss", False, 2, "variance", math.inf),  # it is always 0
  ],
)
def test_softmax_beta(flute, smooth, batch, ours, divisor):
  softmax_beta = 1.7
  total, weights = np.zeros(2), 0.0
  for centre, a in zip(CENTRES, CURVATURES, strict=True):
    update, loss, gradients = client_of_flute(centre, a, EXAMPLES, batch)
    s = statistic_of_flute(flute, loss, gradients, EXAMPLES, smooth)
    weight = math.exp(-softmax_beta * s)
    assert weight < 100
    total, weights = total + weight * update, weights + weight
  task = quadratic(2)
  simulator = make_simulator(
    task,
    dga(task, sgd(RATE), sgd(1.0), statistic=ours, beta=softmax_beta / divisor),
    quadratic_data(CENTRES, CURVATURES, copies=EXAMPLES),
    batching=LocalBatching(batch_size=batch),
  )
  after = params_of(simulator, train(simulator, 1))["w"]
  np.testing.assert_allclose(after, total / weights, rtol=1e-5, atol=1e-6)


def round_of_flute(name, softmax_beta, examples, batch, clip):
  """A round of DGA at 0 in float64, with the last batch in part: the model."""
  total, weights = np.zeros(2), 0.0
  for centre, a in zip(CENTRES, CURVATURES, strict=True):
    w, loss, gradients = np.zeros(2), 0.0, []
    for _ in range(0, examples, batch):
      loss += 0.5 * a * np.sum((w - centre) ** 2)
      gradient = a * (w - centre)
      norm = np.linalg.norm(gradient)
      gradients.append(gradient * min(1, clip / norm))
      w = w - RATE * gradients[-1]
    s = statistic_of_flute(name, loss, np.array(gradients), examples, False)
    weight = math.exp(-softmax_beta * s)
    total, weights = total + weight * w, weights + weight
  return total / weights


@pytest.mark.parametrize("clip", [1e6, 0.7])
@pytest.mark.parametrize(
  ("flute", "ours"),
  [
    ("train_loss", "loss"),
    ("mag_mean_loss", "mean"),
    ("mag_loss", "magnitude"),
  ],
)
def test_statistics_of_batches(flute, ours, clip):
  """`statistic_of="batches"` takes softmax_beta as it is."""
  softmax_beta, examples, batch = 1.7, 5, 2
  task = quadratic(2)
  simulator = make_simulator(
    task,
    dga(
      task,
      clipped(sgd(RATE), clip),
      sgd(1.0),
      statistic=ours,
      statistic_of="batches",
      beta=softmax_beta,
      reference=0.0,
    ),
    quadratic_data(CENTRES, CURVATURES, copies=examples),
    batching=LocalBatching(batch_size=batch),
  )
  found = params_of(simulator, train(simulator, 1))["w"]
  expected = round_of_flute(flute, softmax_beta, examples, batch, clip)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


# --- FedProx, APFL, replay, late clients --------------------------------------


def two_arrays() -> Task:
  """|u - x|^2 / 2 + |v - x|^2 / 2: what happens to one is not the other's."""

  def loss(params, examples):
    gaps = [params[k][None] - examples["x"] for k in ("u", "v")]
    return 0.5 * sum(jnp.sum(gap**2, axis=-1) for gap in gaps)

  return function_task(lambda key: {k: jnp.zeros(2) for k in "uv"}, loss)


def test_mu():
  """FLUTE adds a running sum: of P arrays the i-th counts P - i times."""
  mu, rate, arrays = 0.4, 0.25, 2
  (centre,) = CENTRES[:1]
  expected = []
  for i in range(arrays):
    w = np.zeros(2)
    for _ in range(STEPS):
      w = w - rate * (w - centre + mu * (arrays - i) * w)
    expected.append(w)
  task = two_arrays()
  simulator = make_simulator(
    task,
    fedprox(task, sgd(rate), sgd(1.0), mu=mu),
    quadratic_data([centre], copies=STEPS),
    batching=LocalBatching(batch_size=1),
  )
  last = params_of(simulator, train(simulator, 1))["v"]
  np.testing.assert_allclose(last, expected[1], rtol=1e-5)
  more = hparams_of(simulator, mu=mu * arrays)
  first = params_of(simulator, train(simulator, 1, more))["u"]
  np.testing.assert_allclose(first, expected[0], rtol=1e-5)
  assert np.abs(expected[0] - expected[1]).max() > 0.05
  running = make_simulator(
    task,
    fedprox(task, sgd(rate), sgd(1.0), mu=mu, cumulative=True),
    quadratic_data([centre], copies=STEPS),
    batching=LocalBatching(batch_size=1),
  )
  found = params_of(running, train(running, 1))
  for name, value in zip("uv", expected, strict=True):
    np.testing.assert_allclose(found[name], value, rtol=1e-5)


def alpha_of_flute(one, other, slopes, alpha, rate):
  """`alpha_update(model_global, model_personal)`, for two flat models."""
  slope = (other - one) @ (alpha * slopes[1] + (1 - alpha) * slopes[0])
  return np.clip(alpha - rate * (slope + 0.02 * alpha), 0.0001, 0.9999)


def test_convex_model_interp():
  """A first alpha carries over; of a step neither sign nor shares do."""
  alpha, rate, centre = 0.3, 0.05, CENTRES[3]
  v, w = np.array([0.5, 1.0]), np.array([-1.0, 2.0])
  task = quadratic(2)
  made = apfl(task, sgd(0.1), sgd(1.0), alpha=alpha, alpha_rate=rate)

  @jax.jit
  def moved(v, w, hparams):
    client = Client(
      message=Variables({"w": w}),
      state=Own({"w": v}, (), hparams["alpha"], jnp.ones((), bool)),
      hparams=hparams,
      id=jnp.int32(0),
      version=jnp.int32(0),
      num_examples=jnp.int32(1),
      num_steps=jnp.ones(1, jnp.int32),
      round=jnp.int32(1),
      key=KEY,
      noise_key=KEY,
    )
    (walk,) = made.passes
    example = {"x": jnp.asarray(centre, jnp.float32)[None], "a": jnp.ones(1)}
    batch = Batch(example, jnp.ones(1, bool))
    return walk.step(client, walk.start(client), batch, KEY).own.alpha

  found = float(moved(jnp.float32(v), jnp.float32(w), traced(made.hparams)))
  slopes = np.array([w - centre, v - centre])  # linear: those of the mixture
  decay = rate * 0.02 * alpha
  paper = alpha_of_flute(w, v, slopes, alpha, rate) + decay
  assert found == pytest.approx(paper, rel=1e-5)
  called = alpha_of_flute(v, w, slopes[::-1], alpha, rate)  # client.py:441
  swapped = alpha + rate * (v - w) @ (alpha * slopes[0] + 0.7 * slopes[1])
  assert called == pytest.approx(swapped - decay)
  assert (called - alpha) * (found - alpha) < 0


@pytest.mark.parametrize("server_iterations", [5, 100])
def test_server_iterations(server_iterations):
  """A number of examples, of one epoch at most; the step that passes counts."""
  batch, own, rate = 4, 12, 0.25
  target = np.array([6.0, 1.0])
  w, seen = CENTRES.mean(0), 0
  for _ in range(own // batch):
    if seen < server_iterations:
      w, seen = w - rate * (w - target), seen + batch
  steps = math.ceil(min(server_iterations, own) / batch)
  task = quadratic(2)
  server: dict[str, np.ndarray] = {
    "x": np.tile(target, (own, 1)).astype(np.float32),
    "a": np.ones(own, np.float32),
  }
  data = dataclasses.replace(quadratic_data(CENTRES), server=server)
  inner = fedavg(task, sgd(1.0), sgd(1.0))
  simulator = make_simulator(
    task,
    replay(inner, task, sgd(rate), steps=steps, batch_size=batch),
    data,
    batching=LocalBatching(batch_size=1),
  )
  found = params_of(simulator, train(simulator, 1))["w"]
  np.testing.assert_allclose(found, w, rtol=1e-5)


def test_stale_prob():
  """What is late comes with its weight, and those on time with theirs."""
  task = quadratic(2)
  simulator = make_simulator(
    task,
    stale(fedavg(task, sgd(RATE), sgd(1.0)), 1.0),
    quadratic_data(CENTRES, copies=1),
    batching=LocalBatching(batch_size=1),
  )
  found = params_of(simulator, train(simulator, 2))["w"]
  late = RATE * CENTRES  # of the first round, from 0; FLUTE divides by 0 there
  np.testing.assert_allclose(found, late.mean(0), rtol=1e-5)


def test_initial_epsilon():
  """FLUTE multiplies, and stops before it would fall below `final_epsilon`."""
  epsilon, gamma = 0.4, 0.5
  task = with_loss_metric(quadratic(2))
  server = {
    "x": CENTRES[:1].astype(np.float32),
    "a": np.ones(1, np.float32),
  }
  data = dataclasses.replace(quadratic_data(CENTRES), server=server)
  made = dga_rl(
    task,
    sgd(RATE),
    sgd(1.0),
    metric="loss",
    epsilon=epsilon,
    epsilon_decay=gamma,
    epsilon_least=0.0,
  )
  simulator = make_simulator(
    task,
    made,
    data,
    batching=LocalBatching(batch_size=1),
    aggregator=aggregators.stack(),
  )
  found = float(train(simulator, 3).server.epsilon)
  for _ in range(3):
    epsilon *= gamma if epsilon * gamma > 0.01 else 1.0
  assert found == pytest.approx(epsilon)


def with_loss_metric(task):
  """The task, with its loss as a metric."""

  def metrics(variables, examples):
    value, weight, _ = task.loss(variables, examples, KEY)
    return {"loss": Metric(value, weight)}

  return task._replace(metrics=metrics)


# --- quantization and leakage -------------------------------------------------


def quantised_by_flute(g, bits, threshold):
  """quant.py: `linspace`, `bucketize` from the right end, a quantile."""
  levels = np.linspace(g.min(), g.max(), 2**bits)
  width = levels[1] - levels[0]
  rounded = levels[np.searchsorted(levels, g - 0.5 * width, side="left")]
  return np.where(np.abs(g) > np.quantile(np.abs(g), threshold), rounded, 0)


@pytest.mark.parametrize("bits", [2, 10])
def test_quant_thresh_and_quant_anneal(bits):
  """It is annealed before the first round, here after it."""
  threshold, anneal = 0.8, 0.9
  g = np.random.default_rng(1).normal(size=200).astype(np.float32)
  ours = quantize(threshold * anneal, bits, anneal)
  apply = jax.jit(ours.apply)
  shared, flutes = ours.init({}, ours.hparams), threshold
  for _ in range(3):
    flutes *= anneal
    update, _, aux, *_ = apply({"w": g}, shared, (), traced(ours.hparams), KEY)
    expected = quantised_by_flute(g.astype(np.float64), bits, flutes)
    np.testing.assert_allclose(update["w"], expected, rtol=1e-5, atol=1e-6)
    shared = ours.update(shared, aux, ours.hparams)


def leakage_of_flute(before, after, tolerance=1e-9):
  """metrics.py without weights: the log of a ratio of log-probabilities."""
  ratio = (before + tolerance) / (after + tolerance)
  return max(np.log(np.clip(ratio, 0, 1e9).max()), 0)


@pytest.mark.parametrize("most", [0.2, 1.0, 3.0])
def test_max_allowed_leakage(most):
  """Of words with the loss h before, none of which gets less likely."""

  def loss(variables, examples):
    return Metric(variables.params["h"][examples["x"]], jnp.ones(len(h)))

  h = np.full(5, 2.3)
  task = Task(
    init=lambda key: Variables({"h": jnp.float32(h)}),
    loss=lambda variables, examples, key: Loss(*loss(variables, examples)),
    metrics=lambda variables, examples: {"loss": loss(variables, examples)},
  )
  threshold = 2.3 * (1 - math.exp(-most))
  rng = np.random.default_rng(2)
  outcomes = set()
  for least in (0.02, 0.5, 0.95):
    after = h * rng.uniform(least, 1, 5)
    was, then = (Variables({"h": jnp.float32(x)}) for x in (h, after))
    ours = np.max(log_ratio(task, was, then, {"x": jnp.arange(5)}))
    flutes = leakage_of_flute(-h, -after)
    assert (ours > threshold) == (flutes > most)
    outcomes.add(bool(ours > threshold))
    assert ours == pytest.approx(2.3 * (1 - math.exp(-flutes)), rel=1e-4)


# --- privacy ------------------------------------------------------------------


@pytest.mark.parametrize("scaler", [1.0, 20.0])
def test_local_dp(scaler):
  """`apply_local_dp` of a softmax's weight: one sigma for both."""
  eps, delta, max_grad, max_weight, min_weight = 4.0, 1e-5, 2.0, 0.5, 0.01
  length = math.hypot(max_grad, max_weight)
  sigma = math.sqrt(2 * math.log(1.25 / delta)) * length / eps
  randomizer = additive.gaussian(
    max_grad,
    delta=delta,
    stddev=sigma / max_grad,
    max_weight=max_weight / scaler,
    min_weight=min_weight / scaler,
    weight_scale=max_weight / max_grad,
  )
  draws, size = 4000, 5
  update = np.full(size, max_grad / math.sqrt(size))  # max_grad long
  weight = 0.7 * max_weight / scaler
  apply = jax.jit(jax.vmap(randomizer.apply, in_axes=(None, None, None, 0)))
  sent, weights = apply(
    {"w": jnp.float32(update)},
    jnp.float32(weight),
    traced(randomizer.hparams),
    jax.random.split(KEY, draws),
  )
  noise = np.asarray(sent["w"], np.float64) - update
  assert noise.std() == pytest.approx(sigma, rel=0.03)
  rng = np.random.default_rng(3)
  scaled = min(max_weight, scaler * weight) + sigma * rng.normal(size=10**5)
  flutes = np.clip(scaled, min_weight, max_weight) / scaler
  for ours, theirs in (
    (weights.min(), flutes.min()),
    (weights.max(), flutes.max()),
  ):
    assert ours == pytest.approx(theirs, rel=1e-5)
  share = lambda x, end: np.mean(np.isclose(x, end, rtol=1e-5))
  for end in (flutes.min(), flutes.max()):
    assert share(weights, end) == pytest.approx(share(flutes, end), abs=0.03)
  # Two reports are up to twice as far apart as FLUTE's eps supposes.
  assert local.guarantee(randomizer)[0] > 1.1 * eps


def test_global_sigma():
  """`apply_global_dp`: sigma max_grad / clients, on the mean."""
  sigma, max_grad, clients, size = 3.0, 0.5, 4, 4000
  task = quadratic(size)
  private = with_central_dp(
    fedavg(task, sgd(1.0), sgd(1.0), weighting="uniform"),
    CentralDPConfig(
      clip_norm=max_grad, noise_multiplier=sigma, denominator=float(clients)
    ),
  )
  simulator = make_simulator(
    task, private, quadratic_data(np.zeros((clients, size)))
  )
  noise = flat(params_of(simulator, train(simulator, 1)))
  assert noise.std() == pytest.approx(sigma * max_grad / clients, rel=0.05)
