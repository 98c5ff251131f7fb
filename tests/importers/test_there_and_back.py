"""Whatever export writes, import reads, with equal content."""

import itertools
import pathlib
import tempfile

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedjax_sim.data import FederatedData, exporters, importers, open_store
from fedjax_sim.data.importers import hdf5
from fedjax_sim.data.importers.fields import DTYPES

# What a store takes: any text that is UTF-8.
NAMES = st.text(st.characters(codec="utf-8"), max_size=8)
TABLES = ("npz", "parquet")


@st.composite
def clients(draw):
  """Clients with fields of any dtype and shape, and their names."""
  names = draw(st.lists(NAMES, min_size=1, max_size=3, unique=True))
  sizes = draw(
    st.lists(st.integers(1, 3), min_size=len(names), max_size=len(names))
  )
  examples = {}
  for field in draw(st.sampled_from([("x",), ("x", "y")])):
    shape = draw(st.lists(st.integers(1, 3), max_size=2))
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    whole = st.integers(0, 100)
    entries = {
      "f": st.floats(width=16, allow_nan=False, allow_infinity=False),
      "b": st.booleans(),
    }.get(dtype.kind, whole)
    examples[field] = draw(
      hnp.arrays(dtype, (sum(sizes), *shape), elements=entries)
    )
  return FederatedData(
    examples=examples, offsets=np.cumsum([0, *sizes]), names=names
  )


def one(name, **fields):
  """A client of a single example."""
  examples = {k: np.asarray([v]) for k, v in fields.items()}
  return FederatedData(
    examples=examples, offsets=np.array([0, 1]), names=[name]
  )


def exported(data, file, format):
  """Writes the file, or returns why not."""
  try:
    exporters.export(data, file, format)
  except ValueError as error:
    return str(error)
  return ""


@pytest.fixture(scope="module", autouse=True)
def in_this_process():
  """HDF5 is read here, as a process for each of many files takes long."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      hdf5, "apart", lambda files, _, read: itertools.chain(*map(read, files))
    )
    yield


@pytest.mark.parametrize("format", exporters.EXPORTERS)
@settings(max_examples=15)
@given(data=clients())
@example(data=one("", x=1.0))
@example(data=one(".", x=1.0))
@example(data=one("a/b\0", x=1.0))
@example(data=one("a.item", x=[[True]], y=0.0))
def test_equal_content(format, data):
  with tempfile.TemporaryDirectory() as folder:
    file = pathlib.Path(folder) / "file"
    refused = exported(data, file, format)
    if refused:  # HDF5 and .npz have no room for some names
      assert "give another format" in refused
      assert not file.exists()
      assert format in ("npz", "tff_hdf5", "flute_hdf5")
      assert any({"/", "\0"} & {*n} or n in ("", ".") for n in data.names)
      return
    given = {"client": "client"} if format in TABLES else {}
    source = importers.IMPORTERS[format](file, **given)
    dtypes = {k: v.dtype.name for k, v in data.examples.items()}
    store = pathlib.Path(folder) / "s"
    importers.import_store(
      store, {"train": source}, dtypes=dtypes, num_classes=0
    )
    found = open_store(store).train
    places = {found.client_name(i): i for i in range(found.num_clients)}
    assert {*places} == {*data.names}
    for i, name in enumerate(data.names):
      held = found.client(places[name])
      assert held.keys() == data.examples.keys()
      for field, values in data.client(i).items():
        assert held[field].dtype == values.dtype
        np.testing.assert_array_equal(held[field], values)
