"""`fedjax-sim report`: what a run was and what came of it, or several."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedjax_sim import reporting
from fedjax_sim.config import flags
from fedjax_sim.core import validate
from fedjax_sim.data import workdir_on_disk

_STYLES = {"page": (".html",), "paper": reporting.PAPER_SUFFIXES}
_NAMES = {"page": "report.html", "paper": "curves.pdf"}


def run(arguments: Sequence[str]) -> int:
  """Write a report, and print its path; return the exit code.

  Args:
    arguments: what follows `fedjax-sim report`.

  Raises:
    UsageError: a flag is unknown, missing or has a wrong value.
    ValueError: a workdir is a URL.
    NoRunError: a folder holds no run, or a part of one, or damaged files.
    UnknownNameError: no run has such a metric.
    OSError: a file cannot be read or written.
  """
  values = flags.parse(
    arguments,
    "workdir",
    repeated=["workdir"],
    to="",
    style="page",
    metrics="",
  )
  style = validate.one_of("--style", values.style, [*_STYLES])
  workdirs = [workdir_on_disk(f, "--workdir") for f in values.workdir]
  path = _path(values, style, workdirs)
  metrics = [name for name in values.metrics.split(",") if name]
  if metrics and style == "page":
    raise flags.UsageError(
      f"--metrics={values.metrics} is for --style=paper; a page has all."
    )
  from fedjax_sim.run import report  # which takes a while

  runs = [report.described(folder) for folder in workdirs]
  for one in runs:
    if one.other_version:
      print(  # noqa: T201
        f"fedjax-sim: warning: {one.other_version}", file=sys.stderr
      )
  if style == "page":
    reporting.write_html(runs, path)
  else:
    named = reporting.unique_names(runs)
    rows = {name: one.record.rows for name, one in named.items()}
    reporting.draw_paper(rows, path, metrics)
  print(path)  # noqa: T201
  return 0


def _path(values: Any, style: str, workdirs: Sequence[Path]) -> Path:
  """Return where to write."""
  resolved = [folder.resolve() for folder in workdirs]
  for i, folder in enumerate(resolved):
    if folder in resolved[:i]:
      raise flags.UsageError(
        f"--workdir={workdirs[i]} is given twice; name each workdir once."
      )
  if not values.to:
    if len(workdirs) > 1:
      raise flags.UsageError(
        f"--to=... is missing; name the file, such as {_NAMES[style]}, that"
        f" compares {len(workdirs)} runs."
      )
    return workdirs[0] / _NAMES[style]
  path, suffixes = Path(values.to), _STYLES[style]
  if path.suffix not in suffixes:
    other = next((s for s, x in _STYLES.items() if path.suffix in x), "")
    meant = f", or give --style={other}" if other else ""
    raise flags.UsageError(
      f"--to={values.to} is no file of --style={style}; let its name end in"
      f" {' or '.join(suffixes)}{meant}."
    )
  return path
