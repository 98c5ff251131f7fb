"""The LSTM that predicts a text's next characters.

McMahan et al. 2017 (arXiv 1602.05629), section 3: characters are embedded in 8
dimensions and read by two layers of 256 units.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from fedjax_sim.core import Task, validate
from fedjax_sim.models.layers import LSTM
from fedjax_sim.models.options import several
from fedjax_sim.models.stacked_lstm import read
from fedjax_sim.tasks import nnx_task
from fedjax_sim.tasks.ids import check_ids, check_sequence
from fedjax_sim.tasks.losses import token_cross_entropy


class Reader(nnx.Module):
  """An embedding and LSTM layers."""

  def __init__(
    self,
    tokens: int,
    embedding: int,
    units: tuple[int, ...],
    rngs: nnx.Rngs,
    *,
    recurrent_bias: bool = False,
  ):
    self.embed = nnx.Embed(tokens, embedding, rngs=rngs)
    sizes = (embedding, *units)
    self.layers = nnx.List(
      LSTM(before, after, recurrent_bias=recurrent_bias, rngs=rngs)
      for before, after in itertools.pairwise(sizes)
    )

  def __call__(self, x: jax.Array) -> jax.Array:
    """Return outputs, shape=(time, batch, units), of ids, (batch, time)."""
    return read(self.layers, self.embed(x.T))


class CharLSTM(nnx.Module):
  """Logits for the character after every position."""

  def __init__(
    self,
    tokens: int,
    embedding: int,
    units: tuple[int, ...],
    rngs: nnx.Rngs,
    *,
    recurrent_bias: bool = False,
  ):
    self.reader = Reader(
      tokens, embedding, units, rngs, recurrent_bias=recurrent_bias
    )
    self.logits = nnx.Linear(units[-1], tokens, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Return logits, shape=(batch, time, tokens), of ids, (batch, time)."""
    return jnp.swapaxes(self.logits(self.reader(x)), 0, 1)


def char_lstm(
  example_shape: tuple[int, ...],
  num_classes: int,
  embedding: int = 8,
  units: tuple[int, ...] = (256, 256),
  recurrent_bias: bool = False,
) -> Task:
  """Return an LSTM that predicts the next character at every position.

  Args:
    example_shape: (time,); examples hold character ids.
    num_classes: characters, the padding 0 included.
    embedding: dimensions of a character.
    units: of each layer, one or more.
    recurrent_bias: whether a layer has a second bias, as PyTorch's do; both
      begin at 0, are added, and move with the same gradient.

  Raises:
    TypeError, ValueError: another shape, sizes that are not whole and >= 1, or
      no layer.
  """
  check_sequence("char_lstm", example_shape)
  tokens = validate.integer("num_classes", num_classes)
  embedding = validate.integer("embedding", embedding)
  sizes = layer_sizes(units)
  second = validate.boolean("recurrent_bias", recurrent_bias)
  return nnx_task(
    lambda rngs: CharLSTM(
      tokens, embedding, sizes, rngs, recurrent_bias=second
    ),
    loss=token_cross_entropy,
    check=lambda examples: check_ids(examples["x"], tokens),
  )


def layer_sizes(units: tuple[int, ...]) -> tuple[int, ...]:
  """Return `units` as a tuple of one or more sizes.

  Raises:
    TypeError, ValueError: a size is not whole and >= 1, or there is none.
  """
  what, example = "a number for each layer", "(256, 256)"
  layers = several("units", units, what, example)
  if not layers:
    raise ValueError(f"units={units!r}; give {what}, {example}.")
  return tuple(validate.integer("units", n) for n in layers)
