"""The command line: `fedjax-sim run|launch|verify|describe|...`."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence

from fedjax_sim.cli import start, worker
from fedjax_sim.cli.interrupts import prompt_interrupts
from fedjax_sim.cli.run import run
from fedjax_sim.cli.usage import usage_of
from fedjax_sim.core import urls
from fedjax_sim.core.errors import FedjaxSimError
from fedjax_sim.distributed import supervisor

START_TIMEOUT = 300.0  # seconds of silence, until a worker has read its config

_HELP = ("help", "-h", "--help")
_DEBUG = "--debug"


def _describe(arguments: Sequence[str]) -> int:
  from fedjax_sim.config import flags

  values = flags.parse(arguments, "config")
  from fedjax_sim import distributed
  from fedjax_sim.cli import describe
  from fedjax_sim.config import build

  start.prepare()
  distributed.devices()  # what is wrong with JAX shows now
  build.check_no_password(values.config)
  text = describe.describe(build.build(values.config))
  print(text)  # noqa: T201
  return 0


def _list(arguments: Sequence[str]) -> int:
  names = [a for a in arguments if not a.startswith("-")]
  if len(names) < len(arguments) or len(names) > 2:
    from fedjax_sim.config import flags

    raise flags.UsageError(
      f"list {' '.join(arguments)}: give nothing, KIND, or KIND and NAME."
    )
  from fedjax_sim.cli import listing

  print(listing.run(names))  # noqa: T201
  return 0


def _of_module(name: str) -> Callable[[Sequence[str]], int]:
  """Return the `run` of a module here, which is imported when it is called."""

  def call(arguments: Sequence[str]) -> int:
    done: int = importlib.import_module(f"fedjax_sim.cli.{name}").run(arguments)
    return done

  return call


COMMANDS: Mapping[str, Callable[[Sequence[str]], int]] = {
  "run": run,
  "launch": _of_module("launch"),
  "describe": _describe,
  "plan": _of_module("plan"),
  "check": _of_module("check"),
  "privacy": _of_module("privacy"),
  "data": _of_module("data"),
  "export": _of_module("export"),
  "flute": _of_module("flute"),
  "report": _of_module("report"),
  "compare": _of_module("compare"),
  "list": _list,
  "study": _of_module("study"),
  "verify": _of_module("verify"),
}


def main(argv: Sequence[str] | None = None) -> int:
  """Run a command.

  Args:
    argv: what follows the program's name; None: `sys.argv`.

  Returns:
    0; 1 for a run that failed; 2 for wrong arguments; 75 for a run that lost
    another process; 128 + signal for a run that a signal ended.
  """
  arguments = list(sys.argv[1:] if argv is None else argv)
  reporter = supervisor.Reporter.from_environment()
  if reporter is not None:
    worker.work(lambda: _execute(arguments, reporter), reporter)
  spec = _distributed(arguments)
  words = [a for a in arguments if a not in (_DEBUG, start.NO_CACHE)]
  if words[:1] == ["run"] and spec != "off":
    command = [sys.executable, "-m", "fedjax_sim", *arguments]
    rank = spec.split(",")[1] if spec.count(",") == 2 else "of this host"
    return supervisor.supervise(command, timeout=START_TIMEOUT, rank=rank)
  return _execute(arguments)


def _distributed(arguments: Sequence[str]) -> str:
  """Return the value of --distributed, unchecked; "off" without it."""
  for i, argument in enumerate(arguments):
    name, equals, value = argument.partition("=")
    if name in ("--distributed", "-distributed"):
      return value if equals else "".join(arguments[i + 1 : i + 2])
  return "off"


def _execute(
  arguments: Sequence[str], reporter: supervisor.Reporter | None = None
) -> int:
  debug = _DEBUG in arguments
  arguments = [a for a in arguments if a != _DEBUG]
  # Orbax tells every step of a checkpoint, and adds tracebacks to what it
  # raises; we say what matters ourselves.
  for name in ("absl", "asyncio"):
    logging.getLogger(name).setLevel(logging.CRITICAL)
  try:
    with (
      prompt_interrupts(),
      _short_warnings(),
      start.without_cache(arguments) as arguments,
    ):
      first = arguments[:1]
      if not arguments or first[0] in _HELP or {"-h", "--help"} & {*arguments}:
        print(usage_of(arguments), flush=True)  # noqa: T201
        return 0 if arguments else 2
      if first[0] == "--version":
        version = importlib.metadata.version("fedjax_sim")
        print(version, flush=True)  # noqa: T201
        return 0
      from fedjax_sim.core import validate

      command = validate.lookup("command", arguments[0], COMMANDS)
      if reporter is not None and command is run:
        command = functools.partial(run, reporter=reporter)
      done = command(arguments[1:])
      sys.stdout.flush()
      return done
  except BrokenPipeError:  # `fedjax-sim list | head -1`
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signal.SIGPIPE
  except Exception as error:
    if reporter is not None and worker.is_loss(error):
      raise
    code = _exit_code(error)
    if debug or code is None:
      raise
    text = urls.redacted(f"fedjax-sim: error: {error}")
    print(text, file=sys.stderr)  # noqa: T201
    return code


@contextlib.contextmanager
def _short_warnings() -> Iterator[None]:
  """Show user warnings in one line, without the line of source code.

  Passwords in URLs are left out.
  """
  before = warnings.formatwarning

  def short(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
  ) -> str:
    if category is UserWarning:
      return urls.redacted(f"fedjax-sim: warning: {message}\n")
    return before(message, category, filename, lineno, line)

  warnings.formatwarning = short
  try:
    yield
  finally:
    warnings.formatwarning = before


def _exit_code(error: Exception) -> int | None:
  """Return the exit code of a user's error; None for an error of ours."""
  if isinstance(error, FedjaxSimError):
    return error.exit_code
  kinds = ValueError | TypeError | OSError | ImportError | MemoryError
  return FedjaxSimError.exit_code if isinstance(error, kinds) else None


if __name__ == "__main__":
  sys.exit(main())
