"""MIND's tables, against examples worked out by hand."""

import numpy as np
import pytest

from fedjax_sim.cli.main import main
from fedjax_sim.data import open_store
from fedjax_sim.data.importers import import_store, mind
from fedjax_sim.data.importers.mind import catalogue
from fedjax_sim.data.news import read_news
from mind_files import write_behaviors, write_mind, write_news


@pytest.fixture
def folder(tmp_path):
  folder = tmp_path / "train"
  write_news(folder, ["N1", "N2", "N3", "N4", "N5", "N6"])
  rows = [
    ("U1", "", "N1-0 N2-1 N3-0 N4-1"),
    ("U2", "N1 N2 N3", "N4-0 N5-0 N6-1"),
    ("U1", "N5", "N6-1"),
    ("U3", "N4", "N1-0 N2-0"),
  ]
  write_behaviors(folder, rows)
  return folder


def blocks_of(folder, **options):
  options = {"clicked": 2, "candidates": 4, "negatives": 1, **options}
  return mind(folder, news=catalogue([folder]), **options)


def test_an_impression_is_an_example(tmp_path, folder):
  import_store(
    tmp_path / "s", {"train": blocks_of(folder, sampled=False)}, prepare="ids"
  )
  train = open_store(tmp_path / "s").train
  assert list(train.names or ()) == ["U1", "U2", "U3"]
  assert train.sizes.tolist() == [2, 1, 1]
  x = [[0, 0, 1, 2, 3, 4], [0, 5, 6, 0, 0, 0], [2, 3, 4, 5, 6, 0]]
  x.append([0, 4, 1, 2, 0, 0])
  y = [[0, 1, 0, 1], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
  np.testing.assert_array_equal(train.examples["x"], x)
  np.testing.assert_array_equal(train.examples["y"], y)


def test_a_click_is_a_training_example(folder):
  def examples(**options):
    (block,) = blocks_of(folder, sampled=True, **options)
    parts = np.split(block.examples["x"], [2])
    return dict(zip(block.names, parts, strict=True)), block

  found, block = examples(negatives=1)
  assert block.sizes.tolist() == [2, 1]  # of U1 and U2; U3 clicks on nothing
  first, second = found["U1"], found["U2"]
  assert first[:, 2].tolist() == [2, 4]
  assert set(first[:, 3]) <= {1, 3}
  assert second[0, :3].tolist() == [2, 3, 6]
  assert second[0, 3] in (4, 5)
  assert not first[:, 4:].any()
  assert block.examples["y"].tolist() == [[1, 0, 0, 0]] * 3
  # The same seed draws the same, another one others; all if there are few.
  draws = [examples(seed=seed)[0]["U1"].tolist() for seed in (0, 0, 1, 2, 3)]
  assert draws[0] == draws[1] == first.tolist()
  assert any(draw != draws[0] for draw in draws)
  every, _ = examples(negatives=3)
  assert sorted(every["U2"][0, 3:].tolist()) == [0, 4, 5]


def test_every_news_is_drawn_as_often(tmp_path):
  folder = tmp_path / "train"
  write_news(folder, ["N1", "N2", "N3", "N4"])
  write_behaviors(folder, [("U", "", "N1-0 N2-0 N3-1 N4-0")] * 600)
  x = np.concatenate([b.examples["x"] for b in blocks_of(folder, sampled=True)])
  counts = np.bincount(x[:, 3], minlength=5)
  assert counts[[0, 3]].tolist() == [0, 0]
  assert abs(counts[[1, 2, 4]] - 200).max() < 60  # five standard deviations


def test_titles_and_folders_that_share_news(tmp_path):
  write_news(tmp_path / "a", ["N1", "N2"])
  write_news(tmp_path / "b", ["N2", "N3"])
  row = "N9\tlife\tfood\tIt's  5 p.m., Mr. Übel!\tabstract"
  table = tmp_path / "b" / "news.tsv"
  table.write_text(f"{table.read_text()}\n{row}\n")
  found = catalogue([tmp_path / "a", tmp_path / "b"], title_length=6)
  assert found.ids == {"N1": 1, "N2": 2, "N3": 3, "N9": 4}
  titles, words = found.news
  assert titles.shape == (5, 6)
  assert not titles[0].any()
  told = [words[i - 1] for i in titles[4]]
  assert told == ["it's", "5", "p", ".", "m", "."]


def test_a_store_and_its_titles_by_the_command(tmp_path, capsys):
  write_mind(tmp_path)
  given = ["data", "import", "--format=mind", f"--train={tmp_path / 'train'}"]
  given += [f"--test={tmp_path / 'dev'}", f"--news={tmp_path / 'news.npz'}"]
  sizes = ["--clicked=3", "--candidates=8", "--negatives=2", "--seed=5"]
  assert main([*given, *sizes, f"--store={tmp_path / 's'}"]) == 0
  assert "test" in capsys.readouterr().out
  data = open_store(tmp_path / "s")
  assert (data.num_classes, data.example_shape) == (2, (11,))
  assert data.test is not None
  assert len(data.test["y"]) == 12  # an impression an example
  assert data.test["y"].sum(1).max() > 1
  assert set(data.train.examples["y"].sum(1)) == {1}
  assert data.train.examples["x"][:, 6:].max() == 0  # a click and two others
  news = read_news(tmp_path / "news.npz")
  assert news.titles.shape == (13, 30)
  assert "!" in news.words
  x = data.prepare(data.test)["x"]
  assert (x.dtype, int(x.max())) == (np.int32, 12)


@pytest.mark.parametrize(
  ("rows", "message"),
  [
    ([("U", "", "N1")], "line 1: the candidate 'N1' has no label"),
    ([("U", "", "N1-0 N2-2")], "the candidate 'N2-2' has no label"),
    ([("U", "", "")], "line 1 has no candidates"),
    ([("", "", "N1-0")], "line 1 names no user"),
    ([("U", "N7", "N1-0")], "line 1: news 'N7' is in no news.tsv"),
    (
      [("U", "", "N1-0"), ("U", "", "N1-0 N2-0 N3-0 N4-0 N5-1")],
      "line 2 has 5 candidates, and candidates=4",
    ),
  ],
)
def test_what_is_refused(folder, rows, message):
  write_behaviors(folder, rows)
  with pytest.raises(ValueError, match=message):
    list(blocks_of(folder, sampled=False))


def test_damaged_tables(folder):
  (folder / "behaviors.tsv").write_text("1\tU1\n")
  with pytest.raises(ValueError, match="line 1 has 2 columns .* expected 5"):
    list(blocks_of(folder, sampled=True))
  (folder / "news.tsv").write_bytes(b"N1\ta\tb\t\xff\n")
  with pytest.raises(ValueError, match="cannot be read as MIND's table"):
    catalogue([folder])
  (folder / "news.tsv").write_text("\ta\tb\ttitle\n")
  with pytest.raises(ValueError, match="line 1 names no news"):
    catalogue([folder])
  (folder / "news.tsv").unlink()
  with pytest.raises(FileNotFoundError, match="holds no news.tsv"):
    catalogue([folder])


@pytest.mark.parametrize(
  ("flag", "message"),
  [
    ("--news=", "--news=: name an .npz file for the titles"),
    ("--news=titles.txt", "--news=titles.txt: name an .npz"),
    ("--news=nowhere/a.npz", "in a folder that is there"),
    ("--client=user", "--client=user is for tables"),
    ("--delimiter=;", "--delimiter=; is for csv, and not for mind"),
    ("--candidates=few", "--candidates=few is wrong; give a whole number"),
    ("--candidates=2", "candidates=2 is out of range; give a number >= 5"),
  ],
)
def test_flags_that_are_refused(tmp_path, folder, capsys, flag, message):
  given = ["data", "import", "--format=mind", f"--train={folder}"]
  given += [f"--store={tmp_path / 's'}", f"--news={tmp_path / 'n.npz'}"]
  assert main([*given, flag]) == 2
  assert message in capsys.readouterr().err
  assert not (tmp_path / "s").exists()
  assert not (tmp_path / "n.npz").exists()
