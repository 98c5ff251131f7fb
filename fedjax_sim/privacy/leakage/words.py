"""Words that the update of an embedding gives away.

A step changes the rows of an embedding whose words were read, and no others:
who sees a client's update sees which words it has (Melis et al. 2019,
"Exploiting unintended feature leakage in collaborative learning", arXiv
1805.04049, section 4.1). FLUTE (arXiv 2203.13789) counts how many of a client's
words can be found that way.
"""

from __future__ import annotations

import jax.numpy as jnp

from fedjax_sim.core import Array
from fedjax_sim.core.tree import scaled


def words_in(ids: Array, mask: Array, size: int) -> Array:
  """Return which words a batch of texts has.

  Args:
    ids: shape=(batch, ...), integer; 0 is padding, no word.
    mask: shape=(batch,), bool; texts that count.
    size: how many ids there are.

  Returns:
    shape=(size,), bool.
  """
  if not jnp.issubdtype(ids.dtype, jnp.integer):
    raise ValueError(
      f"leakage.embedding: field 'x' is {ids.dtype}; its words have to be"
      " whole numbers."
    )
  real = mask.reshape(-1, *[1] * (ids.ndim - 1)) & (ids > 0)
  where = jnp.where(real, ids.astype(jnp.int32), size)
  return jnp.zeros(size, bool).at[where.ravel()].set(True, mode="drop")


def guessed(rows: Array, count: Array) -> Array:
  """Return the words that an attacker names who knows how many there are.

  They are those whose rows changed most, in L2. Where noise has changed all
  rows this is what is left to do; without noise it names the rows that changed
  at all.

  Args:
    rows: shape=(size, dimensions); the embedding's update. Row 0 is that of
      padding, and is never named.
    count: shape=(), integer; how many words to name.

  Returns:
    shape=(size,), bool; fewer than `count` if fewer rows changed.
  """
  changed = jnp.sum(scaled(rows)[0] ** 2, axis=1).at[0].set(0)
  order = jnp.argsort(-changed)
  rank = jnp.zeros_like(order).at[order].set(jnp.arange(len(order)))
  return (rank < count) & (changed > 0)
