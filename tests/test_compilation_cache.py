"""Compiled programs on the disk: found again, whole or not at all, bounded."""

import concurrent.futures
import errno
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedjax_sim.cli import main, start
from fedjax_sim.cli.usage import usage_of
from fedjax_sim.distributed import compilation_cache, supervisor
from fedjax_sim.distributed.compilation_cache import ProgramFiles

DIRECTORY = "jax_compilation_cache_dir"
ROOT = pathlib.Path(__file__).resolve().parents[1]
SMOKE = f"--config={ROOT}/configs/digits_fedavg.py:smoke"
# Prints whether JAX found its programs in the cache.
COUNTED = """
import sys
import jax
from fedjax_sim.cli import main

found = []
jax.monitoring.register_event_listener(lambda name, **_: found.append(name))
code = main.main(sys.argv[1:])
hits = found.count("/jax/compilation_cache/cache_hits")
misses = found.count("/jax/compilation_cache/cache_misses")
print(f"hits={hits} misses={misses}", file=sys.stderr)
sys.exit(code)
"""


@pytest.fixture
def files(tmp_path):
  """Makes a cache, and the list of what it says."""

  def make(most_bytes=2**20):
    said: list[str] = []
    return ProgramFiles(tmp_path / "cache", most_bytes, said.append), said

  return make


def folder(tmp_path):
  return sorted((tmp_path / "cache").iterdir())


def test_what_was_put_is_found(files):
  cache, said = files()
  assert cache.get("a") is None
  cache.put("a", b"program")
  assert files()[0].get("a") == b"program"
  assert not said


def test_the_folder_is_the_users_alone(files, tmp_path):
  cache, _ = files()
  cache.put("a", b"program")
  assert (tmp_path / "cache").stat().st_mode & 0o077 == 0
  assert folder(tmp_path)[0].stat().st_mode & 0o077 == 0


def test_a_folder_of_others_is_not_trusted(tmp_path, monkeypatch):
  (tmp_path / "cache").mkdir()
  (tmp_path / "cache").chmod(0o777)
  with pytest.raises(OSError, match=r"others can write to .*cache, .*chmod"):
    ProgramFiles(tmp_path / "cache")
  (tmp_path / "cache").chmod(0o755)
  ProgramFiles(tmp_path / "cache")
  monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
  with pytest.raises(OSError, match="others"):
    ProgramFiles(tmp_path / "cache")


@given(st.data())
def test_a_damaged_program_is_no_program(tmp_path_factory, data):
  """Whatever byte has another bit, and wherever it is cut."""
  place = tmp_path_factory.mktemp("cache")
  said: list[str] = []
  cache = ProgramFiles(place, 2**20, said.append)
  program = data.draw(st.binary(min_size=1, max_size=100))
  cache.put("a", program)
  (path,) = place.iterdir()
  content = bytearray(path.read_bytes())
  at = data.draw(st.integers(0, len(content) - 1))
  if data.draw(st.booleans()):
    content[at] ^= 1 << data.draw(st.integers(0, 7))
  else:
    del content[at:]
  path.write_bytes(content)
  assert cache.get("a") is None
  assert not path.exists()  # else nothing could be put in its place
  assert len(said) == 1
  assert "damaged" in said[0]
  cache.put("a", program)
  assert cache.get("a") == program


def test_what_was_used_the_longest_ago_is_forgotten(files, tmp_path):
  cache, _ = files(most_bytes=430)  # of 132 each
  for i, key in enumerate("abc"):
    cache.put(key, bytes(100))
    (path,) = (tmp_path / "cache").glob(f"*-{key}")
    os.utime(path, (i, i))
  assert cache.get("a") is not None  # now the last one used
  cache.put("d", bytes(100))
  assert [path.name[-1] for path in folder(tmp_path)] == ["a", "c", "d"]


def test_several_processes_keep_to_the_size(files, tmp_path):
  several = [files(most_bytes=5000)[0] for _ in range(3)]
  for i in range(100):
    several[i % 3].put(str(i), bytes(i % 70))
    assert sum(path.stat().st_size for path in folder(tmp_path)) <= 5000
  assert len(folder(tmp_path)) > 50


def test_the_folder_is_not_looked_through_for_each_program(files, monkeypatch):
  looked, scandir = [], os.scandir

  def counted(path):
    looked.append(path)
    return scandir(path)

  monkeypatch.setattr(os, "scandir", counted)
  cache, _ = files()
  for i in range(100):
    cache.put(str(i), bytes(100))
  assert len(looked) == 1


def test_a_write_that_fails_leaves_nothing(files, tmp_path, monkeypatch):
  def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")

  cache, said = files()
  with monkeypatch.context() as patched:
    patched.setattr(os, "replace", full)
    cache.put("a", b"program")
  assert not folder(tmp_path)
  assert "No space left" in said[0]
  cache.put("a", b"program")
  assert cache.get("a") == b"program"


def test_programs_of_a_folder_that_can_only_be_read_are_found(
  files, monkeypatch
):
  def refuse(*_):
    raise OSError(errno.EROFS, "Read-only file system")

  cache, said = files()
  cache.put("a", b"program")
  monkeypatch.setattr(os, "utime", refuse)
  assert cache.get("a") == b"program"
  assert not said


def test_a_program_under_another_name_is_damaged(files, tmp_path):
  cache, said = files()
  cache.put("a", b"program")
  (path,) = folder(tmp_path)
  path.rename(path.with_name(path.name[:-1] + "b"))
  assert cache.get("b") is None
  assert "damaged" in said[0]


def test_a_program_of_somebody_else_is_not_run(files, monkeypatch):
  cache, said = files()
  cache.put("a", b"program")
  monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
  assert cache.get("a") is None
  assert "somebody else" in said[0]


def test_a_program_larger_than_the_cache_is_not_kept(files, tmp_path):
  cache, said = files(most_bytes=100)
  cache.put("a", bytes(100))
  assert not folder(tmp_path)
  assert not said


def test_threads_write_the_same_program(files, tmp_path):
  cache, said = files()
  program = os.urandom(2**16)
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    for done in [pool.submit(cache.put, "a", program) for _ in range(64)]:
      done.result()
  assert cache.get("a") == program
  assert len(folder(tmp_path)) == 1
  assert not said


def test_trouble_is_one_line(files, tmp_path):
  cache, said = files()
  cache.put("a", b"program")
  (path,) = folder(tmp_path)
  path.unlink()
  path.mkdir()  # cannot be read, nor replaced, also by root
  assert cache.get("a") is None
  cache.put("a", b"program")
  assert len(said) == 1
  assert "cannot be read" in said[0]
  assert start.NO_CACHE in said[0]


def test_other_machines_have_programs_of_their_own(files, monkeypatch):
  files()[0].put("a", b"program")
  monkeypatch.setattr(compilation_cache, "machine", lambda: "another")
  assert files()[0].get("a") is None


def test_fewer_cores_are_another_machine(monkeypatch):
  here = compilation_cache.machine()
  assert compilation_cache.machine() == here
  monkeypatch.setattr(compilation_cache.cpu, "count", lambda: 1000)
  assert compilation_cache.machine() != here


def test_what_xla_takes_for_cores_and_what_compresses_count(monkeypatch):
  monkeypatch.delenv("NPROC", raising=False)
  here = compilation_cache.machine()
  with monkeypatch.context() as patched:
    patched.setenv("NPROC", "1")
    assert compilation_cache.machine() != here
  monkeypatch.setattr(sys, "version_info", (3, 99, 0))
  assert compilation_cache.machine() != here


def test_no_folder_is_one_line(tmp_path, monkeypatch, without_cache):
  (tmp_path / "file").write_bytes(b"")
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
  with pytest.warns(UserWarning, match=r"^no compilation cache: .*XDG_CACHE"):
    compilation_cache.begin()
  assert jnp.add(1, 1) == 2


@pytest.fixture
def without_cache():
  """JAX as users have it, who named no cache of their own."""
  before = jax.config.values[DIRECTORY]
  jax.config.update(DIRECTORY, None)
  yield
  jax.config.update(DIRECTORY, before)


def test_a_cache_of_jaxs_own_is_left_alone(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  assert jax.config.values[DIRECTORY]  # see conftest.py
  compilation_cache.begin()
  assert not list(tmp_path.iterdir())


def test_the_flag_is_taken_out_and_leaves_nothing(monkeypatch):
  monkeypatch.delenv("JAX_ENABLE_COMPILATION_CACHE", raising=False)
  with start.without_cache(["a", start.NO_CACHE, "b"]) as rest:
    assert rest == ["a", "b"]
    assert os.environ["JAX_ENABLE_COMPILATION_CACHE"] == "false"
  assert "JAX_ENABLE_COMPILATION_CACHE" not in os.environ
  with start.without_cache(["a"]) as rest:
    assert rest == ["a"]
    assert "JAX_ENABLE_COMPILATION_CACHE" not in os.environ


@pytest.mark.parametrize("before", [start.NO_CACHE, "--debug"])
def test_a_switch_may_stand_before_the_command(monkeypatch, before):
  monkeypatch.setitem(main.COMMANDS, "list", len)  # of what it is given
  assert main.main([before, "list", "x"]) == 1


@pytest.mark.parametrize("before", [start.NO_CACHE, "--debug"])
def test_a_switch_before_run_leaves_it_supervised(monkeypatch, before):
  arguments = [before, "run", "--distributed=auto"]

  def supervise(command, **_):
    return 7 if command[-3:] == arguments else 1

  monkeypatch.setattr(supervisor, "supervise", supervise)
  assert main.main(arguments) == 7


def test_the_switch_takes_no_value(capsys):
  assert main.main(["list", f"{start.NO_CACHE}=true"]) == 2
  assert f"{start.NO_CACHE}=true: it takes no value" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("command", "named"), [("run", True), ("study", True), ("privacy", False)]
)
def test_help_of_what_compiles_names_the_switch(command, named):
  assert (start.NO_CACHE in usage_of([command, "--help"])) == named


def shell(tmp_path, name, *flags):
  """Runs a config as a user does; returns its digest and what it counted."""
  hidden = "JAX_COMPILATION_CACHE_DIR"
  environment = {k: v for k, v in os.environ.items() if k != hidden}
  environment["XDG_CACHE_HOME"] = str(tmp_path / "home")
  paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
  environment["PYTHONPATH"] = os.pathsep.join(paths)
  workdir = tmp_path / name
  arguments = ["run", SMOKE, f"--workdir={workdir}", *flags]
  done = subprocess.run(
    [sys.executable, "-c", COUNTED, *arguments],
    env=environment,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  summary = json.loads((workdir / "summary.json").read_text())
  *lines, counted = done.stderr.splitlines()
  warned = [line for line in lines if line.startswith("fedjax-sim: warning")]
  return summary["params_digest"], counted, warned


@pytest.mark.integration
def test_the_next_run_compiles_nothing_and_has_the_same_bits(tmp_path):
  programs = tmp_path / "home" / "fedjax_sim" / "programs"
  without = shell(tmp_path, "without", start.NO_CACHE)
  assert not programs.exists()
  digest, counted, _ = cold = shell(tmp_path, "cold")
  assert digest == without[0]
  assert counted.startswith("hits=0 misses=")
  assert not cold[2]
  kept = len(list(programs.iterdir()))
  assert shell(tmp_path, "warm") == (digest, f"hits={kept} misses=0", [])
  for path in programs.iterdir():
    path.write_bytes(path.read_bytes()[:-1])
  _, counted, warned = damaged = shell(tmp_path, "damaged")
  assert damaged[0] == digest
  assert counted == f"hits=0 misses={kept}"
  assert len(warned) == 1
