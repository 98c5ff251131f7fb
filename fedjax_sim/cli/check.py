"""`fedjax-sim check`: put a part of one's own through the contract tests."""

from __future__ import annotations

from collections.abc import Sequence

from fedjax_sim.config import flags


def run(arguments: Sequence[str]) -> int:
  """Print a line for each check; return 0 if none failed, else 1.

  Args:
    arguments: what follows `fedjax-sim check`.

  Raises:
    UsageError: a flag is unknown, missing or has a wrong value.
    TypeError, ValueError, OSError, ImportError: the reference leads nowhere, or
      the config is wrong.
  """
  parts, rest = flags.positional(arguments)
  others, _ = flags.split(rest)
  values = flags.parse(others, kind="", config="")
  if len(parts) != 1:
    given = f"{len(parts)} parts are given" if parts else "no part is given"
    raise flags.UsageError(
      f"check: {given}; give one, as in fedjax-sim check path/to/file.py:name."
    )
  # What follows takes JAX, which takes seconds; a wrong call is said before.
  from fedjax_sim.cli.check_part import check_part

  own_data = bool(values["config"].value)
  return check_part(parts[0], values.kind, rest, own_data=own_data)
