"""`fedjax-sim compare`: settings of runs, paired over the seeds they share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedjax_sim.config import flags
from fedjax_sim.core import validate

_LOWER, _HIGHER = "lower_is_better", "higher_is_better"


def run(arguments: Sequence[str]) -> int:
  """Print a table, write the files, print their page; return the exit code.

  Args:
    arguments: what follows `fedjax-sim compare`.

  Raises:
    UsageError: a flag is unknown or has a wrong value.
    CompareError: runs that cannot be compared.
    NoRunError: a folder holds no run, or damaged files.
    UnknownNameError: no run has such a metric; no setting is the baseline.
    ValueError: a number is out of range.
    OSError: a file cannot be read or written.
  """
  switches = [_LOWER, _HIGHER]
  folders, rest = flags.positional(arguments, switches=switches)
  values = flags.parse(
    rest,
    switches=switches,
    metric="",
    at="last",
    target="",
    baseline="",
    confidence="0.95",
    to="",
  )
  if values[_LOWER].value and values[_HIGHER].value:
    raise flags.UsageError(f"--{_LOWER} and --{_HIGHER}: give one of them.")
  known = values[_LOWER].value or values[_HIGHER].value
  confidence = flags.number("--confidence", values.confidence, float)
  validate.number("--confidence", confidence, gt=0, lt=1)
  target = flags.number("--target", values.target or "0", float)
  from fedjax_sim.studies import comparison, comparison_files, comparison_tables
  from fedjax_sim.studies.compare import compare
  from fedjax_sim.studies.compared_runs import is_study

  alone = len(folders) == 1 and is_study(Path(folders[0]))
  to = values.to or (folders[0] if alone else "comparison")
  place = comparison_files.check_folder(to)
  found = compare(
    folders,
    values.metric or None,
    at=_at(values, (comparison.LAST, comparison.BEST)),
    target=target if values.target else None,
    higher_is_better=bool(values[_HIGHER].value) if known else None,
    baseline=values.baseline or None,
    confidence=confidence,
  )
  comparison_files.write_files(found, place)
  print(comparison_tables.text(found))  # noqa: T201
  print(place / comparison_files.PAGE)  # noqa: T201
  return 0


def _at(values: Any, words: Sequence[str]) -> str | int:
  """Return which value of a run counts."""
  if values.at in words:
    return str(values.at)
  at = flags.number("--at", values.at, int, f", {' or '.join(words)}")
  return validate.integer("--at", at, ge=0)
