"""Files in the shape of MIND's, with made-up news and users."""

import numpy as np

WORDS = [
  *("the", "of", "rain", "sun", "wins", "city"),
  *("team", "says", "new", "film", "today", "market"),
]
DIMENSIONS = 6


def write_news(folder, names, seed=0):
  rng = np.random.default_rng(seed)
  folder.mkdir(parents=True, exist_ok=True)
  rows = []
  for name in names:
    title = " ".join(rng.choice(WORDS, rng.integers(3, 7)))
    row = [name, "sports", "soccer", f"{title.title()}!", "An abstract."]
    rows.append("\t".join([*row, "https://a.b", "[]", "[]"]))
  (folder / "news.tsv").write_text("\n".join(rows) + "\n")


def write_behaviors(folder, rows):
  """Write (user, earlier clicks, candidates) a row."""
  lines = [
    f"{i}\t{user}\t11/11/2019 9:05:58 AM\t{before}\t{shown}"
    for i, (user, before, shown) in enumerate(rows, 1)
  ]
  (folder / "behaviors.tsv").write_text("\n".join(lines) + "\n")


def write_vectors(file, words, seed=0):
  """Write vectors in GloVe's text format."""
  vectors = np.random.default_rng(seed).normal(size=(len(words), DIMENSIONS))
  lines = [
    " ".join([word, *(f"{x:.4f}" for x in vector)])
    for word, vector in zip(words, vectors, strict=True)
  ]
  lines.insert(1, ". . ." + " 0.5" * DIMENSIONS)  # a word with spaces
  file.write_text("\n".join(lines) + "\n")


def write_mind(folder, users=3, seed=0):
  """Write folders `train` and `dev`, and `glove.txt`."""
  names = [f"N{10 + i}" for i in range(12)]
  rng = np.random.default_rng(seed)
  for part, known in (("train", names[:9]), ("dev", names[4:])):
    write_news(folder / part, known, seed)
    rows = []
    for i in range(4 * users):
      before = " ".join(rng.choice(known, rng.integers(0, 5)))
      shown = rng.choice(known, rng.integers(3, 7), replace=False)
      labels = [1, 0, *rng.integers(0, 2, len(shown) - 2)]
      candidates = zip(shown, rng.permutation(labels), strict=True)
      told = " ".join(f"{name}-{label}" for name, label in candidates)
      rows.append((f"U{i % users}", before, told))
    write_behaviors(folder / part, rows)
  write_vectors(folder / "glove.txt", [*WORDS, "!"])
