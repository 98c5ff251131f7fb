"""Loaders: the registry's contract, the digits, a user's own file."""

import inspect
import re
import sys

import numpy as np
import pytest
from sklearn import datasets

from fedjax_sim.data import DATASETS, load_digits, load_npz


def arrays(**changes):
  fields = {
    "x": np.arange(12, dtype=np.float32).reshape(6, 2),
    "y": np.array([0, 1, 2, 0, 1, 2], np.uint8),
    "client": np.array(["bo", "al", "bo", "al", "bo", "cy"]),
  }
  return fields | changes


@pytest.fixture
def save(tmp_path, monkeypatch):
  monkeypatch.delenv("FEDJAX_SIM_DATA", raising=False)

  def write(**changes):
    path = tmp_path / "mine.npz"
    kept = {k: v for k, v in arrays(**changes).items() if v is not None}
    np.savez_compressed(path, **kept)
    return path

  return write


@pytest.mark.parametrize("name", DATASETS)
def test_every_loader_takes_the_shared_keywords(name):
  parameters = inspect.signature(DATASETS[name]).parameters
  shared = {"path", "heldout_fraction", "min_examples", "seed"}
  if name != "mnist_writers":  # its unseen clients are given
    shared.add("unseen_clients")
  assert shared <= set(parameters)
  kinds = {p.kind for p in parameters.values()}
  assert kinds <= {
    inspect.Parameter.KEYWORD_ONLY,
    inspect.Parameter.VAR_KEYWORD,
  }


# --- digits -------------------------------------------------------------------


@pytest.mark.parametrize(
  ("partition", "options"),
  [
    ("dirichlet", {"alpha": 0.1}),
    ("iid", {}),
    ("shards", {"shards_per_client": 3}),
    ("power_law", {"exponent": 2.0}),
  ],
)
def test_digits(partition, options):
  data = load_digits(
    num_clients=50,
    partition=partition,
    heldout_fraction=0.2,
    unseen_clients=0.1,
    min_examples=5,
    **options,
  )
  assert data.seen
  assert data.unseen
  assert data.test
  assert (data.name, data.num_classes, data.example_shape) == (
    "digits",
    10,
    (64,),
  )
  assert data.train.num_clients == data.seen.num_clients == 45
  assert data.unseen.num_clients == 5
  assert data.unseen.sizes.min() >= 5
  x, y = data.train.examples["x"], data.train.examples["y"]
  assert (str(x.dtype), str(y.dtype)) == ("float32", "int32")
  assert (x.min(), x.max()) == (0, 1)
  parts = [data.train.examples, data.seen.examples, data.unseen.examples]
  assert sum(len(part["y"]) for part in [*parts, data.test]) == 1797


def test_digits_are_scikit_learns():
  data = load_digits(num_clients=1, partition="iid")
  assert data.test
  ours = np.concatenate(
    [
      np.concatenate([part["x"] * 16, part["y"][:, None]], axis=1)
      for part in (data.train.examples, data.test)
    ]
  )
  pixels, labels = datasets.load_digits(return_X_y=True)
  theirs = np.concatenate([pixels, labels[:, None]], axis=1)
  assert ours.shape == theirs.shape == (1797, 65)
  order, same = np.lexsort(ours.T), np.lexsort(theirs.T)
  np.testing.assert_array_equal(ours[order], theirs[same])


def test_digits_test_set_is_stratified_and_apart_from_the_partition():
  one, two = load_digits(), load_digits(num_clients=10, partition="iid")
  other = load_digits(seed=1)
  assert one.test
  assert two.test
  assert other.test
  np.testing.assert_array_equal(one.test["x"], two.test["x"])
  counts = np.bincount(one.test["y"])
  every = counts + np.bincount(one.train.examples["y"])
  np.testing.assert_array_equal(counts, np.rint(0.2 * every))
  assert (one.test["x"] != other.test["x"]).any()


def test_digits_refuses_unknown_options():
  with pytest.raises(ValueError, match=r"not take 'alhpa'. Did you"):
    load_digits(alhpa=0.1)


def test_digits_needs_scikit_learn(monkeypatch):
  monkeypatch.setitem(sys.modules, "sklearn", None)
  with pytest.raises(ImportError, match="pip install scikit-learn"):
    load_digits()


# --- npz ----------------------------------------------------------------------


def test_npz(save):
  test = {
    "test_x": np.ones((2, 2), np.float32),
    "test_y": np.array([0, 3], np.uint8),
  }
  data = load_npz(path=save(**test))
  assert data.test
  assert (data.name, data.num_classes, data.example_shape) == ("mine", 4, (2,))
  assert data.train.names == ("al", "bo", "cy")
  np.testing.assert_array_equal(data.train.client(1)["x"][:, 0], [0, 4, 8])
  np.testing.assert_array_equal(data.test["y"], [0, 3])


def test_npz_splits(save):
  data = load_npz(
    path=save(client=np.array([7, 7, 7, -1, -1, 3])),
    heldout_fraction=0.5,
    unseen_clients=1,
    min_examples=2,
    seed=1,
  )
  assert data.seen
  assert data.unseen
  assert {data.train.names, data.unseen.names} == {("7",), ("-1",)}
  assert data.seen.names == data.train.names


def test_npz_counts_classes_only_of_integers(save):
  y = np.linspace(0, 1, 6)
  assert load_npz(path=save(y=y)).num_classes == 0
  assert load_npz(path=save(), num_classes=0).num_classes == 0
  assert load_npz(path=save(), num_classes=9).num_classes == 9


@pytest.mark.parametrize(
  ("changes", "error", "match"),
  [
    ({"client": None}, ValueError, "lacks client; it holds x, y. Write it"),
    ({"test_x": np.ones((1, 2))}, ValueError, "lacks test_y; it holds client"),
    (
      {"test_X": np.ones(1)},
      ValueError,
      "'test_X' is unknown. .*: client, test_x",
    ),
    ({"y": np.array(list("abcabc"))}, TypeError, "'y' has dtype <U1"),
    ({"x": np.zeros(6, object)}, ValueError, "objects, which would need unp"),
    ({"y": np.zeros((6, 1), int)}, ValueError, r"write y=y\[:, 0\]"),
    (
      {"y": np.eye(3, dtype=int)[[0, 1, 2, 0, 1, 2]]},
      ValueError,
      "one-hot; write y=y.argmax",
    ),
    (
      {k: np.zeros(0, int) for k in ("x", "y", "client")},
      ValueError,
      "x has no examples",
    ),
    ({"x": np.float32(1)}, ValueError, "'x' is a single number"),
    (
      {"y": np.eye(6), "num_classes": 6},
      TypeError,
      "'y' is float64; give integer labels, or num_classes=0 instead of 6",
    ),
    ({"client": np.int64(1)}, TypeError, r"int64 and shape \(\)"),
    ({"x": np.zeros(5)}, ValueError, "'x' has 5 examples, field 'y' 6"),
    ({"client": np.zeros(5, int)}, ValueError, r"shape \(5,\) for 6 examples"),
    ({"client": np.zeros(6)}, TypeError, "Client keys have dtype float64"),
    (
      {"y": np.arange(-1, 5)},
      ValueError,
      r"client 1 \('bo'\), .* holds label -1",
    ),
  ],
)
def test_npz_refuses(save, changes, error, match):
  options = {k: v for k, v in changes.items() if k == "num_classes"}
  arrays = {k: v for k, v in changes.items() if k not in options}
  with pytest.raises(error, match=match):
    load_npz(path=save(**arrays), **options)


@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.6, 0.99])
def test_npz_refuses_a_truncated_file(save, share):
  path = save()
  whole = path.read_bytes()
  path.write_bytes(whole[: int(share * len(whole))])
  with pytest.raises(ValueError, match=r"cannot be read: .*It is damaged"):
    load_npz(path=path)


def test_npz_refuses_or_reads_right_what_a_flipped_byte_leaves(save):
  path = save()
  whole = path.read_bytes()
  expected = load_npz(path=path).train.examples
  for i in range(len(whole)):
    path.write_bytes(whole[:i] + bytes([whole[i] ^ 0xFF]) + whole[i + 1 :])
    try:
      read = load_npz(path=path).train.examples
    except ValueError as error:
      assert re.search(f"{path}.*(damaged|lacks)", str(error))  # noqa: PT017
    else:
      for field, array in expected.items():
        np.testing.assert_array_equal(read[field], array)


def test_npz_refuses_other_files(tmp_path):
  text, single = tmp_path / "a.csv", tmp_path / "a.npy"
  text.write_text("1,2\n")
  np.save(single, np.ones(3))
  with pytest.raises(ValueError, match=r"a.csv .*is not .npz"):
    load_npz(path=text)
  with pytest.raises(ValueError, match="holds a single array"):
    load_npz(path=single)
  with pytest.raises(ValueError, match=r"a folder; let data.path name the"):
    load_npz(path=tmp_path)


# --- where it lies ------------------------------------------------------------


def test_location(save, monkeypatch, tmp_path):
  path = save()
  with pytest.raises(
    ValueError, match=r"data.path is not set; .*FEDJAX_SIM_DA"
  ):
    load_npz()
  missing = re.escape(f"{tmp_path / 'no.npz'} (from data.path)")
  with pytest.raises(FileNotFoundError, match=missing):
    load_npz(path=tmp_path / "no.npz")
  monkeypatch.setenv("FEDJAX_SIM_DATA", str(tmp_path))
  assert load_npz(path="mine.npz").name == "mine"
  with pytest.raises(
    FileNotFoundError, match=r"no.npz \(from data.path\) and .*FEDJAX_SIM_DATA"
  ):
    load_npz(path="no.npz")
  monkeypatch.setenv("FEDJAX_SIM_DATA", str(path))
  assert load_npz().name == "mine"
  monkeypatch.setenv("FEDJAX_SIM_DATA", str(tmp_path / "gone"))
  with pytest.raises(FileNotFoundError, match=r"gone \(from FEDJAX_SIM_DATA\)"):
    load_npz()
