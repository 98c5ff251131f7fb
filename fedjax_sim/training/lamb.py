"""LAMB as its first implementations have it: without correction, bounded.

You et al. 2020, "Large batch optimization for deep learning: training BERT in
76 minutes" (arXiv 1904.00962). Optax's corrects the moments of the first steps
and bounds no norm of parameters; FLUTE's does neither correct, nor let a norm
count more than 10.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_sim.core import Array, PyTree, in_float32


class Moments(NamedTuple):
  """Running means of gradients and of their squares, like the parameters."""

  mean: PyTree
  square: PyTree


def uncorrected_lamb(
  learning_rate: float,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-6,
  weight_decay: float = 0.0,
  max_norm: float = 10.0,
) -> optax.GradientTransformation:
  """Return LAMB without correction of the moments.

  Args:
    learning_rate: of a step as long as an array's parameters.
    b1: decay of the mean of gradients.
    b2: decay of the mean of their squares.
    eps: added to the root of the latter.
    weight_decay: part of the parameters in a step.
    max_norm: the longest norm of an array that counts.

  Example:
    uncorrected_lamb(0.1).init({"w": jnp.ones(3)})
  """

  def init(params: PyTree) -> Moments:
    zeros = jax.tree.map(jnp.zeros_like, params)
    return Moments(zeros, zeros)

  def update(
    gradient: PyTree, state: Moments, params: PyTree
  ) -> tuple[PyTree, Moments]:
    mean = jax.tree.map(
      lambda m, g: b1 * m + (1 - b1) * g, state.mean, gradient
    )
    square = jax.tree.map(
      lambda v, g: b2 * v + (1 - b2) * g**2, state.square, gradient
    )

    def step(m: Array, v: Array, p: Array) -> Array:
      way = m / (jnp.sqrt(v) + eps) + weight_decay * p
      norm = jnp.minimum(jnp.linalg.norm(in_float32(p).ravel()), max_norm)
      length = jnp.linalg.norm(in_float32(way).ravel())
      known = (norm > 0) & (length > 0)
      trust = jnp.where(known, norm / jnp.where(known, length, 1), 1)
      return -learning_rate * trust * way

    return jax.tree.map(step, mean, square, params), Moments(mean, square)

  return optax.GradientTransformation(init, update)
