"""A comparison as tables: for people, in Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from fedjax_sim.reporting import formatting
from fedjax_sim.studies.comparison import (
  BEST,
  LAST,
  Comparison,
  Pair,
  SettingResult,
)
from fedjax_sim.studies.statistics import Interval

MOST_PAIRS = 100  # in tables for people; pairs.csv has all
_PRINTED = 15  # rows of a table in a terminal
MOST_WINS = 12  # settings in a win matrix for people
_LONG = 20  # letters of a label; pairs with a longer one are numbers
NOTHING = "–"
_LATEX = {
  "\\": r"\textbackslash{}",
  "~": r"\textasciitilde{}",
  "^": r"\textasciicircum{}",
  "±": r"$\pm$",
  "−": "$-$",
  "–": "--",
  "×": r"$\times$",
} | {letter: f"\\{letter}" for letter in "&%$#_{}"}


class TextTable(NamedTuple):
  """A table of texts.

  Attributes:
    caption: what it shows.
    head: of the columns.
    rows: their cells; the first of each is a name, the others are numbers.
  """

  caption: str
  head: Sequence[str]
  rows: Sequence[Sequence[str]]


def title(comparison: Comparison) -> str:
  """Return what is compared, in a line."""
  when = {LAST: "after the last round", BEST: "the best of all rounds"}
  at = when.get(str(comparison.at), f"after round {comparison.at}")
  better = "higher" if comparison.higher_is_better else "lower"
  return f"{comparison.metric} {at}; {better} is better"


def names_of(comparison: Comparison) -> dict[str, str]:
  """Return what tables call each setting: with its number if any is long."""
  labels = [result.label for result in comparison.settings]
  if max(map(len, labels)) <= _LONG:
    return {label: label for label in labels}
  return {label: f"{i}. {label}" for i, label in enumerate(labels, 1)}


def pair_names(comparison: Comparison, pairs: Sequence[Pair]) -> list[str]:
  """Return what tables call pairs: "fedprox − fedavg", or "1 − 2"."""
  names = names_of(comparison)
  short = {
    label: name if name == label else name.partition(".")[0]
    for label, name in names.items()
  }
  return [f"{short[p.a]} − {short[p.b]}" for p in pairs]


def settings_table(comparison: Comparison) -> TextTable:
  """Return a row for each setting: its mean, and how soon it is there."""
  level = f"{100 * comparison.confidence:g} %"
  names = names_of(comparison)
  rows = [
    [
      names[r.label],
      f"{len(r.seeds)} of {len(r.runs)}",
      _mean(r),
      _interval(r.interval, signed=False),
      f"{r.reached.seeds} of {r.reached.of}",
      _rounds(r.reached.rounds),
      _size(r.reached.bytes_down),
      _size(r.reached.bytes_up),
    ]
    for r in comparison.settings
  ]
  target = formatting.number(comparison.target)
  return TextTable(
    f"{title(comparison)}; target {target}, {comparison.target_rule}",
    (
      *("setting", "seeds", "mean ± sd", level),
      *("reach target", "rounds", "down", "up"),
    ),
    rows,
  )


def pairs_table(
  comparison: Comparison, chosen: Sequence[Pair] | None = None
) -> TextTable:
  """Return a row for each pair: the paired difference and how sure it is.

  Args:
    comparison: what was compared.
    chosen: some of its pairs; None: all.
  """
  chosen = comparison.pairs if chosen is None else chosen
  pairs = [*zip(pair_names(comparison, chosen), chosen, strict=True)]
  level = f"{100 * comparison.confidence:g} %"
  rows = [
    [
      name,
      str(p.difference.seeds),
      _signed(p.difference.mean, p.difference.interval.width),
      _interval(p.difference.interval) if p.difference.std > 0 else NOTHING,
      _interval(p.difference.bootstrap) if p.difference.std > 0 else NOTHING,
      _interval(p.difference.unpaired),
      _number(p.difference.width_ratio, 2),
      probability(p.difference.p_value),
      probability(p.adjusted_p),
      _needed(p.difference.seeds_needed),
      _needed(p.difference.seeds_needed_unpaired),
    ]
    for name, p in pairs[:MOST_PAIRS]
  ]
  more = len(comparison.pairs) - len(rows)
  rest = f"; {more:,} more are in pairs.csv" if more else ""
  return TextTable(
    f"Differences of {comparison.metric}{rest}",
    (
      *("pair", "seeds", "difference", f"paired {level}", "bootstrap"),
      *(f"unpaired {level}", "width ratio", "p", "p (Holm)"),
      *("seeds needed", "if unpaired"),
    ),
    rows,
  )


def wins_table(comparison: Comparison) -> TextTable:
  """Return the share of seeds in which a row's setting beats a column's."""
  shown = comparison.settings[:MOST_WINS]
  wins = comparison.wins()
  rows = [
    [
      f"{i + 1}. {setting.label}",
      *(
        NOTHING if math.isnan(wins[i, j]) else f"{100 * wins[i, j]:.0f} %"
        for j in range(len(shown))
      ),
    ]
    for i, setting in enumerate(shown)
  ]
  return TextTable(
    "Share of the common seeds in which a row is better than a column",
    ("setting", *(f"{i + 1}." for i in range(len(shown)))),
    rows,
  )


def width_line(comparison: Comparison) -> str:
  """Return how much pairing narrows intervals, as a sentence; "" unknown."""
  ratio = comparison.width_ratio
  if math.isnan(ratio):
    return ""
  ratios = [pair.difference.width_ratio for pair in comparison.pairs]
  count = sum(map(math.isfinite, ratios))
  of = f", the median of {count:,} pairs" if count > 1 else ""
  return f"Paired intervals are {ratio:.2g} times as wide as unpaired ones{of}."


def text(comparison: Comparison) -> str:
  """Return a short text for the terminal.

  Of many pairs it has those with the best setting, or the baseline.
  """
  first = comparison.baseline or comparison.settings[0].label
  few = len(comparison.pairs) <= _PRINTED
  chosen = [p for p in comparison.pairs if few or first in (p.a, p.b)]
  settings, pairs = settings_table(comparison), pairs_table(comparison, chosen)
  keep = [0, 1, 2, 3, 6, 7, 8, 9]
  short = pairs._replace(
    head=[pairs.head[i] for i in keep],
    rows=[[row[i] for i in keep] for row in pairs.rows],
  )
  tables = [f"{t.caption}\n{_aligned(t)}" for t in (settings, short)]
  lines = [width_line(comparison), *comparison.notes]
  return "\n".join([*tables, *(f"{line}\n" for line in lines if line)])


def markdown(comparison: Comparison) -> str:
  """Return all tables and notes in Markdown."""
  tables = (
    settings_table(comparison),
    pairs_table(comparison),
    wins_table(comparison),
  )
  parts = [f"{t.caption}:\n\n{_pipes(t)}" for t in tables]
  lines = [width_line(comparison), *comparison.notes]
  notes = "".join(f"- {line}\n" for line in lines if line)
  return "\n".join([*parts, notes] if notes else parts)


def latex(comparison: Comparison) -> str:
  """Return the tables of settings and of pairs in LaTeX, with booktabs."""
  tables = [settings_table(comparison), pairs_table(comparison)]
  best = names_of(comparison)[comparison.settings[0].label]
  parts = [_tabular(table, bold=best) for table in tables]
  return "% \\usepackage{booktabs}\n" + "\n".join(parts)


def settings_csv(comparison: Comparison) -> str:
  """Return a line for each setting, with its fields, in full precision."""
  fields = dict.fromkeys(f for r in comparison.settings for f in r.fields)
  head = [
    *("setting", *fields, "metric", "at", "runs", "seeds", "mean", "std"),
    *("low", "high", "target", "reached", "rounds", "bytes_down", "bytes_up"),
    "values",
  ]
  return _csv(
    head,
    [
      [
        r.label,
        *(r.fields.get(field, "") for field in fields),
        *(comparison.metric, comparison.at, len(r.runs)),
        " ".join(map(str, r.seeds)),
        *(_plain(x) for x in (r.mean, r.std, *r.interval)),
        *(comparison.target, r.reached.seeds),
        *(_plain(x) for x in r.reached[2:]),
        " ".join(map(repr, r.values.tolist())),
      ]
      for r in comparison.settings
    ],
  )


def pairs_csv(comparison: Comparison) -> str:
  """Return a line for each pair, in full precision."""
  head = [
    *("a", "b", "seeds", "difference", "std", "low", "high"),
    *("bootstrap_low", "bootstrap_high", "unpaired_low", "unpaired_high"),
    *("width_ratio", "correlation", "p", "p_holm", "wins", "losses"),
    *("seeds_needed", "seeds_needed_unpaired", "detectable"),
  ]
  return _csv(head, [_pair_cells(pair) for pair in comparison.pairs])


def _pair_cells(pair: Pair) -> list[Any]:
  d = pair.difference
  numbers = (
    *(d.mean, d.std, *d.interval, *d.bootstrap, *d.unpaired),
    *(d.width_ratio, d.correlation, d.p_value, pair.adjusted_p),
    *(pair.wins, pair.losses),
  )
  return [
    *(pair.a, pair.b, d.seeds, *(_plain(x) for x in numbers)),
    *(
      "" if n is None else n for n in (d.seeds_needed, d.seeds_needed_unpaired)
    ),
    _plain(d.detectable),
  ]


def _csv(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
  result = io.StringIO()
  writer = csv.writer(result, lineterminator="\n")
  writer.writerows([head, *rows])
  return result.getvalue()


def _plain(value: float) -> str:
  """Return a number in full; "" of what is unknown, or never was."""
  return repr(float(value)) if math.isfinite(value) else ""


def _aligned(table: TextTable) -> str:
  rows = [table.head, *table.rows[:_PRINTED]]
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = [
    "  ".join(
      cell.ljust(width) if i == 0 else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ).rstrip()
    for row in rows
  ]
  more = len(table.rows) - _PRINTED
  lines += [f"and {more:,} more"] if more > 0 else []
  return "".join(f"{line}\n" for line in lines)


def _pipes(table: TextTable) -> str:
  escape = lambda cell: re.sub(r"([\\|`*_<>\[\]])", r"\\\1", cell)
  line = lambda cells: f"| {' | '.join(map(escape, cells))} |\n"
  rule = "| --- |" + " ---: |" * (len(table.head) - 1) + "\n"
  return line(table.head) + rule + "".join(map(line, table.rows))


def _tabular(table: TextTable, bold: str) -> str:
  line = lambda cells: " & ".join(map(_escaped, cells)) + r" \\"
  strong = lambda cell: rf"\textbf{{{_escaped(cell)}}}"
  rows = [
    f"{strong(row[0])} & {row[1]} & {strong(row[2])} & {line(row[3:])}"
    if row[0] == bold
    else line(row)
    for row in table.rows
  ]
  return "\n".join(
    [
      f"% {table.caption}",
      rf"\begin{{tabular}}{{l{'r' * (len(table.head) - 1)}}}",
      r"\toprule",
      line(table.head),
      r"\midrule",
      *rows,
      r"\bottomrule",
      r"\end{tabular}",
      "",
    ]
  )


def _escaped(cell: str) -> str:
  return "".join(_LATEX.get(letter, letter) for letter in cell)


def _decimals(width: float) -> int:
  """Return how many decimals show two digits of a width."""
  if not (math.isfinite(width) and width > 0):
    return 4
  return min(max(1 - math.floor(math.log10(width)), 0), 9)


def _number(value: float, decimals: int) -> str:
  return f"{value:,.{decimals}f}" if math.isfinite(value) else NOTHING


def _signed(value: float, width: float) -> str:
  if not math.isfinite(value):
    return NOTHING
  return f"{value:+,.{_decimals(width)}f}".replace("-", "−")


def _interval(interval: Interval, *, signed: bool = True) -> str:
  if not math.isfinite(interval.width):
    return NOTHING
  decimals = _decimals(interval.width)
  form = f"{'+' if signed else ''},.{decimals}f"
  low, high = (f"{end:{form}}".replace("-", "−") for end in interval)
  return f"[{low}, {high}]"


def _mean(result: SettingResult) -> str:
  if math.isnan(result.std):
    return NOTHING if math.isnan(result.mean) else f"{result.mean:,.4f}"
  decimals = _decimals(result.std)
  return f"{result.mean:,.{decimals}f} ± {result.std:,.{decimals}f}"


def _rounds(value: float) -> str:
  return f"{value:,g}" if math.isfinite(value) else "not reached"


def _size(value: float) -> str:
  return formatting.size(value) if math.isfinite(value) else NOTHING


def probability(value: float) -> str:
  """Return a p-value as people read it."""
  if math.isnan(value):
    return NOTHING
  return "< 0.0001" if value < 1e-4 else f"{value:.2g}"


def _needed(count: int | None) -> str:
  return NOTHING if count is None else f"{count:,}"
