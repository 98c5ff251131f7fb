"""The table at the end of a run."""

import io

from rich.console import Console

from fedjax_sim.reporting import final_text, print_final_table

METRICS = {"test/accuracy": 0.95, "bytes_up": 2_000_000}
FACTS = {"rounds": "100", "workdir": "/tmp/[bold]run"}


def test_plain_lines_are_aligned():
  assert final_text(METRICS, FACTS).splitlines() == [
    "test/accuracy  0.9500",
    "bytes_up       2.000 MB",
    "rounds         100",
    "workdir        /tmp/[bold]run",
  ]


def test_no_metrics_and_no_facts_are_no_lines():
  assert final_text({}, {}) == ""


def test_a_file_gets_plain_lines(capsys):
  print_final_table(METRICS, FACTS)
  assert capsys.readouterr().out == final_text(METRICS, FACTS)


def test_a_terminal_gets_a_table():
  output = io.StringIO()
  console = Console(file=output, force_terminal=True, width=80)
  print_final_table(METRICS, FACTS, console=console)
  text = output.getvalue()
  for part in ("test/accuracy", "0.9500", "2.000 MB", "/tmp/[bold]run", "─"):
    assert part in text
