"""What clients do in a round: how many steps, and on which examples.

A client's examples are cut into whole batches, epoch after epoch. A last,
partial batch of an epoch is filled up with other examples of the same client,
so a batch straddles neither epochs nor clients.

Shuffling uses one counter-based hash of (seed, round, client, epoch, position)
for whole cohorts and one sort, so who else takes part changes nothing.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from fedjax_sim.core import Purpose, validate


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalBatching:
  """What a client does in a round.

  Attributes:
    batch_size: examples a local step.
    epochs: walks over the client's examples; ignored where `steps` is given.
    steps: local steps, whatever the client's size; None: by epochs.
    max_examples: a client uses at most so many of its examples in a round: a
      new random choice every round, or its first ones without `shuffle`;
      None: all.
    max_tokens: a client takes no further step in a round once the loss's
      weights of its examples so far, such as tokens of a text, add up to so
      many or more; None: it takes all.
    drop_remainder: leave out the last, partial batch of an epoch.
    shuffle: a new order every epoch; otherwise the stored one.

  Raises:
    TypeError, ValueError: a number is not whole or < 1.
  """

  batch_size: int = 32
  epochs: int = 1
  steps: int | None = None
  max_examples: int | None = None
  max_tokens: int | None = None
  drop_remainder: bool = False
  shuffle: bool = True

  def __post_init__(self) -> None:
    validate.integer("client.batch_size", self.batch_size)
    validate.integer("client.epochs", self.epochs)
    if self.steps is not None:
      validate.integer("client.steps", self.steps)
    if self.max_examples is not None:
      validate.integer("client.max_examples", self.max_examples)
    if self.max_tokens is not None:
      # Beyond, not every sum of ones in float32 grows.
      validate.integer("client.max_tokens", self.max_tokens, le=2**24)

  def examples_used(self, sizes: np.ndarray) -> np.ndarray:
    """Distinct examples that clients of these sizes use in a round."""
    if self.max_examples is None:
      return sizes
    return np.minimum(sizes, self.max_examples)

  def batches_per_epoch(self, sizes: np.ndarray) -> np.ndarray:
    """Return the batches in one epoch of clients of these sizes."""
    used = self.examples_used(sizes)
    extra = 0 if self.drop_remainder else self.batch_size - 1
    return (used + extra) // self.batch_size

  def num_epochs(self, sizes: np.ndarray) -> np.ndarray:
    """Return the epochs begun by clients of these sizes."""
    if self.steps is None:
      return np.full_like(sizes, self.epochs)
    return -(-self.steps // np.maximum(self.batches_per_epoch(sizes), 1))

  def num_steps(self, sizes: np.ndarray) -> np.ndarray:
    """Local steps of clients of these sizes; none without a batch."""
    batches = self.batches_per_epoch(sizes)
    if self.steps is None:
      return self.epochs * batches
    return np.where(batches > 0, self.steps, 0)

  def order_length(self, sizes: np.ndarray) -> np.ndarray:
    """Return the entries that clients of these sizes take in `order`."""
    batches = self.num_epochs(sizes) * self.batches_per_epoch(sizes)
    return batches * self.batch_size

  def fitted(self, sizes: np.ndarray) -> LocalBatching:
    """Return the same, with no batch larger than the largest client can fill.

    Raises:
      ValueError: `drop_remainder` would leave a client without any batch.
    """
    used = self.examples_used(sizes)
    if self.drop_remainder and used.min() < self.batch_size:
      client = int(np.argmin(used))
      raise ValueError(
        f"client.drop_remainder=True leaves client {client}, which has"
        f" {used[client]} examples, without a batch of"
        f" client.batch_size={self.batch_size}; raise data.min_examples or"
        " lower client.batch_size."
      )
    largest = int(used.max())
    return dataclasses.replace(
      self, batch_size=min(self.batch_size, max(largest, 1))
    )


def evaluation_batch(sizes: np.ndarray, most: int, overhead: int) -> int:
  """Return the batch size with which clients are evaluated in the least time.

  Large batches are mostly padding where most clients are small, and small ones
  take many steps. It is the largest client's, or a power of 2 below.

  Args:
    sizes: examples of every client, shape=(num_clients,).
    most: the largest batch.
    overhead: how many examples take as long as what a step costs besides.

  Example:
    >>> evaluation_batch(np.array([2] * 99 + [200]), most=256, overhead=16)
    8
  """
  largest = max(1, min(most, int(sizes.max())))
  choices = [1 << i for i in range(largest.bit_length()) if 1 << i < largest]
  cost = lambda size: int((-(-sizes // size)).sum()) * (size + overhead)
  return min([largest, *choices], key=cost)


def _mix(x: np.ndarray) -> np.ndarray:
  """Mix 64 bits bijectively (Stafford's variant 13, as in SplitMix64)."""
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))


def _hash(*words: Any) -> np.ndarray:
  """Return a 64-bit hash of broadcast integer arrays."""
  state = np.zeros((), np.uint64)
  with np.errstate(over="ignore"):
    for word in words:
      word = np.asarray(word, np.int64).astype(np.uint64)
      state = _mix(state + word * np.uint64(0x9E3779B97F4A7C15) + np.uint64(1))
  return state


def positions(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """For segments of these lengths: (segment, position in it) of each entry."""
  segment = np.repeat(np.arange(len(counts)), counts)
  first = np.cumsum(counts) - counts
  return segment, np.arange(len(segment)) - first[segment]


def _shuffled(counts: np.ndarray, seeds: np.ndarray) -> np.ndarray:
  """Return a random permutation of 0..count-1 for each segment, end to end.

  Entries are sorted by segment, then by 32 bits of a hash, then by their own
  position. Where the three fit into 64 bits one sort of numbers does it, which
  is ten times faster than a sort by keys.
  """
  segment, position = positions(counts)
  if not len(segment):
    return position
  hashed = _hash(seeds[segment].astype(np.int64), position) >> np.uint64(32)
  low = int(counts.max() - 1).bit_length()
  if low + int(len(counts) - 1).bit_length() > 32:
    return position[np.lexsort((position, hashed, segment))]
  keys = segment.astype(np.uint64) << np.uint64(32 + low)
  keys |= hashed << np.uint64(low)
  keys |= position.astype(np.uint64)
  keys.sort()
  return (keys & np.uint64((1 << low) - 1)).astype(np.int64)


class Batches(NamedTuple):
  """A cohort's batches, client after client. All int64 but `real`.

  Attributes:
    client: shape=(entries,); whose an entry is, by its place in the cohort.
    example: shape=(entries,); which of the examples that the client uses.
    real: shape=(entries,), bool; False where it only fills up a batch.
    start: shape=(cohort,); the first entry of each client.
    rows: shape=(used,); the examples in use, client after client.
    first: shape=(cohort,); where each client's begin there.
  """

  client: np.ndarray
  example: np.ndarray
  real: np.ndarray
  start: np.ndarray
  rows: np.ndarray
  first: np.ndarray

  def order(self, first: np.ndarray | None = None) -> np.ndarray:
    """Return the entries of `order`; see the module.

    Args:
      first: shape=(cohort,); where each client's examples in use begin, one
        after the other; None: they are where they are stored.
    """
    if first is None:
      index = self.rows[self.first[self.client] + self.example]
    else:
      index = first[self.client] + self.example
    return np.where(self.real, index, ~index)


def batches(
  offsets: np.ndarray,
  ids: np.ndarray,
  batching: LocalBatching,
  *,
  seed: int,
  round_: int | np.ndarray,
  salt: int = 0,
) -> Batches:
  """Return the batches of a cohort.

  Args:
    offsets: shape=(num_clients + 1,); where each client's examples begin.
    ids: shape=(cohort,); the cohort.
    batching: what a client does.
    seed: the run's seed.
    round_: the round, or every client's, shape=(cohort,).
    salt: tells passes apart.
  """
  sizes = offsets[ids + 1] - offsets[ids]
  used = batching.examples_used(sizes)
  per_epoch = batching.batches_per_epoch(sizes)
  epochs = batching.num_epochs(sizes)
  secret = _hash(seed, int(Purpose.SHUFFLING), salt, round_, ids)

  # Which of its examples a client uses: its first `used` in a random order.
  if batching.shuffle and batching.max_examples is not None:
    chosen = _shuffled(sizes, _hash(secret.astype(np.int64), -1))
    _, rank = positions(sizes)
    chosen = chosen[rank < np.repeat(used, sizes)]
  else:
    _, chosen = positions(used)

  # One segment for every (client, epoch).
  client, epoch = positions(epochs)
  counts = used[client]
  if batching.shuffle:
    shuffled = _shuffled(counts, _hash(secret[client].astype(np.int64), epoch))
  else:
    _, shuffled = positions(counts)
  first = np.cumsum(counts) - counts

  # Whole batches: entries past the segment's end wrap around and are marked.
  segment, entry = positions(per_epoch[client] * batching.batch_size)
  count = counts[segment]
  lengths = batching.order_length(sizes)
  return Batches(
    client=client[segment],
    example=shuffled[first[segment] + entry % np.maximum(count, 1)],
    real=entry < count,
    start=np.cumsum(lengths) - lengths,
    rows=np.repeat(offsets[ids], used) + chosen,
    first=np.cumsum(used) - used,
  )
