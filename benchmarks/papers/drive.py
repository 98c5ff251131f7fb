"""DRIVE: the error of the mean of ten clients' vectors, a bit an entry.

Vargaftik et al. 2021, "DRIVE: One-bit distributed mean estimation" (arXiv
2105.08339), table 1: the ten clients have one vector, of entries from
lognormal(0, 1), and compress it with rotations of their own. The error is
||mean - x||^2 / ||x||^2; for uniform rotations of long vectors it tends to
(pi / 2 - 1) / 10 = 0.0571.
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks.papers.figure import Figure, Row, Scale
from fedjax_sim.core import Array, Key
from fedjax_sim.transforms import drive

CLIENTS, TRIALS = 10, 100
LENGTHS = (2**13, 2**19)
PRINTED = "0.0571"


def rows(folder: Path, scale: Scale) -> list[Row]:
  """Compress `TRIALS` vectors of each length a seed; trains nothing."""
  del folder
  transform = drive(block=None)

  def error(key: Key) -> Array:
    drawn, rotating = jax.random.split(key)
    x = jnp.exp(jax.random.normal(drawn, (length,)))

    def sent(key: Key) -> Array:
      return transform.apply(x, (), (), {}, key).update

    mean = jax.vmap(sent)(jax.random.split(rotating, CLIENTS)).mean(axis=0)
    return jnp.sum((mean - x) ** 2) / jnp.sum(x**2)

  found = []
  for length in LENGTHS:
    trials = TRIALS if length < 2**16 else TRIALS // 10
    of_keys = jax.jit(lambda keys: jax.lax.map(error, keys).mean())
    ours = [
      float(of_keys(jax.random.split(jax.random.key(seed), trials)))
      for seed in range(scale.seeds)
    ]
    found.append(Row(f"NMSE, {length:,} entries", PRINTED, ours, 4))
  return found


FIGURE = Figure(
  "Vargaftik et al. 2021, 2105.08339, table 1, Hadamard", rows, "nothing"
)
