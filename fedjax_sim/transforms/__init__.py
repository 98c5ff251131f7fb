"""Transforms of updates: clipping, noise, compression, error feedback."""

from collections.abc import Callable

from fedjax_sim.core import Transform
from fedjax_sim.transforms.adaptive_clip import adaptive_clip
from fedjax_sim.transforms.basic import clip, gaussian, lift
from fedjax_sim.transforms.downlink import downlink
from fedjax_sim.transforms.drive import drive
from fedjax_sim.transforms.eden import eden
from fedjax_sim.transforms.ef21 import ef21
from fedjax_sim.transforms.error_feedback import error_feedback
from fedjax_sim.transforms.power_sgd import power_sgd
from fedjax_sim.transforms.product_quantization import product_quantization
from fedjax_sim.transforms.qsgd import qsgd
from fedjax_sim.transforms.quantize import quantize
from fedjax_sim.transforms.random_k import random_k
from fedjax_sim.transforms.rotated import rotated
from fedjax_sim.transforms.signsgd import signsgd
from fedjax_sim.transforms.terngrad import terngrad
from fedjax_sim.transforms.top_k import top_k

__all__ = [
  "TRANSFORMS",
  "adaptive_clip",
  "clip",
  "downlink",
  "drive",
  "eden",
  "ef21",
  "error_feedback",
  "gaussian",
  "lift",
  "power_sgd",
  "product_quantization",
  "qsgd",
  "quantize",
  "random_k",
  "rotated",
  "signsgd",
  "terngrad",
  "top_k",
]


TRANSFORMS: dict[str, Callable[..., Transform]] = {
  "adaptive_clip": adaptive_clip,
  "clip": clip,
  "drive": drive,
  "eden": eden,
  "gaussian": gaussian,
  "power_sgd": power_sgd,
  "product_quantization": product_quantization,
  "qsgd": qsgd,
  "quantize": quantize,
  "random_k": random_k,
  "rotated": rotated,
  "signsgd": signsgd,
  "terngrad": terngrad,
  "top_k": top_k,
}
