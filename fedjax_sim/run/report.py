"""The report of runs, from what their workdirs hold."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from fedjax_sim import reporting
from fedjax_sim.config import fields_of
from fedjax_sim.config.defaults import default_config
from fedjax_sim.config.nondefault import changes, config_file
from fedjax_sim.core import urls
from fedjax_sim.run.changes import ORIGIN, decisive

FILE = "report.html"


def write_report(
  workdirs: Sequence[str | os.PathLike[str]],
  path: str | os.PathLike[str],
  summary: Mapping[str, Any] | None = None,
) -> None:
  """Write the report of a run, or one that compares several.

  Nothing else is written, and no lock is taken: a run may be going on.

  Args:
    workdirs: of the runs, at least one.
    path: the file; replaced atomically.
    summary: of a run that has yet to write it.

  Raises:
    NoRunError: a folder holds no run, or a part of one, or damaged files.
    OSError: a file cannot be read or written.
  """
  runs = [described(Path(folder), summary) for folder in workdirs]
  reporting.write_html(runs, path)


def described(
  folder: Path, summary: Mapping[str, Any] | None = None
) -> reporting.DescribedRun:
  """Return what the workdir of a run says, with its config explained."""
  record = reporting.read_run(folder, summary)
  config = dict(record.config)
  origin = config.pop(ORIGIN, None)
  # Trackers explain nothing, and their sections may hold what is secret; so may
  # others, in workdirs of earlier versions.
  record = record._replace(config=urls.without_secrets(decisive(config)))
  try:
    found = changes(record.config)
    text = config_file(record.config)
  except (KeyError, TypeError, AttributeError) as error:
    raise reporting.NoRunError(
      f"{folder / 'config.json'} is no config of this version of fedjax_sim"
      f" ({error}); report with the version that began the run."
    ) from error
  other = ""
  if {*config} != {*default_config()}:
    other = (
      f"{folder} was begun by another version of fedjax_sim, whose configs have"
      " other sections; its fields are compared with the defaults of this one."
    )
  return reporting.DescribedRun(
    record=record,
    fields=dict(fields_of(ConfigDict(dict(record.config)))),
    changes=found,
    config_file=text,
    command=_command(record, origin),
    origin="" if origin is None else _told(origin),
    other_version=other,
  )


def _told(origin: Mapping[str, Any]) -> str:
  """Return where a branch began."""
  return f"round {origin['round']} of {origin['workdir']}"


def _command(
  record: reporting.RunRecord, origin: Mapping[str, Any] | None
) -> str:
  """Return the command line that repeats a run with its config's file.

  Its flags fix what the run chose by measuring, or found on its machine.
  """
  flags = []
  summary, config = record.summary or {}, record.config
  if summary and config["runtime"].get("lanes") == "auto":
    flags.append(f"--config.runtime.lanes={summary['lanes']}")
  one = summary.get("processes") == 1
  if one and config["runtime"].get("devices") is None:
    flags.append(f"--config.runtime.devices={len(summary['devices'])}")
  workdir = shlex.quote(f"--workdir=runs/{record.name}-again")
  if origin is not None:
    place = f"--branch-from={origin['workdir']}:{origin['round']}"
    flags.append(shlex.quote(place))
  words = ["fedjax-sim run --config=repeat.py", workdir, *flags]
  return " \\\n  ".join(words)
