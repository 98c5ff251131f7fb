"""Sections of `report.html` on influences and Shapley values.

They are made of the tables that a study which leaves clients out has left in
its folder, so that a later comparison of the study keeps them.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fedjax_sim.reporting import formatting
from fedjax_sim.reporting.figures.player_bars import Panel, draw_panel
from fedjax_sim.reporting.pages.page import Figure, Section, Table, draw
from fedjax_sim.studies.record import read_study


class Kind(NamedTuple):
  """A kind of effects.

  Attributes:
    name: of its files and column.
    title: what tables call it.
    errors: of what its standard errors are.
    meaning: of a value, for a reader of the page.
  """

  name: str
  title: str
  errors: tuple[str, ...]
  meaning: str


INFLUENCE = Kind(
  "influence",
  "Influence",
  ("seeds",),
  "The metric with all clients, less that without the client, in each seed.",
)
SHAPLEY = Kind(
  "shapley",
  "Shapley value",
  ("permutations", "seeds"),
  "What the client adds to those who came before it, on average over orders;"
  " the values sum to the metric with all, less that with none.",
)


def influence_sections(folder: Path) -> list[Section]:
  """Return a section for each table of effects in a study's folder.

  Args:
    folder: any; one without such tables has no section.

  Raises:
    WorkdirError: its `study.json` is damaged.
    OSError: a file cannot be read.
  """
  study = read_study(folder)
  if study is None:
    return []
  return [
    _section(kind, folder, study["metric"], study["higher_is_better"])
    for kind in (INFLUENCE, SHAPLEY)
    if (folder / f"{kind.name}.csv").exists()
  ]


def _section(kind: Kind, folder: Path, metric: str, higher: bool) -> Section:
  """Return the section of a kind of effects."""
  with (folder / f"{kind.name}.csv").open(encoding="utf-8", newline="") as file:
    head, *rows = csv.reader(file)
  first = head.index("clients")  # what comes before is varied besides
  panels: dict[str, list[list[str]]] = {}
  for row in rows:
    pairs = zip(head[:first], row[:first], strict=True)
    title = ", ".join(f"{field}={value}" for field, value in pairs)
    panels.setdefault(title, []).append(row[first:])
  figures, tables = [], []
  for i, (title, effects) in enumerate(panels.items()):
    caption = f"{kind.title} on {metric}" + (f", {title}" if title else "")
    figures.append(_figure(f"{kind.name}{i}", caption, effects, higher))
    tables.append(_table(kind, caption, effects))
  best = "largest" if higher else "smallest"
  text = f"{kind.meaning} Those who help most come first: the {best} ones."
  return Section(kind.title, texts=[text], figures=figures, tables=tables)


def _figure(
  name: str, caption: str, effects: Sequence[Sequence[str]], higher: bool
) -> Figure:
  """Return the bars of a table; `effects` are its lines from `clients` on."""
  _, names, values, errors, *_ = zip(*effects, strict=True)
  panel = Panel("", names, np.array(values, float), np.array(errors, float))
  return draw(
    name, caption, lambda ax: draw_panel(ax, panel, higher_is_better=higher)
  )


def _table(kind: Kind, caption: str, effects: Sequence[Sequence[str]]) -> Table:
  """Return a table; its lines are those of the file from `clients` on."""
  head = [
    *("client", "numbers", kind.title.lower()),
    *(f"error ({what})" for what in kind.errors),
    "seeds",
  ]
  shown = lambda text: formatting.number(float(text))
  rows = [
    [name, numbers, *map(shown, (value, *more[:-1])), more[-1]]
    for numbers, name, value, *more in effects
  ]
  return Table(caption, head, rows)
