"""QSGD: entries are rounded at random to multiples of a share of the norm.

Alistarh et al. 2017, "QSGD: Communication-efficient SGD via gradient
quantization and encoding" (arXiv 1610.02132). Of a vector v with s levels,

    Q(v)_i = ||v|| sgn(v_i) l_i / s,    l_i in {0, ..., s}

where l_i is one of the two whole numbers next to s |v_i| / ||v||, drawn so that
its mean is that number (section 3.1). So E Q(v) = v, and with p_i the
fractional part of s |v_i| / ||v||,

    E ||Q(v) - v||^2 = sum_i (||v|| / s)^2 p_i (1 - p_i)
                    <= min(n / s^2, sqrt(n) / s) ||v||^2    (lemma 3.1)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from fedjax_sim.core import Array, HParams, Key, Transform, validate
from fedjax_sim.transforms.flattened import compressor, total, whole_bytes


def qsgd(
  levels: int = 7, bucket: int = 512, norm: str = "l2", coding: str = "elias"
) -> Transform:
  """Round entries at random to `levels` multiples of their bucket's norm.

  Unbiased. The whole update is one vector, cut into buckets; each has a norm of
  its own, a float32.

  `qsgd/bytes` is the length of a code that decodes:

  - `elias`: one bit says which of two is shorter, and follows. Sparse, the
    paper's Code_s: for every entry that is not 0 the Elias omega code of its
    distance to the one before, a sign, and the omega code of its level; at the
    end the distance to the first place behind the update. Dense, the paper's
    Code'_s: for every entry the omega code of its level plus 1, and a sign
    where the level is not 0.
  - `fixed`: for every entry a sign and the fewest bits that hold `levels`.

  Args:
    levels: s, 1 to 32767; 7 and a sign take 4 bits.
    bucket: entries that share a norm; the last bucket may have fewer.
    norm: `l2`, as the theory has it, or `max`, as the paper's experiments.
    coding: `elias` or `fixed`.

  Raises:
    TypeError, ValueError: an argument of another kind or out of range.
  """
  levels = validate.integer("levels", levels, le=2**15 - 1)
  bucket = validate.integer("bucket", bucket)
  validate.one_of("norm", norm, ("l2", "max"))
  validate.one_of("coding", coding, ("elias", "fixed"))

  def compress(x: Array, hparams: HParams, key: Key) -> tuple[Array, Array]:
    s = hparams["levels"].astype(x.dtype)
    rows = jnp.pad(x, (0, -x.size % bucket)).reshape(-1, bucket)
    magnitudes = jnp.abs(rows)
    if norm == "l2":
      norms = jnp.sqrt(jnp.sum(rows * rows, axis=1, keepdims=True))
    else:
      norms = jnp.max(magnitudes, axis=1, keepdims=True)
    unit = jnp.where(norms > 0, norms, 1)
    place = jnp.minimum(magnitudes / unit, 1) * s
    low = jnp.floor(place)
    up = jax.random.uniform(key, rows.shape, rows.dtype) < place - low
    level = low + up
    decoded = norms * (jnp.sign(rows) * level / s)
    whole = level.ravel()[: x.size].astype(jnp.int32)
    if coding == "elias":
      bits = 1 + jnp.minimum(_sparse_bits(whole), _dense_bits(whole))
    else:
      width = 32 - lax.clz(hparams["levels"].astype(jnp.int32))
      bits = x.size * (1 + width).astype(jnp.float32)
    count = 4 * len(rows) + whole_bytes(bits)
    return decoded.ravel()[: x.size], count

  return compressor("qsgd", {"levels": float(levels)}, compress)


def elias_omega_bits(numbers: Array) -> Array:
  """Return the lengths of the Elias omega codes of whole numbers >= 1.

  Args:
    numbers: int32.

  Returns:
    int32, of the same shape: 1 for 1, 3 for 2 and 3, 6 for 4 to 7, ...
  """
  bits, rest = jnp.ones_like(numbers), numbers
  for _ in range(4):  # 2^31 - 1 -> 30 -> 4 -> 2 -> 1
    log = 31 - lax.clz(jnp.maximum(rest, 1))
    bits += jnp.where(rest > 1, log + 1, 0)
    rest = jnp.where(rest > 1, log, 1)
  return bits


def _sparse_bits(level: Array) -> Array:
  """Return the length of Code_s with its end; shape=(), float32."""
  place = jnp.arange(level.size, dtype=jnp.int32)
  there = level > 0
  last = lax.cummax(jnp.where(there, place, -1))
  before = jnp.concatenate([jnp.full(1, -1, jnp.int32), last[:-1]])
  each = elias_omega_bits(place - before) + 1
  each += elias_omega_bits(jnp.maximum(level, 1))
  end = elias_omega_bits(level.size - last[-1])
  return total(jnp.where(there, each, 0)) + end.astype(jnp.float32)


def _dense_bits(level: Array) -> Array:
  """Return the length of Code'_s; shape=(), float32."""
  return total(elias_omega_bits(level + 1) + (level > 0))
