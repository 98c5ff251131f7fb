"""The sections of a report of one run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from fedjax_sim.core import metric_names
from fedjax_sim.reporting import formatting
from fedjax_sim.reporting.figures.curves import colors_of, draw_panel
from fedjax_sim.reporting.figures.run_figures import draw_bytes, draw_phases
from fedjax_sim.reporting.figures.series import (
  PANELS,
  Line,
  Point,
  in_order,
  kind,
  line_of,
  panels_of,
)
from fedjax_sim.reporting.metrics_file import columns
from fedjax_sim.reporting.pages.clients import client_sections
from fedjax_sim.reporting.pages.confusion import confusion_sections
from fedjax_sim.reporting.pages.described import DescribedRun
from fedjax_sim.reporting.pages.page import Card, Section, Table, draw, percent

_LONG = 300  # letters of a value that are shown
_POINTS = 10  # rounds after which spent privacy is shown
_FIRST = ("test/", "seen/", "unseen/", "train/")
_PRIVACY = {
  "privacy_told": "guarantee",
  "privacy_noise": "noise",
  "privacy_budget": "budget",
  "local_privacy": "local privacy",
  "secure_noise": "secure noise",
  "privacy_audit_told": "audit",
}


def run_sections(run: DescribedRun) -> list[Section]:
  """Return the sections of a report of one run, in their order."""
  return [
    _results(run),
    what_ran(run),
    _curves(run),
    *confusion_sections(run.record.rows),
    *client_sections(run),
    _communication(run),
    _privacy(run),
    _time(run),
    repeat(run),
    _all_metrics(run),
    _whole_config(run),
  ]


def status_of(run: DescribedRun) -> str:
  """Return whether a run is finished, in a sentence."""
  record = run.record
  if record.summary is None:
    return (
      f"Not finished: {record.rounds:,} of {record.wanted:,} rounds are done."
    )
  seconds = formatting.number(float(record.summary["wall_seconds"]))
  return f"Finished: {record.rounds:,} rounds in {seconds} s."


def shown(value: Any) -> str:
  """Return a config's value as text, the middle of a long one left out."""
  if value is None:
    return "none"
  text = value if isinstance(value, str) else json.dumps(value)
  if len(text) <= _LONG:
    return text
  half = _LONG // 2
  return f"{text[:half]} ... {text[-half:]}"


def what_ran(run: DescribedRun, title: str = "What was run") -> Section:
  """Return the section of components, and of fields without defaults."""
  rows = [
    (field, shown(value), shown(default))
    for field, value, default in run.changes
  ]
  caption = "The fields that differ from their defaults"
  return Section(
    title,
    texts=() if rows else ["Every field has its default."],
    facts=run.components,
    tables=[Table(caption, ["field", "value", "default"], rows, texts=True)]
    if rows
    else (),
  )


def repeat(run: DescribedRun) -> Section:
  """Return the section that says how to repeat a run."""
  summary = run.record.summary or {}
  facts = {}
  if "params_digest" in summary:
    facts["digest of the parameters"] = str(summary["params_digest"])
    count = summary["processes"]
    facts["devices"] = (
      f"{len(summary['devices'])} x {summary['device_kind']} in"
      f" {'one process' if count == 1 else f'{count} processes'}"
    )
    facts["lanes"] = f"{summary['lanes']} ({summary['lanes_reason']})"
  versions = summary.get("versions") or {}
  facts |= {name: str(version) for name, version in versions.items()}
  texts = (
    []
    if not summary
    else [
      "On a CPU, the same versions on the same kind of machine give the same"
      " digest of the parameters, params_digest in summary.json."
    ]
  )
  mechanism = summary and run.fields.get("privacy.mechanism")
  if mechanism and run.fields.get("privacy.noise_seed") is None:
    texts = [
      "The noise came from fresh entropy (privacy.noise_seed is none), so"
      " another run has other noise, and another digest."
    ]
  return Section(
    "How to repeat it",
    texts=texts,
    facts=facts,
    codes={
      "Write this config as repeat.py:": run.config_file,
      "Run it:": run.command,
    },
  )


def _results(run: DescribedRun) -> Section:
  record = run.record
  warnings = []
  if record.summary is None:
    warnings.append(status_of(run))
  if run.other_version:
    warnings.append(run.other_version)
  if any(math.isnan(v) for row in record.rows for v in row.values()):
    warnings.append("Some metrics are not a number (NaN).")
  return Section(
    "Results",
    warnings=warnings,
    texts=[] if record.rows else ["No round is done yet."],
    cards=[*_cards(run)],
  )


def _all_metrics(run: DescribedRun) -> Section:
  rows = []
  for key in columns(run.record.rows):
    if metric_names.is_cell(key):  # they have a table of their own
      continue
    line = line_of(run.record.rows, key)
    points = (line.last, *_extremes(line), line.best)
    rows.append(
      [metric_names.display(key), *(_at(key, point) for point in points)]
    )
  caption = "Metrics: value (round)"
  head = ["metric", "last", "least", "most", "best"]
  tables = [Table(caption, head, rows)] if rows else ()
  return Section("All metrics", tables=tables, folded=True)


def _cards(run: DescribedRun) -> Iterator[Card]:
  record = run.record
  known = columns(record.rows)
  words = in_order(filter(None, map(kind, known)))
  further = [word for word in words if word not in PANELS]
  for word in ("accuracy", "loss", *further):
    keys = [f"{name}{word}" for name in _FIRST if f"{name}{word}" in known]
    for key in keys:
      line = line_of(record.rows, key)
      last, best = line.last, line.best
      assert last is not None
      note = f"round {last.round:,}"
      if best is not None and best.value != last.value:
        note += f"; best {formatting.number(best.value)}, round {best.round:,}"
      shown_as = metric_names.display(key)
      yield Card(shown_as, formatting.number(last.value), note)
  for key in known:
    if kind(key) == "epsilon":
      last = line_of(record.rows, key).last
      assert last is not None
      yield Card(key, formatting.number(last.value), f"round {last.round:,}")
  summary = record.summary or {}
  yield Card("rounds", f"{record.rounds:,}", f"of {record.wanted:,}")
  if "parameters" in summary:
    yield Card("parameters", f"{summary['parameters']:,}")
    rate = formatting.number(float(summary["clients_per_second"]))
    seconds = formatting.number(float(summary["wall_seconds"]))
    yield Card("wall time", f"{seconds} s", f"{rate} clients/s in training")


def _at(key: str, point: Point | None) -> str:
  if point is None:
    return ""
  return f"{told(key, point.value)} ({point.round:,})"


def told(key: str, value: float) -> str:
  """Return a metric's value; a count as a whole number."""
  counts = key.split("/")[-1].startswith(("clients", "bytes"))
  whole = counts and float(value).is_integer()
  return formatting.metric(key, int(value) if whole else value)


def _extremes(line: Line) -> tuple[Point | None, Point | None]:
  """Return the least and the greatest point, of those that are finite."""
  finite = np.isfinite(line.values)
  if not finite.any():
    return None, None
  rounds, values = line.rounds[finite], line.values[finite]
  ends = int(values.argmin()), int(values.argmax())
  least, most = (Point(int(rounds[i]), float(values[i])) for i in ends)
  return least, most


def _curves(run: DescribedRun) -> Section:
  panels = panels_of(run.record.rows)
  colors = colors_of(panels)
  figures = [
    draw(
      f"curve{i}",
      f"{label} against the round",
      lambda ax, label=label, lines=lines: draw_panel(  # type: ignore[misc]
        ax, label, lines, colors, best_round=run.best_round
      ),
    )
    for i, (label, lines) in enumerate(panels.items())
  ]
  texts = ["No round is done yet."] if not panels else []
  if panels:
    texts.append(
      "A star marks the best value of a line; metrics with the same values"
      " share one."
    )
  return Section("Learning curves", texts=texts, figures=figures)


def _communication(run: DescribedRun) -> Section:
  record = run.record
  lines = {
    name: line_of(record.rows, f"bytes_{name}") for name in ("down", "up")
  }
  lines = {name: line for name, line in lines.items() if line.last is not None}
  if not lines:
    return Section("Communication", texts=["No bytes were counted yet."])
  facts = {}
  for name, line in lines.items():
    total = float(np.nansum(line.values))
    mean = formatting.size(total / len(line.values))
    facts[name] = f"{formatting.size(total)}, {mean} a round"
  rows = columns(record.rows)
  if "clients" in rows:
    _, asked = rows["clients"]
    facts["clients a round"] = told("clients", float(np.nanmean(asked)))
  if "clients_rejected" in rows:
    _, rejected = rows["clients_rejected"]
    facts["updates left out"] = f"{int(np.nansum(rejected)):,}, not finite"
  figure = draw(
    "bytes",
    "Bytes that clients received (down) and sent (up), summed over the rounds",
    lambda ax: draw_bytes(ax, lines),
  )
  return Section("Communication", figures=[figure], facts=facts)


def _privacy(run: DescribedRun) -> Section:
  record = run.record
  summary = record.summary or {}
  facts = {
    title: str(summary[key])
    for key, title in _PRIVACY.items()
    if key in summary
  }
  if "privacy_not_covered" in summary:
    told = ", ".join(summary["privacy_not_covered"])
    facts["not covered by epsilon"] = told
  spent = _spent(run)
  mechanisms = [
    run.fields.get(f"{section}.mechanism")
    for section in ("privacy", "local_privacy")
  ]
  if not any(mechanisms) and not facts and spent is None:
    return Section("Privacy", texts=["No mechanism of privacy was on."])
  later = "The guarantee is summed up at the end of the run."
  return Section(
    "Privacy",
    texts=[] if facts else [later],
    facts=facts,
    tables=() if spent is None else [spent],
  )


def _spent(run: DescribedRun) -> Table | None:
  """Return the privacy spent after some rounds; None if rows have none."""
  rows = run.record.rows
  keys = [key for key in columns(rows) if key.startswith("privacy/")]
  with_any = [row for row in rows if any(key in row for key in keys)]
  if not with_any:
    return None
  places = np.linspace(0, len(with_any) - 1, _POINTS).round().astype(int)
  chosen = [with_any[i] for i in np.unique(places).tolist()]
  cells = [
    [
      f"{row['round']:,}",
      *(formatting.number(row[key]) if key in row else "" for key in keys),
    ]
    for row in chosen
  ]
  return Table("Spent after some rounds", ["round", *keys], cells)


def _time(run: DescribedRun) -> Section:
  record = run.record
  seconds, texts = dict(phase_seconds(run)), []
  if record.summary is None:
    texts.append("Of the rounds so far, by timings.jsonl.")
  if not any(seconds.values()):
    return Section("Time", texts=["Nothing was timed yet."])
  whole = sum(seconds.values())
  rows = [
    [name, f"{value:.3f}", percent(value / whole)]
    for name, value in [*seconds.items(), ("all", whole)]
  ]
  summary = record.summary or {}
  facts = {}
  if summary:
    rates = ("clients_per_second", "examples_per_second")
    for name in rates:
      facts[name.replace("_", " ")] = formatting.number(float(summary[name]))
    facts["padding waste"] = percent(float(summary["padding_waste"]))
    facts["compilations"] = str(summary["compilations"])
  return Section(
    "Time",
    texts=texts,
    figures=[
      draw("phases", "Seconds by phase", lambda ax: draw_phases(ax, seconds))
    ],
    facts=facts,
    tables=[Table("Seconds by phase", ["phase", "seconds", "share"], rows)],
  )


def phase_seconds(run: DescribedRun) -> Mapping[str, float]:
  """Return phase -> seconds; of an unfinished run those that are known."""
  record = run.record
  if record.summary is not None:
    seconds: Mapping[str, float] = record.summary["phase_seconds"]
    return seconds
  phases = ("train", "plan", "evaluate")
  names = ("train_seconds", "plan_seconds", "eval_seconds")
  return {
    phase: math.fsum(row.get(name, 0.0) for row in record.timings)
    for phase, name in zip(phases, names, strict=True)
  }


def _whole_config(run: DescribedRun) -> Section:
  rows = [(field, shown(value)) for field, value in run.fields.items()]
  table = Table("Every field", ["field", "value"], rows, texts=True)
  return Section("The whole config", tables=[table], folded=True)
