"""The models of the peers that train with PyTorch, their data and weights.

The layers have the names of `fedjax_sim.models.pytorch.networks`.
"""

import math
from collections import OrderedDict

import numpy as np
import torch
from torch import nn


def linear(shape, classes):
  """Return a linear layer on the flattened input."""
  return nn.Sequential(
    OrderedDict(flat=nn.Flatten(), linear=nn.Linear(math.prod(shape), classes))
  )


def femnist_cnn(shape, classes):
  """Return two convolutions, max pooling and two dense layers."""
  height, width, channels = shape
  features = (height - 4) // 2 * ((width - 4) // 2) * 64
  return nn.Sequential(
    OrderedDict(
      conv1=nn.Conv2d(channels, 32, 3),
      relu1=nn.ReLU(),
      conv2=nn.Conv2d(32, 64, 3),
      relu2=nn.ReLU(),
      pool=nn.MaxPool2d(2),
      flat=nn.Flatten(),
      dense1=nn.Linear(features, 128),
      relu3=nn.ReLU(),
      dense2=nn.Linear(128, classes),
    )
  )


class CharLSTM(nn.Module):
  """Embedding, two LSTM layers, logits."""

  def __init__(self, shape, classes):
    super().__init__()
    self.embed = nn.Embedding(classes, 8)
    self.lstm = nn.LSTM(8, 256, num_layers=2, batch_first=True)
    self.logits = nn.Linear(256, classes)

  def forward(self, x):
    """Return logits, shape=(batch, time, tokens), of ids, (batch, time)."""
    return self.logits(self.lstm(self.embed(x))[0])


# (shape of one input, channels last, number of classes) -> module
MODELS = {"char_lstm": CharLSTM, "femnist_cnn": femnist_cnn, "linear": linear}


def build(work):
  """Return the model that WORK names, with PyTorch's own first weights."""
  model = MODELS[work["model"]](work["shape"], work["classes"])
  if work["sigmoid"]:
    model.append(nn.Sigmoid())
  return model


def begin(work):
  """Return the model that WORK names, with the first weights of all peers."""
  model = build(work)
  with np.load(work["first"]) as file:
    state = {name: torch.from_numpy(file[name]) for name in file.files}
  model.load_state_dict(state)
  return model


def loss_of(scores, y, reduction="mean"):
  """Return the cross-entropy, of texts over all their tokens."""
  return nn.functional.cross_entropy(
    scores.flatten(0, -2), y.flatten(), reduction=reduction
  )


def read(data):
  """Return every client's inputs, channels first, and every client's labels."""
  with np.load(data) as file:
    x, y = file["x"], torch.from_numpy(file["y"]).long()
    sizes = np.bincount(file["client"]).tolist()
  if x.ndim == 4:
    x = np.ascontiguousarray(np.moveaxis(x, -1, 1))
  x = torch.from_numpy(x)
  x = x if x.is_floating_point() else x.long()
  return x.split(sizes), y.split(sizes)


def arrays(state):
  """Return a state dict in numpy, as `benchmarks/peers.py` reads it."""
  return {name: value.detach().numpy() for name, value in state.items()}
