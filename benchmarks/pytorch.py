"""The same models and steps as a plain PyTorch loop, where it is installed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fedjax_sim.distributed import cpu

MISSING = "PyTorch is not installed: pip install 'fedjax_sim[benchmarks]'"


def load() -> Any:
  """Return the module `torch`; None where it is missing."""
  try:
    import torch
  except ImportError:
    return None
  return torch


FEW = 8  # batches that decide how many threads


def threads_to_try(most: int) -> list[int]:
  """Return the powers of two up to the number of cores, and that number."""
  return sorted({*(1 << i for i in range(most.bit_length())), most})


class Loop:
  """Plain SGD over batches that are sliced beforehand.

  Args:
    torch: the module.
    model: `resnet18`, or one of `benchmarks/peers_/torch_models.py`.
    example_shape: of one input, channels last.
    num_classes: of the labels.
    learning_rate: of the steps.
  """

  def __init__(
    self,
    torch: Any,
    model: str,
    example_shape: tuple[int, ...],
    num_classes: int,
    learning_rate: float,
  ):
    self._torch = torch
    self._device = "cuda" if torch.cuda.is_available() else "cpu"
    if self._device == "cuda":  # as JAX multiplies there
      torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    built = _build(torch, model, example_shape, num_classes)
    self.model = built.to(self._device)
    self._rate = learning_rate
    self.threads: int | None = None  # set by the first `seconds`
    self.tried: dict[int, float] = {}  # threads -> seconds of the same batches

  def batches(
    self,
    examples: Mapping[str, np.ndarray],
    rows: np.ndarray,
    batch_size: int,
    prepare: Callable[[Any], Any],
  ) -> list[tuple[Any, Any]]:
    """Return tensors (x, y) of the rows, cut into whole batches.

    Args:
      examples: field -> (examples, ...).
      rows: shape=(batches * batch_size,).
      batch_size: rows of a batch.
      prepare: as in `FederatedDataset`; done once, beforehand.
    """
    cut = []
    for i in range(0, len(rows), batch_size):
      part = rows[i : i + batch_size]
      batch = prepare({name: array[part] for name, array in examples.items()})
      x = self._torch.from_numpy(np.asarray(batch["x"]))
      y = self._torch.from_numpy(np.asarray(batch["y"])).long()
      if x.ndim == 4:  # images; PyTorch has channels first
        x = x.permute(0, 3, 1, 2).contiguous()
      if not x.is_floating_point():
        x = x.long()
      cut.append((x.to(self._device), y.to(self._device)))
    return cut

  def seconds(self, batches: list[tuple[Any, Any]]) -> float:
    """Return the seconds of training, with the best number of threads.

    The first call finds that number. To time unsuitable ones in every turn
    could take minutes where other processes use the cores, too.
    """
    if self.threads is None:
      few = batches[:FEW]
      self.tried = {
        n: min(self._seconds(few, n) for _ in range(3))
        for n in threads_to_try(cpu.count())
      }
      self.threads = min(self.tried, key=self.tried.__getitem__)
    return self._seconds(batches, self.threads)

  def _seconds(self, batches: list[tuple[Any, Any]], threads: int) -> float:
    self._torch.set_num_threads(threads)
    self._wait()
    began = time.perf_counter()
    self.train(batches)
    self._wait()
    return time.perf_counter() - began

  def _wait(self) -> None:
    if self._device == "cuda":
      self._torch.cuda.synchronize()

  def train(self, batches: list[tuple[Any, Any]]) -> None:
    """Take a step on each batch."""
    torch = self._torch
    params = list(self.model.parameters())
    loss_of = torch.nn.functional.cross_entropy
    for x, y in batches:
      logits = self.model(x)
      loss = loss_of(logits.reshape(-1, logits.shape[-1]), y.reshape(-1))
      gradient = torch.autograd.grad(loss, params)
      with torch.no_grad():  # faster on a CPU than torch.optim.SGD
        for p, g in zip(params, gradient, strict=True):
          p.sub_(g, alpha=self._rate)


# --- models -------------------------------------------------------------------

Shape = tuple[int, ...]


def _build(torch: Any, model: str, shape: Shape, classes: int) -> Any:
  """Return a model: one that other simulators train, too, or the ResNet."""
  if model == "resnet18":
    return _resnet18(torch.nn, shape, classes)
  from benchmarks.peers_ import torch_models  # which imports PyTorch

  return torch_models.MODELS[model](shape, classes)


def _resnet18(nn: Any, shape: Shape, classes: int) -> Any:
  def normed(n_in: int, n_out: int, size: int, strides: int) -> Any:
    convolution = nn.Conv2d(
      n_in, n_out, size, strides, padding=size // 2, bias=False
    )
    return nn.Sequential(convolution, nn.GroupNorm(2, n_out))

  class Block(nn.Module):
    """Two convolutions and what goes around them."""

    def __init__(self, n_in: int, n_out: int, strides: int):
      super().__init__()
      self.inside = nn.Sequential(
        normed(n_in, n_out, 3, strides), nn.ReLU(), normed(n_out, n_out, 3, 1)
      )
      changes = strides != 1 or n_in != n_out
      self.around = (
        normed(n_in, n_out, 1, strides) if changes else nn.Identity()
      )

    def forward(self, x: Any) -> Any:
      return nn.functional.relu(self.inside(x) + self.around(x))

  layers, features = [normed(shape[-1], 64, 3, 1), nn.ReLU()], 64
  for stage in range(4):
    for strides in (1 if stage == 0 else 2, 1):
      layers.append(Block(features, 64 << stage, strides))
      features = 64 << stage
  pool = nn.AdaptiveAvgPool2d(1)
  return nn.Sequential(
    *layers, pool, nn.Flatten(), nn.Linear(features, classes)
  )
