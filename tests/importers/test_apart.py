"""A reader in a process of its own: what it gives, and how it may end."""

import functools
import os
import pathlib
import signal
import struct
import sys

import numpy as np
import pytest
import writers

from fedjax_sim.data.importers import import_store, isolated
from fedjax_sim.data.importers.blocks import Block

pytestmark = pytest.mark.integration

FILE, OTHER = pathlib.Path("some.h5"), pathlib.Path("other.h5")


def reads(last, file):
  """Two clients, then what `last` does."""
  for name in ("a", "b"):
    x = np.arange(6.0).reshape(3, 2)
    yield Block(str(file), [name], [3], {"x": x, "t": np.array(["é"], object)})
  last()


def raises():
  raise ValueError("some.h5: client 'c': no.")


class Odd(Exception):
  def __init__(self, one, two):
    super().__init__(f"{one} and {two}")


def raises_oddly():
  raise Odd(1, 2)


def leaves():
  os._exit(3)


def loops():
  while True:
    pass


def prints():
  print("a library's words")
  os.write(1, b"from C")


def dies(by):
  os.kill(os.getpid(), by)


def blocks(last):
  return isolated.apart([FILE], "HDF5", functools.partial(reads, last))


def test_gives_what_the_reader_gives(capfd):
  found = list(blocks(prints))
  for one, other in zip(found, reads(prints, FILE), strict=False):
    assert (one.where, one.names, one.sizes) == other[:3]
    np.testing.assert_array_equal(one.examples["x"], other.examples["x"])
    assert one.examples["t"].tolist() == ["é"]
    one.examples["x"] += 1  # it may be written to, as what is read here
  assert [b.names for b in found] == [["a"], ["b"]]
  assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
  ("last", "error", "says"),
  [
    (raises, ValueError, "some.h5: client 'c': no."),
    (raises_oddly, RuntimeError, "Odd: 1 and 2"),
    (leaves, ChildProcessError, "some.h5: .*exit status 3"),
    (
      functools.partial(dies, signal.SIGTERM),
      ChildProcessError,
      "some.h5: after client 'b' .*signal 15",
    ),
    (
      functools.partial(dies, signal.SIGSEGV),
      ValueError,
      "some.h5 cannot be read as HDF5: after client 'b' .*SIGSEGV.* damaged",
    ),
    (
      functools.partial(dies, signal.SIGKILL),
      MemoryError,
      "some.h5: after client 'b' .*memory ran out",
    ),
  ],
)
def test_its_end_is_an_error_of_the_file(last, error, says):
  with pytest.raises(error, match=says):
    list(blocks(last))


def test_an_error_tells_where_it_was():
  with pytest.raises(ValueError, match="client 'c'") as caught:
    list(blocks(raises))
  assert "in raises\n" in caught.value.__notes__[0]


def crashes_in_the_second(file):
  last = functools.partial(dies, signal.SIGSEGV) if file == OTHER else prints
  yield from reads(last, file)


def test_one_process_reads_all_files():
  found = list(
    isolated.apart([FILE, FILE], "HDF5", functools.partial(reads, prints))
  )
  assert [b.names for b in found] == [["a"], ["b"]] * 2
  with pytest.raises(ValueError, match="other.h5 cannot .* after client 'b'"):
    list(isolated.apart([FILE, OTHER], "HDF5", crashes_in_the_second))


@pytest.mark.parametrize("name", ["pickle", "struct"])
def test_takes_no_module_from_the_working_folder(tmp_path, monkeypatch, name):
  (tmp_path / f"{name}.py").write_text("raise SystemExit('not this one')")
  monkeypatch.chdir(tmp_path)
  assert len(list(blocks(prints))) == 2


@pytest.mark.parametrize("how", ["ignored", "blocked"])
def test_its_time_ends_whatever_it_inherits(monkeypatch, how):
  monkeypatch.setattr(isolated, "LIMIT", 0.5)
  before = signal.getsignal(signal.SIGPROF)
  if how == "ignored":
    signal.signal(signal.SIGPROF, signal.SIG_IGN)
  else:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGPROF])
  try:
    with pytest.raises(ValueError, match="within 0.5 s"):
      list(blocks(loops))
  finally:
    signal.signal(signal.SIGPROF, before)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])


def test_an_interpreter_that_does_not_start(monkeypatch):
  monkeypatch.setattr(sys, "executable", "/bin/false")
  with pytest.raises(
    ChildProcessError, match="some.h5: before .* exit status 1"
  ):
    list(blocks(prints))


def test_ends_what_computes_for_too_long(monkeypatch):
  monkeypatch.setattr(isolated, "LIMIT", 0.5)
  with pytest.raises(ValueError, match="after client 'b' .* within 0.5 s"):
    list(blocks(loops))


def test_stops_with_who_asks(monkeypatch):
  started = []
  popen = isolated.subprocess.Popen

  def kept(*args, **options):
    started.append(popen(*args, **options))
    return started[-1]

  monkeypatch.setattr(isolated.subprocess, "Popen", kept)
  read = blocks(loops)
  assert next(read).names == ["a"]
  read.close()
  assert started[0].returncode == -signal.SIGKILL


def test_a_library_that_loops_leaves_no_store(tmp_path, monkeypatch):
  """An object of HDF5's global heap whose size wraps round to none."""
  x, y = np.zeros((2, 3), np.float32), np.zeros(2, int)
  name, _, write, _ = writers.WRITERS["flute_hdf5"]
  file = tmp_path / name
  source = write(file, x, y, np.array(["u0", "u1"]))
  data = bytearray(file.read_bytes())
  first = data.index(b"GCOL") + 16
  data[first + 8 : first + 16] = struct.pack("<q", -16)
  file.write_bytes(data)
  monkeypatch.setattr(isolated, "LIMIT", 1.0)
  with pytest.raises(ValueError, match="hdf5 cannot .*before its first client"):
    import_store(tmp_path / "s", {"train": source})
  assert sorted(tmp_path.iterdir()) == [file]
