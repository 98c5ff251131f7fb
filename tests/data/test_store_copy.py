"""Stores with other clients or splits: as the same options give in memory."""

import numpy as np
import pytest

from fedjax_sim.data import (
  FederatedData,
  make_dataset,
  open_store,
  partition_store,
  verify,
  write_store,
)
from fedjax_sim.data.partition import deal
from fedjax_sim.data.store import rewrite

RNG = np.random.default_rng(0)
X = RNG.normal(size=(60, 2)).astype(np.float32)
Y = RNG.integers(0, 4, 60).astype(np.int32)
SIZES = [20, 1, 9, 2, 28]
DATA = make_dataset(
  "data",
  FederatedData(
    examples={"x": X, "y": Y},
    offsets=np.cumsum([0, *SIZES]),
    names=tuple("abcde"),
  ),
  num_classes=4,
  test={"x": X[:3], "y": Y[:3]},
)


@pytest.fixture
def store(tmp_path):
  write_store(tmp_path / "one", DATA)
  return open_store(tmp_path / "one")


def same(found, expected):
  for name in ("train", "seen", "unseen"):
    one, other = getattr(found, name), getattr(expected, name)
    assert (one is None) == (other is None)
    if other is not None:
      np.testing.assert_array_equal(one.offsets, other.offsets)
      for i in range(other.num_clients):
        assert one.client_name(i) == other.client_name(i)
      for field, values in other.examples.items():
        np.testing.assert_array_equal(one.examples[field], values)


@pytest.mark.parametrize("block", [1, 2**24])
@pytest.mark.parametrize(
  "options",
  [
    {"heldout_fraction": 0.3},
    {"unseen_clients": 2, "heldout_fraction": 0.5, "seed": 5},
    {"min_examples": 3, "unseen_clients": 0.3},
  ],
)
def test_splits(tmp_path, monkeypatch, store, options, block):
  monkeypatch.setattr(rewrite, "BLOCK", block)
  told = []
  partition_store(
    tmp_path / "two",
    store,
    progress=lambda *so_far: told.append(so_far),
    vocabulary=["a"],
    **options,
  )
  verify(tmp_path / "two")
  found = open_store(tmp_path / "two")
  same(found, make_dataset("data", DATA.train, num_classes=4, **options))
  assert found.num_classes == 4
  assert found.test is not None
  np.testing.assert_array_equal(found.test["x"], X[:3])
  assert ("train", found.train.num_clients, found.train.num_examples) in told


@pytest.mark.parametrize(
  ("name", "options"),
  [
    ("iid", {}),
    ("dirichlet", {"alpha": 0.3}),
    ("shards", {"shards_per_client": 2}),
    ("power_law", {"exponent": 2.0}),
  ],
)
def test_other_clients(tmp_path, store, name, options):
  partition_store(
    tmp_path / "two",
    store,
    name=name,
    num_clients=6,
    heldout_fraction=0.2,
    seed=3,
    **options,
  )
  dealt = deal(DATA.train.examples, name, 6, 3, **options)
  expected = make_dataset(
    "data", dealt, num_classes=4, heldout_fraction=0.2, seed=3
  )
  same(open_store(tmp_path / "two"), expected)


def test_labels_of_sequences_are_dealt_too(tmp_path):
  rows = FederatedData.from_clients({"a": {"x": X, "y": np.stack([Y, Y], 1)}})
  write_store(tmp_path / "one", make_dataset("data", rows, num_classes=4))
  partition_store(
    tmp_path / "two", open_store(tmp_path / "one"), name="iid", num_clients=7
  )
  assert open_store(tmp_path / "two").train.sizes.tolist() == [9] * 4 + [8] * 3


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"num_clients": 3}, "num_clients is of a partitioner"),
    ({"alpha": 1.0}, "alpha is of a partitioner"),
    ({"name": "iid"}, "partition='iid' needs num_clients"),
    ({"name": "idd", "num_clients": 3}, "'idd' is unknown"),
    ({"name": "iid", "num_clients": 3, "alpha": 1.0}, "alpha"),
    ({"name": "iid", "num_clients": 99}, "needs 99 examples"),
    ({"heldout_fraction": 1.5}, "data.heldout_fraction=1.5"),
    ({"unseen_clients": 5}, "data.unseen_clients=5"),
  ],
)
def test_what_is_refused(tmp_path, store, options, message):
  with pytest.raises(ValueError, match=message):
    partition_store(tmp_path / "two", store, **options)
  assert [file.name for file in tmp_path.iterdir()] == ["one"]


def test_what_is_split_stays_so(tmp_path, store):
  partition_store(tmp_path / "two", store, heldout_fraction=0.2)
  with pytest.raises(ValueError, match="has the split 'seen', so its clients"):
    partition_store(
      tmp_path / "three", open_store(tmp_path / "two"), unseen_clients=1
    )
