"""FedLabels against numpy: pseudo labels, a client's steps, the two means."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedjax_sim import transforms
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.algorithms.fedlabels import fedlabels
from fedjax_sim.core import Loss, Metric, Task, Variables, validate
from fedjax_sim.data import FederatedData, load_digits, with_few_labels
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.models.char_lstm import char_lstm
from fedjax_sim.models.mlp import mlp
from fedjax_sim.tasks import function_task
from fedjax_sim.tasks.losses import cross_entropy
from fedjax_sim.training.optimizers import optimizer
from fedjax_sim.training.pseudo_labels import pseudo_labels
from problems import (
  blobs,
  hparams_of,
  make_simulator,
  params_of,
  sgd,
  train,
)

FEATURES, CLASSES = 4, 3
SIZES = [6, 11, 8]
RATE = 0.4


# --- pseudo labels ------------------------------------------------------------


def by_loop(get_model, supervised, comparison):
  """FLUTE's rule, example by example."""
  found = []
  for theirs, own in zip(get_model, supervised, strict=True):
    if comparison == "variance":
      one, other = np.var(theirs), np.var(own)
    else:
      one, other = (
        1 / (-sum(p * np.log(p) for p in each if p > 0) + 1e-5)
        for each in (theirs, own)
      )
    trusted = theirs if one >= other else own
    found.append(
      (
        np.argmax(trusted),
        np.max(trusted),
        np.argmax(theirs) == np.argmax(own),
        min(one, other) / max(one, other),
      )
    )
  return [np.array(x) for x in zip(*found, strict=True)]


@pytest.mark.parametrize("comparison", ["variance", "entropy"])
def test_the_more_certain_model_gives_the_label(comparison):
  rng = np.random.default_rng(0)
  draw = lambda: rng.dirichlet(np.full(5, 0.4), 300)
  get_model, supervised = draw(), draw()
  found = pseudo_labels(
    jnp.asarray(get_model), jnp.asarray(supervised), comparison
  )
  expected = by_loop(get_model, supervised, comparison)
  np.testing.assert_array_equal(found.label, expected[0])
  np.testing.assert_allclose(found.confidence, expected[1], rtol=1e-5)
  np.testing.assert_array_equal(found.agree, expected[2])
  np.testing.assert_allclose(found.ratio, expected[3], rtol=2e-4)
  assert 0.2 < np.mean(found.label == get_model.argmax(1)) < 0.8
  assert 0.1 < np.mean(found.agree) < 0.9


@pytest.mark.parametrize("comparison", ["variance", "entropy"])
def test_models_that_know_nothing_or_all(comparison):
  even, sure = jnp.full((2, 4), 0.25), jnp.eye(4)[1:3]
  unsure = pseudo_labels(even, even, comparison)
  np.testing.assert_array_equal(unsure.ratio, 1)
  np.testing.assert_array_equal(unsure.confidence, 0.25)
  for pair in ((even, sure), (sure, even)):
    found = pseudo_labels(*pair, comparison)
    np.testing.assert_array_equal(found.label, [1, 2])
    assert float(found.ratio.max()) < 1e-4
  tie = pseudo_labels(sure, sure[::-1], comparison)
  np.testing.assert_array_equal(tie.label, [1, 2])  # of the received one


# --- a round ------------------------------------------------------------------


def linear() -> Task:
  """Logits x @ w, and a buffer that holds a batch's mean."""

  def init(key):
    w = 0.3 * jax.random.normal(key, (FEATURES, CLASSES))
    return Variables({"w": w}, {"mean": jnp.zeros(FEATURES)})

  def logits(variables, examples):
    return examples["x"] @ variables.params["w"]

  def loss(variables, examples, key):
    del key
    value, weight = cross_entropy(logits(variables, examples), examples)
    return Loss(value, weight, {"mean": examples["x"].mean(0)})

  def metrics(variables, examples):
    value, weight = cross_entropy(logits(variables, examples), examples)
    return {"loss": Metric(value, weight)}

  return Task(
    init, loss, metrics, logits=logits, higher_is_better={"loss": False}
  )


OPTIONS = {
  "burn_in": 0,
  "threshold": 0.5,
  "temperature": 0.8,
  "unsup_weight": 0.7,
  "consistency_weight": 0.6,
  "l2": 3.0,
  "magnitude": 0.0,
}


def simulator_of(
  data, *, transform=(), devices=1, lanes=1, rate=1.0, **options
):
  task = linear()
  return make_simulator(
    task,
    fedlabels(task, sgd(RATE), sgd(rate), **OPTIONS | options),
    data,
    batching=LocalBatching(batch_size=100, epochs=3, shuffle=False),
    transforms=transform,
    devices=devices,
    lanes=lanes,
  )


def few(sizes=SIZES, fraction=0.4, seed=2):
  return with_few_labels(blobs(sizes, FEATURES, CLASSES, seed), fraction, seed)


def softmax(z):
  e = np.exp(z - z.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def client_by_hand(w, labelled, unlabelled, options):
  """Full-batch steps of both models: their updates, and the pseudo labels."""
  gradient = lambda w, x, y: (
    x.T @ (softmax(x @ w) - np.eye(CLASSES)[y]) / len(x)
  )
  own = w.copy()
  for _ in range(options.get("labelled_steps", 3)):
    own -= RATE * gradient(own, labelled["x"], labelled["y"])
  new, used = w.copy(), 0
  x = unlabelled["x"]
  for _ in range(options.get("unlabelled_steps", 3) if len(x) else 0):
    t = options["temperature"]
    theirs, mine = softmax(x @ w / t), softmax(x @ own / t)
    label, confidence, agree, ratio = by_loop(theirs, mine, "variance")
    sure = confidence > options["threshold"]
    if not sure.any():
      continue
    used += sure.sum()
    slope = options["unsup_weight"] * gradient(new, x[sure], label[sure])
    both = sure & agree
    gap = (softmax(x @ new / t) - mine) / t * ratio[:, None]
    consistency = x[both].T @ gap[both] / max(both.sum(), 1)
    slope += options["consistency_weight"] * consistency
    slope += options["l2"] * 2 * (new - w) / w.size
    new -= options.get("unlabelled_rate", RATE) * slope
  return own - w, new - w, used


def round_by_hand(data, w, options, clip=None):
  """Both means after a round of all clients: parameters, buffers, counts."""
  sup, unsup, sup_mean, unsup_mean, used = ([], [], [], [], [])
  sets = data.splits["labelled"], data.splits["unlabelled"]

  def mean_of(part, i):  # what fills up a batch begins with the first again
    x = part.client(i)["x"]
    return x[np.arange(part.sizes.max()) % len(x)].mean(0)

  for i in range(data.train.num_clients):
    own = [part.client(i) for part in sets]
    one, two, count = client_by_hand(w, own[0], own[1], options)
    norm = np.sqrt(np.sum(one**2) + np.sum(two**2))
    scale = 1 if clip is None else min(1, clip / norm)
    sup.append(scale * one)
    unsup.append(scale * two)
    sup_mean.append(mean_of(sets[0], i))
    unsup_mean.append(mean_of(sets[1], i) if count else np.zeros(FEATURES))
    used.append(count)
  weights = np.maximum(used, 1)  # FLUTE's: by number of pseudo labels
  weighted = lambda x: np.average(x, axis=0, weights=weights)
  params = w + np.mean(sup, 0), w + weighted(unsup)
  buffers = np.mean(sup_mean, 0), weighted(unsup_mean)
  return params, buffers, used


@pytest.mark.parametrize(
  ("changes", "clip"),
  [
    ({}, None),
    pytest.param({"threshold": 0.0}, None, marks=pytest.mark.slow),
    pytest.param(
      *({"threshold": 0.65, "consistency_weight": 5.0}, None),
      marks=pytest.mark.slow,
    ),
    ({"temperature": 2.0, "threshold": 0.4, "l2": 20.0}, None),
    pytest.param(
      *({"labelled_steps": 4, "unlabelled_rate": 0.2}, None),
      marks=pytest.mark.slow,
    ),
    ({"unlabelled_steps": 2}, 0.3),
    pytest.param({"unlabelled_steps": 2}, None, marks=pytest.mark.slow),
    pytest.param({}, 0.3, marks=pytest.mark.slow),
  ],
)
def test_a_round_does_what_numpy_does(changes, clip):
  data = few()
  chain = [] if clip is None else [transforms.clip(clip)]
  simulator = simulator_of(data, transform=chain, **changes)
  state = simulator.init()
  w = np.asarray(params_of(simulator, state)["w"], np.float64)
  params, buffers, used = round_by_hand(data, w, OPTIONS | changes, clip)
  after = train(simulator, 1).server.variables
  np.testing.assert_allclose(
    after.params["w"], np.mean(params, 0), rtol=1e-4, atol=1e-6
  )
  np.testing.assert_allclose(
    after.buffers["mean"], np.mean(buffers, 0), rtol=1e-4
  )
  assert len(set(used)) > 1  # so that weights matter
  assert sum(used)
  (out,) = simulator.run(state, 1)
  steps = changes.get("unlabelled_steps", 3)
  share = sum(used) / (steps * data.splits["unlabelled"].num_examples)
  assert out.rows[0]["train/pseudo_labels"] == pytest.approx(share)
  if not changes:
    assert 0 < share < 1


def test_without_a_confident_model_only_half_of_the_way_is_left():
  data = few()
  simulator = simulator_of(data, threshold=1.0)
  start = params_of(simulator, simulator.init())["w"]
  half = params_of(simulator, train(simulator, 1))["w"]
  supervised = simulator_of(data, burn_in=5)
  whole = params_of(supervised, train(supervised, 1))["w"]
  np.testing.assert_allclose(half, start + 0.5 * (whole - start), rtol=1e-5)
  (out,) = simulator.run(simulator.init(), 1)
  assert out.rows[0]["train/pseudo_labels"] == 0


def test_a_client_without_unlabelled_examples_takes_part():
  data = few([1, 9, 7])
  assert data.splits["unlabelled"].sizes[0] == 0
  simulator = simulator_of(data)
  w = np.asarray(params_of(simulator, simulator.init())["w"], np.float64)
  params, _, used = round_by_hand(data, w, OPTIONS)
  after = params_of(simulator, train(simulator, 1))["w"]
  np.testing.assert_allclose(after, np.mean(params, 0), rtol=1e-4, atol=1e-6)
  assert used[0] == 0


def test_both_means_are_evaluated_by_themselves():
  data = few()
  data = dataclasses.replace(data, test=data.train.examples)
  plain = simulator_of(data)
  simulator = dataclasses.replace(
    simulator_of(data, evaluate_means=True),
    best_metrics=("test/unsupervised/loss",),
  )
  state = simulator.init()
  names = ("", "supervised/", "unsupervised/")
  first = simulator.evaluate(state)
  assert len({first[f"test/{name}loss"] for name in names}) == 1
  w = np.asarray(params_of(simulator, state)["w"], np.float64)
  means, _, _ = round_by_hand(data, w, OPTIONS)
  after = train(simulator, 1)
  found = simulator.evaluate(after)
  x, y = data.test["x"], data.test["y"]
  for name, params in zip(names, (np.mean(means, 0), *means), strict=True):
    loss = -np.log(softmax(x @ params)[np.arange(len(y)), y]).mean()
    assert found[f"test/{name}loss"] == pytest.approx(loss, rel=1e-4)
  assert len({round(found[f"test/{name}loss"], 4) for name in names}) == 3
  np.testing.assert_array_equal(
    params_of(simulator, after)["w"], params_of(plain, train(plain, 1))["w"]
  )
  best = simulator.react.best_row(simulator.react(after, found))
  assert best["best/test/unsupervised/loss"] == pytest.approx(
    found["test/unsupervised/loss"]
  )


def test_labels_of_the_unlabelled_are_not_used():
  data = few()
  hidden = data.splits["unlabelled"]
  other = {**hidden.examples, "y": (hidden.examples["y"] + 1) % CLASSES}
  hidden = dataclasses.replace(hidden, examples=other)
  changed = dataclasses.replace(
    data, splits={**data.splits, "unlabelled": hidden}
  )
  one, two = simulator_of(data), simulator_of(changed)
  np.testing.assert_array_equal(
    params_of(one, train(one, 3))["w"], params_of(two, train(two, 3))["w"]
  )


# --- burn-in ------------------------------------------------------------------


def test_the_burn_in_is_fedavg_on_the_labelled_and_recompiles_nothing():
  data, task = few(), linear()
  base = fedavg(task, sgd(RATE), sgd(1.0), weighting="uniform")
  passes = (base.passes[0]._replace(split="labelled"),)
  plain = make_simulator(
    task,
    base._replace(passes=passes),
    data,
    batching=LocalBatching(batch_size=100, epochs=3, shuffle=False),
  )
  simulator = simulator_of(data, burn_in=2, magnitude=0.3)
  for rounds in (1, 2, 3):
    one, two = (train(s, rounds).server.variables for s in (simulator, plain))
    same = np.allclose(one.params["w"], two.params["w"], rtol=1e-5)
    assert same == (rounds <= 2)
    if same:
      np.testing.assert_allclose(
        one.buffers["mean"], two.buffers["mean"], rtol=1e-5
      )
  later = train(simulator, 3, hparams_of(simulator, burn_in=3.0))
  np.testing.assert_allclose(
    later.server.variables.params["w"],
    train(plain, 3).server.variables.params["w"],
    rtol=1e-5,
  )
  assert simulator.compilations == 1


# --- lanes, devices, models ---------------------------------------------------


UNEVEN = [6, 11, 8, 5, 9]


def test_lanes_and_devices_change_nothing():
  data = few(UNEVEN)
  one = simulator_of(data, magnitude=0.4, rate=0.7)
  other = simulator_of(data, magnitude=0.4, rate=0.7, lanes=2, devices=2)
  np.testing.assert_allclose(
    params_of(other, train(other, 4))["w"],
    params_of(one, train(one, 4))["w"],
    rtol=1e-4,
    atol=1e-6,
  )


def as_images(data):
  square = lambda examples: {**examples, "x": examples["x"].reshape(-1, 8, 8)}
  return dataclasses.replace(
    data,
    train=dataclasses.replace(data.train, examples=square(data.train.examples)),
    test=square(data.test),
    example_shape=(8, 8),
  )


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_pseudo_labels_help_where_labels_are_few():
  digits = as_images(load_digits(num_clients=20, partition="iid"))
  task = mlp(digits.example_shape, digits.num_classes, (32,))

  def accuracies(seed):
    simulator = make_simulator(
      task,
      fedlabels(
        task,
        sgd(0.3),
        optimizer("sgd", learning_rate=0.5, momentum=0.9),
        threshold=0.8,
      ),
      with_few_labels(digits, 0.1, seed),
      batching=LocalBatching(batch_size=20, epochs=2),
      lanes=20,
      seed=seed,
    )
    for burn_in in (20.0, 1000.0):  # traced: compiled once
      hparams = hparams_of(simulator, burn_in=burn_in)
      state = train(simulator, 60, hparams)
      yield simulator.evaluate(state)["test/accuracy"]

  gains = [-np.diff(list(accuracies(seed))) for seed in (0, 1)]
  assert np.mean(gains) > 0.015


# --- what is refused ----------------------------------------------------------


@given(
  st.sampled_from(
    [
      ("burn_in", -1),
      ("burn_in", 1.5),
      ("threshold", 1.1),
      ("threshold", -0.1),
      ("temperature", 0.0),
      ("unsup_weight", -1.0),
      ("consistency_weight", float("nan")),
      ("l2", -1.0),
      ("magnitude", 1.5),
      ("magnitude", "much"),
      ("comparison", "var"),
      ("flip", 1),
      ("evaluate_means", 1),
      ("labelled_steps", 0),
      ("unlabelled_steps", 1.5),
      ("unlabelled_rate", -1.0),
    ]
  )
)
def test_arguments_that_are_refused(change):
  field, value = change
  with pytest.raises((TypeError, ValueError), match=rf"\b{field}="):
    fedlabels(linear(), sgd(0.1), sgd(1.0), **{field: value})


def test_a_task_without_logits_is_refused():
  task = function_task(lambda key: jnp.zeros(2), lambda params, e: e["x"])
  with pytest.raises(ValueError, match=r"Task\.logits is None; make the task"):
    fedlabels(task, sgd(0.1), sgd(1.0))


def test_logits_of_several_labels_are_refused():
  ids = {
    "x": np.ones((4, 5), np.uint8),
    "y": np.ones((4, 5), np.uint8),
  }
  offsets = np.array([0, 2, 4])
  data = dataclasses.replace(
    blobs([2, 2]),
    train=FederatedData(examples=ids, offsets=offsets),
    example_shape=(5,),
  )
  task = char_lstm((5,), 3, embedding=2, units=(3,))
  simulator = make_simulator(
    task,
    fedlabels(task, sgd(0.1), sgd(1.0)),
    with_few_labels(data, 0.5),
  )
  with pytest.raises(ValueError, match=r"logits have shape \(1, 5, 3\), not"):
    train(simulator, 1)


def test_data_without_the_splits_are_refused():
  with pytest.raises(
    validate.UnknownNameError,
    match=r"split 'labelled'; the data has train\. Set data\.labelled_fraction",
  ):
    simulator_of(blobs(SIZES, FEATURES, CLASSES))
