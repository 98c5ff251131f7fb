"""Traces of when devices were ready."""

from __future__ import annotations

import os
from typing import NamedTuple

import numpy as np

from fedjax_sim.data import locate, read_npz


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
    """Return the devices that are ready at a time; increasing, int64."""
    time = time % self.seconds
    return self.device[(self.begin <= time) & (time < self.end)]


def make_trace(intervals: np.ndarray, offsets: np.ndarray) -> Trace:
  """Make a trace: join a device's overlapping intervals, drop empty ones.

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
  """Read a trace from an `.npz` file with `intervals` and `offsets`.

  Raises:
    FileNotFoundError: there is no such file.
    TypeError, ValueError: it holds something else.
  """
  file = locate(path, "trace")
  arrays = read_npz(file, "trace")
  for name in ("intervals", "offsets"):
    if name not in arrays:
      raise ValueError(
        f"trace: {file} lacks {name!r}; it holds"
        f" {', '.join(sorted(arrays)) or 'nothing'}."
      )
  try:
    return make_trace(arrays["intervals"], arrays["offsets"])
  except (TypeError, ValueError) as error:
    raise type(error)(f"trace: {file}: {error}") from error
