"""Data that a server has itself, and labels that are random."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedjax_sim.data import (
  load_digits,
  make_dataset,
  split_off_clients,
  with_few_labels,
  with_random_labels,
  with_server_data,
)
from problems import blobs, quadratic_data


def server_of(data):
  assert data.server is not None
  return data.server


def rows(examples):
  return sorted(tuple(x.ravel()) for x in examples["x"])


@given(
  st.lists(st.integers(1, 6), min_size=2, max_size=9),
  st.integers(1, 8),
  st.integers(0, 3),
)
def test_the_servers_examples_are_those_of_whole_clients(sizes, amount, seed):
  data = blobs(sizes)
  if amount >= len(sizes):
    with pytest.raises(ValueError, match=r"data\.server_clients"):
      with_server_data(data, amount, seed)
    return
  found = with_server_data(data, amount, seed)
  assert found.train.num_clients == len(sizes) - amount
  both = rows(found.train.examples) + rows(server_of(found))
  assert sorted(both) == rows(data.train.examples)
  again = with_server_data(data, amount, seed)
  np.testing.assert_array_equal(server_of(again)["x"], server_of(found)["x"])


def test_seeds_give_the_server_other_clients():
  data = blobs([3] * 20)
  one, other = (server_of(with_server_data(data, 5, seed)) for seed in (0, 1))
  assert not np.array_equal(one["x"], other["x"])


def test_the_servers_clients_are_gone_from_the_held_out_ones_too():
  base = blobs([5, 6, 7, 8])
  data = make_dataset("b", base.train, num_classes=3, heldout_fraction=0.4)
  found = with_server_data(data, 2)
  assert data.seen is not None
  assert found.seen is not None
  assert found.train.num_clients == found.seen.num_clients == 2
  held = {
    tuple(rows(data.train.client(i))): rows(data.seen.client(i))
    for i in range(4)
  }
  for i in range(2):
    own = tuple(rows(found.train.client(i)))
    assert rows(found.seen.client(i)) == held[own]


def test_clients_by_name():
  """Those who are named move, in the data's order, whatever the seed."""
  data = blobs([4, 5, 6])
  named = dataclasses.replace(data.train, names=("ann", "bob", "7"))
  names: Any
  for names in (("7", "ann"), ["ann", "7", "ann"]):
    left, moved = split_off_clients(named, names, 3)
    assert (left.names, moved.names) == (("bob",), ("ann", "7"))
    np.testing.assert_array_equal(
      moved.examples["x"],
      np.concatenate([named.client(i)["x"] for i in (0, 2)]),
    )
  assert split_off_clients(named, "bob", 0)[1].names == ("bob",)
  whole = dataclasses.replace(data, train=named)
  assert len(server_of(with_server_data(whole, ("bob",)))["x"]) == 5
  unnamed = data.train
  assert split_off_clients(unnamed, "client 1", 0)[1].num_examples == 5
  for names, error, told in (
    (
      ("ann", "bob", "7"),
      ValueError,
      r"data\.unseen_clients=.* names all clients",
    ),
    (("bop",), ValueError, "there is no client 'bop'. Did you mean 'bob'"),
    ((7,), TypeError, "data.unseen_clients"),
  ):
    with pytest.raises(error, match=told):
      split_off_clients(named, names, 0)


def test_the_server_takes_no_clients_of_splits():
  data = with_few_labels(blobs([5, 5, 5]), 0.4)
  with pytest.raises(ValueError, match=r"data\.server_clients=1 does not go"):
    with_server_data(data, 1)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=9), st.floats(0, 1))
def test_only_the_labels_of_the_chosen_change(sizes, fraction):
  data = blobs(sizes)
  found, chosen = with_random_labels(data, fraction, 1)
  assert len(chosen) == round(fraction * len(sizes))
  np.testing.assert_array_equal(
    found.train.examples["x"], data.train.examples["x"]
  )
  for i in range(len(sizes)):
    before, after = data.train.client(i)["y"], found.train.client(i)["y"]
    assert after.dtype == before.dtype
    if i not in chosen:
      np.testing.assert_array_equal(before, after)


def test_the_chosen_get_labels_of_all_classes():
  data = load_digits(num_clients=10)
  found, chosen = with_random_labels(data, 0.5)
  hit = np.concatenate([found.train.client(i)["y"] for i in chosen])
  true = np.concatenate([data.train.client(i)["y"] for i in chosen])
  counts = np.bincount(hit, minlength=10)
  assert counts.min() > 0.6 * len(hit) / 10
  assert 0.05 < np.mean(hit == true) < 0.16
  assert not np.array_equal(chosen, np.arange(5))


def test_random_labels_are_refused():
  with pytest.raises(ValueError, match=r"data\.random_label_clients=1\.5"):
    with_random_labels(blobs([3]), 1.5)
  lines = dataclasses.replace(quadratic_data(np.ones((2, 1))))
  with pytest.raises(ValueError, match="are no classes"):
    with_random_labels(lines, 0.5)
  words = blobs([3, 2])
  several = {**words.train.examples, "y": np.ones((5, 4), np.int32)}
  words = dataclasses.replace(
    words, train=dataclasses.replace(words.train, examples=several)
  )
  with pytest.raises(ValueError, match="several labels"):
    with_random_labels(words, 0.5)


# --- few labels ---------------------------------------------------------------


@given(
  st.lists(st.integers(1, 30), min_size=1, max_size=9),
  st.floats(0.01, 1),
  st.integers(0, 3),
)
def test_every_example_is_labelled_or_not(sizes, fraction, seed):
  data = blobs(sizes)
  wanted = [max(round(fraction * n), 1) for n in sizes]
  if wanted == sizes:
    with pytest.raises(ValueError, match="leaves nothing unlabelled"):
      with_few_labels(data, fraction, seed)
    return
  found = with_few_labels(data, fraction, seed)
  assert found.train is data.train
  labelled, rest = (found.splits[k] for k in ("labelled", "unlabelled"))
  assert labelled.sizes.tolist() == wanted
  for i in range(len(sizes)):
    one, two, all_ = (d.client(i) for d in (labelled, rest, data.train))
    assert sorted(rows(one) + rows(two)) == rows(all_)
    for field in all_:
      assert one[field].dtype == two[field].dtype == all_[field].dtype
    at = [np.flatnonzero((all_["x"] == x).all(1))[0] for x in one["x"]]
    assert at == sorted(at)  # their order stays
    np.testing.assert_array_equal(all_["y"][at], one["y"])
  again = with_few_labels(data, fraction, seed).splits["labelled"]
  np.testing.assert_array_equal(again.examples["x"], labelled.examples["x"])


def test_seeds_label_other_examples():
  data = blobs([30] * 4)
  one, other = (with_few_labels(data, 0.3, s).splits for s in (0, 1))
  assert rows(one["labelled"].examples) != rows(other["labelled"].examples)
  held = make_dataset("b", data.train, num_classes=3, heldout_fraction=0.3)
  assert held.seen is not None
  assert not np.array_equal(
    held.seen.examples["x"], one["labelled"].examples["x"]
  )


def test_few_labels_are_refused():
  data = blobs([4, 4])
  for fraction in (0.0, 1.5, -0.1, float("nan")):
    with pytest.raises(ValueError, match=r"data\.labelled_fraction="):
      with_few_labels(data, fraction)
  with pytest.raises(ValueError, match="has a split 'labelled' already"):
    with_few_labels(with_few_labels(data, 0.5), 0.5)
  with pytest.raises(
    ValueError, match=r"=1\.0 leaves .* client has 4 examples"
  ):
    with_few_labels(data, 1.0)


def test_a_server_set_has_to_fit():
  data = blobs([3, 3])
  wrong = {"x": np.zeros((2, 5), np.float32), "y": np.zeros(2, np.int32)}
  with pytest.raises(ValueError, match="server"):
    dataclasses.replace(data, server=wrong)
