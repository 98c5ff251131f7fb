"""`fedjax-sim flute`: what it refuses, what it writes, and whole runs."""

import json
import math
import textwrap
from pathlib import Path

import numpy as np
import pytest

from fedjax_sim.cli.main import main
from fedjax_sim.config import flags, flute
from fedjax_sim.data import open_store
from fedjax_sim.distributed import mesh
from fedjax_sim.models import MODELS
from flute_files import DGA, DP, FILES, LR, C, S, changed, write
from shaped_files import (
  fed_cifar100,
  fed_emnist,
  flute_heartbeats,
  flute_sentences,
  kaggle_heartbeats,
  leaf_digits,
  tff_shakespeare,
)

# --- what is wrong ------------------------------------------------------------


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    (
      {f"{S}.max_iteratons": 5},
      ["server_config: key='max_iteratons'", "'max_iteration'"],
    ),
    ({"sever_config": {}}, ["key='sever_config'", "'server_config'"]),
    (
      {f"{S}.max_iteration": "many"},
      ["server_config.max_iteration='many'", "whole number"],
    ),
    ({f"{S}.max_iteration": 2.5}, ["max_iteration=2.5", "whole number"]),
    ({f"{S}.max_iteration": True}, ["max_iteration=True", "whole number"]),
    ({f"{S}.softmax_beta": "hot"}, ["softmax_beta='hot'", "a number"]),
    ({f"{S}.wantRL": "no way"}, ["wantRL='no way'", "true or false"]),
    ({f"{S}.data_config": 5}, ["data_config=5", "section"]),
    ({"model_config.width": 8}, ["model_config: key='width'"]),
    ({"strategy": "FedSGD"}, ["strategy='FedSGD'", "FedProx"]),
    ({"strategy": ...}, ["strategy is missing"]),
    ({"model_config.model_folder": ...}, ["model_folder is missing", "--task"]),
    (
      {"model_config.model_folder": "experiments/mine/model.py"},
      ["'mine'", "cv_lr_mnist"],
    ),
    ({f"{S}.num_clients_per_iteration": "few"}, ["'few'", "'lo,hi'"]),
    ({f"{S}.num_clients_per_iteration": "9,3"}, ["'9,3'", "larger"]),
    ({f"{S}.type": "other"}, ["server_config.type='other'", "personalization"]),
    ({f"{S}.optimizer_config.type": "Adam"}, ["type='Adam'", "adamW"]),
    (
      {f"{S}.optimizer_config": {"type": "adam", "betas": [0.9]}},
      ["betas=[0.9]", "two"],
    ),
    ({f"{S}.annealing_config.type": "cosine"}, ["type='cosine'", "step_lr"]),
    ({f"{S}.annealing_config": {"type": "step_lr"}}, ["gamma is missing"]),
    ({"dp_config.enable_global_dp": True}, ["enable_local_dp=true"]),
    (
      {"dp_config": {**DP, "eps": None}},
      ["dp_config.eps is missing", "clips alone"],
    ),
    ({"dp_config": {**DP, "eps": 0}}, ["dp_config.eps=0", "above 0"]),
    ({"dp_config": {**DP, "max_grad": 0}}, ["dp_config.max_grad=0", "> 0"]),
    (
      {f"{S}.optimizer_config": {"type": "adamW", "lr": 1, "weight_decay": 1}},
      ["optimizer_config.weight_decay=1", "optimizer_config.lr=1"],
    ),
    ({f"{S}.optimizer_config": {"type": "sgd"}}, ["lr is missing", "rate"]),
    ({"strategy": "DGA", f"{S}.aggregate_median": ...}, ["softmax, or mean"]),
    ({f"{S}.num_clients_per_iteration": 0}, ["refused", "0 means all"]),
    ({f"{S}.optimizer_config.type": "LarsSGD"}, ["refused", "LarsSGD"]),
    ({f"{S}.optimizer_config.dampening": 0.5}, ["refused", "dampening"]),
    ({f"{C}.type": "gradient_computation"}, ["refused", "fedsgd"]),
    (
      {"model_config.pretrained_model_path": "model.tar"},
      ["refused", "pickled", ".safetensors"],
    ),
    ({"model_config.weight_init": "xavier_normal"}, ["refused", "weight_init"]),
    ({"strategy": None}, ["strategy is missing"]),
    ({"server_config": None}, ["server_config is missing"]),
    (
      {f"{S}.initial_lr_client": math.inf},
      [f"{S}.initial_lr_client=inf", "finite"],
    ),
    (
      {"model_config": {"model_folder": "experiments/mine/x.py", "hidden": 8}},
      ["model_folder='mine' is unknown", "--task=FILE.py:FUNCTION"],
    ),
    (
      {
        "model_config.model_folder": "experiments/cv",
        "model_config.model_type": "resnext50_32x4d",
      },
      ["model_type='resnext50_32x4d'", "resnet18", "vgg11"],
    ),
    (
      {
        "model_config.model_folder": "experiments/cv",
        "model_config.model_type": ...,
      },
      ["model_type is missing", "resnet18"],
    ),
  ],
)
def test_a_wrong_file_is_one_line(tmp_path, capsys, changes, words):
  path = write(tmp_path / "config.yaml", changed(LR, changes))
  before = sorted(tmp_path.rglob("*"))
  assert main(["flute", f"--config={path}", f"--workdir={tmp_path}/run"]) == 2
  out, err = capsys.readouterr()
  assert out == ""
  assert err.startswith("fedjax-sim: error: ")
  assert err.count("\n") == 1
  assert all(word in err for word in words), err
  assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
  ("text", "words"),
  [
    ("a: [1", ["line 1", "expected"]),
    ("a: 1\na: 2\n", ["line 2", "'a' is there twice"]),
    ("- 1\n", ["holds a list", "model_config"]),
    ("", ["holds a NoneType"]),
    ("a: !!python/object:os.system 1\n", ["line 1", "could not determine"]),
    ("a: \x00", ["is no YAML"]),
    ("? [1, 2]\n: 3\n", ["is no YAML", "unhashable"]),
    ("a: \udcff", ["no text in UTF-8", "byte 3"]),
    ("[" * 5000, ["nested too deeply"]),
    ("a: &a {b: 1, b: 2}\nc: {<<: *a}\n", ["'b' is there twice"]),
  ],
)
def test_no_yaml_is_one_line(tmp_path, capsys, text, words):
  path = tmp_path / "config.yaml"
  path.write_text(text, errors="surrogateescape")
  assert main(["flute", f"--config={path}", "--workdir=run"]) == 2
  err = capsys.readouterr().err
  assert err.count("\n") == 1
  assert all(word in err for word in [str(path), *words]), err


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    ([], ["--workdir=... is missing"]),
    (["--translate_only"], ["--workdir=... is missing, or --to=FILE"]),
    (["--workdir=run", "--to=x.py"], ["--to=x.py", "--translate_only"]),
    (["--workdir=run", "--compat=paper"], ["--compat='paper'", "meant"]),
    (["--workdir=run", "--task=mnist"], ["--task='mnist'", "cv_lr_mnist"]),
    (["--workdir=s3://a/b"], ["--workdir=s3://a/b", "--translate_only"]),
    (["--workdir=run", "--data=nowhere"], ["--data=nowhere", "no such"]),
    (["--translate_only", "--to=no/x.py"], ["no: there is no such folder"]),
    (
      ["--workdir=run", "--task=cv_cnn_femnist"],
      ["--data is missing", "data import --format=tff_hdf5"],
    ),
    (
      ["--workdir=run", "--task=cv_cnn_femnist", "--data=."],
      ["--data=. is no client store", "data import"],
    ),
    (["--workdir=run", "--task=cv_lr_mnist", "--data=."], ["mnist"]),
    (["--workdir=run", "--config.server.rouns=3"], ["server.rouns", "rounds"]),
  ],
)
def test_wrong_flags_leave_nothing(
  tmp_path, monkeypatch, capsys, arguments, words
):
  monkeypatch.setattr(mesh, "setup", lambda: None)
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("FEDJAX_SIM_DATA", str(tmp_path))
  path = write(tmp_path / "config.yaml", LR)
  assert main(["flute", f"--config={path}", *arguments]) == 2
  err = capsys.readouterr().err
  assert err.count("\n") == 1
  assert all(word in err for word in words), err
  assert sorted(tmp_path.rglob("*")) == [path]


def test_without_a_file(capsys):
  assert main(["flute", "--workdir=run"]) == 2
  assert "--config=... is missing" in capsys.readouterr().err
  assert main(["flute", "--config=none.yaml", "--workdir=run"]) == 2
  assert "no such file" in capsys.readouterr().err


def test_a_model_that_is_not_here(tmp_path, monkeypatch, capsys):
  others = {k: v for k, v in MODELS.items() if k != "logistic_regression"}
  monkeypatch.setattr("fedjax_sim.models.MODELS", others)
  path = write(tmp_path / "config.yaml", LR)
  assert main(["flute", f"--config={path}", f"--workdir={tmp_path}/run"]) == 2
  err = capsys.readouterr().err
  assert "task cv_lr_mnist needs the model 'logistic_regression'" in err
  assert not (tmp_path / "run").exists()


# --- the command --------------------------------------------------------------


def test_sections_may_be_merged(tmp_path):
  """With YAML's `<<`, whose keys give way to those that are there."""
  path = tmp_path / "config.yaml"
  path.write_text("a: &a {b: 1, c: 2}\nd: {<<: *a, b: 3}\n")
  assert flute.read(path)["d"] == {"b": 3, "c": 2}


@pytest.mark.parametrize("alone", [False, True])
def test_a_file_that_is_no_translation_is_kept(tmp_path, capsys, alone):
  path = write(tmp_path / "mine.yaml", LR)
  target = tmp_path / "config.py"
  words = [f"--config={path}", f"--workdir={tmp_path}"]
  words += ["--translate_only"] if alone else []
  target.write_text("mine = 1\n")
  assert main(["flute", *words]) == 2
  err = capsys.readouterr().err
  assert f"{target} is there, and no translation" in err
  assert target.read_text() == "mine = 1\n"
  assert sorted(tmp_path.iterdir()) == [target, path]


def test_a_translation_is_kept_if_the_next_is_refused(tmp_path, capsys):
  path = write(tmp_path / "mine.yaml", LR)
  words = [f"--config={path}", f"--workdir={tmp_path}"]
  assert main(["flute", *words, "--translate_only"]) == 0
  before = (tmp_path / "config.py").read_text()
  write(path, changed(LR, {f"{S}.val_freq": 0}))
  assert main(["flute", *words]) == 2
  assert "server.eval_every=0" in capsys.readouterr().err
  assert (tmp_path / "config.py").read_text() == before


def test_translating_alone(tmp_path, capsys):
  path = write(tmp_path / "mine.yaml", DGA)
  target = tmp_path / "translated.py"
  words = [f"--config={path}", "--translate_only", f"--to={target}"]
  assert main(["flute", *words]) == 0
  out = capsys.readouterr().out
  assert "42 keys" not in out
  assert f"wrote {target}" in out
  assert "server.rounds=1000" in out
  config = flags.load(str(target))
  assert config.algorithm.beta == 1 / 20
  assert "server_config.max_iteration" in target.read_text()


def test_refused_keys_are_translated_around(tmp_path, capsys):
  tree = changed(LR, {f"{S}.optimizer_config.dampening": 0.5})
  path = write(tmp_path / "mine.yaml", tree)
  words = [f"--config={path}", "--translate_only", f"--workdir={tmp_path}"]
  assert main(["flute", *words]) == 0
  assert "1 refused" in capsys.readouterr().out
  text = (tmp_path / "config.py").read_text()
  assert "# Refused:\n  # - server_config.optimizer_config.dampening" in text


def test_a_model_of_ones_own():
  """Keys that FLUTE lacks are its options, and other metrics its metrics."""
  changes = {
    "model_config": {"model_type": "Net", "width": 8, "hidden_dim": 3},
    f"{S}.best_model_criterion": "top_2",
  }
  translation = flute.translate(
    changed(LR, changes), task="mine.py:net", data="store"
  )
  fields = translation.fields
  assert fields["model.name"] == "mine.py:net"
  assert fields["model.width"] == 8
  assert fields["model.hidden_dim"] == 3
  assert fields["server.best_metrics"] == ("test/top_2",)
  assert (fields["data.name"], fields["data.path"]) == ("store", "store")
  assert translation.counts["refused"] == 0


def test_a_model_of_ones_own_wants_data(tmp_path, capsys):
  path = write(tmp_path / "mine.yaml", LR)
  words = [
    f"--config={path}",
    "--task=mine.py:net",
    f"--workdir={tmp_path}/run",
  ]
  assert main(["flute", *words]) == 2
  err = capsys.readouterr().err
  assert "task mine.py:net has no data set here; give the folder of" in err
  assert "data import --format=leaf_json" in err


# --- FLUTE's own files --------------------------------------------------------


@pytest.mark.parametrize(
  ("name", "writer", "shape", "test"),
  [
    ("cv_lr_mnist/config", leaf_digits, (784,), 6),
    ("cv_cnn_femnist/config", fed_emnist, (28, 28), 6),
    ("cv_resnet_fedcifar100/config", fed_cifar100, (32, 32, 3), 6),
    ("nlp_rnn_fedshakespeare/config", tff_shakespeare, (80,), 3),
    ("ecg_cnn/config", flute_heartbeats, (187,), 6),
    ("hello_world_nlg_gru", flute_sentences, (25,), 6),
  ],
)
def test_the_files_of_a_task_are_found_and_imported(
  tmp_path, name, writer, shape, test
):
  writer(tmp_path)
  folder = "experiments" if "/" in name else "testing"
  name = f"{folder}/{name}"
  translation = flute.translate(FILES[name])
  found = flute.importing(translation, str(tmp_path))
  assert found.complete, found.flags
  store = tmp_path / "store"
  assert main(["data", "import", *found.flags, f"--store={store}"]) == 0
  data = open_store(store)
  assert data.train.num_clients == 3
  assert data.train.examples["x"].shape[1:] == shape
  assert data.test
  assert len(data.test["y"]) == test
  gone = changed(FILES[name], {f"{S}.data_config.test.test_data": "gone"})
  found = flute.importing(flute.translate(gone), str(tmp_path))
  assert not found.complete


@pytest.mark.parametrize(
  ("name", "words"),
  [
    ("experiments/fednewsrec/config", ["--format=mind", "--train=here/FILE"]),
    (
      "configs/hello_world_nlg_gru_json",
      ["--vocabulary=FILE", "--train=here/FILE", "--sequence-length=25"],
    ),
    ("testing/hello_world_mlm_bert", ["--tokenizer=roberta-large"]),
  ],
)
def test_files_that_the_user_has_to_name(name, words):
  found = flute.importing(flute.translate(FILES[name]), "here")
  assert not found.complete
  assert all(word in found.command("STORE") for word in words)


# --- the documents ------------------------------------------------------------

DOCS = Path(__file__).parents[1] / "docs"


def test_the_page_shows_what_the_command_prints():
  tree = flute.read(DOCS / "examples" / "flute_dga.yaml")
  page = (DOCS / "flute.md").read_text()
  assert textwrap.indent(flute.table(flute.translate(tree)), "    ") in page
  for name, tree in FILES.items():
    counts = flute.translate(tree).counts.values()
    cells = " | ".join(map(str, (sum(counts), *counts)))
    assert f"| `{name}.yaml` | {cells} |" in page


# --- whole runs ---------------------------------------------------------------

FEW = {
  f"{S}.max_iteration": 2,
  f"{S}.num_clients_per_iteration": 2,
  f"{S}.val_freq": 2,
  f"{S}.rec_freq": 2,
}


def ran(tmp_path, tree, *arguments):
  """The summary of a run, whose config is beside it."""
  path = write(tmp_path / "mine.yaml", changed(tree, FEW))
  workdir = tmp_path / "run"
  assert (
    main(["flute", f"--config={path}", f"--workdir={workdir}", *arguments]) == 0
  )
  assert flags.load(str(workdir / "config.py")).server.rounds == 2
  return json.loads((workdir / "summary.json").read_bytes())


@pytest.fixture
def cpu(monkeypatch, no_pictures):
  monkeypatch.setattr(mesh, "setup", lambda: None)


@pytest.fixture
def images(tmp_path):
  """A store of colored images of 3 clients, with a test set."""
  rng = np.random.default_rng(0)
  for name, count in (("train", 24), ("test", 8)):
    np.savez(
      tmp_path / f"{name}.npz",
      x=rng.integers(0, 256, (count, 32, 32, 3)).astype(np.uint8),
      y=(np.arange(count) % 4).astype(np.uint8),
      client=np.arange(count) % 3,
    )
  store = tmp_path / "store"
  paths = [f"--{name}={tmp_path}/{name}.npz" for name in ("train", "test")]
  command = ["data", "import", "--format=npz", *paths, f"--store={store}"]
  assert main(command) == 0
  return store


@pytest.fixture
def text(tmp_path):
  """A store of characters of 3 clients."""
  users = {
    name: {"x": ["to be or not to be, that is the question " * 3]}
    for name in "abc"
  }
  blob = {
    "users": list(users),
    "num_samples": [1] * 3,
    "user_data": users,
  }
  (tmp_path / "text.json").write_text(json.dumps(blob))
  store = tmp_path / "store"
  source = f"{tmp_path}/text.json"
  words = [f"--train={source}", f"--test={source}", "--text=characters"]
  length = "--sequence-length=20"
  assert (
    main(
      [
        "data",
        "import",
        "--format=leaf_json",
        *words,
        length,
        f"--store={store}",
      ]
    )
    == 0
  )
  return store


@pytest.mark.slow
@pytest.mark.parametrize("compat", flute.COMPATS)
def test_dga_with_a_network_that_attends(tmp_path, cpu, compat):
  kaggle_heartbeats(tmp_path)
  summary = ran(
    tmp_path,
    FILES["testing/hello_world_ecg_cnn"],
    f"--data={tmp_path}",
    f"--compat={compat}",
    "--config.data.num_clients=4",
    "--config.model.width=4",
    "--config.runtime.lanes=1",
  )
  assert summary["rounds"] == 2
  assert 0 <= summary["test/accuracy"] <= 1


@pytest.mark.integration
def test_from_the_files_of_flutes_users(tmp_path, cpu, capsys):
  own = tmp_path / "own"
  own.mkdir()
  leaf_digits(own)
  words = [f"--data={own}", "--config.runtime.lanes=1"]
  summary = ran(tmp_path, LR, *words)
  assert summary["rounds"] == 2
  assert "clients of train" in capsys.readouterr().out
  store = tmp_path / "run" / "store"
  assert open_store(store).train.client_name(2) == "f_00002"
  assert flags.load(str(tmp_path / "run/config.py")).data.path == str(store)
  before = store.stat().st_mtime_ns
  assert ran(tmp_path, LR, *words) == summary  # it goes on with that store
  assert store.stat().st_mtime_ns == before
  path = write(tmp_path / "mine.yaml", changed(LR, FEW))
  words = [f"--config={path}", f"--workdir={tmp_path}/other", *words]
  assert main(["flute", *words, "--config.server.rouns=1"]) == 2
  assert not (tmp_path / "other").exists()


@pytest.mark.integration
def test_images(tmp_path, cpu, images, capsys):
  summary = ran(
    tmp_path,
    FILES["experiments/classif_cnn/config"],
    f"--data={images}",
    "--config.runtime.lanes=1",
  )
  assert summary["rounds"] == 2
  # Another file of the same name is another run, which is refused.
  written = tmp_path / "run" / "config.py"
  before = written.read_text()
  other = changed(
    FILES["experiments/classif_cnn/config"],
    {**FEW, f"{S}.initial_lr_client": 0.5},
  )
  path = write(tmp_path / "other.yaml", other)
  words = [f"--config={path}", f"--data={images}", "--config.runtime.lanes=1"]
  assert main(["flute", *words, f"--workdir={written.parent}"]) == 2
  assert "client.learning_rate" in capsys.readouterr().err
  assert written.read_text() == before


@pytest.mark.integration
def test_text(tmp_path, cpu, text):
  tree = changed(
    FILES["experiments/nlp_rnn_fedshakespeare/config"],
    {"model_config.hidden_dim": 4, "model_config.embed_dim": 2},
  )
  summary = ran(tmp_path, tree, f"--data={text}", "--config.runtime.lanes=1")
  assert summary["rounds"] == 2


@pytest.mark.integration
def test_few_labels(tmp_path, cpu, images):
  tree = changed(
    FILES["experiments/semisupervision/config"],
    {
      f"{C}.semisupervision.train_ratio": 0.5,
      f"{C}.semisupervision.train_ep": 2,
      f"{C}.semisupervision.unsuptrain_ep": 1,
      f"{C}.semisupervision.burnout_round": 1,
      f"{C}.semisupervision.bs": 4,
    },
  )
  summary = ran(
    tmp_path,
    tree,
    f"--data={images}",
    "--config.model.name=mlp",
    *(f"--config.model.{name}=None" for name in ("depth", "stem", "norm")),
    "--config.runtime.lanes=1",
  )
  assert summary["rounds"] == 2


@pytest.mark.integration
@pytest.mark.parametrize("compat", flute.COMPATS)
def test_local_privacy(tmp_path, cpu, images, compat):
  summary = ran(
    tmp_path,
    changed(DGA, {"dp_config": DP}),
    f"--data={images}",
    f"--compat={compat}",
    "--config.runtime.lanes=1",
  )
  assert summary["rounds"] == 2


@pytest.mark.integration
def test_a_refused_value_names_its_key(tmp_path, real_data, capsys):
  path = write(tmp_path / "config.yaml", changed(LR, {f"{S}.max_iteration": 0}))
  assert main(["flute", f"--config={path}", f"--workdir={tmp_path}/run"]) == 2
  err = capsys.readouterr().err
  assert "server.rounds=0 is out of range" in err
  assert f"It comes from {S}.max_iteration in {path}." in err
