"""The picture of clients: every class has a colour of its own."""

from typing import Any, cast

import numpy as np
import pytest
from matplotlib import image

from fedjax_sim.reporting import draw_clients
from fedjax_sim.reporting.figures.client_picture import _colors, clients_figure


@pytest.mark.parametrize("classes", [1, 2, 10, 20, 21, 62, 256])
def test_colours_are_told_apart(classes):
  colors = _colors(classes)
  assert colors.shape == (classes, 4)
  assert len({tuple(c) for c in colors}) == classes


def test_few_clients_have_bars_of_their_own():
  """Named, apart, in the same order on both sides; counts are whole."""
  sizes, counts = np.array([3, 1, 2]), np.array([[1, 2], [1, 0], [0, 2]])
  names = ["ann", "a clinic with a name far too long", "$c$"]
  told = ["ann", "a clinic wi...ar too long", "$c$"]
  figure = clients_figure(sizes, np.arange(3), counts, "title", names)
  figure.draw_without_rendering()
  ax: Any
  for ax in figure.axes:
    assert [label.get_text() for label in ax.get_xticklabels()] == told
    bars = ax.patches[:3]
    ends = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in bars]
    assert all(ends[i][1] < ends[i + 1][0] for i in range(2))
  left, right = (cast(Any, ax) for ax in figure.axes)
  assert [bar.get_height() for bar in left.patches] == [3, 1, 2]
  heights = [bar.get_height() for bar in right.patches[:3]]
  np.testing.assert_allclose(heights, [1 / 3, 1, 0])
  assert (left.get_yticks() == np.rint(left.get_yticks())).all()


def test_counts_of_clients_are_whole():
  """Where each size is that of a single client."""
  figure = clients_figure(np.array([7, 22, 48, 123]), np.arange(4), None, "t")
  [ax] = figure.axes
  assert (ax.get_yticks() == np.rint(ax.get_yticks())).all()


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
