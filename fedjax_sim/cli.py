"""The command line: `fedjax-sim run|list|describe`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags

USAGE = """\
fedjax-sim: federated learning, simulated.

  fedjax-sim run --config=FILE --workdir=DIR [--config.SECTION.FIELD=VALUE ...]
      trains; on a workdir of an unfinished run, goes on with it
  fedjax-sim describe --config=FILE [--config.SECTION.FIELD=VALUE ...]
      what would run: config, sizes, predicted memory
  fedjax-sim list
      algorithms, aggregators, transforms, models, data sets, ...

--debug shows a traceback with every error.
"""

_DEBUG = "--debug"


class UsageError(Exception):
  """The command line is wrong."""


def _parse(name: str, arguments: Sequence[str], workdir: bool) -> Any:
  """The flags of a command.

  Raises:
    UsageError: a flag or a config field is unknown, missing or of a wrong
      type.
  """
  from ml_collections import config_flags

  values = flags.FlagValues()
  config_flags.DEFINE_config_file(
    "config", None, "The config file.", flag_values=values, lock_config=True
  )
  required = ["config"]
  if workdir:
    flags.DEFINE_string(
      "workdir", None, "Where results go.", flag_values=values
    )
    required.append("workdir")
  try:
    rest = values([f"fedjax-sim {name}", *arguments])
  except (
    flags.Error,
    AttributeError,
    KeyError,
    TypeError,
    ValueError,
    OSError,
  ) as error:
    text = error.args[0] if isinstance(error, KeyError) else error
    raise UsageError(str(text).strip()) from error
  if len(rest) > 1:
    raise UsageError(f"unexpected argument {rest[1]!r}")
  for flag in required:
    if values[flag].value is None:
      raise UsageError(f"--{flag}=... is missing")
  return values


def _run(arguments: Sequence[str]) -> int:
  values = _parse("run", arguments, workdir=True)
  from fedjax_sim import distributed, experiment

  distributed.setup()
  try:
    experiment.run(values.config, values.workdir)
  except experiment.Interrupted as stop:
    print(f"fedjax-sim: {stop}", file=sys.stderr)  # noqa: T201
    return stop.exit_code
  return 0


def _describe(arguments: Sequence[str]) -> int:
  values = _parse("describe", arguments, workdir=False)
  from fedjax_sim import config, describe, distributed

  distributed.setup()
  print(describe.describe(config.build(values.config), values.config))  # noqa: T201
  return 0


def _list(arguments: Sequence[str]) -> int:
  if arguments:
    raise UsageError(f"unexpected argument {arguments[0]!r}")
  from fedjax_sim import describe

  print(describe.listing())  # noqa: T201
  return 0


COMMANDS: Mapping[str, Callable[[Sequence[str]], int]] = {
  "run": _run,
  "describe": _describe,
  "list": _list,
}


def main(argv: Sequence[str] | None = None) -> int:
  """Runs a command.

  Args:
    argv: what follows the program's name; None: `sys.argv`.

  Returns:
    0; 1 for a run that failed; 2 for wrong arguments; 128 + signal for a run
    that a signal ended.
  """
  arguments = list(sys.argv[1:] if argv is None else argv)
  debug = _DEBUG in arguments
  arguments = [a for a in arguments if a != _DEBUG]
  if not arguments or arguments[0] in ("help", "-h", "--help"):
    print(USAGE)  # noqa: T201
    return 0 if arguments else 2
  # Orbax tells every step of a checkpoint; we say what matters ourselves.
  logging.getLogger("absl").setLevel(logging.ERROR)
  try:
    from fedjax_sim import validate

    command = validate.lookup("command", arguments[0], COMMANDS)
    return command(arguments[1:])
  except Exception as error:
    if debug:
      raise
    code = _exit_code(error)
    if code is None:
      raise
    print(f"fedjax-sim: error: {error}", file=sys.stderr)  # noqa: T201
    return code


def _exit_code(error: Exception) -> int | None:
  """What a user's error exits with; None for an error of ours."""
  from fedjax_sim.checkpoint import CheckpointError
  from fedjax_sim.simulate import NoClientsLeftError

  if isinstance(error, NoClientsLeftError | CheckpointError):
    return 1
  if isinstance(error, UsageError | ValueError | TypeError | OSError):
    return 2
  return None


if __name__ == "__main__":
  sys.exit(main())
