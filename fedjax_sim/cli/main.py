"""The command line: `fedjax-sim run|launch|describe|plan|privacy|data|list`."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import itertools
import logging
import math
import os
import re
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import NoReturn

from fedjax_sim.distributed import supervisor

START_TIMEOUT = 300.0  # seconds a worker may be silent before it trains
MOST_DEVICES = 2**16  # that a round is planned for, one by one
USAGE = """\
fedjax-sim: federated learning, simulated.

  fedjax-sim run --config=FILE --workdir=DIR [--config.SECTION.FIELD=VALUE ...]
      trains; on a workdir of an unfinished run, goes on with it
      --profile: where its time went, FLOP/s, and a trace in DIR/profile
      --distributed=auto|HOST:PORT,PROCESS,COUNT: as one process of several
  fedjax-sim launch --processes=N -- run --config=FILE --workdir=DIR ...
      trains in several processes on this machine
  fedjax-sim describe --config=FILE [--config.SECTION.FIELD=VALUE ...]
      what would run: config, sizes, predicted memory
  fedjax-sim plan --config=FILE --devices=N --link-gbps=G --flops=F|measure
      time, network and memory of a round on N devices, predicted: each
      sustains F FLOP/s and sends G gigabits a second to the others
      --host-gbps=H: it gets H from its host, if that is not G
      --memory-gbps=M: it reads and writes M of its memory, if that counts
  fedjax-sim privacy epsilon|calibrate|curve --population=N --delta=D ...
      what --clients-per-round=C, --rounds=T and --noise-multiplier=Z cost;
      with --epsilon=E calibrate finds the one of them that is left out;
      curve draws both into --out=DIR
      --sampling=poisson, --noise=gaussian, --accountant=pld: or others
  fedjax-sim privacy compose DIR DIR ... --delta=D
      what the private runs in these workdirs, on the same data, cost together
  fedjax-sim data import --format=FORMAT --train=PATH --store=DIR
      writes the clients of LEAF's, FLUTE's, TFF's, FedJAX's files, or of
      tables, as a client store; docs/importing.md tells more of the flags
      FORMAT: csv, datasets, fedjax_sqlite, flute_hdf5, json_lines, leaf_json,
      npz, parquet or tff_hdf5
      --client=COLUMN of a table; --fields=x:FROM,y:FROM, --dtypes=x:uint8
      --delimiter=";", --decimal=, of csv
      --text=characters|words: what x is; --vocabulary=STORE|JSON,
      --vocabulary-size=N, --sequence-length=N
      --map=FILE.py:FUNCTION, --prepare=bytes, --num-classes=N, --name=NAME
      --seen, --unseen, --labelled, --unlabelled, --test, --server: paths of
      more splits
  fedjax-sim data import --config=FILE --store=DIR
      writes the config's data set as a client store
  fedjax-sim data info --store=DIR
      clients, examples, classes; --out=PNG draws them
      --verify reads all of it and compares checksums
  fedjax-sim data partition --store=DIR --to=DIR
      writes a store with other clients (--partition=dirichlet, ...,
      --num-clients=N) or splits (--heldout-fraction, --unseen-clients)
      --alpha, --exponent, --shards-per-client, --min-examples, --seed;
      docs/config.md has the partitions
  fedjax-sim data copy --store=URL --to=DIR
      fetches a store from a bucket; --store=DIR --to=URL sends one
  fedjax-sim data export --store=DIR --format=FORMAT --to=FILE
      writes a split of a store (--split=train) as a file: fedjax_sqlite,
      flute_hdf5, leaf_json, npz, parquet or tff_hdf5
  fedjax-sim list
      algorithms, aggregators, transforms, models, data sets, ...

--version names the version.
--debug shows a traceback with every error.
"""

_HELP = ("help", "-h", "--help")
_DEBUG = "--debug"


def _run(
  arguments: Sequence[str], reporter: supervisor.Reporter | None = None
) -> int:
  from fedjax_sim.config import flags

  values = flags.parse(
    arguments,
    "config",
    "workdir",
    switches=("profile",),
    distributed="off",
  )
  import jax

  from fedjax_sim import config as configs
  from fedjax_sim import distributed
  from fedjax_sim.distributed import processes
  from fedjax_sim.run import experiment

  configs.check_fields(values.config)
  distributed.setup()
  peer_timeout = values.config.runtime.peer_timeout
  processes.join(values.distributed, peer_timeout)
  distributed.devices()  # what is wrong with JAX shows now

  def on_round(done: int) -> None:
    if reporter is not None:
      # Now that the data are loaded, which may hold Python's lock for long. A
      # little less than all, as what follows takes its time, too.
      reporter.timeout = 0.8 * peer_timeout
      reporter.round(done)

  if reporter is not None:
    reporter.rank = jax.process_index()
  try:
    experiment.run(
      values.config, values.workdir, on_round, profile=values.profile
    )
  except experiment.Interrupted as stop:
    if processes.is_first():
      print(f"fedjax-sim: {stop}", file=sys.stderr)  # noqa: T201
    return stop.exit_code
  return 0


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
  text = describe.describe(build.build(values.config), values.config)
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
  from fedjax_sim.cli import describe
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
  text = describe.plan(experiment, devices, link, host, speed)
  print(text)  # noqa: T201
  return 0


def _privacy(arguments: Sequence[str]) -> int:
  from fedjax_sim.cli import privacy

  print(privacy.run(arguments))  # noqa: T201
  return 0


def _data(arguments: Sequence[str]) -> int:
  from fedjax_sim.cli import data

  try:
    with _signals_as_exceptions():
      print(data.run(arguments))  # noqa: T201
  except _Stopped as stop:
    print("fedjax-sim: interrupted", file=sys.stderr)  # noqa: T201
    return 128 + stop.number
  return 0


def _list(arguments: Sequence[str]) -> int:
  from fedjax_sim.config import flags

  flags.parse(arguments)
  from fedjax_sim.cli import describe

  print(describe.listing())  # noqa: T201
  return 0


COMMANDS: Mapping[str, Callable[[Sequence[str]], int]] = {
  "run": _run,
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
    with _prompt_interrupts(), _short_warnings():
      if not arguments or first[0] in _HELP or {"-h", "--help"} & {*arguments}:
        print(_usage(arguments), flush=True)  # noqa: T201
        return 0 if arguments else 2
      if first[0] == "--version":
        version = importlib.metadata.version("fedjax_sim")
        print(version, flush=True)  # noqa: T201
        return 0
      from fedjax_sim.core import validate

      command = validate.lookup("command", arguments[0], COMMANDS)
      if reporter is not None and command is _run:
        command = functools.partial(_run, reporter=reporter)
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


def _usage(arguments: Sequence[str]) -> str:
  """How the command that stands before --help is used, or every one."""
  words = list(itertools.takewhile(str.isalpha, arguments))
  entries = re.split(r"^(?=  fedjax-sim )", USAGE, flags=re.MULTILINE)
  for count in range(len(words), 0, -1):
    name = " ".join(["  fedjax-sim", *words[:count]])
    found = [e for e in entries if re.match(rf"{name}\b", e)]
    if found:
      return "".join(found).partition("\n\n")[0].rstrip()
  return USAGE


class _Stopped(KeyboardInterrupt):
  """A signal asks the process to end."""

  def __init__(self, number: int):
    super().__init__(number)
    self.number = number


@contextlib.contextmanager
def _signals_as_exceptions() -> Iterator[None]:
  """Ctrl-C and the like raise, so that what is half written is removed."""
  if threading.current_thread() is not threading.main_thread():
    yield
    return

  def stop(number: int, frame: FrameType | None) -> NoReturn:
    del frame
    raise _Stopped(number)

  numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
  before = {n: signal.getsignal(n) for n in numbers}
  before = {n: h for n, h in before.items() if h != signal.SIG_IGN}  # nohup
  for number in before:
    signal.signal(number, stop)
  try:
    yield
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


@contextlib.contextmanager
def _prompt_interrupts() -> Iterator[None]:
  """Ctrl-C ends the process at once, but where a run saves itself first.

  As an exception it would be lost in the middle of an import.
  """
  if threading.current_thread() is not threading.main_thread():
    yield
    return

  def leave(number: int, frame: FrameType | None) -> None:
    del number, frame
    os.write(sys.stderr.fileno(), b"fedjax-sim: interrupted\n")
    os._exit(128 + signal.SIGINT)

  before = signal.signal(signal.SIGINT, leave)
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, before)


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
  """What a user's error exits with; None for an error of ours."""
  from fedjax_sim.run.checkpoint import CheckpointError
  from fedjax_sim.run.experiment import WriteError
  from fedjax_sim.simulation.dispatch import DivergedError

  if isinstance(error, DivergedError | CheckpointError | WriteError):
    return 1
  kinds = ValueError | TypeError | OSError | ImportError | MemoryError
  if isinstance(error, kinds):
    return 2
  return None


if __name__ == "__main__":
  sys.exit(main())
