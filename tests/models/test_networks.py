"""Networks against their layers in numpy, and their sizes as published."""

import arithmetic as plain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim.models import MODELS
from fedjax_sim.models.layers import uniform
from fedjax_sim.tasks.freezing import named_variables

KEY = jax.random.key(0)
CLASSES = 3


class Values:
  """A model's variables in double precision, and layers that take them.

  Batch normalization keeps the statistics that it saw in `seen`; `training`
  says whether it takes those, or the running ones.
  """

  def __init__(self, variables, training=True):
    found = named_variables(variables)
    self.of = {k: np.asarray(v, np.float64) for k, v in found.items()}
    self.training, self.seen = training, {}

  def conv(self, name, x, **options):
    bias = self.of.get(f"{name}/bias", 0)
    return plain.convolution(x, self.of[f"{name}/kernel"], **options) + bias

  def linear(self, name, x):
    bias = self.of.get(f"{name}/bias", 0)
    return x @ self.of[f"{name}/kernel"] + bias

  def batch_norm(self, name, x):
    affine = self.of[f"{name}/scale"], self.of[f"{name}/bias"]
    axes = tuple(range(x.ndim - 1))
    self.seen[f"buffers/{name}/mean"] = x.mean(axes)
    self.seen[f"buffers/{name}/var"] = x.var(axes)
    if self.training:
      return plain.batch_norm(x, *affine)
    running = (self.of[f"buffers/{name}/{kind}"] for kind in ("mean", "var"))
    return plain.batch_norm(x, *affine, *running)


def drawn(task, seed=0):
  """Variables of the task's shapes, all of them random; variances positive."""
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(task.init, KEY)
  leaves, structure = jax.tree.flatten(shapes)
  values = []
  for name, leaf in zip(named_variables(shapes), leaves, strict=True):
    fan_in = np.prod(leaf.shape[:-1]) if name.endswith("kernel") else 16
    value = rng.normal(size=leaf.shape) / np.sqrt(fan_in)
    if name.endswith(("scale", "var")):
      value = 1 + abs(value)
    values.append(jnp.asarray(value, leaf.dtype))
  return jax.tree.unflatten(structure, values)


def examples_of(shape, size=4, seed=1):
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(size, *shape)).astype(np.float32)
  return {"x": x, "y": rng.integers(0, CLASSES, size).astype(np.int32)}


def check(name, shape, network, evaluated=True, **options):
  """The loss in training; with buffers those, and the logits in evaluation."""
  task = MODELS[name](shape, CLASSES, **options)
  variables, examples = drawn(task), examples_of(shape)
  loss = jax.jit(task.loss)(variables, examples, KEY)
  values = Values(variables)
  logits = network(values, examples["x"].astype(np.float64))
  expected = plain.cross_entropy(logits, examples["y"])
  np.testing.assert_allclose(loss.value, expected, rtol=1e-3, atol=1e-4)
  after = named_variables(variables._replace(buffers=loss.buffers))
  moved = {k for k in after if k.startswith("buffers/")}
  assert moved == set(values.seen)
  for key, seen in values.seen.items():
    running = 0.9 * values.of[key] + 0.1 * seen
    np.testing.assert_allclose(after[key], running, rtol=1e-3, atol=1e-4)
  if not (values.seen and evaluated):
    return
  logits = network(Values(variables, False), examples["x"].astype(np.float64))
  assert task.logits
  found = jax.jit(task.logits)(variables, examples)
  np.testing.assert_allclose(found, logits, rtol=1e-3, atol=1e-3)


# --- networks -----------------------------------------------------------------


def resnet(depth, stem, norm, groups=2):
  """A function of (values, images)."""
  counts = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}[depth]

  def normalized(values, name, x):
    if norm == "batch":
      return values.batch_norm(name, x)
    affine = values.of[f"{name}/scale"], values.of[f"{name}/bias"]
    return plain.group_norm(x, *affine, groups)

  def block(values, name, x, strides):
    def layer(i, x, **options):
      x = values.conv(f"{name}/convs/{i}", x, **options)
      return normalized(values, f"{name}/norms/{i}", x)

    if depth == 18:
      y = plain.relu(layer(0, x, strides=strides, padding=1))
      y = layer(1, y, padding=1)
    else:
      y = plain.relu(layer(0, x))
      y = plain.relu(layer(1, y, strides=strides, padding=1))
      y = layer(2, y)
    around = f"{name}/around/layers"
    if f"{around}/0/kernel" in values.of:
      x = values.conv(f"{around}/0", x, strides=strides)
      x = normalized(values, f"{around}/1", x)
    assert x.shape == y.shape
    return plain.relu(x + y)

  def network(values, x):
    strides, padding = {"3x3": (1, 1), "7x7": (2, 3)}[stem]
    x = values.conv("stem", x, strides=strides, padding=padding)
    x = plain.relu(normalized(values, "norm", x))
    if stem == "7x7":
      x = plain.max_pool(x, 3, 2, 1)
    number = 0
    for stage, count in enumerate(counts):
      for i in range(count):
        x = block(values, f"blocks/{number}", x, 2 if stage and not i else 1)
        number += 1
    return values.linear("logits", x.mean((1, 2)))

  return network


@pytest.mark.parametrize(
  ("depth", "stem", "norm", "shape"),
  [
    (18, "3x3", "group", (8, 9, 3)),
    (18, "7x7", "batch", (32, 33, 3)),
    pytest.param(50, "3x3", "batch", (8, 8, 3), marks=pytest.mark.slow),
  ],
)
def test_resnet(depth, stem, norm, shape):
  options = {"depth": depth, "stem": stem, "norm": norm, "width": 2}
  # Evaluation takes long to compile, and the networks below are evaluated.
  check("resnet", shape, resnet(depth, stem, norm), depth == 50, **options)


def lenet(values, x):
  for name in ("conv1", "conv2"):
    x = plain.max_pool(plain.relu(values.conv(name, x)), 2, 2)
  x = x.reshape(len(x), -1)
  for name in ("dense1", "dense2"):
    x = plain.relu(values.linear(name, x))
  return values.linear("dense3", x)


def test_lenet():
  check("lenet", (16, 18, 2), lenet)


def vgg(norm):
  """A function of (values, images); VGG-11."""

  def network(values, x):
    for stage, count in enumerate((1, 1, 2, 2, 2)):
      layer = 0
      for _ in range(count):
        x = values.conv(f"stages/{stage}/layers/{layer}", x, padding=1)
        layer += 1
        if norm == "batch":
          x = values.batch_norm(f"stages/{stage}/layers/{layer}", x)
          layer += 1
        x = plain.relu(x)
        layer += 1
      x = plain.max_pool(x, 2, 2)
    x = x.reshape(len(x), -1)
    x = plain.relu(values.linear("dense1", x))
    x = plain.relu(values.linear("dense2", x))
    return values.linear("dense3", x)

  return network


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_vgg(norm):
  options = {"depth": 11, "norm": norm, "dropout": 0.0, "width": 2}
  check("vgg", (32, 64, 1), vgg(norm), **options)


def ecg_attention(double_softmax):
  """A function of (values, signals)."""

  def block(values, name, x):
    swish = lambda x: x * plain.sigmoid(x)
    pad = lambda x: np.pad(x, [(0, 0), (4, 0), (0, 0)])
    first = values.conv(f"{name}/conv1", x)
    x = pad(swish(values.batch_norm(f"{name}/norm1", first)))
    x = values.conv(f"{name}/conv2", x)
    x = pad(swish(values.batch_norm(f"{name}/norm2", x)))
    x = values.conv(f"{name}/conv3", x)
    x = pad(swish(values.batch_norm(f"{name}/norm3", first + x)))
    return plain.max_pool(x, 2, 2)

  def network(values, x):
    x = block(values, "block2", block(values, "block1", x))
    outputs, cell = plain.lstm(
      x.transpose(2, 0, 1),  # channels are read one after the other
      values.of["lstm/inputs/kernel"],
      values.of["lstm/recurrent"],
      values.of["lstm/inputs/bias"] + values.of["lstm/recurrent_bias"],
    )
    sums = []
    for asked in (outputs[-1], cell):
      weights = np.tanh(values.linear("attention", asked))
      sums.append(sum(weights[:, [t]] * o for t, o in enumerate(outputs)))
    logits = values.linear("logits", np.maximum(*sums))
    return plain.softmax(logits) if double_softmax else logits

  return network


@pytest.mark.parametrize("double", [False, True])
def test_ecg_attention(double):
  options = {"width": 4, "double_softmax": double}
  check("ecg_attention", (23, 2), ecg_attention(double), **options)


def test_logistic_regression_with_a_sigmoid():
  def network(values, x):
    return plain.sigmoid(values.linear("linear", x.reshape(len(x), -1)))

  options = {"init": "uniform", "sigmoid": True}
  check("logistic_regression", (2, 3), network, **options)


# --- sizes --------------------------------------------------------------------

BATCH = {"norm": "batch"}
TORCHVISION = {"norm": "batch", "stem": "7x7"}
CONVOLUTIONS_OF_16 = 14_714_688  # 13 of 3 x 3, with biases
DENSE_OF_512 = 2 * (512 * 512 + 512) + 512 * 10 + 10


@pytest.mark.parametrize(
  ("name", "shape", "classes", "options", "count"),
  [
    ("lenet", (32, 32, 3), 10, {}, 62_006),
    ("logistic_regression", (784,), 10, {"sigmoid": True}, 7_850),
    ("ecg_attention", (187, 1), 5, {}, 136_965),
    ("resnet", (32, 32, 3), 1000, TORCHVISION, 11_689_512),
    ("resnet", (32, 32, 3), 10, TORCHVISION | {"depth": 50}, 23_528_522),
    ("resnet", (32, 32, 3), 100, BATCH | {"depth": 50}, 23_705_252),
    ("resnet", (32, 32, 3), 1000, TORCHVISION | {"depth": 34}, 21_797_672),
    ("resnet", (32, 32, 3), 10, {}, 11_173_962),
    ("vgg", (32, 32, 3), 10, {}, CONVOLUTIONS_OF_16 + DENSE_OF_512),
    (
      *("vgg", (32, 32, 3), 10, BATCH),
      CONVOLUTIONS_OF_16 + DENSE_OF_512 + 2 * 4_224,
    ),
  ],
)
def test_published_sizes(name, shape, classes, options, count):
  task = MODELS[name](shape, classes, **options)
  leaves = jax.tree.leaves(jax.eval_shape(task.init, KEY).params)
  assert sum(np.prod(x.shape) for x in leaves) == count


# --- first values -------------------------------------------------------------


def first(name, shape, **options):
  task = MODELS[name](shape, CLASSES, **options)
  return named_variables(jax.jit(task.init)(KEY))


def test_pytorchs_draws():
  values = np.asarray(uniform(25)(KEY, (400, 25)))
  assert abs(values).max() <= 0.2
  np.testing.assert_allclose(values.std(), 0.2 / np.sqrt(3), rtol=0.02)
  found = first("logistic_regression", (784,), init="uniform")
  for value in found.values():
    assert 1 / 40 < abs(np.asarray(value)).max() <= 1 / 28
  found = first("ecg_attention", (187, 1), width=16)
  bounds = {
    "block1/conv1": 5**-0.5,
    "block2/conv3": 80**-0.5,
    "lstm/": 0.25,
    "attention": 0.25,
    "logits": 0.25,
  }
  for name, bound in bounds.items():
    most = [
      abs(np.asarray(v)).max() for k, v in found.items() if k.startswith(name)
    ]
    assert len(most) == {"lstm/": 4, "attention": 1}.get(name, 2)
    assert 0.6 * bound < min(most) <= max(most) <= bound, name


def test_a_resnet_begins_as_torchvisions():
  found = first("resnet", (8, 8, 3), width=16, zero_scale=True)
  kernel = np.asarray(found["blocks/2/convs/0/kernel"])
  assert kernel.shape == (3, 3, 16, 32)
  std = np.sqrt(2 / (3 * 3 * 32))  # by fan out
  np.testing.assert_allclose(kernel.std(), std, rtol=0.05)
  assert abs(kernel).max() > 3 * std  # not truncated
  for name, value in found.items():
    if name.endswith("scale"):
      assert np.all(np.asarray(value) == (0 if "norms/1" in name else 1))


# --- options ------------------------------------------------------------------


@pytest.mark.parametrize(
  ("name", "shape", "options", "message"),
  [
    ("resnet", (7, 32, 3), {}, "resnet: .* both sides >= 8"),
    ("resnet", (8, 8, 3), {"depth": 20}, "depth=20 .* 18, 34, 50, 101, 152"),
    ("resnet", (8, 8, 3), {"stem": "5x5"}, "stem='5x5' .* 3x3, 7x7"),
    ("resnet", (8, 8, 3), {"norm": "layer"}, "norm='layer' .* batch, group"),
    ("resnet", (8, 8, 3), {"groups": 3}, "groups=3 does not divide width=64"),
    ("resnet", (8, 8, 3), {"width": 3}, "groups=2 does not divide width=3"),
    ("resnet", (8, 8, 3), {"width": (64,)}, "width=.* give a whole number"),
    ("resnet", (8, 8, 3), {"zero_scale": 1}, "zero_scale=1 is a int"),
    ("lenet", (15, 32, 3), {}, "lenet: .* both sides >= 16"),
    ("vgg", (31, 32, 3), {}, "vgg: .* both sides >= 32"),
    ("vgg", (32, 32, 3), {"depth": 12}, "depth=12 .* 11, 13, 16, 19"),
    ("vgg", (32, 32, 3), {"norm": "group"}, "norm='group' .* batch, none"),
    ("vgg", (32, 32, 3), {"dropout": 2}, "dropout=2"),
    ("ecg_attention", (9, 1), {}, "time >= 10"),
    ("ecg_attention", (187,), {}, r"give \(time, channels\)"),
    ("ecg_attention", (187, 1), {"width": 0}, "width=0 is out of range"),
    ("ecg_attention", (187, 1), {"double_softmax": 1}, "double_softmax=1"),
    ("logistic_regression", (6,), {"init": "he"}, "init='he' .* uniform, zer"),
    ("logistic_regression", (6,), {"sigmoid": 0}, "sigmoid=0 is a int"),
  ],
)
def test_what_is_refused(name, shape, options, message):
  with pytest.raises((TypeError, ValueError), match=message):
    MODELS[name](shape, CLASSES, **options)
