"""Random keys, each derived from a seed, a purpose and indices.

No key is carried along and split, so that random numbers do not depend on
lanes, devices or hosts.
"""

from __future__ import annotations

import enum

import jax

from fedjax_sim.core.types import Array, Key


class Purpose(enum.IntEnum):
  """What a key is for; keys of different purposes never coincide.

  Numbers are part of what a seed means: never change one, only append.
  """

  INIT = 0
  SAMPLING = 1
  SHUFFLING = 2
  CLIENT = 3
  TRANSFORM = 4
  SERVER = 5
  DATA = 6
  AGGREGATION = 7


def key_for(seed: Array | int, purpose: Purpose, *indices: Array | int) -> Key:
  """Return the key of a seed, a purpose and indices.

  Example:
    >>> key = key_for(0, Purpose.CLIENT, round_, client)

  Args:
    seed: shape=(), uint32; may be traced, so runs can be vmapped over seeds.
    purpose: what the key is for.
    *indices: shape=() integers, such as the round and the client's id.
  """
  return _folded(jax.random.key(seed), purpose, *indices)


_NOISE = 0x6E6F6973


def noise_key_for(
  noise_seed: Array, purpose: Purpose, *indices: Array | int
) -> Key:
  """Return the key of private noise, which no seed of the run determines.

  Args:
    noise_seed: shape=(2,), uint32; 64 random bits.
    purpose: who draws the noise: `SERVER`, `CLIENT` or `AGGREGATION`.
    *indices: as in `key_for`.
  """
  root = jax.random.wrap_key_data(noise_seed, impl="threefry2x32")
  # A tag, so that no fixed seed of the noise gives the keys of a run's seed.
  return _folded(jax.random.fold_in(root, _NOISE), purpose, *indices)


def _folded(key: Key, purpose: Purpose, *indices: Array | int) -> Key:
  for index in (int(purpose), *indices):
    key = jax.random.fold_in(key, index)
  return key
