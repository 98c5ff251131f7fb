"""Recommends news: which of some candidates a user clicks next.

FLUTE's fednewsrec, after Qi et al. 2020, "Privacy-preserving news
recommendation model learning" (arXiv 2003.09592). Titles and users' clicks are
read by multi-head self-attention (Vaswani et al. 2017, arXiv 1706.03762) and
summed by additive attention; a GRU reads the last clicks. The score of a
candidate is an inner product. Padding is read as any other title, as there.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fedjax_sim.core import (
  Array,
  Examples,
  Metric,
  Task,
  in_float32,
  validate,
)
from fedjax_sim.data.news import read_news, read_vectors
from fedjax_sim.models.char_lstm import check_ids
from fedjax_sim.models.layers import GRU, conv
from fedjax_sim.tasks import nnx_task
from fedjax_sim.tasks.ranking import HIGHER_IS_BETTER, ranking_metrics

WINDOW = 3  # words that the convolution of titles reads at once
RECENT = 20  # clicks that the GRU reads


class Given(nnx.Param[Array]):
  """What comes from a file, and is never trained."""


class SelfAttention(nnx.Module):
  """Multi-head self-attention without biases and without a last product."""

  def __init__(self, features: int, heads: int, size: int, rngs: nnx.Rngs):
    self.heads, self.size = heads, size
    xavier = nnx.initializers.variance_scaling(2.0, "fan_avg", "uniform")
    self.query, self.key, self.value = (
      nnx.Linear(
        features, heads * size, use_bias=False, kernel_init=xavier, rngs=rngs
      )
      for _ in range(3)
    )

  def __call__(self, x: Array) -> Array:
    """Return shape=(batch, time, heads * size) of (batch, time, features)."""
    apart = lambda y: y.reshape(*y.shape[:-1], self.heads, self.size)
    found = jax.nn.dot_product_attention(
      apart(self.query(x)), apart(self.key(x)), apart(self.value(x))
    )
    return found.reshape(*x.shape[:-1], self.heads * self.size)


class AdditivePooling(nnx.Module):
  """A weighted mean over time, whose weights are a small network's."""

  def __init__(self, features: int, units: int, rate: float, rngs: nnx.Rngs):
    self.dropout = nnx.Dropout(rate, rngs=rngs)
    self.hidden = nnx.Linear(features, units, rngs=rngs)
    self.weight = nnx.Linear(units, 1, rngs=rngs)

  def __call__(self, x: Array) -> Array:
    """Return shape=(batch, features) of (batch, time, features)."""
    x = self.dropout(x)
    weights = nnx.softmax(self.weight(jnp.tanh(self.hidden(x))), axis=1)
    return jnp.sum(weights * x, axis=1)


class TitleEncoder(nnx.Module):
  """A vector of a title: convolution, attention, pooling."""

  def __init__(
    self,
    dimensions: int,
    heads: int,
    size: int,
    pooling: int,
    rate: float,
    rngs: nnx.Rngs,
  ):
    features = heads * size
    self.dropout = nnx.Dropout(rate, rngs=rngs)
    self.conv = conv(
      dimensions, features, (WINDOW,), padding="VALID", rngs=rngs
    )
    self.attention = SelfAttention(features, heads, size, rngs)
    self.pooling = AdditivePooling(features, pooling, rate, rngs)

  def __call__(self, x: Array) -> Array:
    """Return shape=(titles, features) of (titles, words, dimensions)."""
    x = self.dropout(nnx.relu(self.conv(self.dropout(x))))
    return self.pooling(self.dropout(nnx.relu(self.attention(x))))


class UserEncoder(nnx.Module):
  """A vector of a user: attention over all clicks, a GRU over the last."""

  def __init__(
    self, heads: int, size: int, pooling: int, rate: float, rngs: nnx.Rngs
  ):
    features = heads * size
    self.dropout = nnx.Dropout(rate, rngs=rngs)
    self.attention = SelfAttention(features, heads, size, rngs)
    self.clicks = AdditivePooling(features, pooling, rate, rngs)
    self.gru = GRU(features, features, rngs=rngs)
    self.both = AdditivePooling(features, pooling, rate, rngs)

  def __call__(self, x: Array) -> Array:
    """Return shape=(batch, features) of (batch, clicks, features)."""
    long = self.clicks(self.dropout(self.attention(x)))
    short = self.gru(jnp.swapaxes(x[:, -RECENT:], 0, 1))[-1]
    return self.both(jnp.stack([long, short], axis=1))


class NewsRecommender(nnx.Module):
  """Scores of the candidates of each example."""

  def __init__(
    self,
    titles: np.ndarray,
    vectors: np.ndarray,
    clicked: int,
    sizes: dict[str, Any],
    rngs: nnx.Rngs,
  ):
    self.clicked = clicked
    self.titles = Given(jnp.asarray(titles))
    self.embedding = Given(jnp.asarray(vectors))
    self.title = TitleEncoder(vectors.shape[1], **sizes, rngs=rngs)
    self.user = UserEncoder(**sizes, rngs=rngs)

  def __call__(self, x: Array) -> Array:
    """Return scores, (batch, candidates), of ids of news.

    Args:
      x: shape=(batch, clicked + candidates), int32.
    """
    words = self.titles[...][x].reshape(x.size, -1)
    news = self.title(self.embedding[...][words])
    news = news.reshape(*x.shape, -1)
    user = self.user(news[:, : self.clicked])
    return jnp.einsum("bcf,bf->bc", news[:, self.clicked :], user)


def news_recommender(
  example_shape: tuple[int, ...],
  num_classes: int,
  news: str,
  embedding: str,
  clicked: int = 50,
  negatives: int = 4,
  heads: int = 20,
  head_size: int = 20,
  pooling: int = 200,
  dropout: float = 0.2,
) -> Task:
  """Return a model that ranks news by what a user has clicked before.

  A training example is a click among news that were not clicked; its loss is
  the cross-entropy of the softmax over them. Evaluation ranks all candidates of
  an impression: `auc`, `mrr`, `ndcg5`, `ndcg10`, and as `accuracy` whether a
  click comes first, means over impressions. With vectors of 300 dimensions
  2,524,003 parameters are trained; the vectors are not.

  Args:
    example_shape: (clicked + candidates,); `x` holds ids of news, 0 where there
      is none, and `y`, (candidates,), 1 for a click; as `fedjax-sim data import
      --format=mind` has them.
    num_classes: 2, clicked or not.
    news: a file of titles, which the import writes.
    embedding: a file of the words' vectors: GloVe's text, or `.npz` or
      `.safetensors` with an array of a row a word.
    clicked: earlier clicks of an example, the last of which come last.
    negatives: candidates of a training example beside its click.
    heads: of attention.
    head_size: dimensions of each; their product is that of a title's vector.
    pooling: units of additive attention.
    dropout: rate, >= 0 and < 1.

  Raises:
    FileNotFoundError: there is no such file.
    TypeError, ValueError: a file is damaged, examples have another shape, or a
      size is out of range.
  """
  count = {"clicked": clicked, "negatives": negatives, "heads": heads}
  count |= {"head_size": head_size, "pooling": pooling}
  for name, value in count.items():
    validate.integer(name, value)
  rate = validate.number("dropout", dropout, ge=0, lt=1)
  validate.integer("num_classes", num_classes, ge=2, le=2)
  if len(example_shape) != 1 or example_shape[0] <= clicked + negatives:
    raise ValueError(
      f"news_recommender: an example has shape {example_shape}; give"
      f" ({clicked + negatives + 1} or more,), {clicked} clicks and candidates,"
      " or set clicked and negatives."
    )
  held = read_news(news, "news")
  if held.titles.shape[1] < WINDOW:
    raise ValueError(
      f"news={news!r} has titles of {held.titles.shape[1]} words; give at least"
      f" {WINDOW}."
    )
  vectors = read_vectors(embedding, held.words, "embedding")
  sizes = {"heads": heads, "size": head_size, "pooling": pooling, "rate": rate}
  task = functools.partial(
    nnx_task,
    lambda rngs: NewsRecommender(held.titles, vectors, clicked, sizes, rngs),
    trainable=nnx.All(nnx.Param, nnx.Not(Given)),
    loss=functools.partial(click_cross_entropy, clicked=clicked),
    metrics=functools.partial(_metrics, clicked=clicked),
    check=lambda examples: check_ids(
      examples["x"], len(held.titles), f"news={news!r}"
    ),
  )
  evaluated = task()
  few = clicked + negatives + 1
  trained = task(inputs=lambda examples: examples["x"][:, :few])
  return evaluated._replace(
    loss=trained.loss,
    higher_is_better={**evaluated.higher_is_better, **HIGHER_IS_BETTER},
  )


def click_cross_entropy(
  scores: Array, examples: Examples, *, clicked: int
) -> tuple[Array, Array]:
  """Return the cross-entropy of clicks among candidates, and weights.

  Args:
    scores: shape=(batch, candidates); of the first ones.
    examples: with `x` and `y`; see `news_recommender`.
    clicked: ids of `x` before those of candidates.

  Returns:
    The mean over an example's clicks, and 1, or 0 where there is none.
  """
  relevant, present = _candidates(scores, examples, clicked)
  scores = in_float32(scores)
  log = nnx.log_softmax(jnp.where(present, scores, -1e30), axis=-1)
  count = relevant.sum(-1)
  value = -jnp.sum(jnp.where(relevant, log, 0), axis=-1)
  return value / jnp.maximum(count, 1), (count > 0).astype(scores.dtype)


def _metrics(
  scores: Array, examples: Examples, *, clicked: int
) -> dict[str, Metric]:
  return ranking_metrics(scores, *_candidates(scores, examples, clicked))


def _candidates(
  scores: Array, examples: Examples, clicked: int
) -> tuple[Array, Array]:
  """Return which of the first candidates are clicked, and which are there."""
  count = scores.shape[1]
  present = examples["x"][:, clicked : clicked + count] != 0
  return (examples["y"][:, :count] == 1) & present, present
