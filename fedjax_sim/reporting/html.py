"""`report.html`: what a run was and what came of it, or how several compare."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from fedjax_sim.core.files import write_atomically
from fedjax_sim.reporting.pages.described import DescribedRun
from fedjax_sim.reporting.pages.one_run import run_sections, status_of
from fedjax_sim.reporting.pages.page import render
from fedjax_sim.reporting.pages.several_runs import compared_sections

_MOST_NAMES = 6  # in the line below the title


def write_html(
  runs: Sequence[DescribedRun], path: str | os.PathLike[str]
) -> None:
  """Write a page about a run, or one that compares several.

  It is one file, needs no network, is readable in light and dark, on paper and
  in 400 pixels, and the same runs give the same bytes.

  Args:
    runs: at least one.
    path: the file; replaced atomically.

  Raises:
    OSError: the file cannot be written.
  """
  write_atomically(path, page_of(runs).encode())


def page_of(runs: Sequence[DescribedRun]) -> str:
  """Return the page of `write_html` as text."""
  if len(runs) == 1:
    (run,) = runs
    subtitle = f"{run.headline}. {status_of(run)}"
    return render(run.record.name, subtitle, run_sections(run))
  named = unique_names(runs)
  title = f"{len(runs)} runs compared"
  names = [*named][:_MOST_NAMES]
  if more := len(named) - len(names):
    names.append(f"and {more} more")
  return render(title, ", ".join(names), compared_sections(named))


def unique_names(runs: Sequence[DescribedRun]) -> Mapping[str, DescribedRun]:
  """Return the runs by their names, numbered where two have the same."""
  named: dict[str, DescribedRun] = {}
  for run in runs:
    name, count = run.record.name, 2
    while name in named:
      name, count = f"{run.record.name} ({count})", count + 1
    named[name] = run
  return named
