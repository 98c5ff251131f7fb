"""Metrics by name against scikit-learn, client by client and over all."""

import dataclasses
import pathlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import calibration
from sklearn import metrics as sk

from fedjax_sim.algorithms.apfl import apfl
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.cli import listing
from fedjax_sim.config.build import build
from fedjax_sim.config.flags import load
from fedjax_sim.core import (
  Batch,
  Joint,
  Loss,
  Metric,
  PerExample,
  Task,
  Variables,
  metric_names,
  sum_metrics,
)
from fedjax_sim.core.validate import UnknownNameError
from fedjax_sim.data import FederatedData
from fedjax_sim.engine import residency
from fedjax_sim.models.logistic_regression import logistic_regression
from fedjax_sim.simulation.preflight import ModelError
from fedjax_sim.tasks import (
  losses,
  measures,
  with_compute_dtype,
  with_remat,
)
from fedjax_sim.tasks.measures import MEASURES, named_measure
from fedjax_sim.tasks.metrics import MetricError, with_metrics
from problems import blobs, make_simulator, sgd, train

CLASSES = 5
SIZES = [9, 0, 3, 14, 1, 6]
NAMES = (
  "auc",
  "f1_macro",
  "f1_micro",
  "top_2",
  "confusion",
  "perplexity",
  "calibration_error",
)
CELLS = [f"confusion/{i}/{j}" for i in range(CLASSES) for j in range(CLASSES)]


def echo() -> Task:
  """A model that says what its inputs are."""

  def logits(variables, examples):
    return examples["x"] + variables.params["b"]

  def loss(variables, examples, key):
    return Loss(*losses.cross_entropy(logits(variables, examples), examples))

  return Task(
    lambda key: Variables({"b": jnp.zeros(())}),
    loss,
    lambda v, e: losses.classification_metrics(logits(v, e), e),
    logits=logits,
  )


def part_of(sizes, seed):
  rng = np.random.default_rng(seed)
  count = sum(sizes)
  y = rng.integers(0, CLASSES, count)
  if len(sizes) > 1:
    y[9:12] = 2  # a client of one class
  x = rng.normal(size=(count, CLASSES)) + 1.2 * np.eye(CLASSES)[y]
  return FederatedData(
    examples={"x": x.astype(np.float32), "y": y.astype(np.int32)},
    offsets=np.append(0, np.cumsum(sizes)),
    allow_empty=True,
  )


def by_sklearn(examples) -> dict[str, float]:
  """The numbers of some examples; NaN where there is none."""
  x, y = np.asarray(examples["x"], np.float64), examples["y"]
  p = np.exp(x) / np.exp(x).sum(1, keepdims=True)
  said, every = x.argmax(1), range(CLASSES)
  areas = [
    sk.roc_auc_score(y == c, p[:, c]) for c in every if 0 < sum(y == c) < len(y)
  ]
  sure, right = p.max(1), said == y
  counts, _ = np.histogram(sure, np.linspace(0, 1, 16))
  true, mean = calibration.calibration_curve(right, sure, n_bins=15)
  share = counts[counts > 0] / len(y)
  table = sk.confusion_matrix(y, said, labels=every)
  return {
    "auc": np.mean(areas) if areas else np.nan,
    "f1_macro": sk.f1_score(y, said, average="macro"),
    "f1_micro": sk.f1_score(y, said, average="micro"),
    "top_2": sk.top_k_accuracy_score(y, x, k=2, labels=every),
    "perplexity": np.exp(sk.log_loss(y, p, labels=every)),
    "calibration_error": np.sum(share * np.abs(true - mean)),
    **dict(zip(CELLS, table.ravel(), strict=True)),
  }


@pytest.fixture(scope="module", params=[(1, 1), (2, 2)], ids=str)
def evaluated(request):
  """A simulator of the echo, its state, and what an evaluation says."""
  lanes, devices = request.param
  data = dataclasses.replace(
    blobs([4, 2, 6], features=CLASSES, classes=CLASSES),
    unseen=part_of(SIZES, 2),
    test=dict(part_of([33], 3).examples),
  )
  task = with_metrics(echo(), [named_measure("metric", name) for name in NAMES])
  simulator = make_simulator(
    task, fedavg(task, sgd(0.1), sgd(1.0)), data, lanes=lanes, devices=devices
  )
  runtime = dataclasses.replace(simulator.runtime, eval_batch_size=4)
  simulator = dataclasses.replace(simulator, runtime=runtime)
  state = simulator.init()
  return simulator, state, simulator.evaluate(state)


def test_numbers_are_sklearns_for_every_client_and_for_all(evaluated):
  simulator, state, row = evaluated
  unseen, test = simulator.data.unseen, simulator.data.test
  found = simulator.evaluate.clients(state, "unseen").per_client()
  each = {}
  for i, size in enumerate(SIZES):
    if not size:
      assert all(np.isnan(values[i]) for values in found.values())
      continue
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # of one class
      each[i] = by_sklearn(unseen.client(i))
    for name, value in each[i].items():
      np.testing.assert_allclose(found[name][i], value, rtol=1e-5, atol=1e-7)
  assert np.isnan(each[2]["auc"])
  assert np.isnan(each[4]["auc"])
  for name, value in by_sklearn(unseen.examples).items():
    assert row[f"unseen/{name}"] == pytest.approx(value, rel=1e-5)
    if name in CELLS:
      assert f"unseen/{name}/mean" not in row
      continue
    known = [x[name] for x in each.values() if not np.isnan(x[name])]
    assert row[f"unseen/{name}/mean"] == pytest.approx(np.mean(known), rel=1e-5)
    p90 = np.percentile(known, 90)
    assert row[f"unseen/{name}/p90"] == pytest.approx(p90, rel=1e-5)
  for name, value in by_sklearn(test).items():
    assert row[f"test/{name}"] == pytest.approx(value, rel=1e-5)
  logits = np.asarray(test["x"], np.float64)
  p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
  area = sk.roc_auc_score(test["y"], p, multi_class="ovr")
  assert row["test/auc"] == pytest.approx(area, rel=1e-12)


def test_means_stay_and_nothing_compiles_again(evaluated):
  simulator, state, row = evaluated
  task = echo()
  plain = dataclasses.replace(
    simulator, task=task, algorithm=fedavg(task, sgd(0.1), sgd(1.0))
  )
  means = plain.evaluate(plain.init())
  assert all(
    row[name] == pytest.approx(means[name], rel=1e-7) for name in means
  )
  assert simulator.evaluate(state) == row
  sets = simulator.evaluate.sets.values()
  assert [s._jitted._cache_size() for s in sets] == [1, 1]


def test_what_has_no_room_gives_the_same_numbers(evaluated, monkeypatch):
  simulator, state, row = evaluated
  monkeypatch.setattr(residency, "device_room", lambda mesh: 2 * 300)
  parts = dataclasses.replace(simulator)
  assert all(len(s.pieces) > 1 for s in parts.evaluate.sets.values())
  assert parts.evaluate(state) == row


def test_directions_and_names_of_best_models(evaluated):
  simulator, _, _ = evaluated
  wanted = ("unseen/auc/mean", "test/perplexity", "unseen/top_2/p10")
  best = dataclasses.replace(simulator, best_metrics=wanted)
  assert best.react.higher_is_better == dict(
    zip(wanted, [True, False, True], strict=True)
  )
  for metric, text in (
    ("test/confusion/0/1", "whether more of 'confusion/0/1' is better"),
    ("unseen/confusion/0/1/mean", "is unknown"),
  ):
    with pytest.raises(ValueError, match=text):
      _ = dataclasses.replace(simulator, best_metrics=(metric,)).react


def test_personal_and_other_models_have_their_own_numbers():
  data = blobs([7, 9, 4])
  data = dataclasses.replace(data, seen=data.train)
  base = logistic_regression(data.example_shape, data.num_classes)
  task = with_metrics(base, [measures.auc, measures.confusion])
  algorithm = apfl(task, sgd(0.5), sgd(1.0))
  twin = lambda server: {"twin": algorithm.variables(server)}
  algorithm = algorithm._replace(other_models=twin)
  simulator = make_simulator(task, algorithm, data, lanes=2)
  runtime = dataclasses.replace(simulator.runtime, eval_batch_size=4)
  simulator = dataclasses.replace(simulator, runtime=runtime)
  state = train(simulator, 2)
  found = simulator.evaluate.clients(state, "seen").per_client()
  message = algorithm.broadcast(state.server)
  assert base.logits is not None
  assert algorithm.personal is not None
  for i in range(3):
    own = jax.tree.map(lambda x, i=i: x[i], state.clients[0])
    personal = algorithm.personal(message, own)
    examples = {k: jnp.asarray(v) for k, v in data.train.client(i).items()}
    y = np.asarray(examples["y"])
    models = {"": personal, "twin/": algorithm.variables(state.server)}
    for name, variables in models.items():
      x = np.asarray(base.logits(variables, examples), np.float64)
      p = np.exp(x) / np.exp(x).sum(1, keepdims=True)
      areas = [
        sk.roc_auc_score(y == c, p[:, c]) for c in range(3) if sum(y == c) > 0
      ]
      assert found[f"{name}auc"][i] == pytest.approx(np.mean(areas), rel=1e-5)
      expected = sum((y == 0) & (x.argmax(1) == 0))
      assert found[f"{name}confusion/0/0"][i] == expected


# --- numbers of some examples -------------------------------------------------


def number(function, outputs, y):
  values = function(jnp.asarray(outputs), {"y": jnp.asarray(y)})
  return function.number(jax.device_get(values))


def test_two_classes_by_two_scores_or_one_logit():
  rng = np.random.default_rng(0)
  y = rng.integers(0, 2, 200)
  logit = np.round(rng.normal(size=200) + y, 1).astype(np.float32)  # with ties
  two = np.stack([np.zeros_like(logit), logit], 1)
  area = sk.roc_auc_score(y, logit)
  f1 = sk.f1_score(y, logit > 0)
  for outputs in (logit, logit[:, None], two):
    assert number(measures.auc, outputs, y) == pytest.approx(area, rel=1e-12)
    assert number(measures.f1, outputs, y) == pytest.approx(f1, rel=1e-12)
  assert number(measures.auc, two, np.ones(200, int)) is None
  assert number(measures.f1, -np.abs(logit), np.zeros(200, int)) is None
  with pytest.raises(MetricError, match="labels 'y' above 1; take 'mae'"):
    number(measures.f1, logit, y + 1)
  logit[3] = np.nan
  assert np.isnan(number(measures.auc, logit, y))


def test_sure_predictions_keep_their_order():
  """Probabilities would be 1 in float32, and tied."""
  rng = np.random.default_rng(1)
  y = rng.integers(0, 3, 300)
  sure = rng.normal(size=(300, 3)) * 9 + 25 * np.eye(3)[y]
  sure = sure.astype(np.float32).astype(np.float64)
  rest = lambda c: np.logaddexp(*np.delete(sure, c, axis=1).T)
  areas = [sk.roc_auc_score(y == c, sure[:, c] - rest(c)) for c in range(3)]
  found = number(measures.auc, sure.astype(np.float32), y)
  assert found == pytest.approx(np.mean(areas), rel=1e-9)


@pytest.mark.parametrize("shape", [(40,), (40, 3)])
def test_regressions_are_sklearns(shape):
  rng = np.random.default_rng(2)
  y = (rng.normal(size=shape) + 1000).astype(np.float32)
  said = (y + 0.3 * rng.normal(size=shape)).astype(np.float32)
  wide = [np.asarray(x, np.float64) for x in (y, said)]
  assert number(measures.r2, said, y) == pytest.approx(
    sk.r2_score(*wide), rel=1e-9
  )
  total, weight = measures.mae(jnp.asarray(said), {"y": jnp.asarray(y)})
  mean = float(total.sum() / weight.sum())
  assert mean == pytest.approx(sk.mean_absolute_error(*wide), rel=1e-5)
  if len(shape) == 1:
    assert number(measures.r2, said[:, None], y) == number(measures.r2, said, y)
    same = np.full(40, 7.0)
    for outputs, expected in ((same, 1.0), (said, 0.0)):
      assert number(measures.r2, outputs, same) == expected
    assert number(measures.r2, said[:1], y[:1]) is None


def test_tokens_count_but_for_padding():
  rng = np.random.default_rng(3)
  y = rng.integers(0, 4, (6, 7))  # 0 is padding
  x = rng.normal(size=(6, 7, 4)).astype(np.float32)
  real = y > 0
  true, said = y[real], x.argmax(-1)[real]
  labels = range(4)
  expected = sk.f1_score(true, said, average="macro")
  assert number(measures.f1_macro, x, y) == pytest.approx(expected)
  table = number(measures.confusion, x, y)
  np.testing.assert_array_equal(
    [*table.values()], sk.confusion_matrix(true, said, labels=labels).ravel()
  )
  total, weight = named_measure("m", "top_2")(jnp.asarray(x), {"y": y})
  expected = sk.top_k_accuracy_score(true, x[real], k=2, labels=labels)
  assert float(total.sum() / weight.sum()) == pytest.approx(expected)
  loss = losses.token_metrics(jnp.asarray(x), {"y": jnp.asarray(y)})["loss"]
  values = measures.perplexity(jnp.asarray(x), {"y": jnp.asarray(y)}, loss)
  p = np.exp(x[real].astype(np.float64))
  p /= p.sum(1, keepdims=True)
  found = (
    with_metrics(echo(), [measures.perplexity])
    .joint["perplexity"]
    .number(jax.device_get(values))
  )
  assert found == pytest.approx(np.exp(sk.log_loss(true, p, labels=labels)))


def test_counts_are_whole_beyond_float32():
  size = 2**24 + 3
  values = {
    "label": np.ones(size, np.int8),
    "predicted": np.ones(size, np.int8),
  }
  values["predicted"][:1] = 0
  counts = measures._counts(values)
  assert counts.hits.tolist() == [0, size - 1]


# --- what is refused ----------------------------------------------------------


def check_refused(name, outputs, examples, match):
  task = with_metrics(
    echo()._replace(
      metrics=lambda v, e: {},
      logits=lambda variables, examples: jnp.asarray(outputs),
    ),
    [named_measure("metric", name)],
  )
  with pytest.raises(MetricError, match=match) as caught:
    jax.eval_shape(task.metrics, Variables(()), examples)
  assert "\n" not in str(caught.value)


def test_metrics_that_do_not_fit_are_refused():
  ten, whole = np.zeros((4, 10)), {"y": np.zeros(4, int)}
  real = {"y": np.zeros(4, np.float32)}
  check_refused("auc", np.zeros(4), real, "'auc' is of classes, whole numbers")
  check_refused("top_10", ten, whole, "'top_10' of 10 classes is always right")
  check_refused("f1", ten, whole, "'f1' is of two classes, and the model tells")
  check_refused("r2", ten, whole, r"'r2' is of a regression, .* \(4, 10\)")
  check_refused("mae", ten, {"x": ten}, "'mae' needs labels 'y', and examples")
  wide = np.zeros((4, 65))
  check_refused("confusion", wide, whole, "would be 4,225 numbers")
  tokens, texts = np.zeros((4, 3, 9)), {"y": np.zeros((4, 3), int)}
  check_refused("auc", tokens, texts, "'auc' is of one label an example")
  check_refused("perplexity", ten, whole, "made of the metric 'loss'")
  three = np.zeros((4, 3, 3))
  check_refused("f1_macro", three, whole, "needs a score of each class")


def test_a_metric_that_does_not_fit_is_refused_before_anything_runs():
  task = with_metrics(echo(), [named_measure("metric", "top_5")])
  data = blobs([5, 5], features=CLASSES, classes=CLASSES)
  simulator = make_simulator(task, fedavg(task, sgd(0.1), sgd(1.0)), data)
  with pytest.raises(ModelError, match="always right"):
    _ = simulator.checked


@pytest.mark.parametrize("name", ["auk", "top_K", "top_0", "top_x", ""])
def test_unknown_names(name):
  with pytest.raises(UnknownNameError, match="Known: auc, calibration_error"):
    named_measure("model.metrics", name)


def test_every_metric_has_a_title_and_a_docstring():
  for name in MEASURES:
    function = named_measure("metric", name.replace("K", "7"))
    known = metric_names.known(function.__name__)
    assert known is not None
    assert getattr(function, "higher_is_better", None) is known.higher_is_better
    assert MEASURES[name].__doc__
  assert metric_names.display("seen/top_7/p10") == "seen/Top-7 accuracy/p10"


# --- a user's own -------------------------------------------------------------


def balance(outputs, examples):
  return {"y": examples["y"], "said": jnp.argmax(outputs, -1)}


balance.number = lambda v: {  # type: ignore[attr-defined]
  "score": sk.balanced_accuracy_score(v["y"], v["said"]),
  "kappa": None,
}
balance.names = ("score", "kappa")  # type: ignore[attr-defined]


def test_numbers_of_a_users_own(evaluated):
  simulator, _, _ = evaluated
  task = with_metrics(echo(), [balance])
  examples = simulator.data.test
  values = jax.jit(task.metrics)(Variables({"b": 0.0}), examples)["balance"]
  assert isinstance(values, PerExample)
  expected = sk.balanced_accuracy_score(examples["y"], examples["x"].argmax(1))
  found = task.joint["balance"].number(jax.device_get(values.values))
  assert found == {"score": pytest.approx(expected), "kappa": None}


def test_changed_tasks_keep_numbers():
  x = jnp.asarray(np.random.default_rng(4).normal(size=(9, 3)), jnp.float32)
  examples = {"x": x, "y": jnp.arange(9) % 3}
  task = with_metrics(
    echo(), [measures.auc, measures.confusion, measures.f1_macro]
  )
  variables = Variables({"b": jnp.zeros(())})
  for changed in (with_compute_dtype(task, jnp.float32), with_remat(task)):
    for name, joint in changed.joint.items():
      found, expected = (
        joint.number(
          jax.device_get(t.metrics(variables, examples)[name].values)
        )
        for t in (changed, task)
      )
      assert found == expected


def test_numbers_that_cannot_be():
  def flat(outputs, examples):
    return jnp.sum(outputs)

  def broken(outputs, examples):
    return outputs

  flat.number = lambda values: 0.0  # type: ignore[attr-defined]
  broken.number = lambda values: values["y"]  # type: ignore[attr-defined]
  x = {"x": jnp.zeros((4, 3)), "y": jnp.zeros(4, int)}
  with pytest.raises(MetricError, match=r"'flat' has shape \(\); give values"):
    with_metrics(echo(), [flat]).metrics(Variables({"b": 0.0}), x)
  joint = with_metrics(echo(), [broken]).joint["broken"]
  with pytest.raises(
    MetricError, match=r"'broken\.number': line \d+: IndexErr"
  ):
    joint.number(np.zeros((4, 3)))
  broken.names = ("p10",)  # type: ignore[attr-defined]
  with pytest.raises(ValueError, match="the name 'p10' is taken"):
    with_metrics(echo(), [broken])
  broken.names = 3  # type: ignore[attr-defined]
  with pytest.raises(TypeError, match=r"broken\.names is a int, 3; give a tup"):
    with_metrics(echo(), [broken])


def test_a_config_names_ours_and_a_users_own():
  root = pathlib.Path(__file__).resolve().parents[1]
  own = f"{root / 'docs' / 'own' / 'metric.py'}:median_margin"
  fields = {"model.metrics": f"('auc', '{own}', 'top_2')"}
  task = build(
    load(f"{root / 'configs' / 'digits_fedavg.py'}", fields)
  ).simulator.task
  assert task.joint.keys() == {"auc", "median_margin"}
  assert task.higher_is_better["top_2"]
  with pytest.raises(
    UnknownNameError, match=r"model\.metrics='auk' .* 'auc'\?"
  ):
    build(
      load(f"{root / 'configs' / 'digits_fedavg.py'}", {"model.metrics": "auk"})
    )


def test_the_list_has_every_metric():
  lines = listing.run(["metric"]).splitlines()
  assert [line.split()[0] for line in lines[1:]] == [*MEASURES]
  assert "Shown as Top-5 accuracy. Higher" in listing.run(["metric", "top_5"])
  with pytest.raises(UnknownNameError, match="Did you mean 'auc'"):
    listing.run(["metric", "auk"])


def test_a_task_of_a_users_own_that_breaks_the_contract():
  values = PerExample(jnp.zeros(4))
  batch = Batch({"x": jnp.zeros((4, 3))}, jnp.ones(4, bool))
  joint = {"median": Joint(np.median)}

  def refused(made, joint, error, match):
    task = echo()._replace(metrics=lambda v, e: {"median": made}, joint=joint)
    with pytest.raises(error, match=match):
      sum_metrics(task, Variables({}), batch)

  mean = Metric(jnp.zeros(4), jnp.ones(4))
  refused(mean, joint, TypeError, "Task.joint has its number; give PerExample")
  short = PerExample({"a": jnp.zeros(3)})
  refused(short, joint, ValueError, r"shape \(3,\) at \['a'\]; give values of")
  refused(values, {}, TypeError, "as 'median'; give Metric")
  task = echo()._replace(metrics=lambda v, e: {"median": values}, joint=joint)
  assert sum_metrics(task, Variables({}), batch) == {}
