"""Transforms of client updates: clipping, noise, quantization."""

from collections.abc import Callable

from fedjax_sim.core import Transform
from fedjax_sim.transforms.basic import clip, gaussian, lift
from fedjax_sim.transforms.quantize import quantize

__all__ = [
  "TRANSFORMS",
  "clip",
  "gaussian",
  "lift",
  "quantize",
]


TRANSFORMS: dict[str, Callable[..., Transform]] = {
  "clip": clip,
  "gaussian": gaussian,
  "quantize": quantize,
}
