"""Transforms of client updates: clipping, noise, quantization."""

from collections.abc import Callable, Mapping
from typing import Any

from fedjax_sim.core import Transform, validate
from fedjax_sim.transforms.adaptive_clip import adaptive_clip
from fedjax_sim.transforms.basic import clip, gaussian, lift
from fedjax_sim.transforms.quantize import quantize

__all__ = [
  "TRANSFORMS",
  "adaptive_clip",
  "clip",
  "from_config",
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


def from_config(sections: Mapping[str, Mapping[str, Any]]) -> list[Transform]:
  """The transforms of a config, in its order.

  Args:
    sections: name of a transform -> its arguments.

  Raises:
    UnknownNameError: no such transform, or no such argument.
    TypeError, ValueError: an argument is missing or out of range.
  """
  transforms = []
  for name, arguments in sections.items():
    factory = validate.lookup("transforms", name, TRANSFORMS)
    validate.arguments(f"transforms.{name}", arguments, factory)
    transforms.append(factory(**arguments))
  return transforms
