"""Several local processes as one command: what they get, how they end."""

import os
import pathlib
import signal
import sys

import pytest

from fedjax_sim.distributed import cpu, launcher

pytestmark = pytest.mark.integration

ROOT = pathlib.Path(__file__).parents[1]
ENDS = 60  # seconds, on a busy machine, for what takes a moment

LAUNCHER = """\
import sys
from fedjax_sim.distributed.launcher import launch
sys.exit(launch(int(sys.argv[1]), ["run", "--a=1", "--b"], grace=0.5,
                program=[sys.executable, "-c", sys.argv[2]]))
"""
PROCESS = """\
import os, pathlib, signal, socket, sys, time
assert sys.argv[1] == "run" and sys.argv[3:] == ["--a=1", "--b"], sys.argv
address, rank, count = sys.argv[2].removeprefix("--distributed=").split(",")
host, port = address.split(":")
rank, count, port = int(rank), int(count), int(port)
def say(word): os.write(2, f"{rank} {word}\\n".encode())  # in one piece
def wait(condition):
  while not condition(): time.sleep(0.01)
def gone(file):
  try: os.kill(int(file.read_text() or os.getpid()), 0)
  except (FileNotFoundError, ProcessLookupError) as error:
    return isinstance(error, ProcessLookupError)
"""
# So that nothing is left of a test that fails.
FOLLOW = """\
import select, threading
def follow():
  select.select([int(os.environ["FEDJAX_SIM_LAUNCHER_FD"])], [], [])
  os._exit(9)
threading.Thread(target=follow, daemon=True).start()
"""


@pytest.fixture
def start(tmp_path, popen):
  """Launches processes that run some code."""

  def call(processes, code, *, follow=FOLLOW, **variables):
    environment = {k: v for k, v in os.environ.items() if "FEDJAX_SIM" not in k}
    return popen(
      [sys.executable, "-c", LAUNCHER, str(processes), PROCESS + follow + code],
      cwd=tmp_path,
      env=environment | {"PYTHONPATH": str(ROOT)} | variables,
    )

  return call


def finish(process):
  """Exit code, output, and lines of the standard error, sorted.

  Both streams have then ended: no process is left that could write to them.
  """
  out, err = process.communicate(timeout=ENDS)
  return process.returncode, out, sorted(err.splitlines())


def lines(process, count):
  """The next lines of the standard error, sorted."""
  return sorted(process.stderr.readline().strip() for _ in range(count))


def test_all_end_well(start):
  process = start(
    3,
    "assert host == '127.0.0.1' and count == 3 and not sys.stdin.read()\n"
    "print('output', rank)\n"
    "say(os.environ['FEDJAX_SIM_CPU_DEVICES'])\n",
  )
  share = max(1, cpu.count() // 3)
  code, out, err = finish(process)
  assert (code, out) == (0, "output 0\n")
  assert err == [f"{rank} {share}" for rank in range(3)]


def test_the_users_number_of_devices_counts(start):
  code = "say(os.environ['FEDJAX_SIM_CPU_DEVICES'])\n"
  process = start(2, code, FEDJAX_SIM_CPU_DEVICES="7")
  assert finish(process) == (0, "", ["0 7", "1 7"])


def test_process_0_can_take_the_port(start):
  """As JAX's server does."""
  process = start(
    2,
    "if rank == 0:\n"
    "  server = socket.socket(socket.AF_INET6)\n"
    "  server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)\n"
    "  server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)\n"
    "  server.bind(('::', port)); server.listen()\n"
    "  print(server.accept()[0].recv(9).decode())\n"
    "def connected():\n"
    "  try: socket.create_connection((host, port)).sendall(b'hello')\n"
    "  except ConnectionRefusedError: return False\n"
    "  return True\n"
    "if rank == 1: wait(connected)\n",
  )
  assert finish(process) == (0, "hello\n", [])


def test_the_first_failure_counts_and_the_others_are_stopped(start):
  process = start(3, "if rank == 1: sys.exit(2)\ntime.sleep(600)\n")
  assert finish(process) == (2, "", [])


def test_who_does_not_stop_is_killed(start):
  process = start(
    2,
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "file = pathlib.Path('ready')\n"
    "if rank == 1: wait(file.exists); os.kill(os.getpid(), signal.SIGKILL)\n"
    "file.touch()\n"
    "time.sleep(600)\n",
  )
  assert finish(process) == (137, "", [])


@pytest.mark.parametrize(("one", "other"), [(1, 75), (75, 1), (2, 2)])
def test_the_others_may_notice_by_themselves(start, one, other):
  """Process 0 does when process 1 is gone and waited for."""
  process = start(
    2,
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "file, met = pathlib.Path('process'), pathlib.Path('met')\n"
    "if rank == 1:\n"
    "  file.write_text(str(os.getpid())); wait(met.exists)\n"
    f"  sys.exit({one})\n"
    "met.touch()\n"
    "wait(lambda: gone(file))\n"
    f"sys.exit({other})\n",
  )
  assert finish(process) == (one, "", [])


def test_one_that_ends_well_is_no_reason_to_stop(start):
  code = "if rank: sys.exit(0)\ntime.sleep(1.5)\nprint('whole')\n"
  assert finish(start(2, code)) == (0, "whole\n", [])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_each_once(start, number):
  """Ctrl-C in a terminal is sent to the whole process group."""
  process = start(
    2,
    "seen = []\n"
    f"signal.signal({int(number)}, lambda number, _: seen.append(number))\n"
    "say('ready')\n"
    "wait(lambda: seen)\n"
    "time.sleep(1.5 if rank == 0 else 0)\n"  # saves, for longer than the grace
    "say(len(seen))\n"
    "sys.exit(128 + seen[0])\n",
  )
  assert lines(process, 2) == ["0 ready", "1 ready"]
  os.killpg(process.pid, number)
  assert finish(process) == (128 + number, "", ["0 1", "1 1"])


def test_a_second_signal_is_passed_on(start):
  process = start(
    2,
    "seen = []\n"
    "signal.signal(signal.SIGTERM, lambda *_: seen.append(1))\n"
    "for i in range(2): say(i); wait(lambda: len(seen) > i)\n",
  )
  for i in range(2):
    assert lines(process, 2) == [f"0 {i}", f"1 {i}"]
    process.send_signal(signal.SIGTERM)
  assert finish(process) == (0, "", [])


def test_workers_do_not_outlive_the_launcher(start):
  """Whose parents have sessions of their own and go on without it."""
  worker = (
    "import os, signal, sys, time\n"
    "from fedjax_sim.distributed.supervisor import Reporter\n"
    "reporter, rank = Reporter.from_environment(), sys.argv[1]\n"
    "def save(*_):\n"
    "  os.write(2, f'{rank} saved\\n'.encode())\n"
    "  reporter.done(143); sys.exit(143)\n"
    "signal.signal(signal.SIGTERM, save)\n"
    "os.write(2, f'{rank} ready\\n'.encode())\n"
    "time.sleep(600)\n"
  )
  process = start(
    2,
    "from fedjax_sim.distributed.supervisor import supervise\n"
    f"command = [sys.executable, '-c', {worker!r}, str(rank)]\n"
    "sys.exit(supervise(command, timeout=60.0, rank=str(rank)))\n",
    follow="",
  )
  assert lines(process, 2) == ["0 ready", "1 ready"]
  process.kill()
  assert finish(process) == (-signal.SIGKILL, "", ["0 saved", "1 saved"])


def test_a_program_that_does_not_start(tmp_path):
  missing = str(tmp_path / "missing")
  with pytest.raises(FileNotFoundError, match="missing"):
    launcher.launch(2, ["run"], program=[missing])


@pytest.mark.parametrize(
  ("statuses", "code"),
  [
    ([], 0),
    ([0, 0], 0),
    ([0, -9], 137),
    ([75, 1], 1),
    ([2, 75], 2),
    ([0, 75], 75),
  ],
)
def test_ends_at_the_same_time(statuses, code):
  """What can be corrected comes before what the others then have."""
  assert launcher._first(statuses) == code


@pytest.mark.parametrize(
  "arguments",
  [
    ["--processes=4", "--", "run", "--config=a", "--"],
    ["--processes=4", "run", "--config=a", "--"],
    ["--processes", "4", "--", "run", "--config=a", "--"],
    ["--processes", "4", "run", "--config=a", "--"],
  ],
)
def test_arguments(arguments):
  assert launcher.parse(arguments) == (4, ("run", "--config=a", "--"))


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    ("", ["--processes=... is missing", "launch --processes=4 -- run"]),
    ("run --processes=2", ["--processes=... is missing", "first"]),
    ("--processes", ["--processes= ", "whole number >= 1"]),
    ("--processes run", ["--processes=run", "whole number >= 1"]),
    ("--processes=-1 run", ["--processes=-1", "whole number >= 1"]),
    ("--processes=1.5 run", ["--processes=1.5", "whole number >= 1"]),
    ("--processes=² run", ["--processes=²", "whole number >= 1"]),
    ("--processes=0 -- run", ["--processes=0", "number >= 1"]),
    ("--processes=100000 -- run", ["--processes=100000", "at most"]),
    ("--processes=2", ["command is missing", "-- run"]),
    ("--processes=2 -- describe --a", ["'describe'", "'run'"]),
    ("--processes=2 run --distributed=auto", ["'--distributed=auto'", "leave"]),
    ("--processes=2 run --distributed auto", ["'--distributed'", "leave"]),
    ("--processes=2 run -distributed=x", ["'-distributed=x'", "leave"]),
  ],
)
def test_wrong_arguments(arguments, words):
  with pytest.raises(ValueError, match="give|Give|leave") as caught:
    launcher.parse(arguments.split())
  text = str(caught.value)
  assert all(word in text for word in words), text
  assert "\n" not in text


def test_wrong_calls():
  with pytest.raises(ValueError, match="--processes=0"):
    launcher.launch(0, ["run"])
  with pytest.raises(ValueError, match="'list'"):
    launcher.launch(2, ["list"])
