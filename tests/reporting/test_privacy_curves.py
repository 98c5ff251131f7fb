"""The drawn privacy curves, and the table of the same numbers."""

import csv
import struct

import pytest

from fedjax_sim.reporting import (
  Setting,
  draw_privacy_curves,
  write_privacy_curves,
)

BY_ROUND = [Setting(t, 20, 1.5, 0.3 * t**0.5, 20.0) for t in (1, 10, 100)]
BY_COHORT = [Setting(100, n, 0.1 * n, 3.0, float(n)) for n in (10, 100, 1000)]


def test_two_panels(tmp_path):
  path = tmp_path / "privacy.png"
  draw_privacy_curves(BY_ROUND, BY_COHORT, path, "(3, 1e-05)-DP for $one")
  content = path.read_bytes()
  assert content.startswith(b"\x89PNG")
  width, height = struct.unpack(">II", content[16:24])
  assert width > 2 * height


def test_one_point_each(tmp_path):
  path = tmp_path / "privacy.png"
  draw_privacy_curves(BY_ROUND[:1], BY_COHORT[:1], path, "")
  assert path.stat().st_size > 1000


def test_the_table_has_the_same_numbers(tmp_path):
  path = tmp_path / "privacy.csv"
  write_privacy_curves(BY_ROUND, BY_COHORT, path)
  with path.open(newline="") as file:
    rows = list(csv.DictReader(file))
  assert [row["curve"] for row in rows] == ["rounds"] * 3 + ["cohorts"] * 3
  for row, setting in zip(rows, BY_ROUND + BY_COHORT, strict=True):
    for name, value in setting._asdict().items():
      assert float(row[name]) == value
    std = setting.noise_multiplier / setting.clients_per_round
    assert float(row["noise_std"]) == pytest.approx(std)
