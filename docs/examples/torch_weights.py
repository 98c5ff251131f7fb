"""Weights of PyTorch models as weights files, and the outputs compared.

python docs/examples/torch_weights.py weights/

A directory is made with `images.safetensors`, for the model `femnist_cnn`,
`text.safetensors`, for `char_lstm`, and `words.safetensors`, for `word_gru`.
Here the PyTorch models are fresh ones; a trained one comes from
`module.load_state_dict(torch.load(path, weights_only=True))`, where
`weights_only` keeps a pickle from running code.
"""

import pathlib
import sys

import jax
import numpy as np
import torch
from torch import nn

import fedjax_sim as fs
from fedjax_sim.models.char_lstm import char_lstm
from fedjax_sim.models.femnist_cnn import femnist_cnn
from fedjax_sim.models.word_gru import word_gru


class Images(nn.Module):
  """`femnist_cnn` in PyTorch, on images of shape (channels, height, width)."""

  def __init__(self, side=28, classes=62):
    super().__init__()
    self.conv1 = nn.Conv2d(1, 32, 3)
    self.conv2 = nn.Conv2d(32, 64, 3)
    self.side = (side - 4) // 2
    self.dense1 = nn.Linear(64 * self.side**2, 128)
    self.dense2 = nn.Linear(128, classes)

  def forward(self, x):
    x = torch.relu(self.conv2(torch.relu(self.conv1(x))))
    x = nn.functional.max_pool2d(x, 2).flatten(1)
    return self.dense2(torch.relu(self.dense1(x)))


class Text(nn.Module):
  """`char_lstm` in PyTorch, on ids of shape (batch, time)."""

  def __init__(self, tokens=65, embedding=8, units=256):
    super().__init__()
    self.embed = nn.Embedding(tokens, embedding)
    self.lstm = nn.LSTM(embedding, units, num_layers=2, batch_first=True)
    self.logits = nn.Linear(units, tokens)

  def forward(self, x):
    return self.logits(self.lstm(self.embed(x))[0])


class Words(nn.Module):
  """`word_gru` in PyTorch, on ids of shape (batch, time) from 1 on."""

  def __init__(self, words=99, embedding=16, units=32):
    super().__init__()
    self.embed = nn.Embedding(words, embedding)
    self.gru = nn.GRU(embedding, units, batch_first=True)
    self.project = nn.Linear(units, embedding, bias=False)
    self.bias = nn.Parameter(torch.randn(words))

  def forward(self, x):
    states = self.gru(self.embed(x[:, 1:] - 1))[0]
    states = nn.functional.pad(states, (0, 0, 1, 0))  # the first is zero
    return self.project(states) @ self.embed.weight.T + self.bias


# --- layer by layer -----------------------------------------------------------


def linear(state, name):
  """PyTorch computes W x + b, and Flax x W + b."""
  return {"kernel": state[f"{name}.weight"].T, "bias": state[f"{name}.bias"]}


def linear_after_convolution(state, name, channels, height, width):
  """Rows in the order in which (height, width, channels) are flattened."""
  layer = linear(state, name)
  rows = np.arange(channels * height * width).reshape(channels, height, width)
  layer["kernel"] = layer["kernel"][rows.transpose(1, 2, 0).ravel()]
  return layer


def convolution(state, name):
  """From (out, in, *window) to (*window, in, out)."""
  kernel = np.moveaxis(state[f"{name}.weight"], (0, 1), (-1, -2))
  return {"kernel": kernel, "bias": state[f"{name}.bias"]}


def lstm(state, name, layer):
  """Both have the gates in the order i, f, g, o; PyTorch has two biases."""
  part = lambda kind: state[f"{name}.{kind}_l{layer}"]
  bias = part("bias_ih") + part("bias_hh")
  inputs = {"kernel": part("weight_ih").T, "bias": bias}
  return {"inputs": inputs, "recurrent": part("weight_hh").T}


def gru(state, name, layer):
  """Both have the gates in the order r, z, n, and two biases."""
  part = lambda kind: state[f"{name}.{kind}_l{layer}"]
  inputs = {"kernel": part("weight_ih").T, "bias": part("bias_ih")}
  recurrent = {"recurrent": part("weight_hh").T}
  return {"inputs": inputs, **recurrent, "recurrent_bias": part("bias_hh")}


# --- model by model -----------------------------------------------------------


def images(state, side=12):
  """The tree of `femnist_cnn`; `side` is that of the pooled images."""
  flat = linear_after_convolution(state, "dense1", 64, side, side)
  return {
    "conv1": convolution(state, "conv1"),
    "conv2": convolution(state, "conv2"),
    "dense1": flat,
    "dense2": linear(state, "dense2"),
  }


def text(state):
  """The tree of `char_lstm` with two layers."""
  return {
    "reader": {
      "embed": {"embedding": state["embed.weight"]},
      "layers": [lstm(state, "lstm", layer) for layer in (0, 1)],
    },
    "logits": linear(state, "logits"),
  }


def words(state):
  """The tree of `word_gru`; its embeddings are the output's, too."""
  return {
    "embedding": state["embed.weight"],
    "gru": gru(state, "gru", 0),
    "project": {"kernel": state["project.weight"].T},
    "bias": state["bias"],
  }


def numbers(module):
  """The arrays of a module by their names."""
  return {k: x.detach().numpy() for k, x in module.state_dict().items()}


def outputs(task, path, x):
  """What the task's model says of inputs, beginning from a weights file."""
  arrays = fs.read_weights(path).arrays
  variables = fs.with_initial(task, arrays).init(jax.random.key(0))
  return np.asarray(task.logits(variables, {"x": x}))


def main(folder):
  folder.mkdir(parents=True, exist_ok=True)
  torch.manual_seed(0)
  with torch.no_grad():
    module, path = Images(), folder / "images.safetensors"
    fs.write_weights(path, images(numbers(module)))
    x = torch.rand(5, 1, 28, 28)
    expected = module(x).numpy()
    found = outputs(
      femnist_cnn((28, 28, 1), 62), path, x.numpy().transpose(0, 2, 3, 1)
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)
    print(f"{path}: largest difference {abs(found - expected).max():.1e}")

    module, path = Text(), folder / "text.safetensors"
    fs.write_weights(path, text(numbers(module)))
    ids = torch.randint(65, (5, 80))
    expected = module(ids).numpy()
    found = outputs(char_lstm((80,), 65), path, ids.numpy())
    np.testing.assert_allclose(found, expected, atol=1e-5)
    print(f"{path}: largest difference {abs(found - expected).max():.1e}")

    module, path = Words(), folder / "words.safetensors"
    fs.write_weights(path, words(numbers(module)))
    ids = torch.randint(1, 100, (5, 25))
    expected = module(ids).numpy()
    task = word_gru((25,), 100, embedding=16, units=32)
    found = outputs(task, path, ids.numpy())[..., 1:]  # 0 is padding
    np.testing.assert_allclose(found, expected, atol=1e-5)
    print(f"{path}: largest difference {abs(found - expected).max():.1e}")


if __name__ == "__main__":
  main(pathlib.Path(*sys.argv[1:]))
