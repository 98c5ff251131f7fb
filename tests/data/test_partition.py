"""Partitioners: every one of the registry keeps the same promises."""

from typing import cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedjax_sim.data.partition import (
  PARTITIONERS,
  by_key,
  dirichlet,
  iid,
  partition,
  power_law,
  shards,
)

OPTIONS: dict[str, list[dict[str, float]]] = {
  "iid": [{}],
  "dirichlet": [{"alpha": alpha} for alpha in (1e-320, 1e-3, 1, 1e6)],
  "shards": [{"shards_per_client": 1}, {}],
  "power_law": [{"exponent": 1.0001}, {}, {"exponent": 100}],
  "stored_order": [{}],
}
CASES = [(name, case) for name in PARTITIONERS for case in OPTIONS[name]]


def table(labels, client_of):
  """Examples of each client and class."""
  counts = np.zeros((client_of.max() + 1, labels.max() + 1), int)
  np.add.at(counts, (client_of, labels), 1)
  return counts


@pytest.mark.parametrize(("name", "options"), CASES)
@given(
  num_clients=st.integers(1, 12),
  least=st.integers(1, 3),
  more=st.integers(0, 40),
  classes=st.integers(1, 6),
  seed=st.integers(0, 2**64 - 1),
)
def test_promises(name, options, num_clients, least, more, classes, seed):
  room = 2 * num_clients * (least + 1) + more  # enough for any shards
  labels = np.random.default_rng(more).integers(-classes, classes, room)
  arguments = (name, labels, num_clients, seed)
  client_of = partition(*arguments, min_examples=least, **options)
  assert client_of.shape == labels.shape
  assert client_of.dtype == np.int64
  sizes = np.bincount(client_of)
  assert len(sizes) == num_clients
  assert sizes.min() >= least
  again = partition(*arguments, min_examples=least, **options)
  np.testing.assert_array_equal(client_of, again)


DRAWN = [case for case in CASES if case[0] != "stored_order"]


@pytest.mark.parametrize(("name", "options"), DRAWN)
def test_seeds_differ(name, options):
  labels = np.arange(200) % 10
  one, two = (partition(name, labels, 10, seed, **options) for seed in (0, 1))
  assert (one != two).any()


def test_clients_in_stored_order_follow_each_other():
  client_of = partition("stored_order", np.zeros(11, int), 4, 0)
  assert client_of.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3]


@pytest.mark.parametrize("name", ["iid", "dirichlet", "stored_order"])
def test_sizes_are_equal(name):
  sizes = np.bincount(partition(name, np.arange(103) % 7, 10, 0))
  assert sorted(sizes) == [10] * 7 + [11] * 3


def test_a_tight_fit():
  labels = np.arange(12) % 5
  for name in ("iid", "dirichlet", "power_law", "stored_order"):
    sizes = np.bincount(partition(name, labels, 4, 0, min_examples=3))
    np.testing.assert_array_equal(sizes, [3] * 4)


def test_alpha_sets_the_skew():
  labels = np.arange(10_000) % 10
  share = [
    (counts.max(axis=1) / counts.sum(axis=1)).mean()
    for counts in (
      table(labels, dirichlet(labels, 100, seed=0, alpha=alpha))
      for alpha in (0.01, 1, 1000)
    )
  ]
  assert share[0] > 0.8  # not 1: equal sizes leave remnants of classes
  assert share[0] > share[1] > share[2]
  assert share[2] < 0.25  # i.i.d.: 0.1 and the noise of 100 draws


def test_dirichlet_mixes_follow_the_law():
  """A class's share has variance p (1 - p) / (alpha + 1), plus sampling's."""
  labels = np.arange(200_000) % 4
  counts = table(labels, dirichlet(labels, 1000, seed=0, alpha=2.0))
  variance = (counts / 200).var()
  law = 0.25 * 0.75 / 3
  assert variance == pytest.approx(law + (0.25 * 0.75 - law) / 200, rel=0.1)


def test_dirichlet_serves_no_client_last():
  labels = np.arange(20_000) % 10
  counts = table(labels, dirichlet(labels, 200, seed=0, alpha=0.1))
  share = counts.max(axis=1) / counts.sum(axis=1)
  assert share[:100].mean() == pytest.approx(share[100:].mean(), abs=0.08)


def test_shards_give_few_classes():
  labels = np.random.default_rng(0).permutation(np.arange(1000) % 10)
  counts = table(labels, shards(labels, 10, seed=0, shards_per_client=2))
  assert (counts.sum(axis=1) == 100).all()
  assert ((counts > 0).sum(axis=1) <= 2).all()


def test_exponent_sets_the_skew():
  largest = [
    np.bincount(power_law(10_000, 100, seed=0, exponent=exponent)).max()
    for exponent in (1.5, 3, 1000)
  ]
  assert largest[0] > largest[1] > largest[2]
  assert largest[2] <= 102


def test_power_law_has_its_tail():
  """P(w > 4) / P(w > 2) = 2 ** (1 - exponent); the median's w is 2 ** (1/2)."""
  sizes = np.bincount(power_law(10_000_000, 20_000, seed=0, exponent=3.0))
  weights = sizes / np.median(sizes) * 2**0.5
  assert (weights > 4).mean() / (weights > 2).mean() == pytest.approx(
    2.0**-2, abs=0.02
  )


def test_by_key():
  client_of, names = by_key(np.array([30, 4, 30]))
  np.testing.assert_array_equal(client_of, [1, 0, 1])
  assert client_of.dtype == np.int64
  assert names == ("4", "30")
  assert by_key(["b", "a"])[1] == ("a", "b")
  assert by_key(np.array(["ü".encode(), b"a"]))[1] == ("a", "ü")


@pytest.mark.parametrize("keys", [[1.5], [[1]], np.array([None]), [True]])
def test_by_key_refuses(keys):
  with pytest.raises(TypeError, match=r"Client keys have dtype .* integers or"):
    by_key(keys)


@pytest.mark.parametrize(
  ("call", "error", "match"),
  [
    (
      lambda: iid(3, 4, seed=0),
      ValueError,
      r"data.num_clients=4 with data.min_examples=1 needs 4 .* there are 3",
    ),
    (lambda: iid(3, 0, seed=0), ValueError, "data.num_clients=0 is out of"),
    (
      lambda: iid(3, cast(int, 1.0), seed=0),
      TypeError,
      "data.num_clients=1.0 is a float",
    ),
    (
      lambda: power_law(9, 3, seed=0, min_examples=0),
      ValueError,
      "data.min_examples=0 is out of range",
    ),
    (lambda: iid(3, 1, seed=-1), ValueError, "data.seed=-1 is out of range"),
    (
      lambda: dirichlet([0, 1], 1, seed=0, alpha=0),
      ValueError,
      "data.alpha=0.0 is out of range; .* > 0",
    ),
    (
      lambda: power_law(3, 1, seed=0, exponent=1),
      ValueError,
      "data.exponent=1.0 is out of range; .* > 1",
    ),
    (
      lambda: dirichlet([0.5], 1, seed=0),
      TypeError,
      "labels have dtype float64 and shape",
    ),
    (lambda: shards([[1]], 1, seed=0), TypeError, r"shape \(1, 1\); give one"),
    (
      lambda: shards([0, 1, 2], 2, seed=0),
      ValueError,
      "data.shards_per_client=2 cuts 3 examples into 4 shards, too small",
    ),
    (
      lambda: shards([0, 1], 1, seed=0, shards_per_client=0),
      ValueError,
      "data.shards_per_client=0 is out of range",
    ),
    (
      lambda: partition("dirchlet", [0], 1, 0),
      ValueError,
      "data.partition='dirchlet' is unknown. Did you mean 'dirichlet'",
    ),
    (
      lambda: partition("dirichlet", [0], 1, 0, alhpa=1),
      ValueError,
      "does not take 'alhpa'. Did you mean 'alpha'.* min_examples",
    ),
  ],
)
def test_refuses(call, error, match):
  with pytest.raises(error, match=match):
    call()
