"""Who can take part when: a trace of when devices were ready.

Such as FLASH's phones (Yang et al. 2021, "Characterizing impacts of
heterogeneity in federated learning upon large-scale smartphone data", arXiv
2006.06983), idle and charging in a wireless network.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from fedjax_sim.core import validate
from fedjax_sim.data import locate, read_npz
from fedjax_sim.sampling import uniform
from fedjax_sim.sampling.uniform import Sampler, generator, without_replacement

_POINTS = 1000  # random times, at which the mean cohort is taken


class Trace(NamedTuple):
  """When each device was ready; no two intervals of one overlap.

  Attributes:
    device: shape=(intervals,), int64; whose it is, increasing.
    begin: shape=(intervals,), float64; seconds.
    end: shape=(intervals,), float64; from here on it is not ready.
    devices: how many there are, of which some may never be ready.
  """

  device: np.ndarray
  begin: np.ndarray
  end: np.ndarray
  devices: int

  @property
  def seconds(self) -> float:
    """How long the trace is; it begins at 0 and is repeated."""
    return float(self.end.max())

  def ready(self, time: float) -> np.ndarray:
    """The devices that are ready, increasing, int64."""
    time = time % self.seconds
    return self.device[(self.begin <= time) & (time < self.end)]


def make_trace(intervals: np.ndarray, offsets: np.ndarray) -> Trace:
  """A trace; overlapping intervals of a device are joined, empty ones left out.

  Args:
    intervals: shape=(n, 2); begin and end in seconds, device after device.
    offsets: shape=(devices + 1,), integer; device i has the intervals from
      `offsets[i]` to `offsets[i + 1]`.

  Raises:
    TypeError, ValueError: they are not of this kind; names the device.
  """
  intervals, offsets = np.asarray(intervals), np.asarray(offsets)
  if intervals.dtype.kind not in "iuf" or offsets.dtype.kind not in "iu":
    raise TypeError(
      f"A trace has intervals of {intervals.dtype} and offsets of"
      f" {offsets.dtype}; give numbers, and whole numbers."
    )
  if intervals.ndim != 2 or intervals.shape[1] != 2 or not len(intervals):
    raise ValueError(
      f"intervals has shape {intervals.shape}; give (n, 2), begin and end."
    )
  offsets = offsets.astype(np.int64).reshape(-1)
  counts = np.diff(offsets)
  if (
    len(offsets) < 2
    or offsets[0] != 0
    or offsets[-1] != len(intervals)
    or (counts < 0).any()
  ):
    raise ValueError(
      f"offsets, shape {offsets.shape}, do not go from 0 to the"
      f" {len(intervals)} intervals; give (devices + 1,) that never fall."
    )
  device = np.repeat(np.arange(len(counts)), counts)
  begin, end = intervals.astype(np.float64).T
  wrong = np.flatnonzero(~((begin >= 0) & (begin <= end) & np.isfinite(end)))
  if wrong.size:
    i = int(wrong[0])
    raise ValueError(
      f"Device {device[i]} is ready from {begin[i]} to {end[i]}; give seconds,"
      " from 0, the end not before the begin."
    )
  if not (begin < end).any():
    raise ValueError("No device is ever ready; give longer intervals.")
  some = begin < end
  device, begin, end = device[some], begin[some], end[some]
  order = np.lexsort((begin, device))
  device, begin, end = device[order], begin[order], end[order]
  # As every device has room of its own, one running maximum serves all.
  room = device * (end.max() + 1)
  reach = np.maximum.accumulate(end + room)
  first = np.append(True, begin[1:] + room[1:] > reach[:-1])
  last = np.append(np.flatnonzero(first)[1:] - 1, len(first) - 1)
  ends = reach[last] - room[last]
  return Trace(device[first], begin[first], ends, len(counts))


def load_trace(path: str | os.PathLike[str]) -> Trace:
  """A trace from an `.npz` file with `intervals` and `offsets`.

  Raises:
    FileNotFoundError: there is no such file.
    TypeError, ValueError: it holds something else.
  """
  file = locate(path, "server.trace")
  arrays = read_npz(file, "server.trace")
  for name in ("intervals", "offsets"):
    if name not in arrays:
      raise ValueError(
        f"server.trace: {file} lacks {name!r}; it holds"
        f" {', '.join(sorted(arrays)) or 'nothing'}."
      )
  try:
    return make_trace(arrays["intervals"], arrays["offsets"])
  except (TypeError, ValueError) as error:
    raise type(error)(f"server.trace: {file}: {error}") from error


def available(
  num_clients: int,
  clients_per_round: int,
  trace: Trace | str,
  round_seconds: float = 60.0,
) -> Sampler:
  """Cohorts drawn uniformly among the clients that are ready.

  Round r begins r * round_seconds after the trace does, which is repeated when
  it ends. The seed gives every device of the trace as many clients as any
  other, or one more or less. Where fewer are ready than wanted, all of them
  take part, which may be nobody. To draw takes a time that depends on cohort
  and trace, not on the number of clients.

  Args:
    num_clients: the population.
    clients_per_round: how many, if so many are ready.
    trace: when devices are ready, or a file, see `load_trace`.
    round_seconds: how long a round lasts.

  Raises:
    TypeError, ValueError, FileNotFoundError: an argument is out of range.
  """
  num_clients = validate.whole("num_clients", num_clients)
  size = validate.whole(
    "server.clients_per_round", clients_per_round, most=num_clients
  )
  seconds = validate.real("server.round_seconds", round_seconds, above=0)
  made = load_trace(trace) if isinstance(trace, str) else trace
  validate.instance("server.trace", made, Trace, "load_trace('trace.npz')")
  devices = min(made.devices, num_clients)

  @functools.lru_cache(maxsize=4)  # seeds
  def places(seed: int) -> np.ndarray:
    """Which clients each device has: place, place + devices, ..."""
    order = generator(seed, 0, stream=2).permutation(made.devices)
    return np.argsort(order)

  def counts_at(seed: int, time: float) -> tuple[np.ndarray, np.ndarray]:
    """The places that are ready, and how many clients have each."""
    place = np.sort(places(seed)[made.ready(time)])
    place = place[place < devices]
    return place, (num_clients - place + devices - 1) // devices

  def sample(seed: int, round_: int) -> np.ndarray:
    place, counts = counts_at(seed, round_ * seconds)
    total = int(counts.sum())
    rng = generator(seed, round_)
    drawn = without_replacement(rng, total, min(size, total))
    ends = np.cumsum(counts)
    which = np.searchsorted(ends, drawn, side="right")
    nth = drawn - (ends - counts)[which]
    return np.sort(place[which] + devices * nth)

  times = generator(0, 0).uniform(0, made.seconds, _POINTS)
  means = [min(size, int(counts_at(0, time)[1].sum())) for time in times]
  return Sampler(sample=sample, sizes=(size,), expected=float(np.mean(means)))


SAMPLERS: dict[str, Callable[..., Sampler]] = {
  **uniform.SAMPLERS,
  "available": available,
}
