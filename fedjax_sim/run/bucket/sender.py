"""Send snapshots of a workdir to a bucket, so that any kill leaves a run there.

Metrics are sent after the arrays of a checkpoint and before its file of sums,
`summary.json` after all else. So where there are metrics and no whole
checkpoint, a part of one shows that the run never had any. An older
`summary.json` is removed first, other files that have to go are at the end.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from fedjax_sim.run.bucket.folder import Bucket
from fedjax_sim.run.bucket.snapshot import Snapshot, Stamp
from fedjax_sim.run.bucket.staging import checkpoint_of
from fedjax_sim.run.checkpoint_files import SUMS

_METRICS, _SUMMARY = "metrics.jsonl", "summary.json"
_OWN = re.compile(r"checkpoints/\d+/|client_rounds/")  # what may be removed


class Sender:
  """Sends what a bucket has not got yet.

  Args:
    bucket: where nobody else writes.
  """

  def __init__(self, bucket: Bucket):
    self._bucket = bucket
    self._there: dict[str, int] | None = None  # the bucket's files
    self._sent: dict[str, Stamp] = {}

  def send(self, snapshot: Snapshot, check: Callable[[], None]) -> None:
    """Make the bucket hold what a snapshot holds.

    Args:
      snapshot: of the workdir.
      check: raises an error if the bucket is this run's no more.

    Raises:
      OSError: the network or the bucket refuses; the next call goes on.
    """
    if self._there is None:
      self._there = self._bucket.sizes()
    files, rounds = snapshot.files, snapshot.checkpoints()
    if _SUMMARY not in files or self._sent.get(_SUMMARY) != files[_SUMMARY]:
      self._remove(_SUMMARY)  # it may be of fewer rounds than what follows
    for name, stamp in files.items():
      there = self._there.get(name) == stamp.size
      if there and name.startswith("client_rounds/"):  # one content a name
        self._sent[name] = stamp
      last = name in (_METRICS, _SUMMARY)
      if not last and checkpoint_of(name) is None:
        self._put(snapshot, name)
    sums = [s for round_ in rounds for s in self._put_arrays(snapshot, round_)]
    # Rows that no checkpoint holds are of a run that has to begin anew.
    if _METRICS in files and (rounds or _SUMMARY in files):
      self._put(snapshot, _METRICS)
    for name in sums:
      self._put(snapshot, name)
    if _SUMMARY in files:
      self._put(snapshot, _SUMMARY)
    if rounds:
      check()
      gone = [n for n in self._there if _OWN.match(n) and n not in files]
      for name in sorted(gone, key=lambda n: not n.endswith(f"/{SUMS}")):
        self._remove(name)

  def _put_arrays(self, snapshot: Snapshot, round_: int) -> list[str]:
    """Send all of a checkpoint but its sums, unless it is there.

    Returns:
      The file of sums, if it has yet to be sent.
    """
    assert self._there is not None
    prefix = f"checkpoints/{round_}/"
    names = [name for name in snapshot.files if name.startswith(prefix)]
    if all(self._sent.get(name) == snapshot.files[name] for name in names):
      return []
    sums = prefix + SUMS
    there = {n: s for n, s in self._there.items() if n.startswith(prefix)}
    if (
      there == {name: snapshot.files[name].size for name in names}
      and self._bucket.read(sums) == (snapshot.folder / sums).read_bytes()
    ):
      self._sent |= {name: snapshot.files[name] for name in names}
      return []
    self._remove(sums)  # from here on it is none
    for name in there:
      if name not in names or self._sent.get(name) != snapshot.files[name]:
        self._remove(name)
    for name in names:
      if name != sums:
        self._put(snapshot, name)
    return [sums]

  def _put(self, snapshot: Snapshot, name: str) -> None:
    """Send a file, unless it is there."""
    assert self._there is not None
    stamp = snapshot.files[name]
    if self._sent.get(name) != stamp or name not in self._there:
      self._bucket.send(snapshot.folder / name, name, stamp.size)
      self._there[name], self._sent[name] = stamp.size, stamp

  def _remove(self, name: str) -> None:
    assert self._there is not None
    if name in self._there:
      self._bucket.remove(name)
      del self._there[name]
    self._sent.pop(name, None)

  def lacking(self, snapshot: Snapshot) -> list[str]:
    """Return what was not sent, a checkpoint as one."""
    names = [
      "/".join(name.split("/")[:2]) if checkpoint_of(name) is not None else name
      for name, stamp in snapshot.files.items()
      if self._sent.get(name) != stamp
    ]
    found = list(dict.fromkeys(sorted(names)))
    return [*found[:8], *(["..."] if len(found) > 8 else [])]
