"""FedPer, FedRep, FedBN and LG-FedAvg against their papers, in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim import aggregators, sampling
from fedjax_sim.algorithms.fedbn import fedbn, normalization_layers
from fedjax_sim.algorithms.fedper import fedper
from fedjax_sim.algorithms.fedrep import fedrep
from fedjax_sim.algorithms.lg_fedavg import lg_fedavg
from fedjax_sim.algorithms.private_parameters import split_variables
from fedjax_sim.core import Loss, Metric, Task, Variables
from fedjax_sim.core.tree import paths_of
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.engine.traffic import report_shapes, traffic
from fedjax_sim.models.resnet import resnet
from fedjax_sim.privacy.central import CentralDPConfig, with_central_dp
from fedjax_sim.tasks import function_task
from fedjax_sim.training.optimizers import by_layer, optimizer
from fedjax_sim.transforms import quantize
from fedjax_sim.transforms.error_feedback import error_feedback
from logistic import DATA, DIM, OFFSETS, SIZES, WORK, X, Y, batches, cohort
from problems import make_simulator, quadratic, sgd, train
from tiers import slow_but

ETA, ROUNDS, HEAD_EPOCHS = 0.3, 4, 3
FIRST = np.array([0.3, -0.2, 0.1, 0.4])


def _loss(params, examples):
  head = params["head"]
  logit = head["scale"] * (examples["x"] @ params["body"]) + head["bias"]
  return jax.nn.softplus(logit) - examples["y"] * logit


BILINEAR = function_task(
  lambda key: {
    "body": jnp.asarray(FIRST),
    "head": {"bias": jnp.zeros(()), "scale": jnp.ones(())},
  },
  _loss,
)


def simulate(algorithm, rounds=ROUNDS, task=BILINEAR, **options):
  sampler = sampling.Sampler(
    sample=lambda seed, r: np.array(cohort(r)), sizes=(3,), expected=3.0
  )
  options = {"batching": WORK, "sampler": sampler, "lanes": 2, **options}
  simulator = make_simulator(task, algorithm, DATA, **options)
  return simulator, train(simulator, rounds)


def gradient(body, head, rows):
  """With respect to the body and (bias, scale)."""
  x, y = X[rows].astype(np.float64), Y[rows].astype(np.float64)
  inner = x @ body
  slope = 1 / (1 + np.exp(-(head[1] * inner + head[0]))) - y
  return (
    head[1] * slope @ x / len(rows),
    np.array([slope.mean(), (slope * inner).mean()]),
  )


def by_hand(local, shares_body=True):
  """The shared part, and every client's private one."""
  parts = [FIRST.copy(), np.array([0.0, 1.0])]
  shared, private = parts if shares_body else parts[::-1]
  own = [private.copy() for _ in SIZES]
  for r in range(ROUNDS):
    updates = []
    for k in cohort(r):
      after, own[k] = local(k, shared.copy(), own[k])
      updates.append(after - shared)
    shared = shared + np.average(updates, axis=0, weights=SIZES[cohort(r)])
  return shared, np.stack(own)


def together(k, body, head):
  for rows in batches(k):
    slopes = gradient(body, head, rows)
    body, head = body - ETA * slopes[0], head - ETA * slopes[1]
  return body, head


def alternating(k, body, head):
  epoch = batches(k)[: len(batches(k)) // WORK.epochs]
  for rows in epoch * HEAD_EPOCHS:
    head = head - ETA * gradient(body, head, rows)[1]
  for rows in batches(k):
    body = body - ETA * gradient(body, head, rows)[0]
  return body, head


def head_first(k, head, body):
  return together(k, body, head)[::-1]


HEAD, BODY = ("head/",), ("body",)
CASES = {
  "fedper": (
    lambda: fedper(BILINEAR, sgd(ETA), sgd(1.0), private=HEAD),
    lambda: by_hand(together),
  ),
  "fedrep": (
    lambda: fedrep(
      BILINEAR, sgd(ETA), sgd(1.0), private=HEAD, head_epochs=HEAD_EPOCHS
    ),
    lambda: by_hand(alternating),
  ),
  "lg_fedavg": (
    lambda: lg_fedavg(BILINEAR, sgd(ETA), sgd(1.0), private=BODY),
    lambda: by_hand(head_first, shares_body=False),
  ),
}


def vector(params):
  """The parameters of the part as numpy; its first axes are clients."""
  if params["body"] is not None:
    return np.asarray(params["body"])
  head = params["head"]
  return np.stack([head["bias"], head["scale"]], axis=-1)


@pytest.mark.parametrize("name", slow_but(["fedrep"], CASES))
def test_it_is_the_papers_recursion(name):
  make, expected = CASES[name]
  _, state = simulate(make())
  shared, own = expected()
  sent = state.server.variables.params
  np.testing.assert_allclose(vector(sent), shared, atol=2e-6)
  kept = vector(state.clients[0].params)[: len(SIZES)]
  np.testing.assert_allclose(kept, own, atol=2e-6)


def test_private_variables_are_neither_sent_nor_lost():
  simulator, state = simulate(CASES["fedper"][0](), 1)
  algorithm, numbers = simulator.algorithm, simulator.hparams["algorithm"]
  found = traffic(algorithm, state, numbers)
  assert (found.down, found.update) == (4 * DIM, 4 * DIM)
  assert found.up == 4 * DIM + 4  # and its weight
  # A client that never took part has the first head on the current body.
  message = algorithm.broadcast(state.server)
  assert algorithm.personal is not None
  for k in range(len(SIZES)):
    row = jax.tree.map(lambda x, k=k: x[k], state.clients[0])
    model = algorithm.personal(message, row).params
    np.testing.assert_array_equal(
      model["body"], state.server.variables.params["body"]
    )
    head = [model["head"]["bias"], model["head"]["scale"]]
    assert (head == [0.0, 1.0]) == (k not in cohort(0))


@pytest.mark.slow
def test_parts_go_with_rates_by_layer():
  """Of which the optimizers of head and body see some alone."""
  shapes = jax.eval_shape(BILINEAR.init, jax.random.key(0)).params
  halved = (("body", 0.5), ("head/", 0.5))
  layered = lambda rate: by_layer(sgd(2 * rate), halved, shapes)
  algorithm = fedrep(
    BILINEAR,
    layered(ETA),
    layered(1.0),
    private=HEAD,
    head_epochs=HEAD_EPOCHS,
  )
  one, other = (
    simulate(each, 1)[1] for each in (algorithm, CASES["fedrep"][0]())
  )
  for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6)


def test_parts_go_with_transforms_that_remember():
  """Which remember the shapes of the shared parameters alone."""
  coarse = error_feedback(quantize(0.5, bits=4))
  _, state = simulate(
    CASES["fedper"][0](),
    2,
    transforms=[coarse],
    aggregator=aggregators.AGGREGATORS["centered_clipping"](),
  )
  assert [x.shape for x in jax.tree.leaves(state.aggregate)] == [(DIM,)]
  (kept,) = state.clients[1]
  assert [x.shape[1:] for x in jax.tree.leaves(kept.residual)] == [(DIM,)]
  assert np.abs(np.asarray(kept.residual["body"])[cohort(0)]).max() > 1e-4


def normalized() -> Task:
  """A scale and a running mean, which FedBN's default patterns match."""

  def init(key):
    params = {"norm1": {"scale": jnp.ones(())}, "w": jnp.zeros(DIM)}
    return Variables(params, {"norm1": {"mean": jnp.zeros(DIM)}})

  def loss(variables, examples, key):
    params, buffers, _ = variables
    gap = params["w"][None] + params["norm1"]["scale"] - examples["x"]
    value = 0.5 * jnp.sum(gap**2, axis=-1)
    mean = 0.5 * buffers["norm1"]["mean"] + 0.5 * examples["x"].mean(0)
    return Loss(value, jnp.ones_like(value), {"norm1": {"mean": mean}})

  def metrics(variables, examples):
    value = examples["x"] @ variables.params["w"]
    return {"x": Metric(value, jnp.ones_like(value))}

  return Task(init, loss, metrics)


def test_fedbn_keeps_scales_and_running_statistics_at_the_clients():
  simulator, state = simulate(
    fedbn(normalized(), sgd(0.1), sgd(1.0)),
    task=normalized(),
    batching=LocalBatching(batch_size=10, epochs=1, shuffle=False),
  )
  w = np.zeros(DIM)
  scale = np.ones(len(SIZES))
  for r in range(ROUNDS):
    updates = []
    for k in cohort(r):
      x = X[OFFSETS[k] : OFFSETS[k + 1]].astype(np.float64)
      gap = np.mean(w + scale[k] - x, axis=0)
      updates.append(-0.1 * gap)
      scale[k] -= 0.1 * gap.sum()
    w = w + np.average(updates, axis=0, weights=SIZES[cohort(r)])
  np.testing.assert_allclose(state.server.variables.params["w"], w, atol=2e-6)
  own = state.clients[0]
  np.testing.assert_allclose(
    own.params["norm1"]["scale"][: len(SIZES)], scale, atol=2e-6
  )
  found = traffic(simulator.algorithm, state, simulator.hparams["algorithm"])
  assert (found.down, found.up) == (4 * DIM, 4 * DIM + 4)
  # Client 3 has ten examples, a whole batch: its statistics are of those.
  seen = X[OFFSETS[3] : OFFSETS[4]].astype(np.float64).mean(0)
  rounds = sum(3 in cohort(r) for r in range(ROUNDS))
  expected = seen * (1 - 0.5**rounds)
  np.testing.assert_allclose(
    own.buffers["norm1"]["mean"][3], expected, atol=2e-6
  )
  never = state.server.variables
  assert jax.tree.leaves(never.buffers) == []


def test_private_buffers_can_be_had_with_central_privacy():
  """As nothing but the shared update is released."""
  config = CentralDPConfig(clip_norm=1.0, noise_multiplier=1.0, denominator=3.0)
  kept = with_central_dp(fedbn(normalized(), sgd(0.1), sgd(1.0)), config)
  simulator, state = simulate(kept, 0, task=normalized())
  found = report_shapes(kept, state.server, simulator.hparams["algorithm"])
  assert [x.shape for x in jax.tree.leaves(found.update)] == [(DIM,)]
  partly = fedper(normalized(), sgd(0.1), sgd(1.0), private=("norm1",))
  with pytest.raises(ValueError, match="the model has buffers"):
    simulate(with_central_dp(partly, config), 1, task=normalized())


def test_fedbn_finds_normalization_layers():
  task = resnet((8, 8, 3), 4, norm="batch", width=2)
  split = split_variables(task, normalization_layers(task))
  assert split.buffers.private == (True,) * len(split.buffers.private)
  assert len(split.buffers.private) > 10
  shapes = jax.eval_shape(task.init, jax.random.key(0)).params
  kept = jax.tree.leaves(split.params.part(shapes, True))
  assert {x.ndim for x in kept} == {1}  # scales and biases, two to each mean
  assert len(kept) == len(split.buffers.private)
  rest = paths_of(split.params.part(shapes, False))
  assert not any(path.endswith("scale") for path in rest)
  with pytest.raises(ValueError, match="finds no normalization layer"):
    fedbn(quadratic(2), sgd(1.0), sgd(1.0))


@pytest.mark.parametrize(
  ("private", "words"),
  [
    ("head", "is a text"),
    (("tail",), "matches no variable"),
    ((), "keeps nothing private"),
    (("head", "body"), "leaves no parameter to share"),
  ],
)
def test_bad_patterns_are_named(private, words):
  with pytest.raises((TypeError, ValueError), match=words):
    fedper(BILINEAR, sgd(ETA), sgd(1.0), private=private)


def test_fedrep_needs_a_head():
  with pytest.raises(ValueError, match="holds no parameter"):
    fedrep(normalized(), sgd(0.1), sgd(1.0), private=("buffers/",))
  momentum = optimizer("sgd", learning_rate=0.1, momentum=0.9)
  with pytest.raises(ValueError, match="head_epochs=0"):
    fedrep(BILINEAR, momentum, sgd(1.0), private=HEAD, head_epochs=0)
