"""The points of a study: grids, draws, lists and seeds."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedjax_sim.config.flags import UsageError
from fedjax_sim.studies.points import drawn, grid, listed, seeds_of


def test_a_grid_has_all_combinations():
  points = grid({"a.x": "log(0.01,1,3)", "a.y": "fedavg, fedprox"})
  assert points == [
    {"a.x": x, "a.y": y}
    for x in ("0.01", "0.1", "1")
    for y in ("fedavg", "fedprox")
  ]
  assert grid({}) == [{}]


def test_brackets_keep_values_together():
  assert grid({"m": "(64,),(64,32)"}) == [{"m": "(64,)"}, {"m": "(64,32)"}]


@given(
  st.floats(1e-6, 1e3), st.floats(1.1, 1e3), st.integers(2, 20), st.booleans()
)
def test_spaced_values_are_those_of_numpy(first, factor, count, log):
  name, space = ("log", np.geomspace) if log else ("linear", np.linspace)
  text = f"{name}({first},{first * factor},{count})"
  values = [float(p["x"]) for p in grid({"x": text})]
  expected = space(first, first * factor, count)
  np.testing.assert_allclose(values, expected, rtol=1e-5)


def test_draws_follow_the_seed_and_no_other_field():
  vary = {"a": "loguniform(0.001,1)", "b": "u,v"}
  points = drawn(vary, 300, seed=1)
  assert points == drawn(vary, 300, seed=1) != drawn(vary, 300, seed=2)
  assert [p["a"] for p in drawn({"a": vary["a"]}, 300, 1)] == [
    p["a"] for p in points
  ]
  logs = np.log10([float(p["a"]) for p in points])
  assert -3 <= logs.min() < logs.max() <= 0
  # Uniform on (-3, 0): mean -1.5, deviation 0.87, within 4 errors.
  assert abs(logs.mean() + 1.5) < 4 * 0.87 / np.sqrt(300)
  assert {p["b"] for p in points} == {"u", "v"}


def test_points_are_read_from_a_file(tmp_path):
  (tmp_path / "p.json").write_text(
    json.dumps([{"a": 0.5, "b": "x"}, {"a": 1, "b": [1, 2]}])
  )
  (tmp_path / "p.csv").write_text('a,b\n0.5,x\n1,"1,2"\n')
  expected = [{"a": "0.5", "b": "x"}, {"a": "1", "b": "1,2"}]
  assert listed(tmp_path / "p.json") == listed(tmp_path / "p.csv") == expected


@pytest.mark.parametrize(
  ("name", "text", "told"),
  [
    ("p.json", "[]", "has no point"),
    ("p.json", "{", "holds no points"),
    ("p.json", '[{"a":1},{"a":2},{"b":1}]', "point 2 and point 0 .* have a, b"),
    ("p.csv", "a\n1\n2,3\n", "point 1 and point 0 .* have None"),
  ],
)
def test_a_file_of_no_points_is_refused(tmp_path, name, text, told):
  (tmp_path / name).write_text(text)
  with pytest.raises(UsageError, match=f"--points=.*{told}"):
    listed(tmp_path / name)


@pytest.mark.parametrize(
  "text",
  [
    "log(0,1,3)",
    "log(1,0.1,3)",
    "linear(0,1,1)",
    "log(a,1,2)",
    "",
    "a,a",
    "a,,b",
  ],
)
def test_values_that_are_none_are_refused(text):
  with pytest.raises(UsageError, match="--vary=x"):
    grid({"x": text})


def test_a_grid_draws_nothing():
  with pytest.raises(UsageError, match="--random=N"):
    grid({"x": "uniform(0,1)"})


def test_seeds_are_a_number_or_a_list():
  assert seeds_of("3", 5) == [5, 6, 7]
  assert seeds_of("3,7", 5) == [3, 7]
  for text in ("0", "3,3", "x", "-1,2", ""):
    with pytest.raises(UsageError, match="--seeds="):
      seeds_of(text, 0)
