"""Stores in a bucket: whole after a copy, or not there."""

import functools
import http.server
import json
import sys
import threading

import fsspec
import numpy as np
import pytest

from fedjax_sim.cli.main import main
from fedjax_sim.data import (
  StoreError,
  StoreWriter,
  copy_store,
  load_store,
  open_store,
  verify,
  vocabulary_of,
)
from fedjax_sim.data.store import bucket, format

RNG = np.random.default_rng(0)


@pytest.fixture
def store(tmp_path):
  with StoreWriter(tmp_path / "store", vocabulary=["a"]) as writer:
    for name, clients in (("train", 3), ("seen", 3), ("test", 1)):
      sizes = RNG.integers(1, 9, clients)
      x = RNG.normal(size=(sizes.sum(), 2)).astype(np.float32)
      names = [f"c{i}" for i in range(clients)]
      writer.split(name).append(names, sizes, {"x": x})
  return tmp_path / "store"


@pytest.fixture
def url(tmp_path):
  """A bucket's folder, of this test alone."""
  memory = fsspec.filesystem("memory")
  yield f"memory://{tmp_path.name}/deep/store"
  memory.store.clear()


class Quiet(http.server.SimpleHTTPRequestHandler):
  def log_message(self, *args):
    pass


def bytes_of(folder):
  return {
    str(f.relative_to(folder)): f.read_bytes()
    for f in folder.rglob("*")
    if f.is_file()
  }


def test_there_and_back(store, url, tmp_path):
  told = []
  copy_store(str(store), url, lambda *args: told.append(args))
  copy_store(url, str(tmp_path / "new" / "copy"))
  assert bytes_of(tmp_path / "new" / "copy") == bytes_of(store)
  verify(tmp_path / "new" / "copy")
  assert vocabulary_of(tmp_path / "new" / "copy") == ("a",)
  train = open_store(store).train
  assert told[0] == ("train", 3, train.num_examples)
  assert [split for split, *_ in told] == ["train", "seen", "test"]
  assert not list((tmp_path / "new").glob(".*"))


def test_from_a_server(store, tmp_path, capsys):
  handler = functools.partial(Quiet, directory=str(tmp_path))
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_port}"
    given = ["data", "copy", f"--to={tmp_path / 'copy'}"]
    assert main([*given, f"--store={base}/store"]) == 0
    assert "3 clients" in capsys.readouterr().out
    assert main([*given[:2], f"--store={base}/no", "--to=x"]) == 2
    assert "/no is no store" in capsys.readouterr().err
    server.shutdown()
  assert bytes_of(tmp_path / "copy") == bytes_of(store)


@pytest.mark.parametrize("file", ["seen/fields/x.npy", "train/offsets.npy"])
@pytest.mark.parametrize("how", ["missing", "flipped", "cut"])
def test_what_is_damaged_leaves_nothing(store, url, tmp_path, file, how):
  copy_store(str(store), url)
  memory = fsspec.filesystem("memory")
  place = f"{url}/{file}"
  whole = bytearray(memory.cat(place))
  whole[-1] ^= 1
  if how == "missing":
    memory.rm(place)
  else:
    memory.pipe(place, bytes(whole if how == "flipped" else whole[:-3]))
  error = FileNotFoundError if how == "missing" else StoreError
  with pytest.raises(error, match=rf"{url}.*{file.partition('/')[0]}"):
    copy_store(url, str(tmp_path / "copy"))
  assert list(tmp_path.iterdir()) == [store]


@pytest.mark.parametrize("name", ["../../../evil.npy", "/evil.npy", "x.npy"])
def test_no_file_leaves_the_folder(store, url, tmp_path, name):
  """A store.json that is sealed, and names files that are no store's."""
  copy_store(str(store), url)
  memory = fsspec.filesystem("memory")
  facts = json.loads(memory.cat(f"{url}/store.json"))
  files = facts["splits"]["train"]["files"]
  files[name] = files["fields/x.npy"]
  facts["sha256"] = format.seal(facts)
  memory.pipe(f"{url}/store.json", json.dumps(facts).encode())
  with pytest.raises(StoreError, match="which is no store's file"):
    copy_store(url, str(tmp_path / "copy"))
  assert list(tmp_path.iterdir()) == [store]


def test_an_upload_that_fails_is_no_store(store, url, tmp_path, monkeypatch):
  files = fsspec.filesystem("memory")
  put = type(files).put_file

  def fails(self, source, place, **options):
    if place.endswith("name_ends.npy"):
      raise RuntimeError("no\nsuch quota")
    return put(self, source, place, **options)

  monkeypatch.setattr(type(files), "put_file", fails)
  with pytest.raises(OSError, match=r"name_ends\.npy cannot .*: no such quota"):
    copy_store(str(store), url)
  monkeypatch.undo()
  with pytest.raises(FileNotFoundError, match="is no store"):
    copy_store(url, str(tmp_path / "copy"))
  copy_store(str(store), url)  # what is left of it is in nobody's way
  with pytest.raises(FileExistsError, match="is a store already"):
    copy_store(str(store), url)


def test_what_is_refused(store, url, tmp_path, monkeypatch):
  with pytest.raises(ValueError, match="one has to be a URL"):
    copy_store(str(store), str(tmp_path / "copy"))
  with pytest.raises(FileExistsError, match="is there already"):
    copy_store(url, str(store))
  with pytest.raises(ValueError, match="nosuch"):
    copy_store("nosuch://a/b", str(tmp_path / "copy"))
  secret = "nosuch://me:hunter2@host/b"
  for source, to in ((secret, "a"), (secret, secret), (str(store), secret)):
    with pytest.raises(ValueError, match=r"nosuch://\*\*\*@host/b") as caught:
      copy_store(source, to)
    assert "hunter2" not in str(caught.value)
  with pytest.raises(ValueError, match=r"--store=nosuch://\*\*\*@host/b --to"):
    open_store(secret)
  for opens in (open_store, verify, vocabulary_of, StoreWriter):
    with pytest.raises(ValueError, match="data copy --store=memory://"):
      opens(url)
  with pytest.raises(ValueError, match="data copy --store=memory://"):
    load_store(path=url)
  monkeypatch.setitem(sys.modules, "fsspec.core", None)
  with pytest.raises(ModuleNotFoundError, match=r"fedjax_sim\[bucket\]"):
    bucket.copy_store(url, str(tmp_path / "copy"))
  assert list(tmp_path.iterdir()) == [store]
