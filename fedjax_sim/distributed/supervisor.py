"""A small parent process that watches one process of a run over several.

When a process of such a run dies, the others abort deep inside JAX or wait for
it without end. So every process that trains, the worker, is the child of one
that only watches: `supervise`. The worker reports to it every second that it is
alive, in lines of JSON through a pipe (`Reporter`). Whatever ends the worker
before its time becomes one line and exit code 75, "try again".

Only the standard library is imported, here and by
`fedjax_sim.distributed.launcher`: the parent has to be small, quick to start,
and out of reach of what it watches.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import selectors
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence

REPORT_FD = "FEDJAX_SIM_REPORT_FD"  # the worker's end of the pipe
LAUNCHER_FD = "FEDJAX_SIM_LAUNCHER_FD"  # closes when the launcher is gone
TRY_AGAIN = os.EX_TEMPFAIL  # 75

_PIPE_BYTES = 2**16  # as much as a pipe holds
_LONGEST_STEP = 60.0  # seconds
_PR_SET_PDEATHSIG = 1


def supervise(command: Sequence[str], *, timeout: float, rank: str) -> int:
  """Run a worker and watch it; must be called in the main thread.

  SIGTERM and SIGINT are passed on to the worker, which then ends by itself.

  Args:
    command: the worker's program and arguments.
    timeout: seconds, until the worker reports its own. A worker that is silent
      for longer is taken for frozen and killed; so is one that has reported its
      end and does not leave. It must be long enough for a call that holds
      Python's lock, like reading a large file of JSON.
    rank: what messages call the worker until it reports its rank.

  Returns:
    The exit code: the worker's own if it has reported one; 128 + signal if a
    signal that was passed on has ended it; 75 for any other end, after a line
    on the standard error that gives the reason.

  Raises:
    OSError: the command cannot be started.
  """
  with contextlib.ExitStack() as stack:
    received = stack.enter_context(signals())
    selector = stack.enter_context(selectors.DefaultSelector())
    ours, theirs = pipe()
    stack.callback(os.close, ours)
    launcher = _inherited_pipe(LAUNCHER_FD)
    try:
      # A session of its own: Ctrl-C in a terminal is for us, who pass it on;
      # the worker would otherwise get it twice.
      process = subprocess.Popen(
        command,
        env={**os.environ, REPORT_FD: str(theirs)},
        pass_fds=(theirs,),
        start_new_session=True,
      )
    finally:
      os.close(theirs)
    words = _Words(ours, rank, timeout)
    selector.register(received, selectors.EVENT_READ)
    selector.register(ours, selectors.EVENT_READ)
    if launcher is not None:
      selector.register(launcher, selectors.EVENT_READ)

    passed_on: set[int] = set()
    quiet, killed = 0.0, False
    while True:
      # Steps, and none counts for more than its length: if we were stopped
      # ourselves, by Ctrl-Z or a batch system, that was not its silence.
      left = words.timeout - quiet
      step = max(min(words.timeout / 4, left, _LONGEST_STEP), 0.0)
      began = time.monotonic()
      ready = {key.fd for key, _ in selector.select(step)}
      quiet += min(time.monotonic() - began, step)
      if ours in ready:
        if words.listen():
          quiet = 0.0
        if words.ended:
          selector.unregister(ours)
      wanted = read_signals(received)
      if launcher is not None and launcher in ready:
        selector.unregister(launcher)
        wanted.append(signal.SIGTERM)
      for number in wanted:
        process.send_signal(number)
        passed_on.add(number)
      if process.poll() is not None:
        words.listen()
        break
      if quiet >= words.timeout:
        if killed:  # it hangs inside the kernel; we can only tell
          break
        with contextlib.suppress(OSError):  # it has just ended
          os.killpg(process.pid, signal.SIGKILL)
        quiet, killed = 0.0, True

  if words.code is not None:
    return words.code
  status = process.returncode
  asked = [128 + number for number in passed_on if words.cause is None]
  if status in asked:
    return int(status)
  _say(
    f"rank {words.rank} stopped {words.when}:"
    f" {_reason(status, words.cause, words.timeout if killed else None)}."
    " Run the same command on all hosts to go on."
  )
  return 128 - status if status and 128 - status in asked else TRY_AGAIN


class Reporter:
  """A worker's reports to its parent; ends the worker if the parent is gone.

  A thread reports every second that the process is alive: one that is frozen
  falls silent, one with a long round does not. `failed` and `done` report the
  end: the first of them counts, and the worker must then leave.

  Attributes:
    rank: the worker's rank, as soon as it is known.
    timeout: seconds of silence after which the parent takes it for frozen;
      None leaves the parent's own.
  """

  def __init__(self, fd: int, *, every: float = 1.0):
    """Begin to report.

    Args:
      fd: the end of the pipe to write to.
      every: seconds between two signs of life.
    """
    os.set_inheritable(fd, False)
    # A parent that is stopped reads nothing: training goes on, and signs of
    # life that the pipe cannot hold are lost.
    os.set_blocking(fd, False)
    self.rank: int | None = None
    self.timeout: float | None = None
    self._fd = fd
    self._round = 0
    # A signal's handler may report while its thread does.
    self._lock = threading.RLock()
    self._ended = threading.Event()
    _die_with_parent()
    self._send("alive")  # finds out, too, if the parent has died before
    threading.Thread(
      target=self._live, args=(every,), name="report", daemon=True
    ).start()

  @classmethod
  def from_environment(cls, *, every: float = 1.0) -> Reporter | None:
    """Return the reporter of this process if it is a worker; only once.

    Args:
      every: seconds between two signs of life.
    """
    fd = _inherited_pipe(REPORT_FD)
    return None if fd is None else cls(fd, every=every)

  def round(self, number: int) -> None:
    """Report the last round that is done."""
    self._round = int(number)
    self._send("round")

  def failed(self, cause: str) -> None:
    """Report why the run must be resumed; leave by `os._exit` then.

    Args:
      cause: half a sentence, such as "rank 0 does not answer".
    """
    self._last_word("error", cause=cause[:500])

  def done(self, code: int) -> None:
    """Report the exit code; leave with it within the parent's timeout."""
    self._last_word("done", code=int(code) & 0xFF)

  def _live(self, every: float) -> None:
    while not self._ended.wait(every):
      self._send("alive")

  def _last_word(self, kind: str, **more: str | int) -> None:
    with self._lock:
      os.set_blocking(self._fd, True)
      self._send(kind, **more)
      self._ended.set()

  def _send(self, kind: str, **more: str | int) -> None:
    word = {
      "kind": kind,
      "rank": self.rank,
      "round": self._round,
      "timeout": self.timeout,
    }
    line = json.dumps(word | more).encode() + b"\n"
    with self._lock:
      if self._ended.is_set():
        return
      try:
        while line:
          line = line[os.write(self._fd, line) :]
      except BlockingIOError:
        pass
      except BrokenPipeError:  # nobody would know of this process
        os._exit(TRY_AGAIN)


@contextlib.contextmanager
def signals() -> Iterator[socket.socket]:
  """Give a socket from which SIGTERM, SIGINT and SIGCHLD can be read.

  A selector can wait for it; a handler in Python would act between any two
  lines.
  """
  with contextlib.ExitStack() as stack:
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
      stack.enter_context(end)
      end.setblocking(False)
    wakeup = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    stack.callback(signal.set_wakeup_fd, wakeup)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
      before = signal.signal(number, lambda number, frame: None)
      # None: it was not installed from Python.
      before = signal.SIG_DFL if before is None else before
      stack.callback(signal.signal, number, before)
    yield ours


def read_signals(received: socket.socket) -> list[int]:
  """Return the SIGTERMs and SIGINTs that have arrived at `signals()`."""
  try:
    numbers = received.recv(_PIPE_BYTES)
  except BlockingIOError:
    return []
  return [n for n in numbers if n in (signal.SIGTERM, signal.SIGINT)]


def pipe() -> tuple[int, int]:
  """Return the two ends of a pipe, neither with a standard stream's number.

  A standard stream may be closed, and its number free.
  """
  ends = os.pipe()
  ours, theirs = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 3) for end in ends)
  for end in ends:
    os.close(end)
  os.set_blocking(ours, False)
  return ours, theirs


def _inherited_pipe(name: str) -> int | None:
  """Return the pipe whose number a variable holds; remove the variable.

  So the processes that this one starts do not find it. A number that is no
  pipe's has come through a process that kept the variable and closed the pipe.
  """
  text = os.environ.pop(name, "")
  try:
    return int(text) if stat.S_ISFIFO(os.fstat(int(text)).st_mode) else None
  except (ValueError, OSError, OverflowError):
    return None


class _Words:
  """The reports of a worker."""

  def __init__(self, fd: int, rank: str, timeout: float):
    self.rank = rank
    self.timeout = timeout
    self.cause: str | None = None
    self.code: int | None = None
    self.ended = False  # the pipe
    self._round = 0
    self._fd = fd
    self._rest = b""

  @property
  def when(self) -> str:
    """Where in the run the worker is, as far as it has reported."""
    return f"after round {self._round}" if self._round else "before any round"

  def listen(self) -> bool:
    """Read what there is; return whether any of it was a sign of life."""
    try:
      read = os.read(self._fd, _PIPE_BYTES)
    except BlockingIOError:
      return False
    self.ended = not read
    *lines, rest = (self._rest + read).split(b"\n")
    self._rest = rest[-_PIPE_BYTES:]
    return sum(self._understand(line) for line in lines) > 0

  def _understand(self, line: bytes) -> bool:
    """Take a line in; return False if it is no report, or after the end."""
    if self.cause is not None or self.code is not None:
      return False
    try:
      word = json.loads(line)
      kind, round_ = word["kind"], int(word["round"])
      rank = self.rank if word["rank"] is None else str(int(word["rank"]))
      timeout = float(word["timeout"] or self.timeout)
      cause = str(word["cause"]) if kind == "error" else None
      code = int(word["code"]) if kind == "done" else None
    except (ValueError, TypeError, LookupError, OverflowError, RecursionError):
      return False
    known = kind in ("alive", "round", "error", "done")
    if not (known and timeout > 0 and (code is None or 0 <= code <= 255)):
      return False
    self.rank, self.timeout, self._round = rank, timeout, round_
    self.cause, self.code = cause, code
    return True


def _reason(
  status: int | None, cause: str | None, timeout: float | None
) -> str:
  """Return why a worker has ended, in words.

  Args:
    status: as in `Popen.returncode`.
    cause: the reason that the worker reported itself, or None.
    timeout: seconds of silence after which it was killed, or None.
  """
  if cause is not None:
    return " ".join(cause.split()).rstrip(".")
  if timeout is not None:
    left = ", but does not end" if status is None else ""
    return f"frozen, no sign of life for {timeout:g} s; it was killed{left}"
  if status is None or status >= 0:
    return f"it left with exit code {status} and without a last word"
  try:
    name = signal.Signals(-status).name
  except ValueError:
    name = f"signal {-status}"
  hints = {
    "SIGABRT": ", as JAX does when a peer is lost",
    "SIGKILL": ", as the system does when memory is short",
  }
  return f"killed by {name}{hints.get(name, '')}"


def _say(text: str) -> None:
  """Write a line to the standard error, if it can be written to."""
  with contextlib.suppress(AttributeError, OSError, ValueError):
    bar = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    # What was killed has left its progress bar, and the cursor hidden.
    after = "\x1b[?25h\n" if bar else ""
    sys.stderr.write(f"{after}fedjax-sim: {text}\n")
    sys.stderr.flush()


def _die_with_parent() -> None:
  """Have Linux kill this process when its parent dies, even a stopped one."""
  if sys.platform == "linux":
    import ctypes

    death = ctypes.c_ulong(signal.SIGKILL)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, death)
