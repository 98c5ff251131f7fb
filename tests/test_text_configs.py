"""Configs of text whose data the user imports: from the files to metrics.

Shakespeare and posts are real where they are here, in the layout of TFF's and
FLUTE's files; MIND's tables are made up.
"""

import collections
import gzip
import json
import math
import pathlib
import re

import h5py
import pytest

from fedjax_sim.cli.main import main
from fedjax_sim.config.flags import load
from fedjax_sim.run.experiment import run
from mind_files import write_mind

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
pytestmark = [
  pytest.mark.integration,
  pytest.mark.usefixtures("no_pictures"),
]


def imported(folder, *flags):
  assert main(["data", "import", f"--store={folder / 's'}", *flags]) == 0


def summary_of(name, folder, **fields):
  fields = {"data.path": str(folder / "s"), "runtime.devices": "1", **fields}
  config = load(f"{CONFIGS / name}.py:smoke", fields)
  assert load(f"{CONFIGS / name}.py").server.rounds > config.server.rounds
  summary = run(config, folder / "run")
  assert summary["rounds"] == config.server.rounds
  return summary


def test_shakespeare_as_tff_has_it(tmp_path, data_folder, capsys):
  file = data_folder / "tinyshakespeare" / "roles_leaf.json.gz"
  roles = json.loads(gzip.decompress(file.read_bytes()))["user_data"]
  few = [role for role in sorted(roles) if len(roles[role]["x"]) >= 20][:6]
  for split, part in (("train", slice(0, 15)), ("test", slice(15, 20))):
    with h5py.File(tmp_path / f"{split}.h5", "w") as out:
      for role in few:
        out[f"examples/{role}/snippets"] = roles[role]["x"][part]
  imported(
    tmp_path,
    *("--format=tff_hdf5", "--fields=x:snippets", "--text=tff_characters"),
    *(f"--{split}={tmp_path / split}.h5" for split in ("train", "test")),
  )
  found = summary_of("tff_shakespeare_lstm", tmp_path)
  assert found["test/loss"] < math.log(90)
  capsys.readouterr()


@pytest.mark.slow
def test_workers_of_diloco(tmp_path, data_folder, monkeypatch, capsys):
  monkeypatch.setenv("FEDJAX_SIM_DATA", str(data_folder))
  source = "--train=tinyshakespeare/roles_leaf.json.gz"
  roles = f"--store={tmp_path / 'roles'}"
  command = ["data", "import", "--format=leaf_json", "--text=characters"]
  assert main([*command, source, roles]) == 0
  deal = ["--partition=iid", "--num-clients=4", "--heldout-fraction=0.01"]
  command = ["data", "partition", roles, f"--to={tmp_path / 's'}", *deal]
  assert main(command) == 0
  found = summary_of("shakespeare_diloco", tmp_path)
  assert found["seen/loss"] < math.log(65) + 0.1
  capsys.readouterr()


def test_sentences_of_users_as_flute_has_them(tmp_path, data_folder, capsys):
  file = data_folder / "stackexchange" / "beer_posts.jsonl.gz"
  posts = map(json.loads, gzip.decompress(file.read_bytes()).splitlines()[:300])
  users: dict[str, list[str]] = collections.defaultdict(list)
  for post in posts:
    sentences = re.split(r"(?<=[.?!])\s+", post["text"])
    users[str(post["user"])] += [
      " ".join(re.findall(r"\w+", s)) for s in sentences
    ]
  names = sorted(users, key=lambda user: -len(users[user]))[:12]
  for split, part in (("train", names[:10]), ("test", names[10:])):
    held = {
      "users": part,
      "num_samples": [len(users[u]) for u in part],
      "user_data": {u: {"x": users[u]} for u in part},
    }
    (tmp_path / f"{split}.json").write_text(json.dumps(held))
  counts = collections.Counter(
    word for u in names for s in users[u] for word in s.lower().split()
  )
  words = [word for word, _ in counts.most_common(99)]
  (tmp_path / "words.vocab").write_text("\n".join(["<OOV>", *words]))
  imported(
    tmp_path,
    *("--format=leaf_json", "--text=words", "--unmarked", "--case-backoff"),
    *("--sequence-length=25", "--min-characters=3"),
    f"--vocabulary={tmp_path / 'words.vocab'}",
    *(f"--{split}={tmp_path / split}.json" for split in ("train", "test")),
  )
  found = summary_of("reddit_gru", tmp_path)
  assert found["test/loss"] < math.log(100) + 0.1
  assert 0 <= found["test/accuracy"] < 0.5  # the unknown word is no hit
  capsys.readouterr()


def test_mind(tmp_path, capsys):
  write_mind(tmp_path, users=4)
  imported(
    tmp_path,
    *("--format=mind", "--candidates=8", f"--news={tmp_path / 'news.npz'}"),
    *(f"--train={tmp_path / 'train'}", f"--test={tmp_path / 'dev'}"),
  )
  found = summary_of(
    "mind_news",
    tmp_path,
    **{
      "model.news": str(tmp_path / "news.npz"),
      "model.embedding": str(tmp_path / "glove.txt"),
    },
  )
  for name in ("accuracy", "auc", "mrr", "ndcg5", "ndcg10"):
    assert 0 <= found[f"test/{name}"] <= 1
  assert "best/test/auc" in found
  capsys.readouterr()
