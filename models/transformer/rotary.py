"""Rotary positions: queries and keys are turned by angles that grow with time.

Su et al. 2021, "RoFormer: Enhanced transformer with rotary position embedding"
(arXiv 2104.09864). The product of a query and a key then depends on their
distance alone.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rotate(x: jax.Array, base: float) -> jax.Array:
  """Return queries or keys, each turned by the angles of its position.

  Entries i and i + size / 2 of a head are a plane, as in Llama; it is turned by
  `position * base ** (-2 i / size)`. Angles are float32, whatever x is.

  Args:
    x: shape=(batch, time, heads, size); size is even.
    base: the longest wavelength, over 2 pi, about; 10,000 is usual.

  Returns:
    shape=(batch, time, heads, size), in x's dtype.
  """
  half = x.shape[-1] // 2
  rates = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
  positions = jnp.arange(x.shape[1], dtype=jnp.float32)
  angles = (positions[:, None] * rates[None])[None, :, None]
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  one, other = jnp.split(x.astype(cos.dtype), 2, axis=-1)
  turned = jnp.concatenate(
    [one * cos - other * sin, other * cos + one * sin], axis=-1
  )
  return turned.astype(x.dtype)
