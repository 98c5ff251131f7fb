"""The LSTM that predicts a text's next characters.

McMahan et al. 2017 (arXiv 1602.05629), section 3: characters are embedded in 8
dimensions and read by two layers of 256 units.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from fedjax_sim import validate
from fedjax_sim.base import Task
from fedjax_sim.models.layers import LSTM
from fedjax_sim.models.options import several
from fedjax_sim.tasks import nnx_task, token_cross_entropy, token_metrics


class CharLSTM(nnx.Module):
  """An embedding, LSTM layers, and logits for every position."""

  def __init__(
    self, tokens: int, embedding: int, units: tuple[int, ...], rngs: nnx.Rngs
  ):
    self.embed = nnx.Embed(tokens, embedding, rngs=rngs)
    sizes = (embedding, *units)
    self.layers = nnx.List(
      LSTM(sizes[i], sizes[i + 1], rngs=rngs) for i in range(len(units))
    )
    self.logits = nnx.Linear(sizes[-1], tokens, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Logits, shape=(batch, time, tokens), of ids, shape=(batch, time)."""
    x = self.embed(x.T)
    for layer in self.layers:
      x = layer(x)
    return jnp.swapaxes(self.logits(x), 0, 1)


def char_lstm(
  example_shape: tuple[int, ...],
  num_classes: int,
  embedding: int = 8,
  units: tuple[int, ...] = (256, 256),
) -> Task:
  """An LSTM that predicts the next character at every position.

  Args:
    example_shape: (time,); examples hold character ids.
    num_classes: characters, the padding 0 included.
    embedding: dimensions of a character.
    units: of each layer, one or more.

  Raises:
    TypeError, ValueError: another shape, sizes that are not whole and >= 1, or
      no layer.
  """
  if len(example_shape) != 1:
    raise ValueError(
      f"char_lstm: an example has shape {example_shape}; give (time,) ids."
    )
  tokens = validate.whole("num_classes", num_classes)
  embedding = validate.whole("model.embedding", embedding)
  what, example = "a number for each layer", "(256, 256)"
  layers = several("model.units", units, what, example)
  if not layers:
    raise ValueError(f"model.units={units!r}; give {what}, {example}.")
  sizes = tuple(validate.whole("model.units", n) for n in layers)
  return nnx_task(
    lambda rngs: CharLSTM(tokens, embedding, sizes, rngs),
    loss=token_cross_entropy,
    metrics=token_metrics,
  )
