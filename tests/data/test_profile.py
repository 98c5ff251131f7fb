"""The profile of a data set: its clients' sizes and labels."""

import dataclasses
import json

import numpy as np
import pytest

from fedjax_sim.data import FederatedData, make_dataset
from fedjax_sim.data.profile import class_counts, profile_of, spread


def data_of(labels, **options):
  """A data set whose clients have these labels."""
  clients = {
    f"c{i}": {"x": np.zeros((len(y), 2), np.float32), "y": np.asarray(y)}
    for i, y in enumerate(labels)
  }
  given = FederatedData.from_clients(clients)
  return make_dataset("mine", given, **{"num_classes": 3, **options})


def test_sizes_and_labels():
  """Client 0 has class 0 alone, of all labels a half: distance a half."""
  profile = profile_of(data_of([[0, 0], [1, 2], [0, 0], [1, 2]]))
  assert json.loads(json.dumps(profile)) == profile
  assert profile["name"] == "mine"
  assert profile["classes"] == 3
  assert profile["test"] == 0
  assert profile["sets"] == {
    "train": {"clients": 4, "examples": 8, "sizes": [[2, 4]]}
  }
  labels = profile["labels"]
  assert labels["clients"] == 4
  assert labels["skew"] == pytest.approx(0.5)
  assert labels["shown"][1] == {"name": "c1", "size": 2, "counts": [0, 1, 1]}


def test_clients_alike_have_no_skew():
  assert profile_of(data_of([[0, 1, 2]] * 3))["labels"]["skew"] == 0


def test_held_out_and_unseen_clients_are_sets():
  labels = [[0, 1] * (5 + i) for i in range(6)]
  data = data_of(labels, heldout_fraction=0.2, unseen_clients=2)
  profile = profile_of(data)
  for name in ("train", "seen", "unseen"):
    part, sizes = profile["sets"][name], getattr(data, name).sizes
    assert part["clients"] == len(sizes)
    assert part["examples"] == sizes.sum()
    pairs = np.asarray(part["sizes"])
    assert np.repeat(*pairs.T).tolist() == sorted(sizes.tolist())


def test_a_test_set_is_counted():
  data = data_of([[0, 1], [1, 2]])
  test = {"x": np.zeros((7, 2), np.float32), "y": np.zeros(7, int)}
  assert profile_of(dataclasses.replace(data, test=test))["test"] == 7


def test_without_classes_there_are_no_labels():
  clients = {"a": {"x": np.zeros((2, 1)), "y": np.array([0.5, 1.5])}}
  data = make_dataset(
    "lines", FederatedData.from_clients(clients), num_classes=0
  )
  assert profile_of(data)["labels"] is None


def test_of_many_clients_some_are_shown():
  profile = profile_of(data_of([[i % 3] for i in range(3000)]))
  labels = profile["labels"]
  assert labels["clients"] == 1000
  assert len(labels["shown"]) == 60
  assert labels["shown"][-1]["name"] == "c2999"
  assert labels["skew"] == pytest.approx(2 / 3, rel=0.03)
  assert profile["sets"]["train"]["sizes"] == [[1, 3000]]


def test_labels_of_sequences_are_counted_one_by_one():
  clients = {
    "a": {"x": np.zeros((2, 3)), "y": np.array([[0, 1, 1], [2, 1, 0]])}
  }
  counts = class_counts(FederatedData.from_clients(clients), np.array([0]), 3)
  assert counts.tolist() == [[2, 3, 1]]


@pytest.mark.parametrize(("clients", "most"), [(1, 60), (60, 60), (100, 7)])
def test_clients_are_spread_evenly(clients, most):
  chosen = spread(clients, most)
  assert len(chosen) == min(clients, most)
  assert chosen[0] == 0
  assert chosen[-1] == clients - 1
