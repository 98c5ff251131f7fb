"""The LSTM that reads a text and names its class.

Caldas et al. 2018 (arXiv 1812.01097): LEAF's Shakespeare asks for the character
after 80, its Sent140 for a text's sentiment. The layers are those of
`char_lstm`; the answer is what the last of them says at the last character.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from fedjax_sim.core import Task, validate
from fedjax_sim.models.char_lstm import Reader, layer_sizes
from fedjax_sim.tasks import nnx_task
from fedjax_sim.tasks.ids import check_ids, check_sequence


class TextLSTM(nnx.Module):
  """An embedding, LSTM layers, and logits for the text."""

  def __init__(
    self,
    tokens: int,
    classes: int,
    embedding: int,
    units: tuple[int, ...],
    rngs: nnx.Rngs,
  ):
    self.reader = Reader(tokens, embedding, units, rngs)
    self.logits = nnx.Linear(units[-1], classes, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Return logits, shape=(batch, classes), of ids, shape=(batch, time)."""
    end = jnp.maximum(jnp.count_nonzero(x, axis=1), 1) - 1  # 0 is padding
    at_end = jax.nn.one_hot(end, x.shape[1], axis=0)[..., jnp.newaxis]
    read = self.reader(x)
    return self.logits(jnp.sum(read * at_end.astype(read.dtype), axis=0))


def text_lstm(
  example_shape: tuple[int, ...],
  num_classes: int,
  tokens: int | None = None,
  embedding: int = 8,
  units: tuple[int, ...] = (256, 256),
) -> Task:
  """Return an LSTM that reads a text and names its class.

  Args:
    example_shape: (time,); examples hold character ids, padded with 0 at their
      end.
    num_classes: outputs.
    tokens: characters, the padding 0 included; None: `num_classes`, for labels
      that are characters.
    embedding: dimensions of a character.
    units: of each layer, one or more.

  Raises:
    TypeError, ValueError: another shape, sizes that are not whole and >= 1, or
      no layer.
  """
  check_sequence("text_lstm", example_shape)
  classes = validate.integer("num_classes", num_classes)
  known = classes if tokens is None else validate.integer("tokens", tokens)
  embedding = validate.integer("embedding", embedding)
  sizes = layer_sizes(units)

  return nnx_task(
    lambda rngs: TextLSTM(known, classes, embedding, sizes, rngs),
    check=lambda examples: check_ids(examples["x"], known, "model.tokens"),
  )
