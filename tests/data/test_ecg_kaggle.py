"""Kaggle's heartbeats, on small files of the same layout."""

import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim.data import load_ecg_kaggle
from shaped_files import kaggle_heartbeats


@pytest.fixture
def folder(tmp_path):
  kaggle_heartbeats(tmp_path, train=11, test=3)
  return tmp_path


def test_beats_in_stored_order(folder):
  data = load_ecg_kaggle(path=folder, num_clients=4)
  assert (data.num_classes, data.example_shape) == (5, (187, 1))
  assert data.train.sizes.tolist() == [3, 3, 3, 2]
  assert data.test
  found = {"train": data.train.examples, "test": data.test}
  for part, examples in found.items():
    text = (folder / f"mitbih_{part}.csv").read_text().splitlines()
    rows = np.array([line.split(",") for line in text]).astype(float)
    np.testing.assert_allclose(examples["x"][..., 0], rows[:, :-1], rtol=1e-6)
    np.testing.assert_array_equal(examples["y"], rows[:, -1])
    assert [str(examples[k].dtype) for k in "xy"] == ["float32", "uint8"]
  ready = data.prepare({k: jnp.asarray(v) for k, v in data.test.items()})
  assert (ready["x"].dtype, ready["y"].dtype) == (jnp.float32, jnp.int32)


def test_in_a_folder_of_their_own_and_dealt_otherwise(folder, monkeypatch):
  own = folder / "ecg_kaggle"
  own.mkdir()
  for file in folder.glob("*.csv"):
    file.rename(own / file.name)
  monkeypatch.setenv("FEDJAX_SIM_DATA", str(folder))
  data = load_ecg_kaggle(num_clients=5, partition="iid", unseen_clients=2)
  assert data.unseen
  assert (data.train.num_clients, data.unseen.num_clients) == (3, 2)


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ("1.0," * 187 + "5.0", r"mitbih_train.csv: row 2 is of class 5; .* 0 to 4"),
    ("1.0," * 187 + "0.5", "row 2 is of class 0.5"),
    ("1.0," * 187 + "nan", "row 2 is of class nan"),
    ("nan," * 187 + "1.0", "row 2 holds a sample that is NaN"),
    ("1.0," * 187 + "N", r"could not convert string 'N' .*row 1, column 188"),
    ("1.0," * 186 + "1", "the number of columns changed from 188 to 187 at r"),
  ],
)
def test_a_row_that_is_refused(folder, line, message):
  file = folder / "mitbih_train.csv"
  first = file.read_text().splitlines()[0]
  file.write_text(f"{first}\n{line}\n")
  with pytest.raises(ValueError, match=message) as caught:
    load_ecg_kaggle(path=folder, num_clients=2)
  assert "\n" not in str(caught.value)


def test_files_that_are_refused(folder):
  file = folder / "mitbih_train.csv"
  file.write_text("1,2,3\n")
  with pytest.raises(ValueError, match="a row has 3 numbers; give 187 samples"):
    load_ecg_kaggle(path=folder)
  file.write_text("")
  with pytest.raises(ValueError, match=r"mitbih_train.csv is empty"):
    load_ecg_kaggle(path=folder)
  file.unlink()
  with pytest.raises(FileNotFoundError, match="holds no mitbih_train.csv or"):
    load_ecg_kaggle(path=folder)
