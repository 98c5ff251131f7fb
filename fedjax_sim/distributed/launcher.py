"""Starts all processes of a run on this machine: `fedjax-sim launch`."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from fedjax_sim.distributed import cpu, supervisor

MOST_A_CORE = 8  # processes
_EXAMPLE = "fedjax-sim launch --processes=4 -- run --config=... --workdir=..."
_PROGRAM = (sys.executable, "-m", "fedjax_sim")


def parse(arguments: Sequence[str]) -> tuple[int, tuple[str, ...]]:
  """Parse `--processes=N [--] run ...` into (N, ("run", ...)).

  Args:
    arguments: what follows `launch`.

  Raises:
    ValueError: the arguments have another form, or N is wrong.
  """
  name, equals, text = (arguments[0] if arguments else "").partition("=")
  if name != "--processes":
    raise ValueError(
      f"--processes=... is missing: it comes first. Give `{_EXAMPLE}`."
    )
  rest = list(arguments[1:])
  if not equals:
    text = rest.pop(0) if rest else ""
  if not (text.isascii() and text.isdecimal()):
    raise ValueError(f"--processes={text} is wrong; give a whole number >= 1.")
  if rest[:1] == ["--"]:
    del rest[0]
  processes, command = int(text), tuple(rest)
  _check(processes, command)
  return processes, command


def launch(
  processes: int,
  command: Sequence[str],
  *,
  grace: float = 30.0,
  program: Sequence[str] = _PROGRAM,
) -> int:
  """Run a command in several processes; must be called in the main thread.

  SIGTERM and SIGINT are passed on to all. Each process sees as many CPU
  devices as its share of the cores, unless FEDJAX_SIM_CPU_DEVICES is set. The
  standard output is process 0's, the standard error that of all.

  Args:
    processes: how many.
    command: "run" and its arguments, without --distributed.
    grace: seconds for the others to end by themselves after one has failed;
      then they get SIGTERM, and after as many seconds again SIGKILL.
    program: what the command is given to.

  Returns:
    0 if all return 0, else the code of the first that does not; 128 + signal
    for one that was killed.

  Raises:
    ValueError: `processes` or `command` is wrong.
    OSError: a process cannot be started.
  """
  _check(processes, command)
  first, *rest = command
  share = max(1, cpu.count() // processes)
  with contextlib.ExitStack() as stack:
    received = stack.enter_context(supervisor.signals())
    selector = stack.enter_context(selectors.DefaultSelector())
    selector.register(received, selectors.EVENT_READ)
    port = stack.enter_context(_reserved_port()).getsockname()[1]
    # Its other end closes with us, however we end.
    theirs, ours = supervisor.pipe()
    stack.callback(os.close, ours)
    stack.callback(os.close, theirs)
    environment = {
      cpu.CPU_DEVICES: str(share),
      **os.environ,
      supervisor.LAUNCHER_FD: str(theirs),
    }
    running: list[subprocess.Popen[bytes]] = []
    stack.callback(_end, running)
    for i in range(processes):
      # First, since a last flag without its value would swallow it.
      where = f"--distributed=127.0.0.1:{port},{i},{processes}"
      process = subprocess.Popen(
        [*program, first, where, *rest],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=None if i == 0 else subprocess.DEVNULL,
        pass_fds=(theirs,),
        # Ctrl-C in a terminal is for us, who pass it on: once, not twice.
        start_new_session=True,
      )
      running.append(process)

    failure, asked = 0, False
    means = [signal.SIGTERM, signal.SIGKILL]
    deadline = float("inf")
    while running:
      left = deadline - time.monotonic()
      selector.select(max(left, 0.0) if deadline < float("inf") else None)
      for number in supervisor.read_signals(received):
        asked = True
        for process in running:
          process.send_signal(number)
      ended = [p for p in running if p.poll() is not None]
      for process in ended:
        running.remove(process)
      failure = failure or _first([process.returncode for process in ended])
      # Who was asked to stop may take long to save, and must be let.
      if failure and not asked and means and deadline == float("inf"):
        deadline = time.monotonic() + grace
      if time.monotonic() >= deadline and running:
        number = means.pop(0)
        for process in running:
          process.send_signal(number)
        deadline = time.monotonic() + grace if means else float("inf")
  return failure


def _check(processes: int, command: Sequence[str]) -> None:
  """Refuse what `launch` cannot run; by hand, since `validate` needs numpy.

  Raises:
    ValueError: `processes` or `command` is wrong.
  """
  if processes < 1:
    raise ValueError(
      f"--processes={processes} is out of range; give a number >= 1."
    )
  if processes > (most := MOST_A_CORE * cpu.count()):
    raise ValueError(
      f"--processes={processes} is out of range; this machine has"
      f" {cpu.count()} cores, so give at most {most}."
    )
  if not command or command[0] != "run":
    found = repr(command[0]) if command else "missing"
    raise ValueError(
      f"launch: the command is {found}, and has to be 'run'. Give `{_EXAMPLE}`."
    )
  for argument in command:
    name = argument.partition("=")[0]
    if name in ("--distributed", "-distributed"):
      raise ValueError(
        f"launch: the command has {argument!r}; leave it out, every process"
        " gets its own."
      )


def _reserved_port() -> socket.socket:
  """Return a socket that keeps a free port for process 0 while it is open.

  It does not listen, so no connection ends up here. JAX's server sets
  SO_REUSEPORT, too, and can so take the port; no other user's program can, and
  none that lets the system choose its port.
  """
  kept = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
  try:
    kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    kept.bind(("127.0.0.1", 0))
  except BaseException:
    kept.close()
    raise
  return kept


def _first(statuses: Sequence[int]) -> int:
  """Return the exit code for processes that ended at the same time.

  A code that asks for a correction comes before "try again", with which the
  other processes then end; 0 if all returned 0.
  """
  codes = [128 - status if status < 0 else status for status in statuses]
  failures = sorted(
    filter(None, codes), key=lambda c: c == supervisor.TRY_AGAIN
  )
  return failures[0] if failures else 0


def _end(running: Sequence[subprocess.Popen[bytes]]) -> None:
  """End the processes that run already when starting one has failed."""
  for process in running:
    process.kill()
  for process in running:
    process.wait()
