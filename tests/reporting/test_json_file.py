"""JSON files that people read."""

import json

import numpy as np
import pytest

from fedjax_sim.reporting import write_json


def test_keeps_the_order_and_ends_the_last_line(tmp_path):
  write_json(tmp_path / "a.json", {"b": 1, "a": (0.1, "x"), "c": {"d": True}})
  text = (tmp_path / "a.json").read_text()
  assert text.startswith('{\n  "b": 1,\n  "a": [\n')
  assert text.endswith("}\n")
  assert json.loads(text) == {"b": 1, "a": [0.1, "x"], "c": {"d": True}}


def test_numpy_scalars_and_non_finite_values(tmp_path):
  value = {"a": np.int32(3), "b": np.float32(0.5), "c": [np.nan, np.inf]}
  write_json(tmp_path / "a.json", value)
  text = (tmp_path / "a.json").read_text()
  assert json.loads(text) == {"a": 3, "b": 0.5, "c": [None, None]}


def test_what_has_no_json_form_leaves_the_file_alone(tmp_path):
  write_json(tmp_path / "a.json", 1)
  with pytest.raises(TypeError, match="set"):
    write_json(tmp_path / "a.json", {1, 2})
  assert (tmp_path / "a.json").read_text() == "1\n"
