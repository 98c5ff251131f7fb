"""The command line: `fedjax-sim run|launch|describe|plan|privacy|data|list`."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import logging
import math
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NoReturn

from fedjax_sim.cli.interrupts import (
  Stopped,
  prompt_interrupts,
  signals_as_exceptions,
)
from fedjax_sim.cli.run import run
from fedjax_sim.cli.usage import usage_of
from fedjax_sim.core.errors import FedjaxSimError
from fedjax_sim.distributed import supervisor

START_TIMEOUT = 300.0  # seconds a worker may be silent before it trains
MOST_DEVICES = 2**16  # that a round is planned for, one by one

_HELP = ("help", "-h", "--help")
_DEBUG = "--debug"


def _launch(arguments: Sequence[str]) -> int:
  from fedjax_sim.distributed import launcher

  return launcher.launch(*launcher.parse(arguments))


def _describe(arguments: Sequence[str]) -> int:
  from fedjax_sim.config import flags

  values = flags.parse(arguments, "config")
  from fedjax_sim import distributed
  from fedjax_sim.cli import describe
  from fedjax_sim.config import build

  distributed.setup()
  distributed.devices()  # what is wrong with JAX shows now
  text = describe.describe(build.build(values.config))
  print(text)  # noqa: T201
  return 0


def _plan(arguments: Sequence[str]) -> int:
  from fedjax_sim.config import flags

  values = flags.parse(
    arguments,
    *("config", "devices", "link-gbps", "flops"),
    **{"host-gbps": "", "memory-gbps": ""},
  )
  from fedjax_sim import distributed
  from fedjax_sim.cli import plan
  from fedjax_sim.config import build
  from fedjax_sim.core import validate
  from fedjax_sim.simulation import costs

  def number(name: str, other: str = "") -> float:
    value = flags.number(f"--{name}", values[name].value, float, other)
    return validate.real(f"--{name}", value, above=0)

  def rate(name: str, default: float) -> float:
    given = values[name].value
    return number(name) * 1e9 / 8 if given else default  # bytes a second

  devices = flags.number("--devices", values["devices"].value, int)
  validate.whole("--devices", devices, most=MOST_DEVICES)
  link = rate("link-gbps", 0.0)
  host = rate("host-gbps", link)
  memory = rate("memory-gbps", math.inf)
  speed = None
  if values["flops"].value != "measure":
    speed = costs.Speed(number("flops", " or 'measure'"), memory)
  elif math.isfinite(memory):
    raise flags.UsageError(
      f"--memory-gbps={values['memory-gbps'].value} does not go with"
      " --flops=measure, which measures it; leave it out."
    )
  distributed.setup()
  distributed.devices()  # what is wrong with JAX shows now
  experiment = build.build(values.config)
  text = plan.plan(experiment, devices, link, host, speed)
  print(text)  # noqa: T201
  return 0


def _privacy(arguments: Sequence[str]) -> int:
  from fedjax_sim.cli import privacy

  print(privacy.run(arguments))  # noqa: T201
  return 0


def _data(arguments: Sequence[str]) -> int:
  from fedjax_sim.cli import data

  try:
    with signals_as_exceptions():
      print(data.run(arguments))  # noqa: T201
  except Stopped as stop:
    print("fedjax-sim: interrupted", file=sys.stderr)  # noqa: T201
    return 128 + stop.number
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


COMMANDS: Mapping[str, Callable[[Sequence[str]], int]] = {
  "run": run,
  "launch": _launch,
  "describe": _describe,
  "plan": _plan,
  "privacy": _privacy,
  "data": _data,
  "list": _list,
}


def main(argv: Sequence[str] | None = None) -> int:
  """Runs a command.

  Args:
    argv: what follows the program's name; None: `sys.argv`.

  Returns:
    0; 1 for a run that failed; 2 for wrong arguments; 75 for a run that lost
    another process; 128 + signal for a run that a signal ended.
  """
  arguments = list(sys.argv[1:] if argv is None else argv)
  reporter = supervisor.Reporter.from_environment()
  if reporter is not None:
    _work(arguments, reporter)
  spec = _distributed(arguments)
  if arguments[:1] == ["run"] and spec != "off":
    command = [sys.executable, "-m", "fedjax_sim", *arguments]
    rank = spec.split(",")[1] if spec.count(",") == 2 else "of this host"
    return supervisor.supervise(command, timeout=START_TIMEOUT, rank=rank)
  return _execute(arguments)


def _distributed(arguments: Sequence[str]) -> str:
  """What --distributed says; the command checks it."""
  for i, argument in enumerate(arguments):
    name, equals, value = argument.partition("=")
    if name in ("--distributed", "-distributed"):
      return value if equals else "".join(arguments[i + 1 : i + 2])
  return "off"


def _work(arguments: Sequence[str], reporter: supervisor.Reporter) -> NoReturn:
  """Executes a command as one process of several; the parent watches.

  Left at once, always: JAX's own end waits minutes for processes that are
  gone.
  """
  code = 1
  try:
    code = _execute(arguments, reporter)
  except BaseException as error:
    if _is_loss(error):
      text = " ".join(str(error).split())
      reporter.failed(f"lost another process ({text[:200]})")
      code = supervisor.TRY_AGAIN
    else:
      traceback.print_exc()
  finally:
    for stream in (sys.stdout, sys.stderr):
      with contextlib.suppress(OSError, ValueError):
        stream.flush()
    done = functools.partial(reporter.done, code)
    if code != supervisor.TRY_AGAIN and "jax" in sys.modules:
      from fedjax_sim.distributed import processes

      processes.leave(done)
    else:
      done()
    os._exit(code)


def _is_loss(error: BaseException) -> bool:
  if "jax" not in sys.modules:
    return False
  from fedjax_sim.distributed import processes

  return processes.is_loss(error)


def _execute(
  arguments: Sequence[str], reporter: supervisor.Reporter | None = None
) -> int:
  debug = _DEBUG in arguments
  arguments = [a for a in arguments if a != _DEBUG]
  first = arguments[:1]
  # Orbax tells every step of a checkpoint, and adds tracebacks to what it
  # raises; we say what matters ourselves.
  for name in ("absl", "asyncio"):
    logging.getLogger(name).setLevel(logging.CRITICAL)
  try:
    with prompt_interrupts(), _short_warnings():
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
    if reporter is not None and _is_loss(error):
      raise
    code = _exit_code(error)
    if debug or code is None:
      raise
    print(f"fedjax-sim: error: {error}", file=sys.stderr)  # noqa: T201
    return code


@contextlib.contextmanager
def _short_warnings() -> Iterator[None]:
  """What users are warned of is a line, without that of the source."""
  before = warnings.formatwarning

  def short(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
  ) -> str:
    if category is UserWarning:
      return f"fedjax-sim: warning: {message}\n"
    return before(message, category, filename, lineno, line)

  warnings.formatwarning = short
  try:
    yield
  finally:
    warnings.formatwarning = before


def _exit_code(error: Exception) -> int | None:
  """Return what a user's error exits with; None for an error of ours."""
  if isinstance(error, FedjaxSimError):
    return error.exit_code
  kinds = ValueError | TypeError | OSError | ImportError | MemoryError
  return FedjaxSimError.exit_code if isinstance(error, kinds) else None


if __name__ == "__main__":
  sys.exit(main())
