"""Transforms of updates: clipping, noise, quantization, error feedback."""

from collections.abc import Callable

from fedjax_sim.core import Transform
from fedjax_sim.transforms.adaptive_clip import adaptive_clip
from fedjax_sim.transforms.basic import clip, gaussian, lift
from fedjax_sim.transforms.error_feedback import error_feedback
from fedjax_sim.transforms.quantize import quantize

__all__ = [
  "TRANSFORMS",
  "adaptive_clip",
  "clip",
  "error_feedback",
  "gaussian",
  "lift",
  "quantize",
]


TRANSFORMS: dict[str, Callable[..., Transform]] = {
  "adaptive_clip": adaptive_clip,
  "clip": clip,
  "gaussian": gaussian,
  "quantize": quantize,
}
