"""The trackers of a run, all at once.

Those that write local files get rows as rounds are trained. Those on a server
get a `Delivery` each, which knows what other processes have sent from
`trackers.json` in the workdir.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from fedjax_sim import config as configs
from fedjax_sim import reporting
from fedjax_sim.config import build
from fedjax_sim.config.build import ConfiguredTracker
from fedjax_sim.core import urls
from fedjax_sim.core.errors import one_line
from fedjax_sim.distributed import processes
from fedjax_sim.reporting.trackers import Row, RunFacts, Status
from fedjax_sim.run.bucket.mirror import Place
from fedjax_sim.run.changes import decisive
from fedjax_sim.run.delivery import Delivery
from fedjax_sim.run.resume import versions, warn
from fedjax_sim.run.signals import Interrupted
from fedjax_sim.run.workdir import locked

FILE = "trackers.json"
RESULTS = (  # patterns of files in the workdir that trackers get at the end
  *("config.json", "summary.json", "report.html"),
  *("*.png", "*.csv", "*.safetensors", "*.npz", "*.msgpack"),
)


class Trackers:
  """The trackers of a run; without any it does nothing.

  Args:
    configured: the trackers.
    place: where the workdir is.
    config: complete.
    first_round: the first round that this process trains.
  """

  def __init__(
    self,
    configured: Sequence[ConfiguredTracker],
    place: Place,
    config: ConfigDict,
    first_round: int,
  ):
    self._folder, self._config = place.folder, config
    self._name = Path(place.name).resolve().name  # also of a URL
    self._first_round = first_round
    self._messages: list[str] = []
    self._records = _Records(self._folder / FILE)
    self._live = [x for x in configured if x.tracker.live]
    self._deliveries = [
      self._delivery(x) for x in configured if not x.tracker.live
    ]

  def _delivery(self, configured: ConfiguredTracker) -> Delivery:
    label, place = configured.label, configured.tracker.place
    before = self._records.sent(label, place)
    return Delivery(
      configured,
      self._folder / "metrics.jsonl",
      lambda: self._facts(
        self._records.of(label, place), versions() | _git_commit()
      ),
      lambda changes: self._records.change(label, changes),
      self._messages.append,
      before,
    )

  def _facts(
    self, record: Mapping[str, Any], tags: Mapping[str, str]
  ) -> RunFacts:
    """Return what a tracker with this record learns of the run."""
    params = ConfigDict(decisive(configs.resolved(self._config)))
    return RunFacts(
      name=self._name,
      folder=self._folder,
      key=record.get("key", ""),
      run_id=record.get("run_id", ""),
      sent=record.get("sent", -1),
      first_round=self._first_round,
      params=dict(configs.fields_of(params)),
      tags=tags,
    )

  def open(self) -> None:
    """Open the live trackers.

    Raises:
      OSError: one of them cannot write.
    """
    for live in self._live:
      live.tracker.open(self._facts({}, {}))

  def write(self, rows: Iterable[Row]) -> None:
    """Write rows to the live trackers."""
    rows = list(rows)
    for live in self._live:
      live.tracker.send([live.select(row) for row in rows])

  def flush(self) -> None:
    """Return when the live trackers' files have all rows."""
    for live in self._live:
      live.tracker.flush()

  def commit(self, done: int) -> None:
    """Let rows be sent: a checkpoint holds those of `done` rounds."""
    for delivery in self._deliveries:
      delivery.commit(done)

  def messages(self) -> Iterator[str]:
    """Yield what trackers have to say to the user, once."""
    while self._messages:
      yield self._messages.pop(0)

  def close(self, status: Status) -> None:
    """End the run on every tracker, or warn of what was not sent."""
    files: list[Path] = []
    if status == "finished":
      found = {f for p in RESULTS for f in self._folder.glob(p)}
      files = sorted(found)
    for delivery in self._deliveries:
      delivery.end(status, files)
    try:
      for live in self._live:
        live.tracker.close(status, files)
    finally:
      for delivery in self._deliveries:
        if message := delivery.join():
          self._messages.append(message)
      for message in self.messages():
        warn(message)


@contextlib.contextmanager
def tracked(
  experiment: build.Experiment, place: Place, first_round: int
) -> Iterator[Trackers]:
  """Open the trackers of a run, and end the run on them as it ends here.

  Args:
    experiment: what the config describes.
    place: where the workdir is.
    first_round: the first round that this process trains.
  """
  configured = experiment.trackers if processes.is_first() else ()
  trackers = Trackers(configured, place, experiment.config, first_round)
  status: Status = "failed"
  trackers.open()
  try:
    yield trackers
    status = "finished"
  except (Interrupted, KeyboardInterrupt):
    status = "killed"
    raise
  finally:
    trackers.close(status)


def deliver_rest(config: ConfigDict, place: Place, rounds: int) -> None:
  """Send what trackers of a finished run have not got.

  A tracker whose package is missing is only warned of.

  Args:
    config: complete.
    place: where the workdir is.
    rounds: that the run has.
  """
  records = _Records(place.folder / FILE)
  configured = []
  for label in sorted(config.trackers):
    try:
      found = build.build_tracker(config, label)
    except ImportError as error:
      if not records.finished(label, rounds):
        warn(f"{label}: it gets nothing more: {one_line(error)}")
      continue
    tracker = found.tracker
    if not (tracker.live or records.finished(label, rounds, tracker.place)):
      configured.append(found)
  if not configured:
    return
  with locked(place.folder):
    trackers = Trackers(configured, place, config, rounds + 1)
    trackers.commit(rounds)
    trackers.close("finished")


class _Records:
  """What `trackers.json` holds of each tracker; threads may share it."""

  def __init__(self, path: Path):
    self._path = path
    self._lock = threading.Lock()
    self._all: dict[str, dict[str, Any]] = {}
    with contextlib.suppress(OSError, ValueError):  # none, or damaged
      read = json.loads(path.read_bytes())
      # Earlier versions left more of a place's URI than this one.
      self._all = dict(urls.without_secrets(read, urls.redacted))

  def of(self, label: str, place: str = "") -> dict[str, Any]:
    """Return a tracker's record of a place; a new one is written.

    Those of other places are kept in it as `elsewhere`.
    """
    place = urls.redacted(place)
    record = self._at(label, place)
    record.setdefault("key", uuid.uuid4().hex)
    record["place"] = place
    if record != self._all.get(label):
      self._write(label, record)
    return record

  def finished(self, label: str, rounds: int, place: str | None = None) -> bool:
    """Return whether a tracker got all of a finished run.

    Args:
      label: of the tracker.
      rounds: that the run has; it may have ended before with fewer.
      place: where; None: where it was last.
    """
    if place is None:
      place = self._all.get(label, {}).get("place", "")
    ended = self._at(label, place).get("ended") == "finished"
    return ended and self.sent(label, place) >= (rounds or -1)

  def sent(self, label: str, place: str) -> int:
    """Return the round through which rows are sent to a place; -1: none."""
    return int(self._at(label, place).get("sent", -1))

  def _at(self, label: str, place: str) -> dict[str, Any]:
    """Return a copy of the record of a place; a new one has no key.

    Records of earlier versions have no place, and are of any.
    """
    place = urls.redacted(place)
    record = dict(self._all.get(label, {}))
    last = record.get("place", place)
    if last == place:
      return record
    others = record.pop("elsewhere", {}) | {last: record}
    found = others.pop(place, {})
    return {**found, "elsewhere": others}

  def change(self, label: str, changes: dict[str, Any]) -> None:
    """Change a tracker's record, and write all of them."""
    self._write(label, self._all.get(label, {}) | changes)

  def _write(self, label: str, record: dict[str, Any]) -> None:
    with self._lock:
      self._all[label] = record
      reporting.write_json(self._path, self._all)


def _git_commit() -> dict[str, str]:
  """Return the commit of the working folder as a tag; none outside of git."""
  command = ["git", "rev-parse", "HEAD"]
  try:
    result = subprocess.run(
      command, capture_output=True, text=True, timeout=5, check=True
    )
  except (OSError, subprocess.SubprocessError):
    return {}
  return {"git.commit": result.stdout.strip()}
