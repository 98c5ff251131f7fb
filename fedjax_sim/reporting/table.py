"""The tables at the end of a run: metrics and facts; where its time went."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from fedjax_sim.reporting import formatting

if TYPE_CHECKING:
  from rich.console import Console


def print_final_table(
  metrics: Mapping[str, float],
  facts: Mapping[str, str],
  *,
  console: Console | None = None,
) -> None:
  """Print a table to a terminal, plain lines to anything else.

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
    table.add_row(
      Text(name), Text(formatting.metric(name, value), style="cyan")
    )
  table.add_section()
  for name, text in facts.items():
    table.add_row(Text(name), Text(text))
  console.print(table)


def final_text(metrics: Mapping[str, float], facts: Mapping[str, str]) -> str:
  """Return `print_final_table`'s plain text: lines `name  value`, aligned."""
  values = {
    name: formatting.metric(name, value) for name, value in metrics.items()
  }
  lines = [*values.items(), *facts.items()]
  width = max((len(name) for name, _ in lines), default=0)
  return "".join(f"{name:<{width}}  {value}\n" for name, value in lines)


def print_phases(
  seconds: Mapping[str, float],
  facts: Mapping[str, str],
  *,
  console: Console | None = None,
) -> None:
  """Print where the time went, as a table to a terminal, else as lines.

  Args:
    seconds: phase -> seconds; their sum is the whole.
    facts: name -> text, below it.
    console: where to; None is the standard output.
  """
  from rich.console import Console
  from rich.table import Table
  from rich.text import Text

  console = console or Console()
  if not console.is_terminal:
    console.file.write(phases_text(seconds, facts))
    console.file.flush()
    return
  table = Table("phase", "seconds", "share", header_style="bold")
  for column in table.columns[1:]:
    column.justify = "right"
  for i, (name, *cells) in enumerate(_phase_rows(seconds)):
    if i == len(seconds):
      table.add_section()
    table.add_row(Text(name), *(Text(cell, style="cyan") for cell in cells))
  console.print(table)
  console.file.write(final_text({}, facts))
  console.file.flush()


def phases_text(seconds: Mapping[str, float], facts: Mapping[str, str]) -> str:
  """Return `print_phases`' plain text: `phase  seconds  share`, then facts."""
  rows = [("phase", "seconds", "share"), *_phase_rows(seconds)]
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = [
    f"{name:<{widths[0]}}  {value:>{widths[1]}}  {share:>{widths[2]}}\n"
    for name, value, share in rows
  ]
  return "".join(lines) + final_text({}, facts)


def _phase_rows(seconds: Mapping[str, float]) -> list[tuple[str, str, str]]:
  """Return name, seconds and share of each phase, and last of all together."""
  whole = sum(seconds.values())
  rows = [*seconds.items(), ("all", whole)]
  share = lambda value: 100 * value / max(whole, 1e-9)
  return [
    (name, f"{value:.3f}", f"{share(value):.1f} %") for name, value in rows
  ]
