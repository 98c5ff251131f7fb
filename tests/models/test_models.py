"""Every model of the registry, and each against numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.data import FederatedData, make_dataset
from fedjax_sim.models import MODELS
from fedjax_sim.models.logistic_regression import logistic_regression
from fedjax_sim.models.mlp import mlp
from problems import blobs, make_simulator, sgd

CLASSES = 3
KEY = jax.random.key(0)


def batch_of(shape, size=5):
  rng = np.random.default_rng(0)
  return {
    "x": rng.normal(size=(size, *shape)).astype(np.float32),
    "y": rng.integers(0, CLASSES, size).astype(np.int32),
  }


def cross_entropy(logits, y):
  norm = np.log(np.exp(logits).sum(1))
  return norm - logits[np.arange(len(y)), y]


# Each model's smallest sizes, and inputs that it takes.
SMALL: dict[str, dict[str, object]] = {
  "char_lstm": {"embedding": 3, "units": (8, 5)},
  "femnist_cnn": {"dropout": (0.0, 0.0)},
  "ecg_attention": {"width": 4},
  "gbdt": {"objective": "squared", "trees": 2},
  "resnet": {"width": 4},
  "text_lstm": {"embedding": 3, "units": (8, 5)},
  "word_gru": {"embedding": 3, "units": 8},
  "vgg": {"depth": 11, "dropout": 0.0, "width": 2},
}
SHAPES = [
  ("logistic_regression", (6,)),
  ("logistic_regression", (2, 3)),
  ("mlp", (6,)),
  ("mlp", (2, 3)),
  ("ecg_cnn", (12, 2)),
  ("femnist_cnn", (8, 9, 2)),
  ("gbdt", (2, 3)),
  ("gmm", (2, 3)),
  ("heavy_hitters", (2, 3)),
  ("kmeans", (2, 3)),
  ("lenet", (16, 16, 1)),
  ("quantiles", (2, 3)),
  pytest.param("resnet", (8, 9, 3), marks=pytest.mark.slow),
  pytest.param("vgg", (32, 32, 1), marks=pytest.mark.slow),
]


WITHOUT_LABELS = ["gbdt", "gmm", "heavy_hitters", "kmeans", "quantiles"]
OF_TEXT = ["char_lstm", "text_lstm", "word_gru"]
# test_news_recommender.py, test_transformer.py, and test_hugging_face.py
APART = ["news_recommender", "bert", "gpt2", "llama", "hugging_face"]
OF_BATCHES = ["ecg_attention"]  # whose examples are judged together


def test_every_model_is_here():
  named = {getattr(case, "values", case)[0] for case in SHAPES}
  others = (OF_TEXT, OF_BATCHES, APART)
  assert named.union(*others) == set(MODELS)


@pytest.fixture
def _quick_to_compile():
  """Large networks at a small size take long to compile, not to run."""
  before = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", before)


@pytest.mark.usefixtures("_quick_to_compile")
@pytest.mark.parametrize(("name", "shape"), SHAPES)
def test_an_example_is_judged_by_itself(name, shape):
  """Losses and metrics of an example do not depend on the rest of its batch."""
  task = MODELS[name](shape, CLASSES, **SMALL.get(name, {}))
  examples = batch_of(shape)
  variables = jax.jit(task.init)(KEY)
  compute = jax.jit(task.loss)
  loss = compute(variables, examples, KEY)
  assert loss.value.shape == loss.weight.shape == (5,)
  np.testing.assert_array_equal(loss.weight, np.ones(5))
  # The same two among others, in a batch of the same size: compiled once.
  rest = {"x": 3 * examples["x"][::-1] + 1, "y": examples["y"][::-1]}
  own = np.isin(np.arange(5), [1, 2])
  mixed = {
    k: np.where(own.reshape(-1, *[1] * (v.ndim - 1)), v, rest[k])
    for k, v in examples.items()
  }
  other = compute(variables, mixed, KEY).value
  np.testing.assert_allclose(other[own], loss.value[own], rtol=1e-4)
  out = jax.jit(task.metrics)(variables, examples)
  np.testing.assert_allclose(out["loss"].total, loss.value, rtol=1e-4)
  if name not in WITHOUT_LABELS:
    assert out["accuracy"].total.shape == (5,)


def test_dropout_is_for_training():
  task = MODELS["femnist_cnn"]((8, 8, 1), CLASSES)
  examples = batch_of((8, 8, 1))
  variables = jax.jit(task.init)(KEY)
  loss = jax.jit(task.loss)
  one, other = (loss(variables, examples, jax.random.key(i)) for i in (1, 2))
  assert np.all(one.value != other.value)


def test_characters_count_and_padding_does_not():
  task = MODELS["char_lstm"]((7,), 5, embedding=3, units=(8, 6))
  rng = np.random.default_rng(0)
  x = rng.integers(1, 5, (3, 7)).astype(np.uint8)
  y = np.append(x[:, 1:], rng.integers(1, 5, (3, 1)), axis=1).astype(np.uint8)
  y[1, 4:] = 0
  y[2] = 0
  variables = jax.jit(task.init)(KEY)
  loss = jax.jit(task.loss)(variables, {"x": x, "y": y}, KEY)
  assert loss.weight.tolist() == [7, 4, 0]
  assert loss.value[2] == 0
  short = {"x": x[1:2, :4], "y": y[1:2, :4]}
  # What comes later changes nothing before it.
  alone = jax.jit(task.loss)(variables, short, KEY)
  np.testing.assert_allclose(alone.value[0], loss.value[1], rtol=1e-5)
  out = jax.jit(task.metrics)(variables, {"x": x, "y": y})
  total = np.asarray(loss.value * loss.weight)
  np.testing.assert_allclose(out["loss"].total, total, rtol=1e-5)
  assert out["accuracy"].weight.tolist() == [7, 4, 0]


def test_a_text_is_read_to_its_end_and_no_further():
  task = MODELS["text_lstm"]((7,), 3, tokens=5, embedding=3, units=(8, 6))
  x = np.random.default_rng(0).integers(1, 5, (3, 7)).astype(np.uint8)
  x[1, 4:] = 0
  y = np.array([0, 2, 1])
  variables = jax.jit(task.init)(KEY)
  loss = jax.jit(task.loss)(variables, {"x": x, "y": y}, KEY)
  alone = jax.jit(task.loss)(variables, {"x": x[1:2, :4], "y": y[1:2]}, KEY)
  np.testing.assert_allclose(alone.value[0], loss.value[1], rtol=1e-5)
  other = x.copy()
  other[0, 6] = x[0, 6] % 4 + 1  # the last character counts
  changed = jax.jit(task.loss)(variables, {"x": other, "y": y}, KEY).value
  assert changed[0] != loss.value[0]
  assert loss.weight.tolist() == [1, 1, 1]


def test_a_text_lstm_learns_which_character_stands_first():
  rng = np.random.default_rng(0)
  x = rng.integers(1, 4, (40, 6)).astype(np.uint8)
  x[::3, 4:] = 0
  examples: dict[str, np.ndarray] = {"x": x, "y": x[:, 0].astype(int) - 1}
  clients = FederatedData.from_assignment(examples, np.arange(40) % 4)
  data = make_dataset("text", clients, num_classes=3)
  task = MODELS["text_lstm"]((6,), 3, tokens=4, embedding=4, units=(16,))
  simulator = make_simulator(task, fedavg(task, sgd(1.0), sgd(1.0)), data)
  rows = []
  for out in simulator.run(simulator.init(), 80):
    rows += out.rows
  assert rows[-1]["train/loss"] < 0.3 * rows[0]["train/loss"]


@pytest.mark.parametrize(
  ("name", "options", "x", "message"),
  [
    ("char_lstm", {}, [[1, 3]], "'x' holds 3; num_classes says .* 0 to 2"),
    ("char_lstm", {}, [[-1, 300]], "'x' holds -1"),
    ("char_lstm", {}, [[0.5]], "'x' is float64; give whole numbers"),
    ("word_gru", {}, [[1, 3]], "'x' holds 3; num_classes says .* 0 to 2"),
    ("text_lstm", {"tokens": 9}, [[9]], "'x' holds 9; model.tokens .* 0 to 8"),
  ],
)
def test_ids_that_a_model_does_not_know_are_refused(name, options, x, message):
  task = MODELS[name]((2,), CLASSES, **options)
  with pytest.raises(ValueError, match=message):
    task.check({"x": np.array(x)})
  task.check({"x": np.array([[0, 2]])})


def test_an_lstm_learns_what_comes_next():
  text = np.resize([1, 2, 3, 1, 3, 2], 8 * 12).reshape(8, 12).astype(np.uint8)
  clients = [
    {"x": text[i : i + 2, :-1], "y": text[i : i + 2, 1:]} for i in (0, 2, 4, 6)
  ]
  data = make_dataset(
    "text", FederatedData.from_clients(clients), num_classes=4
  )
  task = MODELS["char_lstm"]((11,), 4, embedding=4, units=(16,))
  simulator = make_simulator(task, fedavg(task, sgd(1.0), sgd(1.0)), data)
  rows = []
  for out in simulator.run(simulator.init(), 60):
    rows += out.rows
  assert rows[-1]["train/loss"] < 0.3 * rows[0]["train/loss"]


@pytest.mark.parametrize(
  ("name", "side", "rate", "rounds"),
  [
    ("femnist_cnn", 8, 0.1, 20),
    pytest.param("resnet", 8, 0.03, 20, marks=pytest.mark.slow),
  ],
)
def test_a_model_of_images_learns(name, side, rate, rounds):
  flat_ = blobs([12, 9, 15, 10], features=side * side)
  train = dataclasses.replace(
    flat_.train,
    examples={
      "x": flat_.train.examples["x"].reshape(-1, side, side, 1),
      "y": flat_.train.examples["y"],
    },
  )
  data = make_dataset("images", train, num_classes=CLASSES)
  task = MODELS[name](data.example_shape, CLASSES, **SMALL[name])
  simulator = make_simulator(task, fedavg(task, sgd(rate), sgd(1.0)), data)
  rows = []
  for out in simulator.run(simulator.init(), rounds):
    rows += out.rows
  assert rows[-1]["train/loss"] < 0.5 * rows[0]["train/loss"]


def test_published_sizes():
  """As many parameters as the layers of the published models have."""
  count = lambda task: sum(
    np.prod(x.shape)
    for x in jax.tree.leaves(jax.eval_shape(task.init, KEY).params)
  )
  # 9 * 32 + 32, 288 * 64 + 64, 9216 * 128 + 128, 128 * 62 + 62
  assert count(MODELS["femnist_cnn"]((28, 28, 1), 62)) == 1_206_590
  # Reddi et al. 2021: 86 characters, padding, beginning, end and unknown, as
  # their code has it (google-research/federated, utils/models/
  # shakespeare_models.py). McMahan et al. 2017 give 866,578, without saying of
  # what.
  # 8 * 90; 4 * 256 * (8 + 256 + 1); 4 * 256 * (256 + 256 + 1); 256 * 90 + 90
  assert count(MODELS["char_lstm"]((80,), 90)) == 820_522
  # PyTorch's layers, and so FLUTE's, have a second bias each.
  two = MODELS["char_lstm"]((80,), 90, recurrent_bias=True)
  assert count(two) == 820_522 + 2 * 4 * 256
  # 10,000 * 160; 3 * 512 * (160 + 512 + 2); 512 * 160; 10,000
  assert count(MODELS["word_gru"]((25,), 10_001)) == 2_727_184


@pytest.mark.parametrize("name", ["logistic_regression", "mlp"])
def test_a_model_learns(name):
  data = blobs([12, 9, 15, 10])
  task = MODELS[name](data.example_shape, CLASSES)
  simulator = make_simulator(task, fedavg(task, sgd(0.1), sgd(1.0)), data)
  rows = []
  for out in simulator.run(simulator.init(), 10):
    rows += out.rows
  assert rows[-1]["train/loss"] < 0.5 * rows[0]["train/loss"]


def test_logistic_regression_is_linear_and_starts_from_zeros():
  task = logistic_regression((2, 3), CLASSES)
  variables = task.init(KEY)
  shapes = jax.tree.map(lambda x: x.shape, jax.tree.leaves(variables))
  assert shapes == [(3,), (6, 3)]
  assert not any(np.any(x) for x in jax.tree.leaves(variables))
  examples = batch_of((2, 3))
  rng = np.random.default_rng(1)
  variables = jax.tree.map(
    lambda x: jnp.array(rng.normal(size=x.shape), x.dtype), variables
  )
  bias, kernel = (np.asarray(x) for x in jax.tree.leaves(variables))
  logits = examples["x"].reshape(5, 6) @ kernel + bias
  np.testing.assert_allclose(
    task.loss(variables, examples, KEY).value,
    cross_entropy(logits, examples["y"]),
    rtol=1e-5,
  )
  np.testing.assert_array_equal(
    task.metrics(variables, examples)["accuracy"].total,
    logits.argmax(1) == examples["y"],
  )


def test_mlp_has_relu_between_its_layers():
  task = mlp((2, 3), CLASSES, (5, 4))
  variables = jax.jit(task.init)(KEY)
  shapes = [x.shape for x in jax.tree.leaves(variables)]
  assert shapes == [(5,), (6, 5), (4,), (5, 4), (3,), (4, 3)]
  rng = np.random.default_rng(1)
  variables = jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), variables
  )
  examples = batch_of((2, 3))
  h = np.asarray(examples["x"].reshape(5, 6), np.float64)
  arrays = [np.asarray(x, np.float64) for x in jax.tree.leaves(variables)]
  for i in range(0, 6, 2):
    h = h @ arrays[i + 1] + arrays[i]
    h = np.maximum(h, 0) if i < 4 else h
  np.testing.assert_allclose(
    task.loss(variables, examples, KEY).value,
    cross_entropy(h, examples["y"]),
    rtol=1e-4,
  )


def test_mlp_without_hidden_layers_is_linear():
  variables = mlp((6,), CLASSES, ()).init(KEY)
  assert [x.shape for x in jax.tree.leaves(variables)] == [(3,), (6, 3)]


@pytest.mark.parametrize(
  ("sizes", "error", "match"),
  [
    ((8, 0), ValueError, "hidden_sizes=0 is out of range"),
    ((8.0,), TypeError, "hidden_sizes=8.0 is a float"),
  ],
)
def test_mlp_refuses_sizes(sizes, error, match):
  with pytest.raises(error, match=match):
    mlp((6,), CLASSES, sizes)


@pytest.mark.parametrize(
  ("name", "shape"), [*SHAPES, *((name, (7,)) for name in OF_TEXT[:-1])]
)
def test_a_model_needs_classes(name, shape):
  if name == "quantiles":  # of numbers, not of classes
    assert MODELS[name](shape, 0)
    return
  with pytest.raises(ValueError, match="num_classes=0 is out of range"):
    MODELS[name](shape, 0)


@pytest.mark.parametrize(
  ("name", "shape", "options", "message"),
  [
    ("femnist_cnn", (28, 28), {}, r"shape \(28, 28\); give images"),
    ("femnist_cnn", (5, 28, 1), {}, "both sides >= 6"),
    ("femnist_cnn", (9, 9, 1), {"dropout": (2, 0)}, "dropout=2"),
    ("ecg_cnn", (187,), {}, r"give \(time, channels\)"),
    ("char_lstm", (80, 2), {}, r"give \(time,\) ids"),
    ("char_lstm", (80,), {"units": (0,)}, "units=0"),
    ("char_lstm", (80,), {"units": 256}, r"units=256; give .*\(256, 256\)"),
    ("char_lstm", (80,), {"units": ()}, r"units=\(\); give a number for each"),
    ("char_lstm", (80,), {"units": "256"}, "units='256'; give a number for"),
    ("char_lstm", (80,), {"embedding": 8.0}, "embedding=8.0 is a float"),
    ("word_gru", (80, 2), {}, r"word_gru: .* give \(time,\) ids"),
    ("word_gru", (80,), {"units": 0}, "units=0 is out of range"),
    ("word_gru", (80,), {"embedding": 8.0}, "embedding=8.0 is a float"),
    ("word_gru", (80,), {"reject_unknown": 1}, "reject_unknown=1 is a int"),
    ("text_lstm", (80, 2), {}, r"text_lstm: .* give \(time,\) ids"),
    ("text_lstm", (80,), {"tokens": 0}, "tokens=0 is out of range"),
    ("femnist_cnn", (9, 9, 1), {"dropout": 0.25}, r"=0.25; .*\(0.25, 0.5\)"),
    ("femnist_cnn", (9, 9, 1), {"dropout": (0.1,) * 3}, "give two rates"),
    ("femnist_cnn", (9, 9, 1), {"dropout": (0.1, "a")}, "dropout='a' is a str"),
    ("mlp", (6,), {"hidden_sizes": 64}, r"hidden_sizes=64; give .*\(64,\)"),
  ],
)
def test_what_models_refuse(name, shape, options, message):
  with pytest.raises((TypeError, ValueError), match=message):
    MODELS[name](shape, CLASSES, **options)
