"""Files of titles and of words' vectors."""

import numpy as np
import pytest

from fedjax_sim.core.weights import write_weights
from fedjax_sim.data.news import News, read_news, read_vectors, write_news

WORDS = ("rain", "über", "!")


def test_titles_are_read_as_they_were_written(tmp_path):
  titles = np.array([[0, 0], [1, 3], [2, 0]], np.int32)
  write_news(tmp_path / "a.npz", News(titles, WORDS))
  found = read_news(tmp_path / "a.npz")
  np.testing.assert_array_equal(found.titles, titles)
  assert found.words == WORDS


def test_what_is_no_news_file(tmp_path):
  titles = np.array([[0], [4]], np.int32)
  write_news(tmp_path / "a.npz", News(titles, WORDS))
  with pytest.raises(ValueError, match="a.npz' is no news file .titles are no"):
    read_news(tmp_path / "a.npz", "model.news")
  (tmp_path / "a.npz").write_bytes(b"PK")
  with pytest.raises(ValueError, match="model.news='.*a.npz' is no news file"):
    read_news(tmp_path / "a.npz", "model.news")
  with pytest.raises(FileNotFoundError, match="from model.news"):
    read_news(tmp_path / "b.npz", "model.news")


def test_vectors_of_glove(tmp_path):
  file = tmp_path / "glove.txt"
  file.write_text(
    "the 1 2\n. . . 3 4\n! -1 0.5\nrain . 7 7\nrain 1e-1 2\n! 9 9"
  )
  with pytest.warns(UserWarning, match="lacks 1 of 3 words, such as 'über'"):
    found = read_vectors(file, WORDS)
  expected = [[0, 0], [0.1, 2], [0, 0], [-1, 0.5]]
  np.testing.assert_allclose(found, np.array(expected, np.float32))
  file.write_text("2 2\nrain 1 2\n! 1 2\nüber 5 6\n")  # as word2vec writes it
  np.testing.assert_array_equal(read_vectors(file, WORDS)[2], [5, 6])


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_vectors_of_arrays(tmp_path, suffix):
  file = tmp_path / f"a{suffix}"
  array = np.random.default_rng(0).normal(size=(4, 5))
  write_weights(file, {"vectors": array.astype(np.float16)})
  found = read_vectors(file, WORDS)
  assert found.dtype == np.float32
  np.testing.assert_allclose(found, array, rtol=1e-3)
  write_weights(file, {"vectors": array[:3]})
  with pytest.raises(ValueError, match=r"\(3, 5\)}; give .* each of 4 ids"):
    read_vectors(file, WORDS)


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("the 1 2\nrain 1\n", "line 2: expected a word and 2 numbers"),
    ("the 1 2\nrain 1 x\n", "line 2: expected a word and 2 numbers"),
    ("the 1 2\nrain 1 nan\n", "the vector of word 1 is not finite"),
    ("the 1 2\n", "has no vector of any of 3 words"),
    ("", "has no vector of any of 3 words"),
  ],
)
def test_damaged_vectors(tmp_path, text, message):
  (tmp_path / "a.txt").write_text(text)
  with pytest.raises(ValueError, match=message):
    read_vectors(tmp_path / "a.txt", WORDS)
