"""The picture of clients: every class has a colour of its own."""

import numpy as np
import pytest
from matplotlib import image

from fedjax_sim.reporting import draw_clients
from fedjax_sim.reporting.client_picture import _colors


@pytest.mark.parametrize("classes", [1, 2, 10, 20, 21, 62, 256])
def test_colours_are_told_apart(classes):
  colors = _colors(classes)
  assert colors.shape == (classes, 4)
  assert len({tuple(c) for c in colors}) == classes


def test_bars_are_as_high_as_the_shares(tmp_path):
  """Two clients, one with both classes and one with the second alone."""
  counts = np.array([[3, 1], [0, 5]])
  draw_clients(
    np.array([4, 5]), np.arange(2), counts, tmp_path / "a.png", "title"
  )
  pixels = image.imread(tmp_path / "a.png")[..., :3]
  half = pixels[:, pixels.shape[1] // 2 :]
  first, second = (
    np.abs(half - color[:3]).max(-1) < 0.01 for color in _colors(2)
  )
  assert first.sum() / second.sum() == pytest.approx(0.75 / 1.25, rel=0.03)
