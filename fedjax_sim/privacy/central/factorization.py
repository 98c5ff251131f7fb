"""Correlated noise: strategies of the matrix mechanism, DP-FTRL.

A private algorithm releases a sum x_t in every round t, and a model is built
from running totals of them. Written as matrices, with Z independent noise, it
releases X + C^-1 Z for some lower-triangular C, the strategy: as private as
releasing C X + Z, and the noise of one round is partly taken back in the next
ones. Here C is Toeplitz: its first column says all.

`jax-privacy` finds the coefficients that make the running totals' noise small
and multiplies by C^-1 in a stream; what is added here is the sensitivity of any
part of a run, in double precision, of those numbers that the run computes with.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjax_sim.core import validate
from fedjax_sim.privacy import library


class Strategy(NamedTuple):
  """A lower-triangular Toeplitz matrix C that noise is correlated by.

  Attributes:
    coefficients: C's first column, shape=(rounds,), float64; never negative,
      never increasing.
    noising: jax_privacy's `StreamingMatrix` of C^-1; computes in float32.
    bands: columns so many rounds apart are orthogonal; None: none are.
    rounds: how many rounds it was made for.
  """

  coefficients: np.ndarray
  noising: Any
  bands: int | None
  rounds: int

  def sensitivity(self, rounds: int, period: int) -> float:
    """Return how far, in L2, one client can move C X in the first rounds.

    Every contribution has norm 1 at most, and may be any vector. The farthest
    is reached by equal ones in rounds 0, period, 2 period, ..., since the
    coefficients neither are negative nor increase (arXiv 2405.13763,
    theorem 2).

    Args:
      rounds: how many, from 1 to `Strategy.rounds`.
      period: of so many consecutive rounds a client takes part in one at most.

    Raises:
      TypeError, ValueError: a number is not whole or out of range.
    """
    rounds = validate.integer("rounds", rounds, le=self.rounds)
    period = validate.integer("period", period)
    moved = np.zeros(rounds)
    for first in range(0, rounds, period):
      moved[first:] += self.coefficients[: rounds - first]
    return float(np.linalg.norm(moved))


@functools.lru_cache
def banded(rounds: int, bands: int) -> Strategy:
  """Return the banded Toeplitz strategy with the least mean squared error.

  Among those with so many bands it makes the noise of running totals least if a
  client takes part once in `bands` rounds at most (arXiv 2306.08153; how it is
  found, 2405.15913). The noise's state is `bands` - 1 copies of the parameters.

  Args:
    rounds: of the run.
    bands: how many diagonals of C are not 0; 1 is independent noise.

  Raises:
    TypeError, ValueError: a number is not whole, bands is not within 1..rounds.
  """
  rounds = validate.integer("server.rounds", rounds)
  bands = validate.integer("privacy.bands", bands, le=rounds)
  toeplitz = library("jax_privacy.matrix_factorization.toeplitz")
  with _on_the_host():
    found = toeplitz.optimize_banded_toeplitz(rounds, bands)
    # What is rounded here is what the run computes with.
    first = np.asarray(found, np.float32)
    noising = toeplitz.inverse_as_streaming_matrix(first)
  coefficients = np.pad(first.astype(np.float64), (0, rounds - bands))
  return _checked(Strategy(coefficients, noising, bands, rounds))


@functools.lru_cache
def blt(rounds: int, period: int, buffers: int = 2) -> Strategy:
  """Return the buffered linear Toeplitz strategy of least mean squared error.

  C's first column is 1 and then a sum of `buffers` exponentials (arXiv
  2404.16706), fitted for clients that take part once in `period` rounds at most
  (arXiv 2408.08868). The noise's state is `buffers` copies of the parameters,
  whatever the period.

  Args:
    rounds: of the run.
    period: see above.
    buffers: how many exponentials, from 1 to 10. More than 3 gain next to
      nothing, and may fail.

  Raises:
    TypeError, ValueError: a number is not whole or out of range, or no such
      strategy was found.
  """
  rounds = validate.integer("server.rounds", rounds)
  period = validate.integer("period", period)
  buffers = validate.integer("privacy.buffers", buffers, le=10)
  module = library("jax_privacy.matrix_factorization.buffered_toeplitz")
  with _on_the_host():
    loss = module.LossFn.build_min_sep(n=rounds, error="mean", min_sep=period)
    try:
      found, _ = module.optimize_loss(loss, num_buffers=buffers)
    except RuntimeError as error:
      raise ValueError(
        f"privacy.buffers={buffers}: no strategy was found for {rounds} rounds"
        f" and a period of {period}; give fewer."
      ) from error
    decay = np.asarray(found.buf_decay).astype(np.float32)
    scale = np.asarray(found.output_scale).astype(np.float32)
  builder = module.StreamingMatrixBuilder(buf_decay=decay, output_scale=scale)
  powers = decay.astype(np.float64)[None] ** np.arange(rounds - 1)[:, None]
  coefficients = np.append(1.0, powers @ scale.astype(np.float64))
  return _checked(Strategy(coefficients, builder.build_inverse(), None, rounds))


def _checked(strategy: Strategy) -> Strategy:
  """Refuse coefficients for which `Strategy.sensitivity` would be wrong."""
  c = strategy.coefficients
  if not (
    np.isfinite(c).all() and c.min() >= 0 and np.diff(c).max(initial=0) <= 0
  ):
    raise ValueError(
      f"The strategy found for {strategy.rounds} rounds has coefficients that"
      " are negative or increase; give fewer privacy.bands or privacy.buffers."
    )
  c.setflags(write=False)  # it is cached
  return strategy


@contextlib.contextmanager
def _on_the_host() -> Iterator[None]:
  """Compute coefficients on the CPU, in float64, outside of any trace.

  So they are the same whatever accelerator there is, and whoever asks.
  """
  try:
    device = jax.local_devices(backend="cpu")[0]
  except RuntimeError:  # JAX was told to have none
    device = None
  with (
    jax.ensure_compile_time_eval(),
    jax.default_device(device),
    jax.enable_x64(True),
    jax.default_matmul_precision("highest"),
    jax.numpy_rank_promotion("allow"),  # the library broadcasts
  ):
    yield
