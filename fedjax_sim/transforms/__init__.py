"""Transforms of client updates: clipping, noise, quantization."""

from fedjax_sim.transforms.basic import (
  TRANSFORMS,
  clip,
  from_config,
  gaussian,
  lift,
)
from fedjax_sim.transforms.quantize import quantize

__all__ = [
  "TRANSFORMS",
  "clip",
  "from_config",
  "gaussian",
  "lift",
  "quantize",
]
