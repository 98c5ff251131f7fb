"""The drawn curves."""

import math
import os
import struct

import numpy as np
import pytest

from fedjax_sim.reporting import draw_curves


def png_size(path):
  content = path.read_bytes()
  assert content.startswith(b"\x89PNG")
  return struct.unpack(">II", content[16:24])


def run(rounds, *, every=5):
  rng = np.random.default_rng(0)
  for r in range(1, rounds + 1):
    row = {"round": r, "train/loss": 2 / (1 + r / 9) + 0.1 * rng.random()}
    if every and r % every == 0:
      row["test/loss"] = row["train/loss"] + 0.2
      row["test/accuracy"] = 0.95 * (1 - math.exp(-r / 15))
      row["seen/accuracy/mean"] = 0.9 * (1 - math.exp(-r / 15))
      row["unseen/accuracy/mean"] = 0.8 * (1 - math.exp(-r / 15))
    yield row


def test_losses_and_accuracies_side_by_side(tmp_path):
  path = tmp_path / "curves.png"
  draw_curves(run(100), path, "fedavg on $synthetic")
  width, height = png_size(path)
  assert width > 2 * height
  assert os.listdir(tmp_path) == ["curves.png"]


@pytest.mark.parametrize(
  "rows",
  [
    list(run(1, every=0)),
    list(run(100, every=0)),
    [{"round": 1, "train/loss": math.nan}, {"round": 2}],
    [{"round": 1, "train/loss": None}, {"round": 2, "train/loss": math.inf}],
    [],
  ],
  ids=["one row", "no test", "nan", "null and infinity", "none"],
)
def test_one_panel_without_accuracies(tmp_path, rows):
  draw_curves(rows, tmp_path / "curves.png", "")
  width, height = png_size(tmp_path / "curves.png")
  assert width < 2 * height


def test_the_same_rows_give_the_same_bytes(tmp_path):
  for name in ("a.png", "b.png"):
    draw_curves(run(10), tmp_path / name, "title")
  assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_the_global_state_of_pyplot_is_left_alone(tmp_path):
  import matplotlib as mpl

  before = dict(mpl.rcParams)
  draw_curves(run(10), tmp_path / "a.png", "title")
  assert dict(mpl.rcParams) == before
