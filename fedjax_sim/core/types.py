"""Type aliases of the whole package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

PyTree = Any
Array = jax.Array
Key = jax.Array  # a typed key, shape=()
HParams = Mapping[str, Any]  # nested dict of scalars, all traced
Examples = Mapping[str, Array]  # field -> (examples, ...)
