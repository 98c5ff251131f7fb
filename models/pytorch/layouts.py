"""How layers' arrays lie in PyTorch, and how they lie here.

A network is a list of `Layer`s: a layer's name here, its module's name in
PyTorch, and the `Layout` of its kind. `to_torch` and `from_torch` convert all
arrays of a network by that list. Numpy does it; PyTorch need not be installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fedjax_sim.tasks.freezing import BUFFERS

_MOST_NAMED = 5  # names in a message
_COUNTER = "num_batches_tracked"  # of PyTorch's batch norm; nothing needs it

Convert = Callable[..., Sequence[np.ndarray]]


class Layout(NamedTuple):
  """How the arrays of one kind of layer lie here and in PyTorch.

  Attributes:
    ours: their names here, below the layer's, such as `kernel`.
    theirs: their names in PyTorch, below the module's, such as `weight`.
    to_torch: arrays in the order of `ours` -> arrays in the order of `theirs`.
    from_torch: the other way around.
    buffers: which of `ours` are buffers, not parameters.
  """

  ours: tuple[str, ...]
  theirs: tuple[str, ...]
  to_torch: Convert
  from_torch: Convert
  buffers: tuple[str, ...] = ()


class Layer(NamedTuple):
  """A layer of a network.

  Attributes:
    name: here, such as `blocks/0/convs/0`; "" is the network itself.
    module: in PyTorch, such as `layer1.0.conv1`; "" is the network itself.
    layout: of its arrays.
  """

  name: str
  module: str
  layout: Layout


def to_torch(
  arrays: Mapping[str, np.ndarray], layers: Iterable[Layer]
) -> dict[str, np.ndarray]:
  """Return a state dict of PyTorch, as arrays by name.

  Args:
    arrays: name -> array, as `named_variables` and `read_weights` have them.
    layers: of the network.

  Raises:
    ValueError: an array is missing, or has no layer, or has a shape that its
      layer cannot have.

  Example:
    to_torch({"kernel": x, "bias": b}, [Layer("", "fc", linear())])
  """
  layers = tuple(layers)
  return _convert(
    arrays,
    [(_ours(r), _theirs(r), r.layout.to_torch) for r in layers],
    "weights",
  )


def from_torch(
  state: Mapping[str, np.ndarray], layers: Iterable[Layer]
) -> dict[str, np.ndarray]:
  """Return the arrays of a network here, for `write_weights`.

  Args:
    state: of a PyTorch module: name -> array, such as
      `{k: x.numpy() for k, x in module.state_dict().items()}`.
    layers: of the network.

  Raises:
    ValueError: an array is missing, or has no layer, or has a shape that its
      layer cannot have.

  Example:
    from_torch({"fc.weight": w, "fc.bias": b}, [Layer("", "fc", linear())])
  """
  layers = tuple(layers)
  return _convert(
    {k: x for k, x in state.items() if k.rpartition(".")[2] != _COUNTER},
    [(_theirs(r), _ours(r), r.layout.from_torch) for r in layers],
    "state dict",
  )


def _ours(layer: Layer) -> list[str]:
  path = f"{layer.name}/" if layer.name else ""
  return [
    f"{BUFFERS if name in layer.layout.buffers else ''}{path}{name}"
    for name in layer.layout.ours
  ]


def _theirs(layer: Layer) -> list[str]:
  path = f"{layer.module}." if layer.module else ""
  return [f"{path}{name}" for name in layer.layout.theirs]


def _convert(
  arrays: Mapping[str, np.ndarray],
  rows: Sequence[tuple[list[str], list[str], Convert]],
  source: str,
) -> dict[str, np.ndarray]:
  """Convert arrays, layer by layer.

  Args:
    arrays: by the names of one side.
    rows: of each layer the names there, those of the other side, and what
      converts.
    source: what messages call the arrays.
  """
  needed = [name for names, _, _ in rows for name in names]
  if missing := [name for name in needed if name not in arrays]:
    raise ValueError(
      f"{source}: there is no {_listed(missing)}; give a model of these layers,"
      " or the layers of this model."
    )
  if unused := sorted(set(arrays) - set(needed)):
    raise ValueError(
      f"{source}: no layer takes {_listed(unused)}; leave them out, or add"
      " their layers."
    )
  converted: dict[str, np.ndarray] = {}
  for names, others, function in rows:
    given = [np.asarray(arrays[name]) for name in names]
    try:
      found = function(*given)
    except ValueError as error:
      shapes = ", ".join(
        f"{n!r} {x.shape}" for n, x in zip(names, given, strict=True)
      )
      raise ValueError(
        f"{source}: the layer does not fit the shapes {shapes}; give the model"
        " and the layers of the same network."
      ) from error
    for name, array in zip(others, found, strict=True):
      converted[name] = np.ascontiguousarray(array)
  return converted


def _listed(names: Sequence[str]) -> str:
  more = len(names) - _MOST_NAMED
  listed = ", ".join(map(repr, names[:_MOST_NAMED]))
  return f"{listed} and {more} more" if more > 0 else listed


# --- layers -------------------------------------------------------------------


def _with_bias(
  kernel: Callable[[np.ndarray], np.ndarray],
  weight: Callable[[np.ndarray], np.ndarray],
  bias: bool,
) -> Layout:
  """Return a layout of `kernel`, and of `bias` as it is.

  Args:
    kernel: of the weight.
    weight: of the kernel.
    bias: whether there is one.
  """
  names = ("bias",) if bias else ()
  return Layout(
    ("kernel", *names),
    ("weight", *names),
    lambda x, *more: (weight(x), *more),
    lambda x, *more: (kernel(x), *more),
  )


def _transposed(x: np.ndarray) -> np.ndarray:
  return x.transpose(1, 0)  # of two axes alone, unlike `.T`


def linear(bias: bool = True) -> Layout:
  """Return the layout of `Linear`: (outputs, inputs) there."""
  return _with_bias(_transposed, _transposed, bias)


def linear_after_convolution(
  channels: int, height: int, width: int, bias: bool = True
) -> Layout:
  """Return the layout of a `Linear` that reads flattened images.

  PyTorch flattens (channels, height, width), and Flax (height, width,
  channels).

  Args:
    channels: of the images.
    height: of the images.
    width: of the images; 1 for sequences.
    bias: whether there is one.
  """

  def kernel(weight: np.ndarray) -> np.ndarray:
    parts = weight.reshape(-1, channels, height, width).transpose(2, 3, 1, 0)
    return parts.reshape(-1, weight.shape[0])

  def weight(kernel: np.ndarray) -> np.ndarray:
    parts = kernel.reshape(height, width, channels, -1).transpose(3, 2, 0, 1)
    return parts.reshape(kernel.shape[1], -1)

  return _with_bias(kernel, weight, bias)


def convolution(bias: bool = True) -> Layout:
  """Return the layout of `Conv1d` and `Conv2d`: (out, in, *window) there."""
  return _with_bias(
    lambda x: np.moveaxis(x, (0, 1), (-1, -2)),
    lambda x: np.moveaxis(x, (-1, -2), (0, 1)),
    bias,
  )


def _renamed(ours: tuple[str, ...], theirs: tuple[str, ...]) -> Layout:
  """Return the layout of arrays that lie alike."""
  alike = lambda *arrays: arrays
  return Layout(ours, theirs, alike, alike)


def batch_norm() -> Layout:
  """Return the layout of `BatchNorm1d` and `BatchNorm2d`.

  The running statistics are buffers on both sides. PyTorch also counts
  batches (`num_batches_tracked`), which is left out.
  """
  layout = _renamed(
    ("scale", "bias", "mean", "var"),
    ("weight", "bias", "running_mean", "running_var"),
  )
  return layout._replace(buffers=("mean", "var"))


def norm(bias: bool = True) -> Layout:
  """Return the layout of `GroupNorm`, `LayerNorm` and `RMSNorm` (no bias)."""
  names = ("bias",) if bias else ()
  return _renamed(("scale", *names), ("weight", *names))


def embedding() -> Layout:
  """Return the layout of `Embedding`: (ids, features) on both sides."""
  return _renamed(("embedding",), ("weight",))


def parameters(**names: str) -> Layout:
  """Return the layout of arrays that are no layer's, and lie alike.

  Args:
    **names: name here -> name in PyTorch.
  """
  return _renamed(tuple(names), tuple(names.values()))


def _recurrent(layer: int) -> tuple[str, ...]:
  kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
  return tuple(f"{kind}_l{layer}" for kind in kinds)


def lstm(layer: int = 0, recurrent_bias: bool = False) -> Layout:
  """Return the layout of one layer of `LSTM`; gates are i, f, g, o in both.

  Args:
    layer: which one of the module's.
    recurrent_bias: whether the layer here has the second bias. If not, it has
      the sum of PyTorch's two, and 0 becomes PyTorch's second one.
  """
  if recurrent_bias:
    return _two_biases(layer)

  def to_torch(
    kernel: np.ndarray, recurrent: np.ndarray, bias: np.ndarray
  ) -> Sequence[np.ndarray]:
    weights = _transposed(kernel), _transposed(recurrent)
    return *weights, bias, np.zeros_like(bias)

  def from_torch(
    kernel: np.ndarray, recurrent: np.ndarray, *biases: np.ndarray
  ) -> Sequence[np.ndarray]:
    return _transposed(kernel), _transposed(recurrent), np.sum(biases, axis=0)

  ours = ("inputs/kernel", "recurrent", "inputs/bias")
  return Layout(ours, _recurrent(layer), to_torch, from_torch)


def gru(layer: int = 0) -> Layout:
  """Return the layout of one layer of `GRU`; gates are r, z, n in both.

  Both have two biases, as r scales the second one's part of n.

  Args:
    layer: which one of the module's.
  """
  return _two_biases(layer)


def _two_biases(layer: int) -> Layout:
  """Return the layout of a recurrent layer with both of PyTorch's biases."""
  swapped = lambda x, y, *biases: (_transposed(x), _transposed(y), *biases)
  ours = ("inputs/kernel", "recurrent", "inputs/bias", "recurrent_bias")
  return Layout(ours, _recurrent(layer), swapped, swapped)


def attention(bias: bool = True) -> Layout:
  """Return the layout of `MultiheadAttention`, whose heads are all alike.

  Queries, keys and values are one array there, one below the other.

  Args:
    bias: whether the four linear layers have biases.
  """
  kinds = ("kernel", "bias") if bias else ("kernel",)
  parts = ("query", "key", "value", "output")
  ours = tuple(f"{part}/{kind}" for kind in kinds for part in parts)
  theirs = ["in_proj_weight", "out_proj.weight"]
  theirs += ["in_proj_bias", "out_proj.bias"] if bias else []

  def to_torch(*arrays: np.ndarray) -> Sequence[np.ndarray]:
    *inner, outer = map(_transposed, arrays[:4])
    joined = [np.concatenate(inner), outer]
    if bias:
      joined += [np.concatenate(arrays[4:7]), arrays[7]]
    return joined

  def from_torch(
    inner: np.ndarray, outer: np.ndarray, *biases: np.ndarray
  ) -> Sequence[np.ndarray]:
    parts = [*map(_transposed, (*np.split(inner, 3), outer))]
    if bias:
      parts += [*np.split(biases[0], 3), biases[1]]
    return parts

  return Layout(ours, tuple(theirs), to_torch, from_torch)
