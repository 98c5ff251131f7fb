"""Weights of PyTorch models here, and of models here in PyTorch.

python docs/examples/torch_weights.py weights/

Of the models `femnist_cnn`, `char_lstm` and `word_gru`, written in PyTorch, the
weights become `images.safetensors`, `text.safetensors` and `words.safetensors`,
which `model.initial` takes. The weights of the models here become
`images_torch.safetensors` and so on, which PyTorch loads. Outputs are compared.

Here all weights are fresh ones. A file of PyTorch's is opened by
`module.load_state_dict(torch.load(path, weights_only=True))`, where
`weights_only` keeps a pickle from running code.
"""

import pathlib
import sys

import jax
import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

import fedjax_sim as fs
from fedjax_sim.models.char_lstm import char_lstm
from fedjax_sim.models.femnist_cnn import femnist_cnn
from fedjax_sim.models.pytorch import networks
from fedjax_sim.models.pytorch.layouts import from_torch, to_torch
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


def from_module(module, layers, path):
  """Write the weights of a PyTorch module, for `model.initial`."""
  state = {k: x.detach().numpy() for k, x in module.state_dict().items()}
  fs.write_weights(path, from_torch(state, layers))


def to_module(arrays, layers, path, module):
  """Write weights of a model here for PyTorch, and load them there."""
  fs.write_weights(path, to_torch(arrays, layers))
  module.load_state_dict(load_file(path))


def outputs(task, variables, x):
  """Return what the model here says of inputs."""
  return np.asarray(task.logits(variables, {"x": x}))


def compare(path, found, module, x):
  expected = module(x).detach().numpy()
  np.testing.assert_allclose(found, expected, atol=1e-5)
  print(f"{path}: largest difference {abs(found - expected).max():.1e}")


def main(folder):
  folder.mkdir(parents=True, exist_ok=True)
  torch.manual_seed(0)
  images = torch.rand(5, 1, 28, 28)
  ids, words = torch.randint(65, (5, 80)), torch.randint(1, 100, (5, 25))
  for name, module, task, layers, x, seen in (
    (
      *("images", Images(), femnist_cnn((28, 28, 1), 62)),
      *(networks.femnist_cnn(), images, images.permute(0, 2, 3, 1)),
    ),
    ("text", Text(), char_lstm((80,), 65), networks.char_lstm(), ids, ids),
    (
      *("words", Words(), word_gru((25,), 100, embedding=16, units=32)),
      *(networks.word_gru(), words, words),
    ),
  ):
    # The logits of `word_gru` begin with that of the padding.
    own = slice(1, None) if name == "words" else slice(None)
    key = jax.random.key(0)

    path = folder / f"{name}.safetensors"
    from_module(module, layers, path)
    begun = fs.with_initial(task, fs.read_weights(path).arrays).init(key)
    compare(path, outputs(task, begun, seen.numpy())[..., own], module, x)

    path = folder / f"{name}_torch.safetensors"
    variables = task.init(key)  # or those of `fs.load(workdir)`
    to_module(fs.named_variables(variables), layers, path, module)
    compare(path, outputs(task, variables, seen.numpy())[..., own], module, x)


if __name__ == "__main__":
  main(pathlib.Path(*sys.argv[1:]))
