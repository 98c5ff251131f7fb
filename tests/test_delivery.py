"""Rows arrive exactly once, whatever the tracker does."""

import json
import threading
import time

import pytest

from fedjax_sim.config.build import ConfiguredTracker
from fedjax_sim.reporting import MetricsFile, MetricsReader
from fedjax_sim.reporting.trackers import Opened, RunFacts, Selection, Tracker
from fedjax_sim.run import delivery as delivery_module
from fedjax_sim.run.delivery import Delivery


class Server(Tracker):
  """A tracker that fails as its script says, and what it received.

  Before each call of `send` an entry of the script is taken: "ok"; "refused",
  which raises before anything arrives; "lost", which raises after all has
  arrived; "half", which raises after the first half of the rows.
  """

  def __init__(self, script=(), opened=None, reachable=True):
    self.script, self.opened = list(script), opened or Opened("run-1")
    self.reachable = reachable
    self.received, self.closed, self.opens, self.asked = [], [], 0, 0
    self.threads = set()

  def open(self, run):
    self.opens += 1
    if not self.reachable:
      raise ConnectionError("connection refused")
    self.facts = run
    return self.opened

  def unsent(self, rows):
    self.asked += 1
    have = {row["round"] for row in self.received}
    return [
      row if row["round"] not in have else {"round": row["round"]}
      for row in rows
    ]

  def send(self, rows):
    self.threads.add(threading.current_thread().name)
    what = self.script.pop(0) if self.script else "ok"
    if what == "refused":
      raise ConnectionError("refused")
    if what == "half":
      self.received += rows[: len(rows) // 2]
      raise TimeoutError("half of it")
    self.received += rows
    if what == "lost":
      raise TimeoutError("no answer")

  def close(self, status, files):
    self.closed.append((status, [f.name for f in files]))


@pytest.fixture
def quick(monkeypatch):
  monkeypatch.setattr(delivery_module, "_FIRST_PAUSE", 0.01)
  monkeypatch.setattr(delivery_module, "MOST_ROWS", 4)


def write(folder, rounds, keep=0):
  with MetricsFile(folder / "metrics.jsonl", keep_through=keep) as file:
    for i in range(keep + 1, rounds + 1):
      file.append([{"round": i, "train/loss": 1 / i, "test/accuracy": i / 99}])


def deliver(tracker, folder, *, select=None, wait=20.0, facts=None, sent=-1):
  notes: list[dict[str, object]] = []
  warnings: list[str] = []
  told = facts or RunFacts("run", folder, "key", "", -1, 1, {"seed": 0}, {})
  configured = ConfiguredTracker("it", tracker, select or Selection(), wait)
  made = Delivery(
    configured,
    folder / "metrics.jsonl",
    lambda: told,
    notes.append,
    warnings.append,
    sent,
  )
  return made, notes, warnings


def rounds(tracker):
  return [row["round"] for row in tracker.received]


def wait_until(condition):
  end = time.monotonic() + 20
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.005)


@pytest.mark.parametrize(
  "script",
  [
    [],
    ["refused", "refused"],
    ["lost"],
    ["half", "half", "lost"],
    ["ok", "lost", "refused", "ok", "half"],
  ],
)
def test_each_row_arrives_once(script, tmp_path, quick):
  write(tmp_path, 10)
  server = Server(script)
  made, notes, warnings = deliver(server, tmp_path)
  made.commit(10)
  made.end("finished", [tmp_path / "summary.json"])
  assert made.join() == ""
  assert sorted(rounds(server)) == list(range(1, 11))
  by_round = {row["round"]: row for row in server.received}
  assert by_round[4] == {
    "round": 4,
    "train/loss": 0.25,
    "test/accuracy": 4 / 99,
  }
  assert server.closed == [("finished", ["summary.json"])]
  assert notes[0] == {"run_id": "run-1", "sent": -1, "ended": None}
  assert notes[-2:] == [{"sent": 10}, {"ended": "finished"}]
  assert len(warnings) <= 1
  assert server.threads == {"tracker it"}


def test_only_committed_rows_are_sent(tmp_path, quick):
  write(tmp_path, 10)
  server = Server()
  made, _, _ = deliver(server, tmp_path)
  made.commit(3)
  wait_until(lambda: len(server.received) == 3)
  time.sleep(0.05)
  assert rounds(server) == [1, 2, 3]
  made.commit(6)
  made.end("killed", [])
  assert made.join() == ""
  assert rounds(server) == [1, 2, 3, 4, 5, 6]
  assert server.closed == [("killed", [])]


@pytest.mark.parametrize(
  ("sent", "newest", "asked"), [(4, 6, 1), (4, 4, 0), (-1, 10, 3), (10, 10, 0)]
)
def test_a_joined_run_is_asked_for_what_it_lacks(
  sent, newest, asked, tmp_path, quick
):
  """`newest` rows arrived, of which `sent` were noted before the kill."""
  write(tmp_path, 10)
  server = Server(opened=Opened("run-1", sent, newest))
  server.received = [{"round": i} for i in range(1, newest + 1)]
  made, _, _ = deliver(server, tmp_path)
  made.commit(10)
  made.end("finished", [])
  assert made.join() == ""
  assert rounds(server) == list(range(1, 11))
  assert server.asked == asked


def test_rows_that_are_trained_again_are_not_sent_again(tmp_path, quick):
  write(tmp_path, 10)
  server = Server(opened=Opened("run-1", 8, 8))
  made, _, _ = deliver(server, tmp_path)
  made.commit(5)  # the checkpoint of round 8 was damaged
  wait_until(lambda: server.opens)
  made.commit(10)
  made.end("finished", [])
  assert made.join() == ""
  assert rounds(server) == [9, 10]


def test_a_tracker_out_of_reach(tmp_path, quick):
  write(tmp_path, 10)
  server = Server(reachable=False)
  made, notes, warnings = deliver(server, tmp_path)
  made.commit(5)
  wait_until(lambda: server.opens > 2)
  made.commit(10)
  began = time.monotonic()
  made.end("finished", [])
  assert made.join() == (
    "it: 10 of 10 rows were not sent: connection refused; they are in"
    " metrics.jsonl."
  )
  assert time.monotonic() - began < 5
  assert warnings == [
    "it: connection refused; the run goes on, and its rows wait in"
    " metrics.jsonl."
  ]
  assert not notes


def test_what_was_sent_before_is_not_missing(tmp_path, quick):
  write(tmp_path, 8)
  made, _, _ = deliver(Server(reachable=False), tmp_path, sent=4)
  made.commit(8)
  made.end("finished", [])
  assert made.join().startswith("it: 4 of 8 rows were not sent: connection")


def test_what_is_said_of_an_error_has_no_password(tmp_path, quick):
  """Though it is cut off in the middle of the URL."""
  write(tmp_path, 3)

  class Refusing(Server):
    def open(self, run):
      super().open(run)
      far = "x" * 180
      raise ConnectionError(f"{far} http://me:hunter2@host:5000: refused")

  made, _, warnings = deliver(Refusing(), tmp_path)
  made.commit(3)
  wait_until(lambda: warnings)
  made.end("finished", [])
  for line in (made.join(), *warnings):
    assert "http://***@" in line
    assert "hunter" not in line


def test_what_a_tracker_warns_of(tmp_path, quick):
  write(tmp_path, 3)
  server = Server(opened=Opened("run-1", warning="it is a child run."))
  made, _, warnings = deliver(server, tmp_path)
  made.commit(3)
  made.end("finished", [])
  assert made.join() == ""
  assert warnings == ["it: it is a child run."]


def test_a_tracker_that_comes_back(tmp_path, quick):
  write(tmp_path, 10)
  server = Server(reachable=False)
  made, _, _ = deliver(server, tmp_path)
  made.commit(10)
  wait_until(lambda: server.opens > 2)
  server.reachable = True
  made.end("finished", [])
  assert made.join() == ""
  assert rounds(server) == list(range(1, 11))


def test_a_tracker_that_hangs(tmp_path, quick):
  write(tmp_path, 10)
  let_go = threading.Event()

  class Hanging(Server):
    def send(self, rows):
      super().send(rows)
      if len(self.received) > 4:
        let_go.wait(20)

  made, _, _ = deliver(Hanging(), tmp_path, wait=0.2)
  began = time.monotonic()
  made.commit(10)
  assert time.monotonic() - began < 0.1
  made.end("finished", [])
  assert made.join() == (
    "it: 6 of 10 rows were not sent: it took longer than 0.2 s; they are in"
    " metrics.jsonl."
  )
  assert time.monotonic() - began < 2
  let_go.set()


def test_a_tracker_that_cannot_end(tmp_path, quick):
  write(tmp_path, 3)

  class Endless(Server):
    def close(self, status, files):
      raise OSError("no room for files")

  made, _, _ = deliver(Endless(), tmp_path, wait=0.3)
  made.commit(3)
  made.end("finished", [])
  assert made.join() == (
    "it: all rows were sent, but not the end: no room for files."
  )


def test_a_run_without_a_checkpoint_opens_no_tracker(tmp_path):
  server = Server()
  made, _, _ = deliver(server, tmp_path)
  made.end("failed", [])
  assert made.join() == ""
  assert server.opens == 0


def test_a_selection(tmp_path, quick):
  write(tmp_path, 2)
  server = Server()
  select = Selection(("train/*",), "test/accuracy")
  made, _, _ = deliver(server, tmp_path, select=select)
  made.commit(2)
  made.end("finished", [])
  assert made.join() == ""
  assert server.received == [
    {"round": i, "train/loss": 1 / i, "accuracy": i / 99} for i in (1, 2)
  ]


def test_rows_of_which_nothing_is_selected(tmp_path, quick):
  write(tmp_path, 6)
  server = Server()
  made, notes, _ = deliver(server, tmp_path, select=Selection(("none",)))
  made.commit(6)
  made.end("finished", [])
  assert made.join() == ""
  assert server.received == []
  assert {"sent": 6} in notes


def test_a_reader_follows_a_file_that_grows(tmp_path):
  write(tmp_path, 3)
  path = tmp_path / "metrics.jsonl"
  reader = MetricsReader(path)
  found = lambda *args: [row["round"] for row in reader.read(*args)]
  assert found(-1, 2) == [1, 2]
  assert found(2, 9, 1) == [3]
  write(tmp_path, 8, keep=3)
  assert found(3, 9, 2) == [4, 5]
  assert found(5, 9) == [6, 7, 8]
  assert found(8, 9) == []
  assert found(-1, 9) == list(range(1, 9))  # from the beginning again
  with path.open("ab") as file:
    file.write(json.dumps({"round": 9}).encode())  # not whole
  assert found(8, 9) == []
