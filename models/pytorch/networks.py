"""The networks of `models/` that PyTorch has, too: a list of layers of each.

A function takes those options of the model that change its layers. Names are
torchvision's for ResNets, and for the others those of the modules in
`docs/examples/torch_weights.py`.
"""

from __future__ import annotations

from fedjax_sim.core import validate
from fedjax_sim.models.pytorch import layouts
from fedjax_sim.models.pytorch.layouts import Layer
from fedjax_sim.models.resnet import BLOCKS, DEPTHS_OF_TWO, NORMS

Layers = tuple[Layer, ...]


def resnet(depth: int = 18, norm: str = "batch") -> Layers:
  """Return the layers of a ResNet, with torchvision's names.

  Args:
    depth: 18, 34, 50, 101 or 152.
    norm: `batch` as torchvision has it, or `group`.

  Example:
    to_torch(arrays, resnet(depth=50))["layer1.0.conv3.weight"].shape
  """
  validate.one_of("depth", str(depth), map(str, BLOCKS))
  is_batch = validate.one_of("norm", norm, NORMS) == "batch"
  normalized = layouts.batch_norm() if is_batch else layouts.norm()
  conv = layouts.convolution(bias=False)
  bottleneck = depth not in DEPTHS_OF_TWO
  layers = [Layer("stem", "conv1", conv), Layer("norm", "bn1", normalized)]
  number = 0
  for stage, count in enumerate(BLOCKS[depth]):
    for i in range(count):
      ours, theirs = f"blocks/{number}", f"layer{stage + 1}.{i}"
      for k in range(3 if bottleneck else 2):
        layers += [
          Layer(f"{ours}/convs/{k}", f"{theirs}.conv{k + 1}", conv),
          Layer(f"{ours}/norms/{k}", f"{theirs}.bn{k + 1}", normalized),
        ]
      if i == 0 and (stage or bottleneck):
        around, sample = f"{ours}/around/layers", f"{theirs}.downsample"
        layers += [
          Layer(f"{around}/0", f"{sample}.0", conv),
          Layer(f"{around}/1", f"{sample}.1", normalized),
        ]
      number += 1
  return (*layers, Layer("logits", "fc", layouts.linear()))


def femnist_cnn(height: int = 28, width: int = 28) -> Layers:
  """Return the layers of the FEMNIST CNN.

  Args:
    height: of the images.
    width: of the images.
  """
  flat = layouts.linear_after_convolution(
    64, (height - 4) // 2, (width - 4) // 2
  )
  return (
    Layer("conv1", "conv1", layouts.convolution()),
    Layer("conv2", "conv2", layouts.convolution()),
    Layer("dense1", "dense1", flat),
    Layer("dense2", "dense2", layouts.linear()),
  )


def lenet(height: int = 32, width: int = 32) -> Layers:
  """Return the layers of LeNet, with the names of PyTorch's tutorial.

  Args:
    height: of the images.
    width: of the images.
  """
  left = lambda side: ((side - 4) // 2 - 4) // 2
  flat = layouts.linear_after_convolution(16, left(height), left(width))
  return (
    Layer("conv1", "conv1", layouts.convolution()),
    Layer("conv2", "conv2", layouts.convolution()),
    Layer("dense1", "fc1", flat),
    Layer("dense2", "fc2", layouts.linear()),
    Layer("dense3", "fc3", layouts.linear()),
  )


def char_lstm(layers: int = 2, recurrent_bias: bool = False) -> Layers:
  """Return the layers of the LSTM on characters.

  Args:
    layers: of LSTM.
    recurrent_bias: as in the model.
  """
  return (
    Layer("reader/embed", "embed", layouts.embedding()),
    *(
      Layer(f"reader/layers/{i}", "lstm", layouts.lstm(i, recurrent_bias))
      for i in range(validate.integer("layers", layers))
    ),
    Layer("logits", "logits", layouts.linear()),
  )


def word_gru() -> Layers:
  """Return the layers of the GRU on words, whose embeddings are tied."""
  return (
    Layer("", "", layouts.parameters(embedding="embed.weight", bias="bias")),
    Layer("gru", "gru", layouts.gru()),
    Layer("project", "project", layouts.linear(bias=False)),
  )
