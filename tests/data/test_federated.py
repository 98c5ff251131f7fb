"""Federated data: its checks, its methods, and the splits."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedjax_sim.data import (
  FederatedData,
  FederatedDataset,
  batch_steps,
  check_labels,
  from_bytes,
  make_dataset,
  split_clients,
  split_off_clients,
)
from fedjax_sim.data.loaders import cifar10


def of_sizes(sizes, names=None, allow_empty=False):
  """Clients of these sizes; example k is k, its label k % 3."""
  count = sum(sizes)
  return FederatedData(
    examples={
      "x": np.arange(count, dtype=np.float32)[:, None],
      "y": np.arange(count, dtype=np.int32) % 3,
    },
    offsets=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
    names=names,
    allow_empty=allow_empty,
  )


def rows(data):
  return data.examples["x"][:, 0].astype(int).tolist()


SIZES = st.lists(st.integers(1, 6), min_size=1, max_size=8)
SEEDS = st.integers(0, 2**64 - 1)


def test_properties():
  data = of_sizes([2, 3], ("a", "b"))
  assert (data.num_clients, data.num_examples) == (2, 5)
  np.testing.assert_array_equal(data.sizes, [2, 3])
  assert data.sizes.dtype == np.int64
  assert data.client_name(1) == "b"
  assert of_sizes([1]).client_name(0) == "client 0"
  np.testing.assert_array_equal(data.owner_of([0, 1, 2, 4]), [0, 0, 1, 1])


def test_client_is_a_view():
  data = of_sizes([2, 3])
  np.testing.assert_array_equal(data.client(1)["x"][:, 0], [2, 3, 4])
  assert np.shares_memory(data.client(1)["x"], data.examples["x"])
  with pytest.raises(ValueError, match="client=2 is out of range"):
    data.client(2)


@given(sizes=SIZES, pick=st.randoms(use_true_random=False))
def test_select_equals_a_loop(sizes, pick):
  data = of_sizes(sizes, tuple(f"c{i}" for i in range(len(sizes))))
  ids = pick.sample(range(len(sizes)), pick.randint(1, len(sizes)))
  chosen = data.select(ids)
  assert chosen.names == tuple(f"c{i}" for i in ids)
  for new, old in enumerate(ids):
    for field, array in data.client(old).items():
      np.testing.assert_array_equal(chosen.client(new)[field], array)


@pytest.mark.parametrize(
  ("ids", "error", "match"),
  [
    ([0, 2], ValueError, "client 2; ids go from 0 to 1"),
    ([-1], ValueError, "client -1"),
    ([1, 1], ValueError, "client 1 2 times"),
    ([True, False], TypeError, "bool"),
    ([0.0], TypeError, "float64"),
    ([], ValueError, "at least one client"),
  ],
)
def test_select_refuses(ids, error, match):
  with pytest.raises(error, match=match):
    of_sizes([1, 1]).select(ids)


def test_at_least():
  data = of_sizes([1, 3, 2])
  np.testing.assert_array_equal(data.at_least(2).sizes, [3, 2])
  assert data.at_least(1) is data
  with pytest.raises(ValueError, match=r"min_examples=4 leaves no .* 3 exampl"):
    data.at_least(4)


def test_pooled_is_one_client():
  data = of_sizes([1, 3, 2], ("a", "b", "c")).pooled()
  np.testing.assert_array_equal(data.sizes, [6])
  assert data.names is None


def with_(data=None, **changes):
  return dataclasses.replace(data or of_sizes([2, 3]), **changes)


def with_x(x):
  return with_(examples={"x": x, "y": np.zeros(5, np.int32)})


@pytest.mark.parametrize(
  ("x", "error", "match"),
  [
    ([1.0] * 5, TypeError, "'x' is a list; give a numpy array"),
    (np.zeros(5, object), TypeError, "object, which would need unpickling"),
    (np.array(list("abcde")), TypeError, "dtype <U1; give native"),
    (np.zeros(5, ">f4"), TypeError, "dtype >f4; give native"),
    (np.zeros(5, complex), TypeError, "complex128"),
    (np.ones(()), ValueError, "'x' is a single number"),
    (np.zeros(4), ValueError, "'x' has 4 examples, field 'y' 5"),
  ],
)
def test_refuses_arrays(x, error, match):
  with pytest.raises(error, match=match):
    with_x(x)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_names_where_a_value_is_not_finite(bad):
  x = np.zeros((5, 2), np.float32)
  x[3, 1] = bad
  match = rf"'x' of client 1 \('b'\), example 1 holds {bad}; remove"
  with pytest.raises(ValueError, match=match):
    with_(of_sizes([2, 3], ("a", "b")), examples={"x": x})


@pytest.mark.parametrize(
  ("changes", "error", "match"),
  [
    ({"examples": {}}, ValueError, "no field; give at least one"),
    ({"offsets": [0, 5]}, TypeError, "offsets is list; give"),
    ({"offsets": np.array([0, 5], np.int32)}, TypeError, "offsets is int32"),
    ({"offsets": np.array([0])}, ValueError, "at least one client"),
    ({"offsets": np.array([[0, 5]])}, ValueError, r"shape \(1, 2\)"),
    ({"offsets": np.array([1, 5])}, ValueError, "from 1 to 5; let them"),
    ({"offsets": np.array([0, 4])}, ValueError, "number of examples, 5"),
    (
      {"offsets": np.array([0, 3, 2, 5])},
      ValueError,
      "fall from 3 to 2 at client 1",
    ),
    (
      {"offsets": np.array([0, 2, 2, 5])},
      ValueError,
      "client 1 has no examples; .*drop_empty=True .*data.min_examples",
    ),
    (
      {"offsets": np.array([0, 5, 5]), "names": ("a", "b")},
      ValueError,
      r"client 1 \('b'\) has no examples",
    ),
    ({"names": ("a",)}, ValueError, "1 entries for 2 clients"),
    ({"names": ("a", "a")}, ValueError, "calls clients 0 and 1 'a'"),
    ({"names": ("a", 1)}, TypeError, "1 for client 1; give strings"),
  ],
)
def test_refuses(changes, error, match):
  with pytest.raises(error, match=match):
    with_(**changes)


def test_from_clients():
  clients = {"a": {"x": [[1, 2]]}, "b": {"x": [[3, 4], [5, 6]]}}
  data = FederatedData.from_clients(clients)
  assert data.names == ("a", "b")
  np.testing.assert_array_equal(data.examples["x"], [[1, 2], [3, 4], [5, 6]])
  unnamed = FederatedData.from_clients(iter(clients.values()))
  assert unnamed.names is None
  np.testing.assert_array_equal(unnamed.offsets, data.offsets)


def test_from_clients_without_the_empty():
  nothing: list[list[int]] = []
  clients = {"a": {"x": nothing}, "b": {"x": [[3, 4]]}}
  with pytest.raises(ValueError, match=r"client 0 \('a'\) has no examples"):
    FederatedData.from_clients(clients)
  data = FederatedData.from_clients(clients, drop_empty=True)
  assert data.names == ("b",)


@pytest.mark.parametrize(
  ("clients", "match"),
  [
    ([], "no client with examples"),
    ([{"x": [1], "y": [1, 2]}], "client 0: field 'x' has 1 .* 'y' 2"),
    ([{"x": [[1], [1, 2]]}], "client 0: field 'x' is no array"),
    ([{"x": [1]}, {"x": [1.5]}], "client 1: one 'x' is float64 .* int64"),
    ([{"x": [1]}, {"x": [[1]]}], r"client 1: one 'x' is .* shape \(1,\)"),
    ([{"x": [1]}, {"z": [1]}], r"client 1 has fields \['z'\], client 0"),
  ],
)
def test_from_clients_refuses(clients, match):
  with pytest.raises(ValueError, match=match):
    FederatedData.from_clients(clients)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.uint64])
def test_from_assignment_is_stable(dtype):
  owners = np.array([1, 0, 1, 3], dtype)
  data = FederatedData.from_assignment(
    {"x": np.arange(4)}, owners, names="abcd", drop_empty=True
  )
  assert data.names == ("a", "b", "d")
  np.testing.assert_array_equal(data.examples["x"], [1, 0, 2, 3])
  np.testing.assert_array_equal(data.sizes, [1, 2, 1])


@pytest.mark.parametrize(
  ("owners", "keywords", "error", "match"),
  [
    ([0.0, 1.0], {}, TypeError, "client_of has dtype float64"),
    ([0], {}, ValueError, r"shape \(1,\) for 2 examples"),
    ([0, -1], {}, ValueError, "client_of holds -1; give numbers from 0 to 0"),
    ([0, 2], {"num_clients": 2}, ValueError, "holds 2; .* from 0 to 1"),
    ([0, 2], {}, ValueError, "client 1 has no examples"),
    ([0, 1], {"names": ["a"]}, ValueError, "holds 1"),
    ([0, 0], {"num_clients": 1, "names": "ab"}, ValueError, "2 entries for 1"),
  ],
)
def test_from_assignment_refuses(owners, keywords, error, match):
  with pytest.raises(error, match=match):
    FederatedData.from_assignment({"x": np.arange(2)}, owners, **keywords)


def test_check_labels():
  data = of_sizes([2, 3], ("a", "b"))
  check_labels(data, "y", 3)
  match = r"'y' of client 1 \('b'\), example 0 holds label 2; .* from 0 to 1"
  with pytest.raises(ValueError, match=match):
    check_labels(data, "y", 2)
  with pytest.raises(TypeError, match="'x' is float32; give .* or num_cl"):
    check_labels(data, "x", 2)
  with pytest.raises(ValueError, match="field='z' is unknown"):
    check_labels(data, "z", 2)
  tokens = with_(data, examples={"y": np.array([[0, 1]] * 4 + [[0, -1]])})
  with pytest.raises(ValueError, match="example 2 holds label -1"):
    check_labels(tokens, "y", 2)


# --- splits -------------------------------------------------------------------


@given(
  sizes=st.lists(st.integers(2, 9), min_size=1, max_size=8),
  fraction=st.floats(0.3, 1),
  seed=SEEDS,
)
def test_split_clients_covers_every_client_once(sizes, fraction, seed):
  data = of_sizes(sizes)
  train, held = split_clients(data, fraction, seed)
  assert train.num_clients == held.num_clients == len(sizes)
  for i in range(len(sizes)):
    kept, out, all_ = (
      d.client(i)["x"][:, 0].tolist() for d in (train, held, data)
    )
    assert kept
    assert kept == sorted(kept)
    assert sorted(kept + out) == all_
    assert len(out) == min(round(fraction * len(all_)), len(all_) - 1)


def test_split_clients_depends_on_the_seed_alone():
  data = of_sizes([20, 30])
  first, again, other = (split_clients(data, 0.5, seed) for seed in (0, 0, 1))
  assert rows(first[1]) == rows(again[1]) != rows(other[1])


def test_split_clients_keeps_names_and_lets_clients_be_empty():
  train, held = split_clients(of_sizes([1, 4], ("a", "b")), 0.5, 0)
  np.testing.assert_array_equal(held.sizes, [0, 2])
  assert held.allow_empty
  assert not train.allow_empty
  assert train.names == held.names == ("a", "b")


def test_split_clients_refuses():
  with pytest.raises(ValueError, match=r"heldout_fraction=0.1 holds out noth"):
    split_clients(of_sizes([1, 3]), 0.1, 0)
  with pytest.raises(ValueError, match=r"data.heldout_fraction=0.0 is out of"):
    split_clients(of_sizes([3]), 0, 0)
  with pytest.raises(ValueError, match=r"data\.seed=-1 is out of range"):
    split_clients(of_sizes([3]), 0.5, -1)


@given(sizes=SIZES.filter(lambda sizes: len(sizes) > 1), seed=SEEDS)
def test_split_off_clients_moves_whole_clients(sizes, seed):
  names = tuple(map(str, range(len(sizes))))
  data = of_sizes(sizes, names)
  seen, unseen = split_off_clients(data, 1, seed)
  assert unseen.num_clients == 1
  assert sorted([*(seen.names or ()), *(unseen.names or ())]) == sorted(names)
  assert sorted(rows(seen) + rows(unseen)) == rows(data)
  assert rows(seen) == sorted(rows(seen))


def test_split_off_a_fraction():
  data = of_sizes([1] * 10)
  assert split_off_clients(data, 0.25, 0)[1].num_clients == 2
  assert split_off_clients(data, 0.01, 0)[1].num_clients == 1
  assert split_off_clients(data, 3, 0)[1].num_clients == 3
  assert split_off_clients(data, 1.0, 0)[1].num_clients == 1


@pytest.mark.parametrize(
  ("amount", "error", "match"),
  [
    (3, ValueError, "data.unseen_clients=3 is out of range; .* from 1 to 2"),
    (1.5, TypeError, "data.unseen_clients=1.5 is a float"),
    (3.0, ValueError, "from 1 to 2"),
    (-0.5, ValueError, "data.unseen_clients=-0.5"),
    (True, TypeError, "is a bool"),
    ("2", ValueError, "='2': there is no client '2'. There are"),
    (None, TypeError, "data.unseen_clients"),
    ((1,), TypeError, "data.unseen_clients"),
  ],
)
def test_split_off_refuses(amount, error, match):
  with pytest.raises(error, match=match):
    split_off_clients(of_sizes([1, 1, 1]), amount, 0)


def test_split_off_needs_two_clients():
  with pytest.raises(ValueError, match="needs 2 clients or more"):
    split_off_clients(of_sizes([3]), 1, 0)


# --- data sets ----------------------------------------------------------------


def dataset(**changes):
  fields = {
    "name": "test",
    "train": of_sizes([2, 3]),
    "num_classes": 3,
    "example_shape": (1,),
  }
  return FederatedDataset(**fields | changes)


def test_all_splits():
  labelled = of_sizes([1, 0], allow_empty=True)
  data = dataset(splits={"labelled": labelled})
  assert data.all_splits == {"train": data.train, "labelled": labelled}


TEST = {"x": np.zeros((4, 1), np.float32), "y": np.arange(4, dtype=np.int32)}


@pytest.mark.parametrize(
  ("changes", "match"),
  [
    ({"num_classes": -1}, "num_classes=-1 is out of range"),
    ({"num_classes": 2}, "train: field 'y' of client 1, .* label 2"),
    ({"test": TEST}, "test: field 'y' of client 0, example 3 holds label 3"),
    ({"test": {"x": TEST["x"]}}, r"test has fields \['x'\], train"),
    ({"test": {}}, "test: there is no field"),
    (
      {"test": TEST | {"x": np.zeros((4, 2), np.float32)}},
      r"test: one 'x' is float32 of shape \(2,\), in train float32 of shape",
    ),
    ({"example_shape": (2,)}, r"example_shape=\(2,\) but .* shape \(1,\)"),
    ({"seen": of_sizes([1])}, "seen has 1 clients, train 2; give the same"),
    ({"splits": {"extra": of_sizes([1])}}, r"splits\['extra'\] has 1 clients"),
    ({"splits": {"train": of_sizes([1, 1])}}, "splits holds 'train'"),
    ({"seen": of_sizes([1, 1], ("a", "b"))}, "the same clients, names and"),
  ],
)
def test_dataset_refuses(changes, match):
  with pytest.raises(ValueError, match=match):
    dataset(**changes)


def test_labels_may_be_no_classes():
  assert dataset(num_classes=0).num_classes == 0


def test_make_dataset_splits_everything_once():
  data = of_sizes([1, 4, 5, 6], ("a", "b", "c", "d"))
  made = make_dataset(
    "test",
    data,
    num_classes=3,
    heldout_fraction=0.5,
    unseen_clients=1,
    min_examples=2,
  )
  assert made.train.num_clients == 2
  assert made.seen
  assert made.unseen
  assert made.train.names == made.seen.names
  parts = rows(made.train) + rows(made.seen) + rows(made.unseen)
  assert sorted(parts) == rows(data)[1:]


def test_make_dataset_without_splits():
  data = of_sizes([1, 4])
  made = make_dataset("test", data, num_classes=3)
  assert made.train is data
  assert (made.seen, made.unseen, made.test) == (None, None, None)


PREPARES = [
  from_bytes,
  cifar10.prepare,
  batch_steps.prepare_numbers,
  batch_steps.prepare_ids,
]


@pytest.mark.parametrize("prepare", PREPARES)
@pytest.mark.parametrize(
  ("given_", "got"),
  [("uint8", "int32"), ("int64", "int32"), ("float32", "float32")],
)
def test_labels_are_prepared_alike(prepare, given_, got):
  x = np.full((2, 4, 4, 3), 51, np.uint8)
  y = np.array([1, 2], given_)
  ready = prepare({"x": x, "y": y, "weight": y})
  assert (ready["y"].dtype, ready["weight"].dtype) == (got, given_)
  np.testing.assert_array_equal(ready["y"], y)


@pytest.mark.parametrize("prepare", PREPARES)
def test_inputs_without_labels_are_prepared(prepare):
  x = np.full((2, 4, 4, 3), 51, np.uint8)
  assert set(prepare({"x": x})) == {"x"}
