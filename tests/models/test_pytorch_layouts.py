"""PyTorch's names and layouts, where PyTorch is not installed.

`tests/test_torch_weights.py` compares outputs with PyTorch's.
"""

import inspect
import pathlib
import re

import jax
import numpy as np
import pytest

from fedjax_sim.models import MODELS
from fedjax_sim.models.pytorch import layouts, networks
from fedjax_sim.models.pytorch.layouts import Layer, from_torch, to_torch
from fedjax_sim.tasks.freezing import named_variables

ROOT = pathlib.Path(__file__).parents[2]


def named(model, shape, classes, **options):
  """Random arrays by the names of a model's variables."""
  task = MODELS[model](shape, classes, **options)
  shapes = named_variables(jax.eval_shape(task.init, jax.random.key(0)))
  rng = np.random.default_rng(0)
  return {
    k: rng.normal(size=x.shape).astype(np.float32) for k, x in shapes.items()
  }


IMAGES = (32, 32, 3)
SMALL = {"width": 4}


@pytest.mark.parametrize(
  ("model", "shape", "options", "layers"),
  [
    ("resnet", IMAGES, SMALL, networks.resnet(norm="group")),
    ("resnet", IMAGES, {**SMALL, "norm": "batch"}, networks.resnet()),
    ("resnet", IMAGES, {**SMALL, "depth": 34}, networks.resnet(34, "group")),
    (
      *("resnet", IMAGES, {**SMALL, "depth": 50, "norm": "batch"}),
      networks.resnet(50),
    ),
    ("femnist_cnn", (10, 12, 1), {}, networks.femnist_cnn(10, 12)),
    ("lenet", (20, 16, 3), {}, networks.lenet(20, 16)),
    ("char_lstm", (8,), {"units": (3, 4, 5)}, networks.char_lstm(3)),
    (
      *("char_lstm", (8,), {"units": (3,), "recurrent_bias": True}),
      networks.char_lstm(1, recurrent_bias=True),
    ),
    ("word_gru", (8,), {"embedding": 3, "units": 4}, networks.word_gru()),
  ],
)
def test_all_of_a_network_comes_back(model, shape, options, layers):
  arrays = named(model, shape, 7, **options)
  back = from_torch(to_torch(arrays, layers), layers)
  assert back.keys() == arrays.keys()
  for name, array in arrays.items():
    np.testing.assert_array_equal(back[name], array)


def test_resnets_have_torchvisions_names_and_shapes():
  """As `torchvision.models.resnet18` and `resnet50` have them."""
  options = {"stem": "7x7", "norm": "batch"}
  shapes = {
    depth: {
      k: x.shape
      for k, x in to_torch(
        named("resnet", IMAGES, 1000, depth=depth, **options),
        networks.resnet(depth),
      ).items()
    }
    for depth in (18, 50)
  }
  assert len(shapes[18]) == 62 + 2 * 20  # parameters, running statistics
  assert len(shapes[50]) == 161 + 2 * 53
  for depth, name, shape in (
    (18, "conv1.weight", (64, 3, 7, 7)),
    (18, "bn1.running_var", (64,)),
    (18, "layer1.1.conv2.weight", (64, 64, 3, 3)),
    (18, "layer2.0.downsample.0.weight", (128, 64, 1, 1)),
    (18, "layer4.0.downsample.1.running_mean", (512,)),
    (18, "fc.weight", (1000, 512)),
    (50, "layer1.0.downsample.0.weight", (256, 64, 1, 1)),
    (50, "layer3.5.conv3.weight", (1024, 256, 1, 1)),
    (50, "layer4.2.bn3.bias", (2048,)),
    (50, "fc.weight", (1000, 2048)),
  ):
    assert shapes[depth][name] == shape, name
  assert "layer1.0.downsample.0.weight" not in shapes[18]


def test_where_a_number_of_a_kernel_goes():
  rng = np.random.default_rng(0)
  weight = rng.normal(size=(5, 3, 2, 4))  # out, in, height, width
  kernel, _ = layouts.convolution().from_torch(weight, np.zeros(5))
  for o, i, y, x in ((0, 0, 0, 0), (4, 2, 1, 3), (1, 2, 0, 3)):
    assert kernel[y, x, i, o] == weight[o, i, y, x]

  image, weight = rng.normal(size=(3, 2, 4)), rng.normal(size=(5, 24))
  layout = layouts.linear_after_convolution(3, 2, 4, bias=False)
  (kernel,) = layout.from_torch(weight)
  np.testing.assert_allclose(
    image.transpose(1, 2, 0).ravel() @ kernel, weight @ image.ravel()
  )


def test_the_second_bias_of_an_lstm():
  state = {
    f"{kind}_l0": np.full(shape, value, np.float32)
    for kind, shape, value in (
      ("weight_ih", (8, 3), 1),
      ("weight_hh", (8, 2), 2),
      ("bias_ih", (8,), 3),
      ("bias_hh", (8,), 4),
    )
  }
  for both, ours, theirs in ((False, 7, 0), (True, 3, 4)):
    rows = [Layer("", "", layouts.lstm(recurrent_bias=both))]
    arrays = from_torch(state, rows)
    assert np.all(arrays["inputs/bias"] == ours)
    assert ("recurrent_bias" in arrays) == both
    assert np.all(to_torch(arrays, rows)["bias_hh_l0"] == theirs)


def test_what_pytorch_counts_is_left_out():
  rows = [Layer("norm", "bn", layouts.batch_norm())]
  state = {f"bn.{name}": np.ones(3) for name in rows[0].layout.theirs}
  state["bn.num_batches_tracked"] = np.array(7)
  assert from_torch(state, rows).keys() == {
    *("norm/scale", "norm/bias", "buffers/norm/mean", "buffers/norm/var")
  }


@pytest.mark.parametrize(
  ("arrays", "message"),
  [
    ({"bias": np.ones(2)}, "weights: there is no 'kernel'; give a model of"),
    (
      {"kernel": np.ones((3, 2)), "bias": np.ones(2), "scale": np.ones(2)},
      "weights: no layer takes 'scale'; leave them out",
    ),
    (
      {"kernel": np.ones((3, 2, 1)), "bias": np.ones(2)},
      r"weights: the layer does not fit .* 'kernel' \(3, 2, 1\), 'bias' \(2,\)",
    ),
  ],
)
def test_what_does_not_fit_is_named(arrays, message):
  with pytest.raises(ValueError, match=message):
    to_torch(arrays, [Layer("", "fc", layouts.linear())])


def test_a_depth_that_no_resnet_has():
  with pytest.raises(ValueError, match="depth='20' .* 101, 152, 18"):
    networks.resnet(20)


def test_every_layout_has_its_row_and_every_row_its_test():
  page = (ROOT / "docs" / "weights.md").read_text()
  rows = re.findall(r"^\| `(\w+)` \| .* \| `(\w+)` \|$", page, re.M)
  public = {
    name
    for name, function in inspect.getmembers(layouts, inspect.isfunction)
    if function.__module__ == layouts.__name__
    and function.__annotations__["return"] == "Layout"
    and not name.startswith("_")
  }
  tests = (ROOT / "tests" / "test_torch_weights.py").read_text()
  assert {name for name, _ in rows} == public
  for _, test in rows:
    assert f"\ndef {test}(" in tests
