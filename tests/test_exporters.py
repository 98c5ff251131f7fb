"""Exported files: what importers read of them, and what other libraries do."""

import json
import subprocess
import sys

import h5py
import numpy as np
import pytest

from fedjax_sim.data import FederatedData, exporters, importers, open_store
from fedjax_sim.data.store import rewrite

RNG = np.random.default_rng(0)
SIZES = [3, 1, 5]
NAMES = ("user é", "b", "c d")
DATA = FederatedData(
  examples={
    "x": RNG.normal(size=(9, 2, 3)).astype(np.float32),
    "y": RNG.integers(0, 4, 9).astype(np.int32),
  },
  offsets=np.cumsum([0, *SIZES]),
  names=NAMES,
)
IMPORTERS = {
  **importers.IMPORTERS,
  "npz": lambda path: importers.npz(path, client="client"),
  "parquet": lambda path: importers.parquet(path, client="client"),
}
SUFFIXES = {
  "fedjax_sqlite": "sqlite",
  "flute_hdf5": "hdf5",
  "leaf_json": "json",
  "npz": "npz",
  "parquet": "parquet",
  "tff_hdf5": "h5",
}


@pytest.mark.parametrize("block", [1, 2**24])
@pytest.mark.parametrize("format", exporters.EXPORTERS)
def test_there_and_back(tmp_path, monkeypatch, format, block):
  monkeypatch.setattr(rewrite, "BLOCK", block)
  file, told = tmp_path / f"a.{SUFFIXES[format]}", []
  exporters.export(DATA, file, format, lambda *so_far: told.append(so_far))
  assert told[-1] == (format, 3, 9)
  assert list(tmp_path.iterdir()) == [file]
  importers.import_store(tmp_path / "s", {"train": IMPORTERS[format](file)})
  found = open_store(tmp_path / "s").train
  # HDF5 sorts the names of its groups
  names = [found.client_name(i) for i in range(3)]
  assert sorted(names) == sorted(NAMES)
  for i, name in enumerate(NAMES):
    one, other = DATA.client(i), found.client(names.index(name))
    for field, values in one.items():
      assert other[field].dtype == values.dtype
      np.testing.assert_array_equal(other[field], values)


def test_leaf_is_leaf(tmp_path):
  file = tmp_path / "a.json"
  exporters.export(DATA, file, "leaf_json")
  held = json.loads(file.read_text())
  assert held["users"] == list(NAMES)
  assert held["num_samples"] == SIZES
  assert held["user_data"]["b"]["y"] == DATA.client(1)["y"].tolist()


def test_flute_finds_labels_where_it_looks(tmp_path):
  file = tmp_path / "a.hdf5"
  exporters.export(DATA, file, "flute_hdf5")
  with h5py.File(file) as held:
    assert [name.decode() for name in held["users"]] == list(NAMES)
    assert held["num_samples"][()].tolist() == SIZES
    assert held["user_data_label/b"][()].tolist() == [DATA.client(1)["y"][0]]
    assert held["user_data/b/x"].shape == (1, 2, 3)


@pytest.mark.integration
@pytest.mark.parametrize("format", exporters.EXPORTERS)
def test_a_full_disk(tmp_path, format):
  """In a process of its own: no file may be larger than some bytes."""
  code = f"""
import pathlib, resource, signal
import numpy as np
from fedjax_sim.data import FederatedData
from fedjax_sim.data.exporters import export
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
x = np.random.default_rng(0).normal(size=(9, 20, 64))
clients = {{f"c{{i}}": {{"x": x[i]}} for i in range(9)}}
data = FederatedData.from_clients(clients)
try:
  export(data, pathlib.Path("a"), {format!r})
except OSError as error:
  print(error)
"""
  done = subprocess.run(
    [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  assert "cannot write a: " in done.stdout
  assert not any(tmp_path.iterdir())


def test_what_is_refused(tmp_path):
  file = tmp_path / "a"
  with pytest.raises(ValueError, match="format='tff' is unknown. Did you mean"):
    exporters.export(DATA, file, "tff")
  with pytest.raises(FileNotFoundError, match="There is no folder"):
    exporters.export(DATA, tmp_path / "no" / "a", "npz")
  named = FederatedData.from_clients({"a/b": DATA.client(0)})
  for format in ("tff_hdf5", "flute_hdf5"):
    with pytest.raises(ValueError, match="'a/b' cannot name a group of HDF5"):
      exporters.export(named, file, format)
  odd = FederatedData.from_clients({"a": {"z": np.zeros(1)}})
  with pytest.raises(ValueError, match="holds x and y, and there are z"):
    exporters.export(odd, file, "leaf_json")
  assert not any(tmp_path.iterdir())
  zeros = FederatedData.from_clients({"a\0": DATA.client(0)})
  for format in ("npz", "tff_hdf5"):
    with pytest.raises(ValueError, match=r"Client 'a\\x00'"):
      exporters.export(zeros, file, format)
  names = FederatedData.from_clients({"a": {"client": np.zeros(1)}})
  for format in ("npz", "parquet"):
    with pytest.raises(ValueError, match="The field 'client' would be in the"):
      exporters.export(names, file, format)
  assert not any(tmp_path.iterdir())
  file.write_text("mine")
  with pytest.raises(FileExistsError, match="is there already"):
    exporters.export(DATA, file, "npz")
  assert file.read_text() == "mine"
