"""JSON of what a run knows: its config, its summary."""

from __future__ import annotations

import json
import math
import numbers
import os
from collections.abc import Mapping
from typing import Any

from fedjax_sim.core.files import write_atomically


def plain(value: Any) -> Any:
  """`value` in JSON's own terms.

  Numpy scalars become Python's. NaN and the infinities, which JSON lacks,
  become null.
  """
  if isinstance(value, Mapping):
    return {key: plain(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [plain(item) for item in value]
  if isinstance(value, bool):
    return value
  if isinstance(value, numbers.Integral):
    return int(value)
  if isinstance(value, numbers.Real):
    return float(value) if math.isfinite(value) else None
  return value


def write_json(path: str | os.PathLike[str], value: Any) -> None:
  """Writes `value` for people to read: indented, in the order given.

  Raises:
    OSError: see `write_atomically`.
    TypeError: something in `value` has no JSON form.
  """
  text = json.dumps(plain(value), indent=2, allow_nan=False)
  write_atomically(path, f"{text}\n".encode())
