"""The sections of a report that compares several runs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedjax_sim.reporting import formatting
from fedjax_sim.reporting.figures.overlay import (
  compared_metrics,
  draw_names,
  draw_overlay,
)
from fedjax_sim.reporting.figures.series import line_of
from fedjax_sim.reporting.pages.described import DescribedRun
from fedjax_sim.reporting.pages.one_run import (
  repeat,
  shown,
  status_of,
  what_ran,
)
from fedjax_sim.reporting.pages.page import Section, Table, draw

_MOST_NAMES = 8  # of runs in the legend of each picture
Named = Mapping[str, DescribedRun]


def compared_sections(runs: Named) -> list[Section]:
  """Return the sections of a report that compares runs, in their order.

  Args:
    runs: name -> run, two or more.
  """
  details = [
    _joined(name, what_ran(run), repeat(run)) for name, run in runs.items()
  ]
  return [_results(runs), _curves(runs), _configs(runs), *details]


def _joined(title: str, first: Section, second: Section) -> Section:
  """Return a folded section with the contents of two."""
  return Section(
    title,
    texts=[*first.texts, *second.texts],
    facts={**first.facts, **second.facts},
    tables=[*first.tables, *second.tables],
    codes={**first.codes, **second.codes},
    folded=True,
  )


def _results(runs: Named) -> Section:
  metrics = compared_metrics(run.record.rows for run in runs.values())
  rows = [
    [
      name,
      *(_last(run, key) for key in metrics),
    ]
    for name, run in runs.items()
  ]
  sizes = [
    [name, *_bytes(run), *_of_summary(run)] for name, run in runs.items()
  ]
  size_head = ["run", "down", "up", "parameters", "rounds", "wall time"]
  best = [
    [
      name,
      *(_best(run, key) for key in metrics if key.split("/")[0] != "privacy"),
    ]
    for name, run in runs.items()
  ]
  best_head = ["run", *(k for k in metrics if k.split("/")[0] != "privacy")]
  guarantees = [
    [name, str((run.record.summary or {}).get("privacy_told", "none"))]
    for name, run in runs.items()
  ]
  tables = [
    Table("The last value of each metric", ["run", *metrics], rows),
    Table("The best value of each metric (round)", best_head, best),
    Table("Bytes that clients received and sent, size, time", size_head, sizes),
  ]
  if any(told != "none" for _, told in guarantees):
    caption = "What is guaranteed of privacy"
    head = ["run", "guarantee"]
    tables.append(Table(caption, head, guarantees, texts=True))
  warnings = [
    f"{name}: {status_of(run)}"
    for name, run in runs.items()
    if run.record.summary is None
  ]
  warnings += [r.other_version for r in runs.values() if r.other_version]
  return Section("Results", warnings=warnings, tables=tables)


def _last(run: DescribedRun, key: str) -> str:
  last = line_of(run.record.rows, key).last
  return "" if last is None else formatting.number(last.value)


def _best(run: DescribedRun, key: str) -> str:
  best = line_of(run.record.rows, key).best
  if best is None:
    return ""
  return f"{formatting.number(best.value)} ({best.round:,})"


def _bytes(run: DescribedRun) -> list[str]:
  lines = [line_of(run.record.rows, f"bytes_{n}") for n in ("down", "up")]
  return [
    formatting.size(float(np.nansum(line.values))) if line.last else ""
    for line in lines
  ]


def _of_summary(run: DescribedRun) -> list[str]:
  record = run.record
  rounds = f"{record.rounds:,} of {record.wanted:,}"
  if record.summary is None:
    return ["", rounds, ""]
  seconds = formatting.number(float(record.summary["wall_seconds"]))
  return [f"{record.summary['parameters']:,}", rounds, f"{seconds} s"]


def _curves(runs: Named) -> Section:
  rows = {name: run.record.rows for name, run in runs.items()}
  crowded = len(rows) > _MOST_NAMES
  figures = [
    draw(
      f"curve{i}",
      f"{key} against the round",
      lambda ax, key=key: draw_overlay(  # type: ignore[misc]
        ax, key, rows, names=not crowded
      ),
    )
    for i, key in enumerate(compared_metrics(rows.values()))
  ]
  if crowded and figures:
    height = 0.5 + 0.2 * len(rows)
    onto = lambda ax: draw_names(ax, [*rows])
    figures.append(draw("names", "The runs' lines", onto, height))
  texts = ["A star marks the best value of a line."]
  return Section(
    "Learning curves",
    texts=texts if figures else ["No round is done yet."],
    figures=figures,
  )


def _configs(runs: Named) -> Section:
  fields = dict.fromkeys(f for run in runs.values() for f in run.fields)
  texts = {
    field: [
      shown(run.fields[field]) if field in run.fields else "no such field"
      for run in runs.values()
    ]
    for field in fields
  }
  differ = {field: x for field, x in texts.items() if len(set(x)) > 1}
  title = "Configs"
  if not differ:
    return Section(title, texts=["All runs have the same config."])
  caption = "The fields in which the runs differ"
  if len(runs) > len(differ):  # the longer side goes down
    columns = zip(*differ.values(), strict=True)
    rows = [[name, *x] for name, x in zip(runs, columns, strict=True)]
    table = Table(caption, ["run", *differ], rows, texts=True)
  else:
    rows = [[field, *x] for field, x in differ.items()]
    table = Table(caption, ["field", *runs], rows, texts=True)
  return Section(title, tables=[table])
