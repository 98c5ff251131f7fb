"""The table at the end of a run: its last metrics, then its facts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from fedjax_sim.reporting import wording

if TYPE_CHECKING:
  from rich.console import Console


def print_final_table(
  metrics: Mapping[str, float],
  facts: Mapping[str, str],
  *,
  console: Console | None = None,
) -> None:
  """Prints a table to a terminal, plain lines to anything else.

  Args:
    metrics: name -> value, such as the last row of `metrics.jsonl`.
    facts: name -> text, such as rounds, wall time, workdir.
    console: where to; None is the standard output.
  """
  from rich.console import Console
  from rich.table import Table
  from rich.text import Text

  console = console or Console()
  if not console.is_terminal:
    console.file.write(final_text(metrics, facts))
    console.file.flush()
    return
  table = Table(show_header=False)
  table.add_column(style="bold")
  table.add_column(overflow="fold")
  for name, value in metrics.items():
    table.add_row(Text(name), Text(wording.metric(name, value), style="cyan"))
  table.add_section()
  for name, text in facts.items():
    table.add_row(Text(name), Text(text))
  console.print(table)


def final_text(metrics: Mapping[str, float], facts: Mapping[str, str]) -> str:
  """Lines `name  value`, aligned; the arguments of `print_final_table`."""
  values = {
    name: wording.metric(name, value) for name, value in metrics.items()
  }
  lines = [*values.items(), *facts.items()]
  width = max((len(name) for name, _ in lines), default=0)
  return "".join(f"{name:<{width}}  {value}\n" for name, value in lines)
