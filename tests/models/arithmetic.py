"""Layers in plain numpy, channels last, in the precision of their arguments."""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view


def windows(x, sizes, strides, padding, fill):
  """Windows of x: (batch, *out, features, *sizes); channels are last in x."""
  space = len(sizes)
  sides = [(0, 0), *[(padding, padding)] * space, (0, 0)]
  padded = np.pad(x, sides, constant_values=fill)
  axes = tuple(range(1, space + 1))
  every = sliding_window_view(padded, sizes, axes)
  return every[(slice(None), *[slice(None, None, strides)] * space)]


def convolution(x, kernel, strides=1, padding=0):
  """x, (batch, *space, features in), by (*window, features in and out)."""
  *sizes, _, _ = kernel.shape
  seen = windows(x, tuple(sizes), strides, padding, 0)
  first = np.moveaxis(kernel, -2, 0)  # (features in, *window, features out)
  return np.tensordot(seen, first, len(sizes) + 1)


def max_pool(x, size, strides, padding=0):
  space = x.ndim - 2
  seen = windows(x, (size,) * space, strides, padding, -np.inf)
  return seen.max(tuple(range(-space, 0)))


def batch_norm(x, scale, bias, mean=None, var=None):
  """By statistics of the batch, or by these."""
  axes = tuple(range(x.ndim - 1))
  mean = x.mean(axes) if mean is None else mean
  var = x.var(axes) if var is None else var
  return (x - mean) / np.sqrt(var + 1e-5) * scale + bias


def group_norm(x, scale, bias, groups):
  cut = x.reshape(len(x), -1, groups, x.shape[-1] // groups)
  mean = cut.mean((1, 3), keepdims=True)
  var = cut.var((1, 3), keepdims=True)
  return ((cut - mean) / np.sqrt(var + 1e-5)).reshape(x.shape) * scale + bias


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def relu(x):
  return np.maximum(x, 0)


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def cross_entropy(logits, y):
  return -np.log(softmax(logits))[np.arange(len(y)), y]


def lstm(x, inputs, recurrent, bias):
  """Outputs, and the last cell, of x, (time, batch, features); gates ifgo."""
  h = c = np.zeros((x.shape[1], recurrent.shape[0]))
  outputs = []
  for step in x:
    i, f, g, o = np.split(step @ inputs + h @ recurrent + bias, 4, axis=-1)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    h = sigmoid(o) * np.tanh(c)
    outputs.append(h)
  return np.stack(outputs), c
