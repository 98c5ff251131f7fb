"""Losses and metrics of one's own: what is told, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from fedjax_sim import core
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.core import Batch, Loss, Metric, Task, Variables
from fedjax_sim.simulation.preflight import ModelError
from fedjax_sim.tasks import function_task, linen_task, losses, nnx_task
from problems import blobs, make_simulator, sgd

FEATURES, CLASSES, GAMMA = 6, 3, 2.0
KEY = jax.random.key(0)


def focal(logits, examples):
  """Lin et al. 2017 (arXiv 1708.02002); labels below 0 weigh nothing."""
  log = jax.nn.log_softmax(logits)
  y = jnp.maximum(examples["y"], 0)
  picked = jnp.take_along_axis(log, y[:, None], axis=1)[:, 0]
  return -((1 - jnp.exp(picked)) ** GAMMA) * picked, examples["y"] >= 0


def squares(outputs, examples):
  value = (outputs[:, 0] - examples["y"]) ** 2
  return value, jnp.ones_like(value)


def made(kind, outputs, **options):
  if kind == "nnx":
    make = lambda rngs: nnx.Linear(FEATURES, outputs, rngs=rngs)
    return nnx_task(make, **options)
  x = jax.ShapeDtypeStruct((1, FEATURES), jnp.float32)
  return linen_task(linen.Dense(outputs), x, **options)


def examples_of(y):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(len(y), FEATURES)).astype(np.float32)
  return {"x": x, "y": y}


def outputs_of(variables, x):
  kernel, bias = (
    np.asarray(jax.tree.leaves(variables.params[k])[0], np.float64)
    for k in ("kernel", "bias")
  )
  return x @ kernel + bias


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_evaluation_tells_the_loss_that_trains(kind):
  examples = examples_of(np.array([0, 2, 1, -1], np.int32))
  task = made(kind, CLASSES, loss=focal)
  variables = task.init(KEY)
  found = jax.jit(task.metrics)(variables, examples)
  logits = outputs_of(variables, examples["x"])[:3]
  p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
  p = p[np.arange(3), examples["y"][:3]]
  assert found.keys() == {"loss", "accuracy"}
  expected = -((1 - p) ** GAMMA) * np.log(p)
  np.testing.assert_allclose(found["loss"].total[:3], expected, rtol=1e-5)
  hits = logits.argmax(1) == examples["y"][:3]
  np.testing.assert_array_equal(found["accuracy"].total, [*hits, 0])
  for metric in found.values():
    assert metric.total[3] == 0
    np.testing.assert_array_equal(metric.weight, [1, 1, 1, 0])


@pytest.mark.parametrize("kind", ["nnx", "linen"])
@pytest.mark.parametrize(("y", "outputs"), [("f4", 1), ("f4", 2), ("i4", 1)])
def test_there_is_no_accuracy_without_classes(kind, y, outputs):
  examples = examples_of(np.array([0, 2, 1], y))
  task = made(kind, outputs, loss=squares)
  variables = task.init(KEY)
  found = jax.jit(task.metrics)(variables, examples)
  assert found.keys() == {"loss"}
  expected = outputs_of(variables, examples["x"])[:, 0] - examples["y"]
  np.testing.assert_allclose(found["loss"].total, expected**2, rtol=1e-5)


def test_the_loss_is_added_to_metrics_that_lack_it():
  def mae(outputs, examples):
    value = jnp.abs(outputs[:, 0] - examples["y"])
    return {"mae": Metric(value, jnp.ones_like(value))}

  def other(outputs, examples):
    return {"loss": mae(outputs, examples)["mae"]}

  examples = examples_of(np.array([0.5, 2], np.float32))
  task = made("nnx", 1, loss=squares, metrics=mae)
  variables = task.init(KEY)
  found = task.metrics(variables, examples)
  np.testing.assert_allclose(
    found["loss"].total, found["mae"].total ** 2, rtol=1e-5
  )
  own = made("nnx", 1, loss=squares, metrics=other)
  with pytest.raises(ValueError, match="returned 'loss', which evaluation has"):
    own.metrics(variables, examples)
  with pytest.raises(TypeError, match="metrics is .*give one function"):
    made("nnx", 1, loss=squares, metrics={"mae": mae})


def test_metrics_of_another_loss_have_the_one_that_trains():
  examples = {
    "x": jnp.ones((2, FEATURES)),
    "y": jnp.array([0, 1], jnp.int32),
  }
  task = made("nnx", CLASSES, loss=focal, metrics=losses.classification_metrics)
  variables = task.init(KEY)
  found = task.metrics(variables, examples)
  assert found.keys() == {"loss", "accuracy"}
  trained = task.loss(variables, examples, KEY)
  np.testing.assert_allclose(found["loss"].total, trained.value, rtol=1e-6)


def test_labels_that_are_no_classes_need_a_loss():
  examples = {"x": jnp.ones((2, FEATURES)), "y": jnp.ones(2)}
  task = made("nnx", CLASSES)
  with pytest.raises(TypeError, match="'y' is float32; give a loss"):
    task.loss(task.init(KEY), examples, KEY)


def test_a_run_tells_one_loss_in_training_and_evaluation():
  data = blobs([5, 8], features=FEATURES)
  data = dataclasses.replace(data, unseen=data.train)
  task = made("nnx", CLASSES, loss=focal)
  simulator = make_simulator(task, fedavg(task, sgd(0), sgd(1.0)), data)
  out = simulator.dispatch(simulator.init(), simulator.plan(0, 1))
  row = simulator.evaluate(out.state)
  np.testing.assert_allclose(
    row["unseen/loss"], out.rows[0]["train/loss"], rtol=1e-5
  )


def test_evaluation_has_the_numbers_of_a_loss():
  def scaled(outputs, examples):
    value, weight = squares(outputs, examples)
    return examples["factor"] * value, weight

  task = made("nnx", 1, loss=scaled)._replace(hparams={"factor": 3.0})
  plain = made("nnx", 1, loss=squares)
  variables = task.init(KEY)
  batch = Batch(examples_of(np.ones(4, np.float32)), jnp.ones(4, bool))
  totals = [
    core.sum_metrics(t, variables, batch)["loss"] for t in (task, plain)
  ]
  np.testing.assert_allclose(totals[0].total, 3 * totals[1].total, rtol=1e-6)


def test_tokens_have_their_own_metrics():
  assert losses.evaluated(losses.token_cross_entropy, None) is (
    losses.token_metrics
  )
  assert losses.evaluated(losses.cross_entropy, None) is (
    losses.classification_metrics
  )


# --- refusals -----------------------------------------------------------------

DATA = blobs([5, 8], features=FEATURES)


def check_refused(task, *texts):
  algorithm = fedavg(task, sgd(0.1), sgd(1.0))
  with pytest.raises(ModelError) as caught:
    _ = make_simulator(task, algorithm, DATA).checked
  for text in texts:
    assert text in str(caught.value)


def value_alone(outputs, examples):
  return jnp.mean(outputs, axis=1)


def scalar(outputs, examples):
  return jnp.mean(outputs), jnp.ones(())


def angle(outputs, examples):
  value = jnp.exp(1j * outputs[:, 0])
  return value, jnp.ones_like(outputs[:, 0])


def nothing(outputs, examples):
  return None


def metric_for_pair(outputs, examples):
  return Metric(outputs[:, 0], outputs[:, 0])


@pytest.mark.parametrize(
  ("loss", "texts"),
  [
    (
      value_alone,
      ["the loss 'value_alone' returned an array, float32 of shape (4,)",
       "value, jnp.ones_like(value)"],
    ),
    (scalar, ["value has shape ()", "takes the mean itself"]),
    (angle, ["value has dtype complex64", "jnp.abs(value)"]),
    (nothing, ["the loss 'nothing' returned None"]),
    (metric_for_pair, ["returned a Metric of 2", "value and weight"]),
  ],
  ids=lambda x: getattr(x, "__name__", ""),
)  # fmt: skip
def test_losses_of_another_structure_are_refused(loss, texts):
  check_refused(made("nnx", CLASSES, loss=loss), *texts)


def dictionary(outputs, examples):
  return {"error": outputs[:, 0]}


def array_of_metrics(outputs, examples):
  return outputs[:, 0]


def pair(outputs, examples):
  return {"error": (outputs[:, 0], jnp.ones_like(outputs[:, 0]))}


def imaginary(outputs, examples):
  return {"error": Metric(1j * outputs[:, 0], jnp.ones_like(outputs[:, 0]))}


@pytest.mark.parametrize(
  ("metrics", "texts"),
  [
    (
      dictionary,
      ["the metrics function 'dictionary' returned an array, float32 of shape",
       "as 'error'", "Metric(total=value * weight, weight=weight)"],
    ),
    (array_of_metrics, ["'array_of_metrics' returned an array", "{'error': "]),
    (pair, ["returned a tuple of 2 as 'error'", "Metric(total="]),
    (imaginary, ["total of 'error' has dtype complex64"]),
  ],
  ids=lambda x: getattr(x, "__name__", ""),
)  # fmt: skip
def test_metrics_of_another_structure_are_refused(metrics, texts):
  check_refused(made("nnx", CLASSES, metrics=metrics), *texts)


def test_tasks_of_another_structure_are_refused():
  init = lambda key: Variables({"w": jnp.zeros(FEATURES)}, {"b": jnp.zeros(2)})
  value = lambda v, e: e["x"] @ v.params["w"]
  bare = Task(init, lambda v, e, key: value(v, e), lambda v, e: {})
  check_refused(bare, "Task.loss returned an array, float32", "Loss(value, jnp")

  def forgets(variables, examples, key):
    found = value(variables, examples)
    return Loss(found, jnp.ones_like(found))

  text = "buffers has nothing at ['b'], and it was float32 (2,)"
  check_refused(bare._replace(loss=forgets), text, "variables.buffers where")
  text = "Task.metrics returned an array"
  keeps = lambda v, e, key: forgets(v, e, key)._replace(buffers=v.buffers)
  task = bare._replace(loss=keeps, metrics=value)
  check_refused(task, text)


def test_plain_functions_of_another_structure_are_refused():
  init = lambda key: {"w": jnp.zeros(FEATURES)}
  value = lambda p, e: e["x"] @ p["w"]

  def both(params, examples):
    return value(params, examples), 1

  check_refused(function_task(init, both), "'both' returned a tuple of 2")
  check_refused(
    function_task(init, value, value),
    "the metrics function '<lambda>' returned an array",
  )


@pytest.mark.parametrize(
  ("name", "text"),
  [
    ("loss/mean", "'loss/mean' is taken"),
    ("p90", "'p90' is taken"),
    ("client", "'client' is taken"),
    ("", "'' is empty"),
    (" ", "' ' is empty"),
    ("a//b", "'a//b' is empty, or a part of it"),
    (3, "3 is no text"),
  ],
)
def test_names_that_reports_use_are_refused(name, text):
  init = lambda key: {"w": jnp.zeros(FEATURES)}
  value = lambda p, e: e["x"] @ p["w"]
  task = function_task(init, value, lambda p, e: {name: value(p, e)})
  check_refused(task, text)


def test_names_of_what_clients_report_are_refused_too():
  task = made("nnx", CLASSES)
  plain = fedavg(task, sgd(0.1), sgd(1.0))

  def finish(client, carry):
    report = plain.finish(client, carry)
    return report._replace(metrics={"": report.metrics["loss"]})

  simulator = make_simulator(task, plain._replace(finish=finish), DATA)
  with pytest.raises(
    ValueError, match=r"Report\.metrics: the name '' is empty"
  ):
    simulator.trace()


def test_numbers_of_an_algorithm_replace_no_others():
  task = made("nnx", CLASSES)
  plain = fedavg(task, sgd(0.1), sgd(1.0))
  named = plain._replace(
    state_metrics=lambda server, hparams: {"train/loss": jnp.ones(())}
  )
  simulator = make_simulator(task, named, DATA)
  with pytest.raises(
    ValueError, match=r"Algorithm\.state_metrics .*'train/loss'"
  ):
    simulator.dispatch(simulator.init(), simulator.plan(0, 1))


@pytest.mark.parametrize(
  ("dtype", "text"),
  [("int32", "model.frozen=('table',)"), ("complex64", "w[0] + 1j * w[1]")],
)
def test_parameters_that_no_gradient_moves_are_refused(dtype, text):
  task = function_task(
    lambda key: {"w": jnp.zeros(FEATURES), "table": jnp.zeros(2, dtype)},
    lambda params, e: e["x"] @ params["w"],
  )
  check_refused(task, f"the parameter 'table' is {dtype}", text)


def test_a_model_without_parameters_is_refused():
  task = function_task(lambda key: {}, lambda params, e: e["x"][:, 0])
  check_refused(task, "the model has no parameters")
