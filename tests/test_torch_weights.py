"""Layouts of docs/weights.md: PyTorch's modules say what layers here say.

Every layout is compared by outputs, from PyTorch's random parameters, and then
taken back to PyTorch, bit for bit.
"""

import os
import pathlib
import re
import runpy
import subprocess
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fedjax_sim as fs
from fedjax_sim.core.weights import read_weights
from fedjax_sim.models import MODELS, layers
from fedjax_sim.models.pytorch import layouts, networks
from fedjax_sim.models.pytorch.layouts import Layer, from_torch, to_torch
from fedjax_sim.models.transformer.attention import Attention
from fedjax_sim.tasks import losses

torch = pytest.importorskip(
  "torch", reason="needs PyTorch: pip install 'fedjax_sim[benchmarks]'"
)

pytestmark = pytest.mark.integration

ROOT = pathlib.Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "docs" / "examples" / "torch_weights.py"
RNGS = nnx.Rngs(0)
Module: Any = torch.nn.Module


@pytest.fixture(autouse=True)
def _seeded():
  torch.manual_seed(0)


def state_of(module) -> dict[str, np.ndarray]:
  return {k: x.detach().numpy() for k, x in module.state_dict().items()}


def shaken(module):
  """The module in evaluation, no parameter or statistic of which is 0 or 1."""
  with torch.no_grad():
    for name, x in module.state_dict().items():
      if name.endswith("running_var"):
        x.uniform_(0.5, 2.0)
      elif x.is_floating_point():
        x.add_(0.3 * torch.randn_like(x))
  return module.eval()


def fill(module: nnx.Module, arrays: dict[str, np.ndarray]) -> None:
  """Put arrays into a module by their names."""
  for name, array in arrays.items():
    *path, leaf = name.removeprefix("buffers/").split("/")
    part: Any = module
    for key in path:
      part = part[int(key)] if key.isdigit() else getattr(part, key)
    variable = getattr(part, leaf)
    assert variable.shape == array.shape, name
    variable[...] = jnp.asarray(array)


def check(layout, theirs, ours, x, run=None, name="", module=""):
  """Compare outputs, and what goes back to PyTorch.

  `x` is PyTorch's input; `run` takes it to what PyTorch should say, by the
  layer here.
  """
  state = state_of(theirs)
  rows = [Layer(name, module, layout)]
  arrays = from_torch({f"{module}{k}": v for k, v in state.items()}, rows)
  fill(ours, arrays)
  ours.eval()
  expected = theirs(x)
  expected = expected[0] if isinstance(expected, tuple) else expected
  found = (run or ours)(jnp.asarray(x.numpy()))
  np.testing.assert_allclose(found, expected.detach().numpy(), atol=1e-5)
  back = to_torch(arrays, rows)
  assert back.keys() == {
    k for k in state if not k.endswith("num_batches_tracked")
  }
  for key, value in back.items():
    np.testing.assert_array_equal(value, state[key])


# --- layers -------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_linear(bias):
  theirs = shaken(torch.nn.Linear(5, 3, bias=bias))
  ours = nnx.Linear(5, 3, use_bias=bias, rngs=RNGS)
  check(layouts.linear(bias), theirs, ours, torch.randn(4, 5))


def test_linear_after_convolution():
  theirs = shaken(torch.nn.Linear(2 * 3 * 4, 5))
  ours = nnx.Linear(2 * 3 * 4, 5, rngs=RNGS)
  layout = layouts.linear_after_convolution(2, 3, 4)

  def run(flat):  # what a network here flattens has the channels last
    images = flat.reshape(-1, 2, 3, 4).transpose(0, 2, 3, 1)
    return ours(images.reshape(len(flat), -1))

  check(layout, theirs, ours, torch.randn(6, 24), run)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("space", [1, 2])
def test_convolution(space, bias):
  kind = (torch.nn.Conv1d, torch.nn.Conv2d)[space - 1]
  options = {"stride": 2, "padding": 1, "bias": bias}
  theirs = shaken(kind(3, 5, (3, 2)[:space], **options))
  window = (3, 2)[:space]
  ours = layers.conv(
    *(3, 5, window),
    strides=2,
    padding=1,
    use_bias=bias,
    rngs=RNGS,
  )
  x = torch.randn(2, 3, *(9, 8)[:space])
  last = lambda x: jnp.moveaxis(x, 1, -1)
  first = lambda x: jnp.moveaxis(x, -1, 1)
  run = lambda x: first(ours(last(x)))
  check(layouts.convolution(bias), theirs, ours, x, run)


@pytest.mark.parametrize("space", [1, 2])
def test_batch_norm(space):
  kind = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)[space - 1]
  ours = layers.batch_norm(4, rngs=RNGS)
  x = torch.randn(3, 4, *(6, 5)[:space])
  run = lambda x: jnp.moveaxis(ours(jnp.moveaxis(x, 1, -1)), -1, 1)
  check(layouts.batch_norm(), shaken(kind(4)), ours, x, run)


def test_group_norm():
  ours = layers.group_norm(6, 2, rngs=RNGS)
  run = lambda x: jnp.moveaxis(ours(jnp.moveaxis(x, 1, -1)), -1, 1)
  theirs = shaken(torch.nn.GroupNorm(2, 6))
  check(layouts.norm(), theirs, ours, torch.randn(3, 6, 5, 4), run)


def test_layer_norm():
  ours = nnx.LayerNorm(6, epsilon=1e-5, rngs=RNGS)
  theirs = shaken(torch.nn.LayerNorm(6))
  check(layouts.norm(), theirs, ours, torch.randn(3, 6))


def test_rms_norm():
  ours = nnx.RMSNorm(6, epsilon=1e-5, rngs=RNGS)
  theirs = shaken(torch.nn.RMSNorm(6, eps=1e-5))
  check(layouts.norm(bias=False), theirs, ours, torch.randn(3, 6))


def test_embedding():
  ours = nnx.Embed(7, 3, rngs=RNGS)
  theirs = shaken(torch.nn.Embedding(7, 3))
  check(layouts.embedding(), theirs, ours, torch.randint(7, (2, 5)))


@pytest.mark.parametrize("recurrent_bias", [True, False])
def test_lstm(recurrent_bias):
  theirs = shaken(torch.nn.LSTM(3, 5))
  layout = layouts.lstm(recurrent_bias=recurrent_bias)
  ours = layers.LSTM(3, 5, recurrent_bias=recurrent_bias, rngs=RNGS)
  if not recurrent_bias:  # whose place is that of the sum of both
    with torch.no_grad():
      theirs.bias_hh_l0.zero_()
  check(layout, theirs, ours, torch.randn(6, 2, 3))


def test_two_biases_of_an_lstm_become_their_sum():
  theirs = shaken(torch.nn.LSTM(3, 5))
  ours = layers.LSTM(3, 5, rngs=RNGS)
  fill(ours, from_torch(state_of(theirs), [Layer("", "", layouts.lstm())]))
  x = torch.randn(6, 2, 3)
  expected = theirs(x)[0].detach().numpy()
  np.testing.assert_allclose(ours(x.numpy()), expected, atol=1e-5)


def test_gru():
  ours = layers.GRU(3, 5, rngs=RNGS)
  check(layouts.gru(), shaken(torch.nn.GRU(3, 5)), ours, torch.randn(6, 2, 3))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_attention(bias, causal):
  theirs = shaken(
    torch.nn.MultiheadAttention(6, 2, bias=bias, batch_first=True)
  )
  draw = nnx.initializers.lecun_normal()
  ours = Attention(
    *(6, 2, 2, 3),
    bias=bias,
    causal=causal,
    rotary_base=None,
    kernel_init=draw,
    output_init=draw,
    rngs=RNGS,
  )
  forward = theirs.forward
  mask = torch.triu(torch.ones(5, 5, dtype=torch.bool), 1) if causal else None
  theirs.forward = lambda x: forward(x, x, x, attn_mask=mask)
  check(layouts.attention(bias), theirs, ours, torch.randn(3, 5, 6))


def test_parameters():
  """Arrays of the network itself, beside those of its layers."""
  theirs = torch.nn.Module()
  theirs.shift = torch.nn.Parameter(torch.randn(3))
  rows = [Layer("", "", layouts.parameters(bias="shift"))]
  arrays = from_torch(state_of(theirs), rows)
  np.testing.assert_array_equal(arrays["bias"], theirs.shift.detach().numpy())
  assert to_torch(arrays, rows).keys() == {"shift"}


# --- networks -----------------------------------------------------------------


class Basic(Module):
  """A block of two convolutions, with torchvision's names."""

  def __init__(self, before, after, stride, norm):
    super().__init__()
    conv = lambda n, size, step: torch.nn.Conv2d(
      *(n, after, size, step, size // 2), bias=False
    )
    self.conv1, self.bn1 = conv(before, 3, stride), norm(after)
    self.conv2, self.bn2 = conv(after, 3, 1), norm(after)
    self.downsample = torch.nn.Identity()
    if stride > 1:
      around = conv(before, 1, stride), norm(after)
      self.downsample = torch.nn.Sequential(*around)

  def forward(self, x):
    y = torch.relu(self.bn1(self.conv1(x)))
    return torch.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class ResNet18(Module):
  """A ResNet of 18 layers for small tests; torchvision's has width 64."""

  def __init__(self, stem, norm, width, classes):
    super().__init__()
    size, stride = (7, 2) if stem == "7x7" else (3, 1)
    self.conv1 = torch.nn.Conv2d(3, width, size, stride, size // 2, bias=False)
    self.bn1 = norm(width)
    self.pool = torch.nn.MaxPool2d(3, 2, 1) if stride == 2 else lambda x: x
    before = width
    for stage in range(4):
      after = width << stage
      blocks = [
        Basic(before, after, 2 if stage else 1, norm),
        Basic(after, after, 1, norm),
      ]
      setattr(self, f"layer{stage + 1}", torch.nn.Sequential(*blocks))
      before = after
    self.fc = torch.nn.Linear(before, classes)

  def forward(self, x):
    x = self.pool(torch.relu(self.bn1(self.conv1(x))))
    for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
      x = stage(x)
    return self.fc(x.mean((2, 3)))


def both_ways(module, task, rows, x, seen, folder, own=slice(None)):
  """Compare logits with PyTorch's weights here, and ours in PyTorch."""
  expected = shaken(module)(x).detach().numpy()
  path = folder / "here.safetensors"
  fs.write_weights(path, from_torch(state_of(module), rows))
  begun = fs.with_initial(task, read_weights(path).arrays)
  variables = jax.jit(begun.init)(jax.random.key(1))
  logits = jax.jit(lambda v: task.logits(v, {"x": seen}))
  found = np.asarray(logits(variables))[..., own]
  scale = abs(expected).max()
  np.testing.assert_allclose(found / scale, expected / scale, atol=1e-4)

  variables = jax.jit(task.init)(jax.random.key(2))
  path = folder / "there.safetensors"
  fs.write_weights(path, to_torch(fs.named_variables(variables), rows))
  from safetensors.torch import load_file

  module.load_state_dict(load_file(path))
  expected = module(x).detach().numpy()
  found = np.asarray(logits(variables))[..., own]
  np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize(("stem", "norm"), [("7x7", "batch"), ("3x3", "group")])
def test_a_resnet(stem, norm, tmp_path):
  theirs = torch.nn.BatchNorm2d
  if norm == "group":
    theirs = lambda features: torch.nn.GroupNorm(2, features)
  module = ResNet18(stem, theirs, 8, 4)
  options = {"depth": 18, "stem": stem, "norm": norm, "width": 8}
  task = MODELS["resnet"]((32, 32, 3), 4, **options)
  x = torch.randn(2, 3, 32, 32)
  seen = x.permute(0, 2, 3, 1).numpy()
  rows = networks.resnet(18, norm)
  both_ways(module, task, rows, x, seen, tmp_path)


def test_lenet(tmp_path):
  class LeNet(Module):
    def __init__(self):
      super().__init__()
      self.conv1 = torch.nn.Conv2d(3, 6, 5)
      self.conv2 = torch.nn.Conv2d(6, 16, 5)
      self.fc1 = torch.nn.Linear(16 * 5 * 4, 120)
      self.fc2 = torch.nn.Linear(120, 84)
      self.fc3 = torch.nn.Linear(84, 7)

    def forward(self, x):
      pool = torch.nn.functional.max_pool2d
      x = pool(torch.relu(self.conv1(x)), 2)
      x = pool(torch.relu(self.conv2(x)), 2).flatten(1)
      return self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(x)))))

  task = MODELS["lenet"]((32, 28, 3), 7)
  x = torch.randn(2, 3, 32, 28)
  seen = x.permute(0, 2, 3, 1).numpy()
  both_ways(LeNet(), task, networks.lenet(32, 28), x, seen, tmp_path)


def test_the_module_of_the_guide_from_flute(tmp_path, monkeypatch):
  """Its file here says what its file in FLUTE says, and measures alike."""
  flute: Any = types.ModuleType("core.model")
  flute.BaseModel = Module
  monkeypatch.setitem(sys.modules, "core", types.ModuleType("core"))
  monkeypatch.setitem(sys.modules, "core.model", flute)
  folder = ROOT / "docs" / "examples" / "from_flute"
  named = runpy.run_path(str(folder / "flute" / "model.py"))
  theirs = named["GestureNet"]({"width": 8})
  ours = runpy.run_path(str(folder / "gestures.py"))
  task = ours["gestures"]((24, 3), 6)
  x, y = torch.randn(50, 3, 24), torch.randint(6, (50,))
  seen = x.transpose(1, 2).numpy()
  both_ways(theirs, task, ours["layers"](), x, seen, tmp_path)
  measured = theirs.inference({"x": x, "y": y})
  scores = measured["output"].detach().numpy()
  found = ours["top_2"](scores, {"y": y.numpy()})
  assert measured["top_2"]["value"] == pytest.approx(float(found.mean()))
  means = {
    name: float(m.total.sum() / m.weight.sum())
    for name, m in losses.classification_metrics(
      scores, {"y": y.numpy()}
    ).items()
  }
  loss = theirs.loss({"x": x, "y": y}).item()
  assert measured["acc"] == pytest.approx(means["accuracy"])
  assert means["loss"] == pytest.approx(loss, rel=1e-5)


def test_the_script_compares_three_networks_both_ways(tmp_path):
  done = subprocess.run(
    [sys.executable, str(SCRIPT), str(tmp_path / "weights")],
    env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  found = re.findall(
    r"(\w+)\.safetensors: largest difference (\S+)", done.stdout
  )
  assert [name for name, _ in found] == [
    *("images", "images_torch", "text", "text_torch"),
    *("words", "words_torch"),
  ]
  assert all(float(difference) < 1e-5 for _, difference in found)
  arrays = read_weights(tmp_path / "weights" / "text.safetensors").arrays
  assert arrays["reader/layers/1/recurrent"].shape == (256, 1024)
