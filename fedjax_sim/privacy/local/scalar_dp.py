"""ScalarDP: a number within a range, sent as one of a few levels.

Bhowmick et al. 2018 (arXiv 1812.00984, algorithm 3). The number is rounded to a
level at random, without bias, then sent by randomized response.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_sim.core import Array, Key

_MOST_LEVELS = 2**16  # finer than anything that the noise lets see


class Levels(NamedTuple):
  """How a number of [0, 1] is sent.

  Attributes:
    top: there are so many levels above 0.
    forget: probability that the level is drawn from all of them instead.
    scale: what one level above the mean of forgotten ones stands for, so that
      the expectation is right.
    centre: what is subtracted from the level before.
  """

  top: int
  forget: float
  scale: float
  centre: float


def levels(epsilon: float) -> Levels:
  """Return the levels for this epsilon; ceil(e^(epsilon / 3)), as in the paper.

  The right level is sent with probability e^epsilon / (e^epsilon + top), each
  other one with 1 / (e^epsilon + top).
  """
  top = math.ceil(min(_MOST_LEVELS, math.exp(min(epsilon, 99.0) / 3)))
  small = math.exp(-epsilon)
  all_ = 1 + top * small
  return Levels(
    top=top,
    forget=(top + 1) * small / all_,
    scale=all_ / -math.expm1(-epsilon) / top,
    centre=top * (top + 1) * small / (2 * all_),
  )


def randomize(number: Array, law: Levels, key: Key) -> Array:
  """Return a number as it is sent: its expectation is the number.

  Args:
    number: shape=(), float, from 0 to 1.
    law: from `levels`.
    key: of the draws.

  Returns:
    shape=(), float; it may be negative.
  """
  round_key, forget_key, level_key = jax.random.split(key, 3)
  above = jax.random.uniform(round_key, dtype=number.dtype)
  level = jnp.floor(law.top * number + above)
  level = jnp.minimum(level, law.top)  # a sum may round up
  other = jax.random.randint(level_key, (), 0, law.top + 1)
  forgotten = jax.random.bernoulli(forget_key, law.forget)
  told = jnp.where(forgotten, other.astype(level.dtype), level)
  return law.scale * (told - law.centre)
