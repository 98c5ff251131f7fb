"""Quantization of updates: small entries go, the others take few values.

That of FLUTE (Dimitriadis et al. 2022, arXiv 2203.13789): a quantile of the
magnitudes says which entries become 0, uniform bins say what the others are
rounded to. What a client sends is computed with as it would be decoded; its
bytes are counted, and nothing is encoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fedjax_sim.core import (
  Array,
  HParams,
  Key,
  PyTree,
  Transform,
  TransformResult,
  validate,
)
from fedjax_sim.transforms.ranks import at_rank, ordered_bits


class _Coded(NamedTuple):
  """Arrays that share their levels, after a round trip.

  Attributes:
    arrays: as they are decoded, in their own dtypes.
    kept: shape=(), int32; entries that were not dropped.
    bytes: shape=(), int32; what all of them take.
  """

  arrays: list[Array]
  kept: Array
  bytes: Array


def quantize(
  sparsity: float,
  bits: int = 8,
  anneal: float = 1.0,
  per_layer: bool = True,
) -> Transform:
  """Drop small entries of an update and round the others to 2**bits levels.

  Of every array, entries whose magnitude is at most the quantile `sparsity` of
  the magnitudes become 0; with a sparsity of 0, those that are 0 already. The
  others go to the nearest of 2**bits levels, evenly spaced from the array's
  least to its greatest entry; halfway between two, to the lower one. An array
  whose entries are all the same stays as it is, and all of it is kept. Several
  entries of the quantile's magnitude are all dropped: of (c, -c) nothing is
  left, whatever the sparsity above 0.

  The metric `quantize/kept` is the fraction of the entries that are kept,
  `quantize/bytes` what the update takes on the wire: for every array two
  float32 numbers, the least and the greatest entry; `bits` for every entry that
  is kept; and if any is dropped, a bitmap with one bit an entry. Codes and
  bitmaps are filled up to whole bytes. Shapes, and which arrays have a bitmap,
  are not counted.

  Args:
    sparsity: share of the entries that become 0, in [0, 1).
    bits: of a code, 1 to 16; no hyper-parameter, as it is compiled in.
    anneal: in (0, 1]; the sparsity is `sparsity * anneal**t` after t rounds, of
      which those without any client do not count.
    per_layer: False: quantile, levels and bitmap are those of all arrays
      together.

  Raises:
    TypeError, ValueError: an argument of another kind or out of range.
  """
  sparsity = validate.number("sparsity", sparsity, ge=0.0, lt=1.0)
  bits = validate.integer("bits", bits, le=16)
  anneal = validate.number("anneal", anneal, gt=0.0, le=1.0)
  per_layer = validate.boolean("per_layer", per_layer)

  def apply(
    update: PyTree, shared: PyTree, state: PyTree, hparams: HParams, key: Key
  ) -> TransformResult:
    del key
    share = hparams["sparsity"] * hparams["anneal"] ** shared
    leaves, treedef = jax.tree.flatten(update)
    there = [x for x in leaves if x.size]
    if not there:
      nothing = jnp.float32(0)
      return TransformResult(
        update, state, metrics={"kept": nothing}, bytes=nothing
      )
    groups = [[x] for x in there] if per_layer else [there]
    coded = [_round_trip(group, share, bits) for group in groups]
    # In float32, as of a large model there may be more than an int32 holds.
    add = lambda counts: sum(count.astype(jnp.float32) for count in counts)
    arrays = (x for c in coded for x in c.arrays)
    sent = [next(arrays) if x.size else x for x in leaves]
    kept = add(c.kept for c in coded) / sum(x.size for x in there)
    return TransformResult(
      jax.tree.unflatten(treedef, sent),
      state,
      metrics={"kept": kept},
      bytes=add(c.bytes for c in coded),
    )

  return Transform(
    name="quantize",
    hparams={"sparsity": sparsity, "anneal": anneal},
    apply=apply,
    init=lambda params, hparams: jnp.zeros((), jnp.int32),
    update=lambda shared, aux, hparams: shared + 1,
    differentiable=False,
  )


def _round_trip(arrays: Sequence[Array], sparsity: Array, bits: int) -> _Coded:
  """Encode arrays by one quantile and one set of levels, and decode them."""
  dtype = jnp.result_type(jnp.float32, *arrays)
  wide = [x.astype(dtype) for x in arrays]
  magnitudes = [jnp.abs(x) for x in wide]
  low = jnp.stack([jnp.min(x) for x in wide]).min()
  high = jnp.stack([jnp.max(x) for x in wide]).max()
  differ = low < high
  threshold = jnp.where(sparsity > 0, _quantile(magnitudes, sparsity), 0)
  dropped = [differ & (m <= threshold) for m in magnitudes]

  levels = jnp.linspace(low, high, 2**bits)
  # An eighth of it, and of x below, so that its reciprocal is no subnormal.
  span = high / 8 - low / 8
  span = jnp.where(span > 0, span, 1)
  decoded = []
  for x, drop, given in zip(wide, dropped, arrays, strict=True):
    place = (x / 8 - low / 8) / span * (len(levels) - 1)
    code = jnp.ceil(place - 0.5).astype(jnp.int32)
    rounded = jnp.where(drop, 0, levels[code])
    decoded.append(jnp.where(differ, rounded, x).astype(given.dtype))

  size = sum(x.size for x in arrays)
  kept = sum((jnp.sum(~d, dtype=jnp.int32) for d in dropped), jnp.int32(0))
  # kept * bits / 8, which in bits could be more than an int32 holds.
  codes = kept // 8 * bits + (kept % 8 * bits + 7) // 8
  bitmap = jnp.where(kept < size, (size + 7) // 8, 0)
  return _Coded(decoded, kept, 8 + codes + bitmap)


def _quantile(magnitudes: Sequence[Array], share: Array) -> Array:
  """Return the magnitude at or next below a quantile of all arrays together.

  The quantile itself, between two magnitudes, has the same ones below it.

  Args:
    magnitudes: of one dtype, >= 0.
    share: shape=(); the quantile, in [0, 1).
  """
  last = sum(m.size for m in magnitudes) - 1
  rank = jnp.floor(share * last).astype(jnp.int32)
  rank = jnp.minimum(rank, max(last - 1, 0))  # a share may be rounded to 1
  found = at_rank([ordered_bits(m) for m in magnitudes], rank)
  return lax.bitcast_convert_type(found, magnitudes[0].dtype)
