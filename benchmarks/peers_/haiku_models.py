"""The models in Haiku, and first weights of all peers as its parameters.

Haiku's LSTM has one kernel for the input and the state, one bias, the gates in
the order i, g, f, o, and adds 1 to that of f, which its bias begins without.
"""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

KINDS = {"kernel": "w", "bias": "b", "embedding": "embeddings"}
UNITS = 256


def linear(x, classes):
  """Return scores of flat inputs."""
  return hk.Linear(classes, name="linear")(x)


def femnist_cnn(x, classes):
  """Return scores of images: as FedJAX's own model, without dropout."""
  x = jax.nn.relu(hk.Conv2D(32, 3, padding="VALID", name="conv1")(x))
  x = jax.nn.relu(hk.Conv2D(64, 3, padding="VALID", name="conv2")(x))
  window = (1, 2, 2, 1)
  x = hk.Flatten()(hk.MaxPool(window, window, padding="VALID")(x))
  x = jax.nn.relu(hk.Linear(128, name="dense1")(x))
  return hk.Linear(classes, name="dense2")(x)


def char_lstm(x, classes):
  """Return scores at every position: as FedJAX's own model, without tanh.

  By a loop, where FedJAX unrolls it; so a step compiles in seconds.
  """
  x = hk.Embed(classes, 8, name="embed")(x.T)
  reader = hk.DeepRNN([hk.LSTM(UNITS, name=f"lstm{i}") for i in range(2)])
  x, _ = hk.dynamic_unroll(reader, x, reader.initial_state(x.shape[1]))
  return jnp.swapaxes(hk.Linear(classes, name="logits")(x), 0, 1)


MODELS = {"char_lstm": char_lstm, "femnist_cnn": femnist_cnn, "linear": linear}


def to_haiku(first):
  """Return Haiku's parameters of weights by fedjax_sim's names."""
  params = {}
  for name, array in first.items():
    if "layers/" not in name:
      module, kind = _place(name)
      params.setdefault(module, {})[kind] = jnp.asarray(array)
  for layer in _lstm_layers(first):
    own = {k: first[f"{layer}/{k}"] for k in ("recurrent", "recurrent_bias")}
    kernel, bias = (
      first[f"{layer}/inputs/kernel"],
      first[f"{layer}/inputs/bias"],
    )
    bias = _swapped(bias + own["recurrent_bias"])
    bias[2 * UNITS : 3 * UNITS] -= 1
    params[_lstm(layer)] = {
      "w": jnp.asarray(_swapped(np.concatenate([kernel, own["recurrent"]]))),
      "b": jnp.asarray(bias),
    }
  return params


def from_haiku(params, names):
  """Return the weights of these names, of Haiku's parameters."""
  found = {}
  for name in names:
    if "layers/" not in name:
      module, kind = _place(name)
      found[name] = np.asarray(params[module][kind])
  for layer in _lstm_layers(names):
    own = params[_lstm(layer)]
    kernel, bias = _swapped(own["w"]), np.array(own["b"])
    bias[2 * UNITS : 3 * UNITS] += 1
    found[f"{layer}/inputs/kernel"] = kernel[:-UNITS]
    found[f"{layer}/recurrent"] = kernel[-UNITS:]
    found[f"{layer}/inputs/bias"] = _swapped(bias)
    found[f"{layer}/recurrent_bias"] = np.zeros_like(bias)
  return found


def _place(name):
  """Return the module in Haiku and its parameter."""
  *_, module, kind = name.split("/")
  return module, KINDS[kind]


def _lstm_layers(names):
  """Return the paths of the LSTM's layers, in order."""
  return sorted({"/".join(n.split("/")[:3]) for n in names if "layers/" in n})


def _lstm(layer):
  return f"lstm{layer.rpartition('/')[2]}/linear"


def _swapped(gates):
  """Return i, f, g, o as i, g, f, o, or the other way around."""
  i, f, g, o = np.split(np.asarray(gates), 4, axis=-1)
  return np.concatenate([i, g, f, o], axis=-1)
