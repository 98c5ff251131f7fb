"""Damaged files: a clear error, or a store of what the file says; never half.

`pytest -m slow tests/importers/test_fuzz.py` tries many more.
"""

import contextlib
import pathlib
import tempfile

import datasets
import numpy as np
import pytest
import writers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedjax_sim.data import open_store, verify
from fedjax_sim.data.importers import import_store, isolated

FILES = {
  name: writer
  for name, writer in writers.WRITERS.items()
  if name not in ("examples", "datasets (save_to_disk)")
}
HUB = "datasets (streamed)"  # takes a second to give up
RNG = np.random.default_rng(1)
ROWS = {"npz": 20_000}  # so that what is read first has no checksum yet


def rows(count):
  """x, y and owner of so many examples, those of a client in a row."""
  x = RNG.random((count, 3)).astype(np.float32)
  owner = np.array(sorted(f"u{i}" for i in RNG.integers(0, 3, count)))
  return x, RNG.integers(0, 3, count), owner


datasets.disable_progress_bars()


@pytest.fixture(scope="module", autouse=True)
def patience():
  """Seconds that the library of HDF5 may compute, of so small a file."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(isolated, "LIMIT", 5.0)
    yield


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  """Format -> its file, the file's bytes, and what reads it."""
  folder = tmp_path_factory.mktemp("written")
  found = {}
  for i, (format, (name, _, write, _)) in enumerate(FILES.items()):
    (folder / str(i)).mkdir()
    file = folder / str(i) / name
    source = write(file, *rows(ROWS.get(format, 9)))
    if file.is_dir():
      file = next(file.iterdir())
    found[format] = (file, file.read_bytes(), source)
  return found.__getitem__  # a dict would be printed whole


@st.composite
def damages(draw):
  """What happens to a file's bytes: a function."""
  kind = draw(st.sampled_from(["cut", "flip", "insert", "remove", "repeat"]))
  # Where the structure is: often near one of the ends.
  place = draw(st.floats(0, 1, exclude_max=True))
  place = draw(st.sampled_from([place, place**4, 1 - place**4]))
  length = draw(st.integers(1, 40))
  junk = draw(st.binary(min_size=1, max_size=8))

  def damage(data: bytes) -> bytes:
    at = min(int(place * len(data)), len(data) - 1)
    if kind == "cut":
      return data[:at]
    if kind == "flip":
      flipped = bytes(a ^ b for a, b in zip(data[at:], junk, strict=False))
      return data[:at] + flipped + data[at + len(flipped) :]
    if kind == "insert":
      return data[:at] + junk + data[at:]
    if kind == "remove":
      return data[:at] + data[at + length :]
    return data[:at] + data[at : at + length] + data[at:]

  return damage


def try_damaged(written, format, damage):
  file, whole, source = written(format)
  with tempfile.TemporaryDirectory() as folder:
    store = pathlib.Path(folder) / "s"
    try:
      file.write_bytes(damage(whole))
      with contextlib.suppress(ValueError, TypeError):
        import_store(store, {"train": source})
        verify(store)
        assert open_store(store).train.num_examples
        return
      assert not any(pathlib.Path(folder).iterdir())
    finally:
      file.write_bytes(whole)


CHECKS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@pytest.mark.integration
@pytest.mark.parametrize("format", sorted({*FILES} - {HUB}))
@settings(max_examples=15, suppress_health_check=CHECKS)
@given(damage=damages())
def test_damaged(written, format, damage):
  try_damaged(written, format, damage)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("format", sorted({*FILES} - {HUB}))
@settings(max_examples=2000, suppress_health_check=CHECKS)
@given(damage=damages())
def test_damaged_often(written, format, damage):
  try_damaged(written, format, damage)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=100, suppress_health_check=CHECKS)
@given(damage=damages())
def test_damaged_parts_of_a_data_set(written, damage):
  try_damaged(written, HUB, damage)
