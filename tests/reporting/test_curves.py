"""The drawn curves."""

import math
import os
import struct

import numpy as np
import pytest

from fedjax_sim.core.validate import UnknownNameError
from fedjax_sim.reporting import draw_curves, draw_paper
from fedjax_sim.reporting.figures.curves import curves_figure
from fedjax_sim.reporting.figures.overlay import paper_figure
from fedjax_sim.reporting.pages.confusion import confusion_sections


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


# --- lines --------------------------------------------------------------------


def legends(figure):
  """The texts of each panel's legend."""
  return [
    [text.get_text() for text in ax.get_legend().get_texts()]
    for ax in figure.axes
    if ax.axison
  ]


def lines_of(ax):
  """The curves of a panel, without stars and vertical lines."""
  return [
    line
    for line in ax.lines
    if line.get_linestyle() != "None" and len(line.get_xdata()) > 2
  ]


def stars(ax):
  return [
    (float(line.get_xdata()[0]), float(line.get_ydata()[0]))
    for line in ax.lines
    if line.get_marker() == "*"
  ]


def test_equal_metrics_share_a_line():
  rows = [
    {
      "round": r,
      "train/loss": 1 / r,
      "test/loss": 2 / r,
      "seen/loss": 2 / r * (1 + 1e-9),
      "seen/loss/mean": 2 / r,
      "unseen/loss": 2 / r if r < 4 else 2.01 / r,
    }
    for r in range(1, 5)
  ]
  figure = curves_figure(rows, "title")
  [ax] = figure.axes
  assert len(lines_of(ax)) == 3
  assert legends(figure) == [
    [
      "train: 0.2500",
      "test = seen = seen mean: 0.5000",
      "unseen: 0.5025",
    ]
  ]


def test_metrics_of_other_rounds_are_other_lines():
  rows = [
    {"round": 1, "test/loss": 1.0, "seen/loss": 1.0},
    {"round": 2, "test/loss": 1.0},
  ]
  figure = curves_figure(rows, "title")
  assert legends(figure) == [["test: 1.000", "seen: 1.000"]]


def test_nan_in_the_same_rounds_is_equal():
  rows = [
    {"round": r, "test/loss": value, "seen/loss": value}
    for r, value in enumerate([1.0, math.nan, 0.5], 1)
  ]
  assert legends(curves_figure(rows, "t")) == [["test = seen: 0.5000"]]


def test_stars_and_legends_have_the_best_values():
  rows = [
    {"round": r, "test/loss": loss, "test/accuracy": accuracy}
    for r, (loss, accuracy) in enumerate(
      [(1.0, 0.2), (0.5, 0.8), (math.nan, math.nan), (0.7, 0.6)], 1
    )
  ]
  figure = curves_figure(rows, "title", best_round=2)
  assert legends(figure) == [
    ["test: 0.7000 (best 0.5000, round 2)", "best model, round 2"],
    ["test: 0.6000 (best 0.8000, round 2)", "best model, round 2"],
  ]
  assert [stars(ax) for ax in figure.axes] == [[(2, 0.5)], [(2, 0.8)]]


def test_epsilon_is_never_best():
  rows = [{"round": r, "privacy/epsilon": float(r)} for r in (1, 2)]
  figure = curves_figure(rows, "title")
  assert legends(figure) == [["privacy/epsilon: 2.000"]]
  assert stars(figure.axes[0]) == []


# --- for papers ---------------------------------------------------------------


@pytest.mark.parametrize(
  ("suffix", "begins"),
  [(".pdf", b"%PDF"), (".svg", b"<?xml"), (".png", b"\x89PNG")],
)
def test_a_paper_gets_a_column(tmp_path, suffix, begins):
  runs = {"a": list(run(20)), "b": list(run(10))}
  paths = [tmp_path / f"{name}{suffix}" for name in "ab"]
  for path in paths:
    draw_paper(runs, path)
  contents = [path.read_bytes() for path in paths]
  assert contents[0].startswith(begins)
  assert contents[0] == contents[1]
  if suffix == ".pdf":
    assert b"Type3" not in contents[0]  # publishers refuse such fonts
  if suffix == ".png":
    assert png_size(paths[0])[0] == 3.25 * 300


def test_panels_of_a_paper():
  """The runs' metrics of the test set, without those of training."""
  runs = {"a": list(run(20)), "b $x$": list(run(10))}
  figure = paper_figure(runs)
  assert [ax.get_ylabel() for ax in figure.axes] == [
    "test/loss",
    "test/accuracy",
  ]
  assert legends(figure) == [["a", r"b \$x\$"]] * 2
  chosen = paper_figure(runs, ["train/loss"])
  assert [ax.get_ylabel() for ax in chosen.axes] == ["train/loss"]
  one = paper_figure({"a": runs["a"]})
  assert [ax.get_ylabel() for ax in one.axes] == ["Loss", "Accuracy"]
  assert figure.get_size_inches()[0] == 3.25


def test_a_paper_has_the_first_set_that_there_is():
  rows = [{"round": 1, "train/loss": 1.0, "unseen/loss": 1.0}]
  figure = paper_figure({"a": rows, "b": rows})
  assert [ax.get_ylabel() for ax in figure.axes] == ["unseen/loss"]
  rows = [{"round": 1, "train/loss": 1.0, "privacy/epsilon": 1.0}]
  figure = paper_figure({"a": rows, "b": rows})
  labels = [ax.get_ylabel() for ax in figure.axes]
  assert labels == ["train/loss", "privacy/epsilon"]


def test_an_unknown_metric_is_refused(tmp_path):
  with pytest.raises(UnknownNameError, match="metrics='test/los' is unknown"):
    draw_paper({"a": list(run(10))}, tmp_path / "a.pdf", ["test/los"])
  assert not [*tmp_path.iterdir()]


def test_known_metrics_have_panels_below_each_other():
  better = {"auc": True, "f1_macro": True, "mae": False, "top_5": True}
  rows = [
    {"round": r, "test/loss": 1 / r, "epsilon": r}
    | {f"test/{name}": value for name in better}
    | {"unseen/auc/mean": 0.1 * r, "test/confusion/0/1": 7.0}
    for r, value in enumerate([0.5, 0.9, 0.2], 1)
  ]
  figure = curves_figure(rows, "title")
  titles = [ax.get_ylabel() for ax in figure.axes if ax.axison]
  known = ["AUC", "F1 (macro)", "Mean absolute error", "Top-5 accuracy"]
  assert titles == ["Loss", "Epsilon", *known]
  assert legends(figure)[2:] == [
    [
      "test: 0.2000 (best 0.9000, round 2)",
      "unseen mean: 0.3000",
    ],
    ["test: 0.2000 (best 0.9000, round 2)"],
    ["test: 0.2000"],
    ["test: 0.2000 (best 0.9000, round 2)"],
  ]
  tops = [ax.get_position().y1 for ax in figure.axes]
  assert min(tops[:4]) > max(tops[4:])


def test_confusion_is_a_table_of_the_last_counts():
  cells = {
    f"test/confusion/{i}/{j}": 3.0 * i + j for i in (0, 1) for j in (0, 1)
  }
  later = {key: value + 1 for key, value in cells.items()}
  rows: list[dict[str, float]] = [
    {"round": 1, **cells},
    {"round": 2, **later},
    {"round": 3},
  ]
  (section,) = confusion_sections(rows)
  (table,) = section.tables
  assert table.caption == "test/Confusion, round 2"
  assert table.head == ["label", "0", "1"]
  assert table.rows == [["0", "1", "2"], ["1", "4", "5"]]
  assert confusion_sections([{"round": 1, "test/loss": 1.0}]) == []
