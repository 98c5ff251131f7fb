"""The bar: what a terminal shows, and that nothing else shows anything."""

import io
import re
import time

import pytest
from rich.console import Console

from fedjax_sim.reporting import Progress
from fedjax_sim.reporting.progress import _Pace

ROW = {"round": 3, "train/loss": 0.31, "clients": 10}


def terminal(**options):
  return Console(file=io.StringIO(), force_terminal=True, width=100, **options)


def shown(console):
  """What was drawn, without colours and movements of the cursor."""
  return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue())


def last_line(console):
  return shown(console).rstrip().splitlines()[-1]


def test_a_terminal_shows_round_loss_accuracy_and_speed():
  console = terminal()
  with Progress(20, console=console) as progress:
    progress.update(ROW, clients_per_second=1234.5)
  line = last_line(console)
  assert "round 3/20" in line
  assert "loss 0.3100" in line
  assert "accuracy - " in line
  assert "1,234 clients/s" in line


def test_the_last_accuracy_stays():
  console = terminal()
  with Progress(20, console=console) as progress:
    row = {**ROW, "test/accuracy": 0.95}
    progress.update(row, clients_per_second=1.0)
    progress.update({**ROW, "round": 4}, clients_per_second=1.0)
  assert "round 4/20" in last_line(console)
  assert "accuracy 0.9500" in last_line(console)


def test_a_resumed_run_starts_where_it_goes_on():
  console = terminal()
  with Progress(20, done=7, console=console):
    pass
  line = last_line(console)
  for part in ("round 7/20", "loss -", "- clients/s"):
    assert part in line


def test_the_time_left_is_of_this_process_after_its_first_burst(monkeypatch):
  now = 0.0
  monkeypatch.setattr(time, "monotonic", lambda: now)
  pace = _Pace()
  now = 60.0  # compiled; a dispatch of two rounds
  assert pace.left(101, 110) == "-"
  assert pace.left(102, 110) == "-"
  now = 62.0
  pace.left(103, 110)
  assert pace.left(104, 110) == "0:00:06"
  now = 68.0
  assert pace.left(110, 110) == "0:00:00"


def test_log_lines_stand_above_the_bar():
  console = terminal()
  with Progress(20, console=console) as progress:
    progress.log("saved [round 3] " + "x" * 100)
    progress.log("loss rose", level="warning")
    progress.update(ROW, clients_per_second=1.0)
  lines = [line.rstrip() for line in shown(console).splitlines()]
  assert "saved [round 3] " + "x" * 100 in "\n".join(lines)
  assert "loss rose" in lines
  assert "round 3/20" in last_line(console)


@pytest.mark.parametrize(
  "console",
  [
    Console(file=io.StringIO(), force_terminal=False),
    Console(file=io.StringIO(), force_jupyter=True),
    terminal(_environ={"TERM": "dumb"}),
  ],
  ids=["file", "jupyter", "dumb"],
)
def test_only_warnings_go_where_no_bar_can_be_drawn(console, capsys):
  with Progress(20, console=console) as progress:
    progress.update(ROW, clients_per_second=1.0)
    progress.log("saved")
    progress.log("loss rose", level="warning")
  assert console.file.getvalue() == ""
  assert capsys.readouterr() == ("", "loss rose\n")


def test_colours_asked_for_draw_no_bar_into_a_file(monkeypatch, capsys):
  monkeypatch.setenv("FORCE_COLOR", "1")
  with Progress(20) as progress:
    progress.update(ROW, clients_per_second=1.0)
  assert capsys.readouterr() == ("", "")


def test_an_error_inside_ends_the_bar():
  console = terminal()
  with pytest.raises(RuntimeError), Progress(20, console=console):
    raise RuntimeError
  assert console.file.getvalue().rstrip("\n").endswith("\x1b[?25h")  # cursor
