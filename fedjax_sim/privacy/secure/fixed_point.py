"""Fixed point: updates as whole numbers whose sum cannot overflow.

A coordinate within [-clip, clip] becomes the nearest multiple of
clip 2^-fraction, or by chance one of the two around it, which keeps its mean.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fedjax_sim.core import Array, HParams, Key, PyTree, validate
from fedjax_sim.privacy.secure.masking import Code

ROUNDINGS = ("nearest", "stochastic")


def fraction_bits(clients: int, bits: int) -> int:
  """Return the most bits f behind the point that no sum overflows with.

  They are the most with clients 2^f <= 2^(bits - 1) - 1.

  Raises:
    ValueError: there would be none.
  """
  clients = validate.integer("clients", clients)
  bits = validate.integer("bits", bits, ge=2, le=32)
  room = (2 ** (bits - 1) - 1) // clients
  if room < 2:
    raise ValueError(
      f"bits={bits}: the sum of {clients} clients would overflow; give"
      f" at least {(2 * clients).bit_length() + 1}, or fewer clients."
    )
  return room.bit_length() - 1


def fixed_point(
  clients: int,
  *,
  clip: float,
  max_weight: float | None = None,
  bits: int = 32,
  rounding: str = "nearest",
) -> Code:
  """Return the code of a sum of updates, or a weighted mean, in fixed point.

  With f = `fraction_bits(clients, bits)`, `nearest` rounding and
  |coordinates| <= clip, the sum of n clients is off by at most
  n clip 2^-(f + 1), besides float32's own rounding of the result. A
  coordinate outside [-clip, clip] counts as the nearest that is inside.

  Args:
    clients: the most clients of a round.
    clip: the largest coordinate.
    max_weight: the largest weight; a greater one counts as this. Weights are
      encoded, too, and the weighted sum is divided by theirs. None: the plain
      sum.
    bits: of a number that a client sends, from 2 to 32.
    rounding: `nearest`, or `stochastic`.

  Raises:
    TypeError, ValueError: an argument is out of range, or sums would overflow.
  """
  scale = 2.0 ** fraction_bits(clients, bits)
  validate.one_of("rounding", rounding, ROUNDINGS)
  hparams = {"clip": validate.number("clip", clip, gt=0)}
  if max_weight is not None:
    most = validate.number("max_weight", max_weight, gt=0)
    hparams["max_weight"] = most

  def whole(key: Key, x: Array) -> Array:
    x = jnp.clip(x, -1, 1) * scale
    if rounding == "stochastic":
      x = jnp.floor(x + jax.random.uniform(key, x.shape))
    return jnp.round(x).astype(jnp.int32)

  def encode(
    update: PyTree, weight: Array, key: Key, hparams: HParams
  ) -> PyTree:
    share = jnp.ones((), jnp.float32)
    if max_weight is not None:
      share = jnp.minimum(weight / hparams["max_weight"], 1)
    leaves, structure = jax.tree.flatten(update)
    unit = [
      jnp.clip(x.astype(jnp.float32) / hparams["clip"], -1, 1) * share
      for x in leaves
    ]
    keys = [jax.random.fold_in(key, i) for i in range(len(unit) + 1)]
    numbers = [whole(k, x) for k, x in zip(keys[:-1], unit, strict=True)]
    weights = () if max_weight is None else whole(keys[-1], share)
    return jax.tree.unflatten(structure, numbers), weights

  def decode(sums: PyTree, hparams: HParams) -> PyTree:
    numbers, weights = sums
    unit = scale if max_weight is None else jnp.maximum(weights, 1)
    return jax.tree.map(
      lambda x: hparams["clip"] * (x.astype(jnp.float32) / unit), numbers
    )

  return Code(clients, bits, encode, decode, hparams)
