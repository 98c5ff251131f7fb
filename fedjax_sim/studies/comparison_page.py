"""`report.html` of a comparison: one file, in sections."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedjax_sim.reporting import formatting
from fedjax_sim.reporting.figures.bands import MOST_BANDS
from fedjax_sim.reporting.pages.one_run import shown
from fedjax_sim.reporting.pages.page import Card, Section, Table, draw, render
from fedjax_sim.studies import comparison_tables as tables
from fedjax_sim.studies.comparison import Comparison
from fedjax_sim.studies.comparison_curves import (
  draw_differences,
  draw_means,
  reference_of,
)
from fedjax_sim.studies.statistics import POWER


def page_of(comparison: Comparison, first: Sequence[Section] = ()) -> str:
  """Return the page as HTML; the same comparison gives the same bytes.

  Args:
    comparison: what it shows.
    first: sections before all others.
  """
  runs = sum(len(result.runs) for result in comparison.settings)
  return render(
    f"{len(comparison.settings)} settings compared",
    f"{tables.title(comparison)}. {runs:,} runs.",
    [
      *first,
      _results(comparison),
      _curves(comparison),
      _differences(comparison),
      _seeds(comparison),
      _settings(comparison),
      _runs(comparison),
    ],
  )


def _table(table: tables.TextTable) -> Table:
  return Table(table.caption, table.head, table.rows)


def _results(comparison: Comparison) -> Section:
  best = comparison.settings[0]
  tested = [p for p in comparison.pairs if not math.isnan(p.adjusted_p)]
  alpha = 1 - comparison.confidence
  found = sum(pair.adjusted_p <= alpha for pair in tested)
  ratio = comparison.width_ratio
  cards = [
    Card("best mean", formatting.number(best.mean), best.label),
    Card(
      "pairs told apart",
      f"{found} of {len(comparison.pairs)}",
      f"p (Holm) at most {alpha:.2g}",
    ),
  ]
  if not math.isnan(ratio):
    cards.append(
      Card(
        "paired width",
        f"{ratio:.2g} ×",
        "that of unpaired intervals, the median of pairs",
      )
    )
  return Section(
    "Results",
    warnings=comparison.notes,
    cards=cards,
    tables=[_table(tables.settings_table(comparison))],
  )


def _curves(comparison: Comparison) -> Section:
  level = f"{100 * comparison.confidence:g} %"
  base = reference_of(comparison).label
  figures = [
    draw(
      "means",
      f"{comparison.metric}: mean ± standard deviation over seeds",
      lambda ax: draw_means(ax, comparison),
    ),
    draw(
      "differences",
      f"Paired difference from {base}: mean and {level} interval",
      lambda ax: draw_differences(ax, comparison),
    ),
  ]
  more = len(comparison.settings) - MOST_BANDS
  left = [f"The {MOST_BANDS} best settings are drawn; {more:,} are not."]
  return Section(
    "Learning curves", texts=left if more > 0 else (), figures=figures
  )


def _differences(comparison: Comparison) -> Section:
  texts = [
    "Each difference is between runs of the same seed, which share cohorts,"
    " batches and initial parameters. Its paired interval is that of the paired"
    " t test; the bootstrap's (BCa) is too narrow where seeds are few; the"
    " unpaired one (Welch) is what the same runs would give if they shared"
    " nothing. The width ratio is the paired one's width over the unpaired"
    " one's. p (Holm) is corrected for all pairs; intervals are not.",
    tables.width_line(comparison),
  ]
  pairs = tables.pairs_table(comparison)  # seeds are another section's
  more = len(comparison.settings) - tables.MOST_WINS
  if more > 0:
    texts.append(f"The second table has the {tables.MOST_WINS} best settings.")
  return Section(
    "Differences",
    texts=[line for line in texts if line],
    tables=[
      Table(pairs.caption, pairs.head[:-2], [row[:-2] for row in pairs.rows]),
      _table(tables.wins_table(comparison)),
    ],
  )


def _seeds(comparison: Comparison) -> Section:
  rows = []
  pairs = comparison.pairs[: tables.MOST_PAIRS]
  names = tables.pair_names(comparison, pairs)
  for name, pair in zip(names, pairs, strict=True):
    d = pair.difference
    rows.append(
      [
        name,
        str(d.seeds),
        *(_count(n) for n in (d.seeds_needed, d.seeds_needed_unpaired)),
        formatting.number(d.detectable)
        if math.isfinite(d.detectable)
        else tables.NOTHING,
      ]
    )
  return Section(
    "Seeds needed",
    texts=[
      "So many seeds a two-sided t test at 5 % needs to find the difference"
      f" with probability {POWER:g}, if the true difference and its spread are"
      " those that these seeds show; few seeds show them roughly. The last"
      " column is the smallest difference that the seeds at hand find with that"
      " probability."
    ],
    tables=[
      Table(
        "How many seeds tell two settings apart",
        ("pair", "seeds", "needed", "needed unpaired", "found from"),
        rows,
      )
    ],
  )


def _count(number: int | None) -> str:
  return tables.NOTHING if number is None else f"{number:,}"


def _settings(comparison: Comparison) -> Section:
  fields = dict.fromkeys(f for r in comparison.settings for f in r.fields)
  names = tables.names_of(comparison)
  rows = [
    [
      names[r.label],
      *(shown(r.fields[f]) if f in r.fields else "" for f in fields),
    ]
    for r in comparison.settings
  ]
  return Section(
    "Settings",
    tables=[
      Table("The fields in which they differ", ["setting", *fields], rows, True)
    ],
  )


def _runs(comparison: Comparison) -> Section:
  rows: list[Sequence[str]] = []
  for result in comparison.settings:
    values = dict(zip(result.seeds, result.values, strict=True))
    for run in result.runs:
      value = values.get(run.seed)
      done = int(run.rows[-1]["round"]) if run.rows else 0
      told = "" if value is None else formatting.number(float(value))
      rows.append(
        [
          *(str(run.folder), result.label, str(run.seed)),
          *(run.status, f"{done:,}", told),
        ]
      )
  head = ("run", "setting", "seed", "status", "rounds", comparison.metric)
  return Section(
    "Runs", tables=[Table("All runs", head, rows, True)], folded=True
  )
