"""What a parent makes of its worker's end, whatever that is."""

import os
import pathlib
import pty
import signal
import subprocess
import sys

import pytest

from fedjax_sim.distributed import supervisor

pytestmark = pytest.mark.integration

ROOT = pathlib.Path(__file__).parents[1]
ENDS = 60  # seconds, on a busy machine, for what takes a moment

PARENT = """\
import sys
from fedjax_sim.distributed.supervisor import supervise
sys.exit(supervise(sys.argv[1:], timeout=60.0, rank="2"))
"""
WORKER = """\
import json, os, resource, signal, subprocess, sys, time
from fedjax_sim.distributed import supervisor
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
reporter = supervisor.Reporter.from_environment(every=0.1)
assert reporter is not None
"""


def environment():
  return os.environ | {"PYTHONPATH": str(ROOT)}


@pytest.fixture
def start(popen):
  """Starts a parent whose worker runs some code."""

  def call(code, *, prelude=WORKER, closed="", stderr=subprocess.PIPE):
    command = [sys.executable, "-c", PARENT]
    command += [sys.executable, "-c", prelude + code]
    return popen(
      ["sh", "-c", f'exec {closed} "$@"', "sh", *command],
      env=environment(),
      stderr=stderr,
    )

  return call


def finish(process):
  """Exit code and standard error.

  Both streams have then ended: no worker is left that could write to them.
  """
  _, err = process.communicate(timeout=ENDS)
  return process.returncode, err


def line(process):
  """The next line that the worker prints."""
  return process.stdout.readline().strip()


@pytest.mark.parametrize("code", [0, 1, 2, 75, 130, 143])
def test_an_announced_end_is_passed_on_in_silence(start, code):
  process = start(
    "reporter.rank = 2\n"
    "reporter.round(3)\n"
    "print('out'); print('err', file=sys.stderr)\n"
    f"reporter.done({code})\n"
    f"sys.exit({code})\n"
  )
  out, err = process.communicate(timeout=ENDS)
  assert (process.returncode, out, err) == (code, "out\n", "err\n")


def test_the_first_last_word_counts(start):
  assert finish(start("reporter.done(3); reporter.failed('x')")) == (3, "")
  code, err = finish(start("reporter.failed('x'); reporter.done(3)"))
  assert code == 75
  assert ": x. Run" in err
  # Whatever tears the process down afterwards.
  assert finish(start("reporter.done(0); os.abort()")) == (0, "")


@pytest.mark.parametrize(
  ("code", "words"),
  [
    ("os.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL, as the sys"),
    ("os.abort()", "killed by SIGABRT, as JAX does when a peer is lost. "),
    ("os.kill(os.getpid(), signal.SIGSEGV)", "killed by SIGSEGV. "),
    ("os.kill(os.getpid(), signal.SIGTERM)", "killed by SIGTERM. "),
    ("os._exit(0)", "it left with exit code 0 and without a last word. "),
    ("sys.exit(3)", "it left with exit code 3 and without a last word. "),
    (
      "reporter.failed('lost\\n  rank 0.'); os._exit(1)",
      "stopped after round 57: lost rank 0. Run",
    ),
    ("reporter.failed('é' * 9000); os._exit(75)", f": {'é' * 500}. Run"),
  ],
)
def test_any_other_end_is_one_line(start, code, words):
  noise = "print('F0000 noise', file=sys.stderr, flush=True)\n"
  worker = start(f"reporter.rank = 4\nreporter.round(57)\n{noise}{code}\n")
  status, err = finish(worker)
  assert status == 75
  first, last = err.splitlines()
  assert first == "F0000 noise"
  assert last.startswith("fedjax-sim: rank 4 stopped after round 57: ")
  assert words in last
  assert last.endswith(" Run the same command on all hosts to go on.")


def test_a_worker_that_says_nothing(start):
  assert finish(start("raise SystemExit(1)", prelude="")) == (
    75,
    "fedjax-sim: rank 2 stopped before any round: it left with exit code 1 and"
    " without a last word. Run the same command on all hosts to go on.\n",
  )


def test_a_frozen_worker(start):
  process = start(
    "reporter.timeout = 1.5\n"
    "reporter.round(7)\n"
    "os.kill(os.getpid(), signal.SIGSTOP)\n"
  )
  code, err = finish(process)
  assert code == 75
  assert err.count("\n") == 1
  assert "rank 2 stopped after round 7: frozen, no sign of life for 1.5" in err


def test_a_worker_that_does_not_leave(start):
  code = "reporter.timeout = 1.5\nreporter.{}\ntime.sleep(600)\n"
  assert finish(start(code.format("done(3)"))) == (3, "")
  status, err = finish(start(code.format("failed('lost rank 1')")))
  assert status == 75
  assert "lost rank 1" in err


def test_a_long_round_is_not_frozen(start):
  code = "reporter.timeout = 3\ntime.sleep(4.5)\nreporter.done(0)\n"
  assert finish(start(code)) == (0, "")


@pytest.mark.parametrize(
  "pids",
  ["[parent]", pytest.param("[parent, os.getpid()]", marks=pytest.mark.slow)],
)
def test_a_stopped_parent_is_not_the_workers_silence(start, pids):
  """Ctrl-Z stops the parent, a batch system both."""
  code = (
    "reporter.timeout = 3\n"
    "parent = os.getppid()\n"
    "time.sleep(1)\n"
    f"pids = {pids}\n"
    "wake = 'sleep 4; kill -CONT ' + ' '.join(map(str, pids))\n"
    "subprocess.Popen(['sh', '-c', wake], start_new_session=True)\n"
    "for pid in pids: os.kill(pid, signal.SIGSTOP)\n"
    "time.sleep(4)\n"
    "reporter.done(0)\n"
  )
  assert finish(start(code)) == (0, "")


def test_a_full_pipe_does_not_stop_the_worker(start):
  code = (
    "parent = os.getppid()\n"
    "os.kill(parent, signal.SIGSTOP)\n"
    "for i in range(5000): reporter.round(i)\n"
    "os.kill(parent, signal.SIGCONT)\n"
    "reporter.done(0)\n"
  )
  assert finish(start(code)) == (0, "")


@pytest.mark.parametrize(
  ("before", "after"),
  [
    ("supervisor._die_with_parent = lambda: None\n", ""),
    ("", ""),
    pytest.param(
      *("", "os.kill(os.getpid(), signal.SIGSTOP)\n"),
      marks=pytest.mark.skipif(sys.platform != "linux", reason="Linux's"),
    ),
  ],
  ids=["by the pipe alone", "as it is", "stopped"],
)
def test_a_worker_does_not_outlive_its_parent(start, before, after):
  first, second = WORKER.split("reporter =")
  process = start(
    f"print('ready', flush=True)\n{after}time.sleep(600)\n",
    prelude=f"{first}{before}reporter ={second}",
  )
  assert line(process) == "ready"
  process.kill()
  code, err = finish(process)
  assert (code, err) == (-signal.SIGKILL, "")


COUNTING = """\
seen = []
for number in (signal.SIGTERM, signal.SIGINT):
  signal.signal(number, lambda number, frame: seen.append(number))
print("ready", flush=True)
def wait(count):
  while len(seen) < count: time.sleep(0.01)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_passed_on(start, number):
  process = start(
    COUNTING + "wait(1)\nreporter.done(128 + seen[0])\nos._exit(0)\n"
  )
  assert line(process) == "ready"
  process.send_signal(number)
  assert finish(process) == (128 + number, "")


def test_a_second_signal_is_passed_on(start):
  process = start(
    f"{COUNTING}wait(1); print('one', flush=True)\n"
    "wait(2); reporter.done(len(seen))\n"
  )
  for word in ("ready", "one"):
    assert line(process) == word
    process.send_signal(signal.SIGTERM)
  assert finish(process) == (2, "")


def test_ctrl_c_reaches_the_worker_once(start):
  """A terminal sends it to the whole process group."""
  process = start(
    f"{COUNTING}wait(1); time.sleep(1); reporter.done(len(seen))\n"
  )
  assert line(process) == "ready"
  os.killpg(process.pid, signal.SIGINT)
  assert finish(process) == (1, "")


def test_a_worker_that_a_passed_signal_kills(start):
  process = start("print('ready', flush=True)\ntime.sleep(600)\n")
  assert line(process) == "ready"
  process.send_signal(signal.SIGTERM)
  code, err = finish(process)
  assert code == 143
  assert "stopped before any round: killed by SIGTERM. Run" in err
  # One that leaves by itself has said what there is to say.
  process = start(f"{COUNTING}wait(1)\nos._exit(130)\n")
  assert line(process) == "ready"
  process.send_signal(signal.SIGINT)
  assert finish(process) == (130, "")


def test_garbage_in_the_pipe(start):
  process = start(
    "os.set_blocking(reporter._fd, True)\n"
    "word = {'kind': 'done', 'rank': 1, 'round': 1, 'timeout': 1, 'code': 1}\n"
    "wrong = [{'kind': 'x'}, {'rank': []}, {'rank': {}}, {'round': 1e999}]\n"
    "wrong += [{'round': None}, {'round': 'x'}, {'timeout': float('nan')}]\n"
    "wrong += [{'timeout': -1}, {'timeout': 'x'}, {'kind': []}]\n"
    "wrong += [{'code': c} for c in (256, -1, None, 'x', [], 10**400)]\n"
    "lines = [json.dumps(word | change).encode() for change in wrong]\n"
    "lines += [b'', b'\\xff\\0', b'3', b'{}', b'[' * 50000, b'x' * 300000]\n"
    "for line in lines:\n"
    "  line += b'\\n'\n"
    "  while line: line = line[os.write(reporter._fd, line):]\n"
    "reporter.done(4)\n"
  )
  assert finish(process) == (4, "")


def test_what_a_worker_starts_is_no_worker(start):
  program = (
    "import os, sys; from fedjax_sim.distributed.supervisor import Reporter\n"
    "assert Reporter.from_environment() is None\n"
    "try: os.fstat(int(sys.argv[1]))\n"
    "except OSError: sys.exit(9)\n"
  )
  process = start(
    f"program = {program!r}\n"
    "command = [sys.executable, '-c', program, str(reporter._fd)]\n"
    "reporter.done(subprocess.call(command, close_fds=False))\n"
  )
  assert finish(process) == (9, "")


def test_a_fork_may_keep_the_pipe(start):
  """The worker's end counts, not that of the pipe."""
  process = start(
    "if (child := os.fork()) == 0:\n"
    "  os.close(1); os.close(2); time.sleep(600)\n"
    "print(child, flush=True)\n"
    "os.kill(os.getpid(), signal.SIGKILL)\n"
  )
  child = int(line(process))
  try:
    code, err = finish(process)
  finally:
    os.kill(child, signal.SIGKILL)
  assert code == 75
  assert "SIGKILL" in err


@pytest.mark.parametrize("closed", ["<&-", "<&- >&- 2>&-", "2>&-"])
def test_closed_streams(start, closed):
  assert finish(start("reporter.done(5)\n", closed=closed)) == (5, "")
  code, err = finish(start("os.abort()\n", closed=closed))
  assert code == 75
  assert ("SIGABRT" in err) == ("2>" not in closed)


def test_a_line_of_its_own_in_a_terminal(start, monkeypatch):
  """Whoever is killed leaves a bar without an end, and no cursor."""
  monkeypatch.setenv("TERM", "xterm")
  ours, theirs = pty.openpty()
  process = start(
    "assert sys.stderr.isatty()\n"
    "sys.stderr.write('round 3/10'); sys.stderr.flush(); os.abort()\n",
    stderr=theirs,
  )
  os.close(theirs)
  assert process.wait(ENDS) == 75
  shown = b""
  try:
    while read := os.read(ours, 4096):
      shown += read
  except OSError:  # how Linux ends it
    pass
  os.close(ours)
  assert shown.startswith(b"round 3/10\x1b[?25h\r\nfedjax-sim: rank 2 stopped")


def test_no_reporter_without_a_parent(monkeypatch, tmp_path):
  monkeypatch.delenv(supervisor.REPORT_FD, raising=False)
  assert supervisor.Reporter.from_environment() is None
  with (tmp_path / "file").open("w") as file:
    for text in ("", "x", "-1", "1" * 30, str(file.fileno())):
      monkeypatch.setenv(supervisor.REPORT_FD, text)
      assert supervisor.Reporter.from_environment() is None
      assert supervisor.REPORT_FD not in os.environ
    file.write("whose number it is by chance")


def test_a_command_that_does_not_start(tmp_path):
  handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
  missing = str(tmp_path / "missing")
  with pytest.raises(FileNotFoundError, match="missing"):
    supervisor.supervise([missing], timeout=60.0, rank="0")
  assert handlers == [
    signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)
  ]


def test_nothing_but_the_standard_library():
  code = (
    "import sys\n"
    "before = set(sys.modules)\n"
    "from fedjax_sim.distributed import launcher, supervisor\n"
    "worker = 'from fedjax_sim.distributed.supervisor import Reporter as R;'\n"
    "worker += 'R.from_environment().done(0)'\n"
    "command = [sys.executable, '-c', worker]\n"
    "assert supervisor.supervise(command, timeout=60.0, rank='0') == 0\n"
    "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
    "assert new - sys.stdlib_module_names == {'fedjax_sim'}, new\n"
    "assert not {'jax', 'numpy'} & set(sys.modules)\n"
  )
  subprocess.run(
    [sys.executable, "-c", code], env=environment(), check=True, timeout=ENDS
  )
