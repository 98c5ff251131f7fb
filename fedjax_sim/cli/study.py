"""`fedjax-sim study`: run many runs as rows of a few programs."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def run(arguments: Sequence[str]) -> int:
  """Run a study, or go on with it; return the exit code."""
  from fedjax_sim.config import flags

  vary, rest = _split(arguments)
  values = flags.parse(
    rest,
    "config",
    "studydir",
    switches=("plan",),
    seeds="1",
    random=None,
    points=None,
    halving=None,
    metric=None,
    **{"search-seed": "0"},
  )
  from fedjax_sim import distributed
  from fedjax_sim.studies import folder, points
  from fedjax_sim.studies.study import predict, study

  whole = lambda name: (
    None
    if values[name].value is None
    else flags.number(f"--{name}", values[name].value, int)
  )
  listed = None
  if values.points is not None:
    listed = points.listed(Path(values.points).expanduser())
  seeds = points.seeds_of(values.seeds, values.config.seed)
  counts = {name: whole(name) for name in ("random", "halving", "search-seed")}
  distributed.setup()
  distributed.devices()  # what is wrong with JAX shows now
  what: dict[str, Any] = {
    "vary": vary,
    "points": listed,
    "seeds": seeds,
    "random": counts["random"],
    "search_seed": counts["search-seed"] or 0,
    "halving": counts["halving"],
    "metric": values.metric,
  }
  if values.plan:
    predict(values.config, **what)
    return 0
  try:
    study(values.config, values.studydir, **what)
  except folder.StudyInterrupted as stop:
    print(f"fedjax-sim: {stop}", file=sys.stderr)  # noqa: T201
    return stop.exit_code
  return 0


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
