"""The GRU that predicts a sentence's words, with tied embeddings.

FLUTE's language model (Garcia Dimitriadis et al. 2022, arXiv 2203.13789): a GRU
reads embedded words, a product takes its state back to the embedding's
dimensions, and the scores of words are products with their embeddings (Press
and Wolf 2017, arXiv 1608.05859).
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx

from fedjax_sim.core import Array, Examples, Metric, Task, validate
from fedjax_sim.data.text import UNKNOWN
from fedjax_sim.models.char_lstm import check_ids, check_sequence
from fedjax_sim.models.layers import GRU, uniform, uniform_within
from fedjax_sim.tasks import nnx_task
from fedjax_sim.tasks.losses import token_cross_entropy, token_hits

_NEVER = -1e30  # the logit of the padding; infinity times 0 would be NaN


class WordGRU(nnx.Module):
  """Logits for every word of a sentence, the first from the zero state."""

  def __init__(self, words: int, embedding: int, units: int, rngs: nnx.Rngs):
    draw = uniform_within((3 / embedding) ** 0.5)
    self.embedding = nnx.Param(draw(rngs.params(), (words, embedding)))
    self.gru = GRU(embedding, units, rngs=rngs)
    self.project = nnx.Linear(
      units,
      embedding,
      use_bias=False,
      kernel_init=uniform(units),
      rngs=rngs,
    )
    self.bias = nnx.Param(jnp.zeros(words))

  def __call__(self, x: Array) -> Array:
    """Return logits, (batch, time, words + 1), of ids, (batch, time).

    What comes first in `x` is never read: it begins every sentence alike.
    """
    table = self.embedding[...]
    # Padding reads as some word; only words of weight 0 follow.
    rows = jnp.maximum(x[:, 1:].T - 1, 0)
    states = self.gru(jnp.take(table, rows, axis=0))
    states = jnp.pad(states, ((1, 0), (0, 0), (0, 0)))
    logits = self.project(states) @ table.T + self.bias[...][None, None]
    logits = jnp.swapaxes(logits, 0, 1)
    padding = ((0, 0), (0, 0), (1, 0))
    return jnp.pad(logits, padding, constant_values=_NEVER)


def word_gru(
  example_shape: tuple[int, ...],
  num_classes: int,
  embedding: int = 160,
  units: int = 512,
  reject_unknown: bool = True,
) -> Task:
  """Return a GRU that predicts every word of a sentence; embeddings are tied.

  Losses and accuracy weigh sentences by their words. With 10,000 words it has
  2,727,184 parameters.

  Args:
    example_shape: (time,); examples hold ids of words, of which the first is
      that of a beginning, or 0; as `fedjax-sim data import --text=words` has
      them.
    num_classes: ids, the padding 0 included, which has no embedding.
    embedding: dimensions of a word.
    units: of the GRU.
    reject_unknown: count predictions of the id 1, which stands for all words
      outside of the vocabulary, as wrong.

  Raises:
    TypeError, ValueError: another shape, or sizes that are not whole and >= 1.

  Example:
    word_gru((25,), num_classes=10_001)
  """
  check_sequence("word_gru", example_shape)
  tokens = validate.integer("num_classes", num_classes, ge=2)
  embedding = validate.integer("embedding", embedding)
  units = validate.integer("units", units)
  reject = validate.boolean("reject_unknown", reject_unknown)

  def metrics(logits: Array, examples: Examples) -> dict[str, Metric]:
    wrong = UNKNOWN if reject else None
    return {"accuracy": token_hits(logits, examples, wrong)}

  return nnx_task(
    lambda rngs: WordGRU(tokens - 1, embedding, units, rngs),
    loss=token_cross_entropy,
    metrics=metrics,
    check=lambda examples: check_ids(examples["x"], tokens),
  )
