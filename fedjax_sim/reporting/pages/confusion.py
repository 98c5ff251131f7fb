"""The section of a report with tables of confusion: labels and predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedjax_sim.core import metric_names
from fedjax_sim.reporting import formatting
from fedjax_sim.reporting.pages.page import Section, Table


def confusion_sections(
  rows: Sequence[Mapping[str, float]],
) -> list[Section]:
  """Return a section with a table for every set that has one; [] without any.

  Args:
    rows: of `metrics.jsonl`, whose last one with such cells counts.
  """
  tables: dict[str, dict[tuple[int, int], float]] = {}
  rounds: dict[str, int] = {}
  for row in rows:
    for key, value in row.items():
      if not metric_names.is_cell(key):
        continue
      name, label, predicted = key.rsplit("/", 2)
      tables.setdefault(name, {})[int(label), int(predicted)] = value
      rounds[name] = int(row["round"])
  if not tables:
    return []
  made = [_table(k, rounds[k], cells) for k, cells in tables.items()]
  texts = ["A row is a label, and a column what the model said."]
  return [Section("Confusion", texts=texts, tables=made, folded=True)]


def _table(
  name: str, round_: int, cells: Mapping[tuple[int, int], float]
) -> Table:
  classes = sorted({label for label, _ in cells})
  whole = lambda value: int(value) if value.is_integer() else value
  rows = [
    [str(i), *(formatting.number(whole(float(cells[i, j]))) for j in classes)]
    for i in classes
  ]
  caption = f"{metric_names.display(name)}, round {round_:,}"
  return Table(caption, ["label", *map(str, classes)], rows)
