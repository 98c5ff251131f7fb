"""`fedjax-sim study`: run many runs as rows of a few programs."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedjax_sim.cli import start

_NUMBERS = ("random", "halving", "search-seed", "shapley")
_FUNCTION = "get_study"


def run(arguments: Sequence[str]) -> int:
  """Run a study, or go on with it; return the exit code."""
  from fedjax_sim.config import flags

  vary, rest = _split(arguments)
  names = ("studydir", "seeds", "points", "metric", *_NUMBERS)
  optional: dict[str, Any] = dict.fromkeys(names)
  values = flags.parse(rest, "config", switches=("plan",), **optional)
  if values.studydir is None and not values.plan:
    raise flags.UsageError("--studydir=... is missing")
  from fedjax_sim import distributed
  from fedjax_sim.studies import folder, points
  from fedjax_sim.studies.study import predict, study

  what = _of_file(rest)
  if vary or values.points is not None:
    what.pop("vary", None)
    what.pop("points", None)
  if vary:
    what["vary"] = vary
  if values.points is not None:
    what["points"] = points.listed(Path(values.points).expanduser())
  if values.seeds is not None:
    what["seeds"] = points.seeds_of(values.seeds, values.config.seed)
  if values.metric is not None:
    what["metric"] = values.metric
  for name in _NUMBERS:
    if (text := values[name].value) is not None:
      number = flags.number(f"--{name}", text, int)
      what[name.replace("-", "_")] = number
  start.prepare()
  distributed.devices()  # what is wrong with JAX shows now
  if values.plan:
    predict(values.config, **what)
    return 0
  try:
    study(values.config, values.studydir, **what)
  except folder.StudyInterrupted as stop:
    print(f"fedjax-sim: {stop}", file=sys.stderr)  # noqa: T201
    return stop.exit_code
  return 0


def _of_file(arguments: Sequence[str]) -> dict[str, Any]:
  """Return what the config file's `get_study()` says; {} without one."""
  import inspect

  from fedjax_sim.config import flags
  from fedjax_sim.core import errors, validate
  from fedjax_sim.studies.study import study

  path = flags.config_path(arguments)
  assert path is not None
  try:
    found = runpy.run_path(path).get(_FUNCTION)
    what = {} if found is None else dict(found())
  except Exception as error:
    text = errors.raised(path, error)
    raise flags.UsageError(f"--config={path}: {_FUNCTION}: {text}") from error
  known = list(inspect.signature(study).parameters)[2:]
  for name in what:
    validate.one_of(f"--config={path}: {_FUNCTION}(): key", name, known)
  return what


def _split(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
  """Split off the --vary FIELD=VALUES of the arguments."""
  from fedjax_sim.config import flags

  vary: dict[str, str] = {}
  rest: list[str] = []
  left = list(arguments)
  while left:
    argument = left.pop(0)
    found = re.match(r"--?vary(=|$)", argument)
    if not found:
      rest.append(argument)
      continue
    if found[1]:
      text = argument[found.end() :]
    else:
      text = left.pop(0) if left else ""
    field, equals, spec = text.partition("=")
    field = field.removeprefix("config.")
    if not equals or not field:
      raise flags.UsageError(
        f"--vary {text}: give a field and its values, such as"
        " --vary client.learning_rate=0.01,0.1."
      )
    if field in vary:
      raise flags.UsageError(
        f"--vary {field} comes twice; give all values once."
      )
    vary[field] = spec
  return vary, rest
