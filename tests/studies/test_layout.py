"""Layouts and rungs: who stands where, and who goes on."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedjax_sim.studies import halving
from fedjax_sim.studies.layout import SPARE, lay_out


@given(
  st.lists(st.integers(0, 6), min_size=1, max_size=40),
  st.integers(1, 5),
  st.integers(1, 8),
)
def test_every_run_has_one_place_beside_runs_of_its_plan(plans, devices, wide):
  layout = lay_out(plans, devices, wide)
  assert layout.place.shape[0] == devices
  assert layout.place.shape[2] <= wide
  assert sorted(layout.place[layout.used]) == list(range(len(plans)))
  of = np.asarray(plans)[layout.place]
  assert (of == of[:, :, :1]).all()  # one plan a group, spare places included
  for run in range(len(plans)):
    device, group, row = layout.at(run)
    assert layout.place[device, group, row] == run
    assert plans[layout.leaders()[device][group]] == plans[run]


@given(st.lists(st.integers(0, 6), min_size=1, max_size=40), st.integers(1, 5))
def test_what_is_packed_is_unpacked(plans, devices):
  layout = lay_out(plans, devices, 4)
  tree = {"x": np.arange(len(plans)), "y": np.ones((len(plans), 2))}
  packed = layout.pack(tree)
  assert packed["y"].shape == (*layout.place.shape, 2)
  for name, leaf in layout.unpack(packed).items():
    np.testing.assert_array_equal(leaf, tree[name])


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 4))
def test_few_places_are_spare(seeds, points, devices):
  plans = list(range(seeds)) * points
  places = lay_out(plans, devices, 16).place.size
  fewest = min(
    -(-seeds * -(-points // rows) // devices) * devices * rows
    for rows in range(1, points + 1)
  )
  assert places <= SPARE * fewest


def test_rungs_are_those_of_the_paper():
  assert halving.rungs(9, 90, 3, 10) == [10, 30, 90]
  assert halving.rungs(8, 60, 2, 5) == [10, 15, 30, 60]
  assert halving.rungs(1, 60, 3, 5) == [60]
  assert halving.rungs(100, 4, 3, 2) == [2, 4]


@pytest.mark.parametrize("higher", [True, False])
def test_the_best_third_goes_on(higher):
  scores = [0.3, math.nan, 0.9, 0.1, 0.5, 0.9, 0.2]
  ranked = [2, 5, 4] if higher else [3, 6, 0]
  best = halving.best(scores, 3, higher_is_better=higher)
  assert best == sorted(ranked)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.integers(2, 5))
def test_the_best_is_never_ended(scores, eta):
  best = halving.best(scores, eta, higher_is_better=True)
  assert len(best) == halving.kept(len(scores), eta) >= 1
  assert max(scores) == max(scores[i] for i in best)
