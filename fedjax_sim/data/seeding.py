"""Random generators of the data package, by seed and purpose."""

from __future__ import annotations

import enum

import numpy as np

from fedjax_sim.core import validate

MOST_SEED = 2**64 - 1
_DATA = 6 << 32  # `base.Purpose.DATA`: apart from the engine's own streams


class Stream(enum.IntEnum):
  """Purposes of random draws; each has its own stream for the same seed."""

  PARTITION = 0
  TEST = 1
  HELD_OUT = 2
  UNSEEN = 3
  SERVER = 4
  LABELS = 5
  FEW_LABELS = 6


def generator(seed: int, stream: Stream) -> np.random.Generator:
  """Return the generator of (seed, stream), the same on every machine.

  Args:
    seed: from 0 to 2**64 - 1.
    stream: what it is for.

  Raises:
    TypeError, ValueError: `seed` is not such a number.
  """
  seed = validate.integer("data.seed", seed, ge=0, le=MOST_SEED)
  key = np.array([seed, _DATA + stream], np.uint64)
  return np.random.Generator(np.random.Philox(key=key))
