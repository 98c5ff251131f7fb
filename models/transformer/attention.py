"""Multi-head attention, with fewer heads of keys and values where asked for.

Vaswani et al. 2017, "Attention is all you need" (arXiv 1706.03762); Ainslie et
al. 2023, "GQA" (arXiv 2305.13245).
"""

from __future__ import annotations

import jax
from flax import nnx

from fedjax_sim.models.transformer.rotary import rotate

Initializer = jax.nn.initializers.Initializer


class Attention(nnx.Module):
  """Queries, keys, values, `jax.nn.dot_product_attention` and an output.

  Scores and softmax are float32, whatever is computed in.

  Args:
    width: of the input and the output.
    heads: of queries.
    key_value_heads: of keys and values; divides `heads`.
    head_size: entries of a head.
    bias: whether the four linear layers have biases.
    causal: whether a position sees no later one.
    rotary_base: see `rotate`; None: positions are not marked here.
    kernel_init: of queries, keys and values.
    output_init: of the output.
    rngs: draws the kernels.
  """

  def __init__(
    self,
    width: int,
    heads: int,
    key_value_heads: int,
    head_size: int,
    *,
    bias: bool,
    causal: bool,
    rotary_base: float | None,
    kernel_init: Initializer,
    output_init: Initializer,
    rngs: nnx.Rngs,
  ):
    def layer(n_in: int, n_out: int, init: Initializer) -> nnx.Linear:
      return nnx.Linear(n_in, n_out, use_bias=bias, kernel_init=init, rngs=rngs)

    self.query = layer(width, heads * head_size, kernel_init)
    self.key = layer(width, key_value_heads * head_size, kernel_init)
    self.value = layer(width, key_value_heads * head_size, kernel_init)
    self.output = layer(heads * head_size, width, output_init)
    self.head_size = head_size
    self.causal, self.rotary_base = causal, rotary_base

  def __call__(self, x: jax.Array, seen: jax.Array | None = None) -> jax.Array:
    """Return what every position takes from those that it sees.

    Args:
      x: shape=(batch, time, width).
      seen: shape=(batch, time), bool; False for positions that none sees, such
        as padding. None: all are seen.

    Returns:
      shape=(batch, time, width).
    """
    split = lambda y: y.reshape(*x.shape[:2], -1, self.head_size)
    query, key = split(self.query(x)), split(self.key(x))
    if self.rotary_base is not None:
      query, key = (rotate(y, self.rotary_base) for y in (query, key))
    mask = None if seen is None else seen[:, None, None, :]
    mixed = jax.nn.dot_product_attention(
      query, key, split(self.value(x)), mask=mask, is_causal=self.causal
    )
    return self.output(mixed.reshape(*x.shape[:2], -1))
