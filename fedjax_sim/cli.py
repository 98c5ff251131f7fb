"""The command line: `fedjax-sim run|list|describe`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

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

_HELP = ("help", "-h", "--help")
_DEBUG = "--debug"
_FIELD = "config."


class UsageError(Exception):
  """The command line is wrong."""


def _options(
  arguments: Sequence[str], required: Sequence[str]
) -> tuple[dict[str, str], dict[str, str]]:
  """The options of a command, and the config's fields among them.

  Args:
    arguments: `--name=value` or `--name value`.
    required: the names that must be there, and may be, besides fields.

  Raises:
    UsageError: an option is unknown, or lacks its value, or is missing.
  """
  from fedjax_sim import validate

  options: dict[str, str] = {}
  fields: dict[str, str] = {}
  rest: Iterator[str] = iter(arguments)
  for argument in rest:
    if not argument.startswith("--"):
      raise UsageError(f"unexpected argument {argument!r}")
    name, equals, value = argument[2:].partition("=")
    if not name.startswith(_FIELD):
      validate.known("option", f"--{name}", [f"--{n}" for n in required])
    if not equals:
      value = next(rest, "--")
      if value.startswith("--"):
        raise UsageError(f"--{name} lacks its value: --{name}=...")
    if name.startswith(_FIELD):
      fields[name.removeprefix(_FIELD)] = value
    else:
      options[name] = value
  for name in required:
    if not options.get(name):
      raise UsageError(f"--{name}=... is missing")
  return options, fields


def _run(arguments: Sequence[str]) -> int:
  options, fields = _options(arguments, ["config", "workdir"])
  from fedjax_sim import config, distributed, experiment

  distributed.setup()
  try:
    experiment.run(config.load(options["config"], fields), options["workdir"])
  except experiment.Interrupted as stop:
    print(f"fedjax-sim: {stop}", file=sys.stderr)  # noqa: T201
    return stop.exit_code
  return 0


def _describe(arguments: Sequence[str]) -> int:
  options, fields = _options(arguments, ["config"])
  from fedjax_sim import config, describe, distributed

  distributed.setup()
  source = config.load(options["config"], fields)
  print(describe.describe(config.build(source), source))  # noqa: T201
  return 0


def _list(arguments: Sequence[str]) -> int:
  _options(arguments, [])
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
  if not arguments or any(a in _HELP for a in arguments):
    print(USAGE)  # noqa: T201
    return 0 if arguments else 2
  # Orbax tells every step of a checkpoint, and adds tracebacks to what it
  # raises; we say what matters ourselves.
  for name in ("absl", "asyncio"):
    logging.getLogger(name).setLevel(logging.CRITICAL)
  try:
    from fedjax_sim import validate

    command = validate.lookup("command", arguments[0], COMMANDS)
    return command(arguments[1:])
  except KeyboardInterrupt:
    if debug:
      raise
    print("fedjax-sim: interrupted", file=sys.stderr)  # noqa: T201
    return 130
  except Exception as error:
    code = _exit_code(error)
    if debug or code is None:
      raise
    print(f"fedjax-sim: error: {error}", file=sys.stderr)  # noqa: T201
    return code


def _exit_code(error: Exception) -> int | None:
  """What a user's error exits with; None for an error of ours."""
  from fedjax_sim.checkpoint import CheckpointError
  from fedjax_sim.experiment import WriteError
  from fedjax_sim.simulate import NoClientsLeftError

  if isinstance(error, NoClientsLeftError | CheckpointError | WriteError):
    return 1
  if isinstance(
    error, UsageError | ValueError | TypeError | OSError | ImportError
  ):
    return 2
  return None


if __name__ == "__main__":
  sys.exit(main())
