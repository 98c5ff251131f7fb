"""CIFAR's images as their page offers them: dictionaries that Python 2 pickled.

Krizhevsky (2009, "Learning multiple layers of features from tiny images"):
`cifar-10-batches-py/` and `cifar-100-python/`. A pickle can name any function
to be called. These need three of numpy's; one that names another is refused,
and so nothing in a file runs.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

SIDE, CHANNELS = 32, 3
_PIXELS = SIDE * SIDE * CHANNELS
_ARRAYS = ("numpy.core.multiarray", "numpy._core.multiarray")
_ALLOWED: Mapping[tuple[str, str], Any] = {
  ("numpy", "ndarray"): np.ndarray,
  ("numpy", "dtype"): np.dtype,
  **{(name, "_reconstruct"): np.empty(0).__reduce__()[0] for name in _ARRAYS},
}


class _Reader(pickle.Unpickler):
  """Builds arrays and plain values, and nothing else."""

  def find_class(self, module: str, name: str) -> Any:
    """Return what a pickle calls, if it is one of numpy's three."""
    if (module, name) not in _ALLOWED:
      raise pickle.UnpicklingError(f"it wants to call {module}.{name}")
    return _ALLOWED[module, name]


def read_batch(file: Path, labels: str) -> dict[str, np.ndarray]:
  """Read a batch of images.

  Args:
    file: such as `data_batch_1`.
    labels: the key of the labels: `labels`, `fine_labels` or `coarse_labels`.

  Returns:
    x, shape=(images, 32, 32, 3), and y, shape=(images,), both uint8.

  Raises:
    ValueError: it is damaged, calls functions, or holds something else.
  """
  try:
    with file.open("rb") as stream:
      held = _Reader(stream, encoding="bytes").load()
  except OSError:
    raise
  except Exception as error:  # what a damaged pickle raises is anything
    text = str(error).rstrip(".") or type(error).__name__
    raise ValueError(
      f"{file} is no pickle of CIFAR: {text}. Get it again."
    ) from error
  keys = (b"data", labels.encode())
  if not isinstance(held, dict) or not all(key in held for key in keys):
    raise ValueError(f"{file} lacks data or {labels}. Get it again.")
  x, y = (np.asarray(held[key]) for key in keys)
  if x.dtype != np.uint8 or x.shape != (len(y), _PIXELS):
    raise ValueError(
      f"{file}: data: expected uint8 of shape ({len(y)}, {_PIXELS}), one row a"
      f" label, found {x.dtype} of shape {x.shape}. Get it again."
    )
  if y.dtype.kind not in "iu" or y.min(initial=0) < 0 or y.max(initial=0) > 255:
    raise ValueError(
      f"{file}: {labels}: expected whole numbers from 0 to 255, found"
      f" {y.dtype}. Get it again."
    )
  images = x.reshape(-1, CHANNELS, SIDE, SIDE).transpose(0, 2, 3, 1)
  return {"x": np.ascontiguousarray(images), "y": y.astype(np.uint8)}
