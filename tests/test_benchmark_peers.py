"""What other simulators are measured by, and FLUTE's workloads here.

Of the other simulators only what surrounds them is tested, and our own script.
"""

import importlib
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture
def benchmark(monkeypatch):
  """Imports a module of the folder, which is not installed."""
  monkeypatch.syspath_prepend(str(ROOT))
  return lambda name: importlib.import_module(f"benchmarks.{name}")


def module_of(path: str) -> types.ModuleType:
  """A script of the folder, which belongs to no package."""
  spec = importlib.util.spec_from_file_location("script", ROOT / path)
  assert spec is not None
  assert spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def of_run(seconds: float, loss: float = 1.0) -> dict:
  """What `peers.train` returns, as far as the table reads it."""
  return {
    "seconds_per_round": seconds,
    "examples_per_second": 600 / seconds,
    "train_loss": loss,
    "train_accuracy": 0.5,
    "version": "1.2",
    "trains_with": "jax 0.10",
  }


def cells_of(table: str) -> dict[str, list[str]]:
  """Name -> the other cells of its row."""
  rows = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in table.splitlines()
  ]
  assert {len(row) for row in rows} == {7}
  return {name: cells for name, *cells in rows}


def test_table_compares_within_a_turn(benchmark):
  peers = benchmark("peers")
  results = {
    peers.OURS: {"runs": [of_run(1.0), of_run(2.0), of_run(4.0)]},
    "other": {"runs": [of_run(3.0, 0.9), of_run(4.0), of_run(20.0)]},
    "broken": {"error": "no | such thing", "runs": [of_run(1.0)]},
  }
  rows = cells_of(peers.table(results))
  same = ["1.2", "jax 0.10", "1.00", "1.00", "1.0000", "0.5000"]
  assert rows[peers.OURS] == same
  ratio = "3.00 (2.00-5.00)"
  loss = "1.0000 (0.9000-1.0000)"
  assert rows["other"] == ["1.2", "jax 0.10", ratio, ratio, loss, "0.5000"]
  assert rows["broken"][2] == "failed: no / such thing"


def test_table_without_our_own_times(benchmark):
  peers = benchmark("peers")
  results = {
    peers.OURS: {"error": "out of memory", "runs": []},
    "other": {"runs": [of_run(3.0)]},
  }
  rows = cells_of(peers.table(results))
  assert rows[peers.OURS][2] == "failed: out of memory"
  assert rows["other"][2:4] == ["unknown", "unknown"]


def test_losses_that_disagree(benchmark):
  peers = benchmark("peers")
  far = 2 * peers.TOLERANCE
  results: dict[str, dict] = {
    peers.OURS: {"runs": [of_run(1.0, 1.0), of_run(1.0, 1.0)]},
    "near": {"runs": [of_run(1.0, 1.0 - peers.TOLERANCE / 2)]},
    "far": {"runs": [of_run(1.0, 1.0 + far), of_run(1.0, 1.0 + far)]},
    "lost": {"runs": [of_run(1.0, float("nan"))]},
    "broken": {"error": "no such thing", "runs": []},
  }
  found = peers.disagreeing(results)
  assert list(found) == ["far", "lost"]
  assert found["far"] == pytest.approx(far)
  results[peers.OURS]["error"] = "out of memory"
  assert not peers.disagreeing(results)


def test_evaluation_of_a_linear_model(benchmark, tmp_path):
  made, path = benchmark("peer_cases"), tmp_path / "data.npz"
  x, y = np.eye(2, dtype=np.float32), np.array([0, 0], np.int32)
  np.savez(path, x=np.tile(x, (made.AT_ONCE, 1)), y=np.tile(y, made.AT_ONCE))
  work = {**made.WORK, "shape": [2], "classes": 2}
  weights = lambda kernel, bias: {
    "linear/kernel": np.asarray(kernel, np.float32),
    "linear/bias": np.asarray(bias, np.float32),
  }
  of = weights([[2.0, 0.0], [0.0, 1.0]], [100.0, 100.0])
  loss, accuracy = made.evaluate(path, of, work)
  expected = [np.log1p(np.exp(-2)), np.log1p(np.exp(1))]
  assert loss == pytest.approx(np.mean(expected), rel=1e-5)
  assert accuracy == 0.5
  of = weights([[2.0, 0.0], [0.0, 1.0]], [0.0, 0.0])
  loss, accuracy = made.evaluate(path, of, {**work, "sigmoid": True})
  squash = lambda x: 1 / (1 + np.exp(-x))
  gaps = [squash(0.0) - squash(2.0), squash(1.0) - squash(0.0)]
  assert loss == pytest.approx(np.mean(np.log1p(np.exp(gaps))), rel=1e-5)
  assert accuracy == 0.5


def test_reason_of_a_failure(benchmark):
  reason = benchmark("environments").reason
  assert reason("begin\nValueError: no\nsee the log\n") == "ValueError: no"
  assert reason("begin\n\n  the end \n") == "the end"
  assert reason("") == ""
  assert len(reason("error " * 100)) == 300


def test_a_command_that_fails_or_hangs(benchmark):
  made = benchmark("environments")
  assert made.call([sys.executable, "-c", "print(1)"], seconds=60) == "1\n"
  with pytest.raises(made.FailedError, match="^KeyError: 3$|^KeyError: '3'$"):
    made.call([sys.executable, "-c", "{}['3']"], seconds=60)
  with pytest.raises(made.FailedError, match="took more than 0 s"):
    made.call([sys.executable, "-c", "import time; time.sleep(60)"], seconds=0)


def test_a_peer_gets_the_first_python_that_is_new_enough(benchmark):
  made = benchmark("environments")
  pythons, here = [sys.executable, "no such python"], sys.version_info[:2]
  assert made.python_for(pythons, here, seconds=60) == sys.executable
  newer = (here[0], here[1] + 1)
  with pytest.raises(made.FailedError, match="no such python: No such file"):
    made.python_for(pythons, newer, seconds=60)
  wanted = (
    rf"needs Python {newer[0]}\.{newer[1]} or newer; --python=.* has none"
  )
  with pytest.raises(made.FailedError, match=wanted):
    made.python_for(pythons[:1], newer, seconds=60)


def test_data_of_other_parameters_is_another_file(benchmark):
  peers = benchmark("peer_data")
  assert peers.data_name() == peers.data_name(dict(peers.DATA))
  names = {peers.data_name({**peers.DATA, key: 3}) for key in peers.DATA}
  assert len(names | {peers.data_name()}) == len(peers.DATA) + 1


def test_requirements_are_of_one_version(benchmark):
  for peer in benchmark("environments").PEERS.values():
    assert all("==" in requirement for requirement in peer.requirements)


def test_clients_of_other_cases_can_be_learned_from(benchmark, tmp_path):
  made, cases = benchmark("peer_data"), benchmark("cases")
  assert set(made.WRITERS) < set(cases.CASES)
  for name, writer in made.WRITERS.items():
    case, files = cases.smoke(cases.CASES[name]), []
    for _ in range(2):
      made.write_case(tmp_path / "data.npz", case, writer)
      with np.load(tmp_path / "data.npz") as file:
        files.append(dict(file))
    one, other = files
    assert all(np.array_equal(one[key], other[key]) for key in other)
    assert one["x"].shape[1:] == case.example_shape
    sizes = np.bincount(one["client"])
    assert sizes.tolist() == cases.sizes(case).tolist()
    y = one["y"]
    assert y.dtype == np.int32
    assert 0 <= y.min() < y.max() < case.num_classes
    frequent = np.bincount(y.ravel()).max() / y.size
    assert frequent > 3 / case.num_classes
    if case.stored == "token":
      assert y.min() == 1  # 0 would be padding
      np.testing.assert_array_equal(one["x"][:, 1:], y[:, :-1])


def small_work(made: types.ModuleType, case: str) -> dict:
  """A case with smaller inputs and fewer classes."""
  shapes = {"lr": [6], "mnist": [6], "cnn": [8, 8, 1], "lstm": [5]}
  shape = shapes[case]
  return {**made.CASES[case], "shape": shape, "classes": 7, "cohort": 2}


def inputs_of(work: dict, count: int) -> np.ndarray:
  """Random inputs of a case."""
  rng, shape = np.random.default_rng(0), (count, *work["shape"])
  if work["model"] == "char_lstm":
    return rng.integers(1, work["classes"], shape, dtype=np.int32)
  return rng.standard_normal(shape, dtype=np.float32)


def test_all_begin_with_the_same_weights(benchmark):
  made = benchmark("peer_cases")
  for case in ("lr", "cnn", "lstm"):
    work = small_work(made, case)
    one, other = made.first_weights(work), made.first_weights(work)
    assert all(np.array_equal(one[name], other[name]) for name in other)
    assert (case == "lr") == all(not array.any() for array in one.values())


def test_haiku_gets_and_returns_the_weights(benchmark, monkeypatch):
  made = benchmark("peer_cases")
  monkeypatch.setitem(sys.modules, "haiku", types.ModuleType("haiku"))
  script = module_of("benchmarks/peers_/haiku_models.py")
  rng = np.random.default_rng(0)
  for case in ("lr", "cnn", "lstm"):
    first = made.first_weights(small_work(made, case))
    drawn = {
      name: rng.standard_normal(array.shape, dtype=np.float32)
      for name, array in first.items()
    }
    params = script.to_haiku(drawn)
    found = script.from_haiku(params, drawn)
    assert set(found) == set(drawn)
    for name, array in drawn.items():
      if name.endswith("/recurrent_bias"):
        array = np.zeros_like(array)  # which Haiku adds to the other
      elif name.endswith("/inputs/bias"):
        array = array + drawn[name.replace("inputs/bias", "recurrent_bias")]
      np.testing.assert_allclose(found[name], array, atol=1e-6)


def test_an_lstm_of_haiku_has_our_gates(benchmark, monkeypatch):
  made = benchmark("peer_cases")
  monkeypatch.setitem(sys.modules, "haiku", types.ModuleType("haiku"))
  script = module_of("benchmarks/peers_/haiku_models.py")
  work = small_work(made, "lstm")
  first = made.first_weights(work)
  params, x = script.to_haiku(first), inputs_of(work, 3)
  sigmoid = lambda z: 1 / (1 + np.exp(-z))
  hidden = np.asarray(params["embed"]["embeddings"])[x.T]
  for layer in range(2):
    own = {k: np.asarray(v) for k, v in params[f"lstm{layer}/linear"].items()}
    h = c = np.zeros((3, script.UNITS), np.float32)
    outputs = []
    for step in hidden:  # as haiku.LSTM computes it
      i, g, f, o = np.split(
        np.concatenate([step, h], axis=1) @ own["w"] + own["b"], 4, axis=1
      )
      c = sigmoid(f + 1) * c + sigmoid(i) * np.tanh(g)
      h = sigmoid(o) * np.tanh(c)
      outputs.append(h)
    hidden = np.stack(outputs)
  last = {k: np.asarray(v) for k, v in params["logits"].items()}
  logits = hidden @ last["w"] + last["b"]
  task = made.task_of(work)
  variables = made.with_initial(task, first).init(jax.random.key(0))
  ours = task.logits(variables, {"x": x})
  np.testing.assert_allclose(ours, np.swapaxes(logits, 0, 1), atol=1e-5)


# Not skipped without PyTorch, as `.ci/run` counts what is.
if importlib.util.find_spec("torch") is not None:

  @pytest.mark.parametrize("case", ["lr", "cnn", "lstm"])
  def test_pytorch_gets_and_returns_the_weights(benchmark, tmp_path, case):
    made, peers = benchmark("peer_cases"), benchmark("peers")
    script = module_of("benchmarks/peers_/torch_models.py")
    work = small_work(made, case) | {"first": str(tmp_path / "first.npz")}
    layers = made.layers_of(work)
    rng = np.random.default_rng(0)
    weights = {
      name: array + rng.standard_normal(array.shape, dtype=np.float32) / 8
      for name, array in made.first_weights(work).items()
    }
    np.savez(work["first"], **peers.to_torch(weights, layers))
    x = inputs_of(work, 4)
    y = rng.integers(1, 7, x.shape if case == "lstm" else 4, dtype=np.int32)
    data = tmp_path / "data.npz"
    np.savez(data, x=x, y=y, client=np.array([0, 0, 0, 1]))

    model = script.begin(work)
    clients = list(zip(*script.read(data), strict=True))
    assert [len(inputs) for inputs, _ in clients] == [3, 1]
    losses = [script.loss_of(model(x), y).item() for x, y in clients]
    loss, _ = made.evaluate(data, weights, work)
    assert loss == pytest.approx(0.75 * losses[0] + 0.25 * losses[1], rel=1e-4)
    state = script.arrays(model.state_dict())
    found = peers.from_torch(state, layers)
    assert all(np.array_equal(found[name], weights[name]) for name in weights)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["lr", "cnn", "lstm"])
def test_our_script_for_peers_trains(benchmark, tmp_path, case):
  peers, made = benchmark("peers"), benchmark("peer_cases")
  work = small_work(made, case)
  x = inputs_of(work, 60)
  y = x % 6 + 1 if case == "lstm" else (x.reshape(60, -1)[:, 0] > 0) * 2
  data = tmp_path / "data.npz"
  np.savez(data, x=x, y=y.astype(np.int32), client=np.arange(60) // 6)
  env = {**os.environ, "JAX_PLATFORMS": "cpu"}
  runner = peers.our_runners(env, work)[peers.OURS]
  before, _ = made.evaluate(data, made.first_weights(work), work)
  row = peers.train(
    **runner._asdict(), data=data, rounds=peers.SMALLEST_ROUNDS, seconds=120
  )
  assert row["seconds_per_round"] > 0
  assert row["examples_per_round"] == 12
  assert row["train_loss"] < before - 0.01
  assert row["version"] == row["versions"]["fedjax_sim"]
  assert row["trains_with"] == f"jax {jax.__version__}"


# --- FLUTE --------------------------------------------------------------------


def test_a_missing_checkout_of_flute_is_told(benchmark, tmp_path):
  peers, made = benchmark("peers"), benchmark("environments")
  for path in (None, tmp_path):
    with pytest.raises(made.FailedError, match=f"^--flute={path}: give a"):
      peers.flute_work(path)
  (tmp_path / "e2e_trainer.py").touch()
  work = peers.flute_work(tmp_path)
  assert work["flute"] == str(tmp_path)
  assert work["processes"] >= 2


def checkout_of(folder: pathlib.Path) -> pathlib.Path:
  """A folder with as much of FLUTE as the script looks at."""
  own = folder / "experiments" / "cv_lr_mnist"
  own.mkdir(parents=True)
  (folder / ".github").mkdir()
  (folder / "core").mkdir()
  (folder / "e2e_trainer.py").touch()
  theirs = {
    "strategy": "FedAvg",
    "model_config": {"model_type": "LR", "input_dim": 784},
    "server_config": {
      "rec_freq": 20,
      "type": "model_optimization",
      "data_config": {
        "val": {"batch_size": 10, "val_data": None},
        "test": {"batch_size": 10, "test_data": None},
      },
    },
    "client_config": {"data_config": {"train": {"desired_max_samples": 5000}}},
  }
  (own / "config.yaml").write_text(yaml.safe_dump(theirs))
  return folder


def test_every_case_takes_flute(benchmark, tmp_path, monkeypatch):
  peers, made = benchmark("peers"), benchmark("environments")
  monkeypatch.setattr(peers, "environment", lambda *_, **__: "an interpreter")
  checkout = checkout_of(tmp_path)
  for work in peers.CASES.values():
    runner = peers.peer_runner(
      made.FLUTE,
      {},
      work,
      cache=tmp_path,
      pythons=[sys.executable],
      flute=checkout,
      seconds=60,
    )
    assert runner.torch
    assert {**runner.batching, **work} == runner.batching  # what all train
    assert runner.batching["flute"] == str(checkout)


def test_flute_gets_its_own_config_with_our_numbers(tmp_path):
  script = module_of("benchmarks/peers_/run_flute.py")
  checkout = checkout_of(tmp_path)
  work = {"cohort": 3, "batch_size": 7, "epochs": 1, "learning_rate": 0.5}
  config = script.make_config(checkout, "a.npz", "first.pt", 9, work)
  assert config["strategy"] == "FedAvg"
  assert config["model_config"] == {
    "model_type": "PeerModel",
    "model_folder": "experiments/peers/model.py",
    "pretrained_model_path": "first.pt",
    "work": work,
  }
  assert config["server_config"] == {
    "type": "model_optimization",
    "max_iteration": 9,
    "num_clients_per_iteration": 3,
    "initial_lr_client": 0.5,
    "val_freq": 10,
    "rec_freq": 10,
    "data_config": {
      "val": {"batch_size": 10, "val_data": "a.npz"},
      "test": {"batch_size": 10, "test_data": "a.npz"},
    },
  }
  assert config["client_config"]["data_config"]["train"] == {
    "desired_max_samples": 5000,
    "batch_size": 7,
    "list_of_train_data": "a.npz",
    "max_grad_norm": np.inf,
  }
  more = work | {"epochs": 2}
  with pytest.raises(ValueError, match="one epoch"):
    script.make_config(checkout, "a.npz", "first.pt", 9, more)


def test_flute_runs_in_links_into_its_checkout(tmp_path):
  script = module_of("benchmarks/peers_/run_flute.py")
  checkout, folder = checkout_of(tmp_path / "flute"), tmp_path / "run"
  folder.mkdir()
  script.link(folder, checkout)
  links = {str(p.relative_to(folder)): p.resolve() for p in folder.rglob("*")}
  ours = ROOT / "benchmarks" / "peers_" / "flute_experiment.py"
  for name in script.LOADED:
    assert links.pop(f"experiments/peers/{name}") == ours
  for name in ("core", "e2e_trainer.py"):
    assert links.pop(name) == checkout / name
  assert set(links) == {
    "experiments",
    "experiments/peers",
    "experiments/peers/dataloaders",
  }
  assert {p.name for p in (checkout / "experiments").iterdir()} == {
    "cv_lr_mnist"
  }


if importlib.util.find_spec("torch") is not None:

  @pytest.mark.parametrize("case", ["lr", "mnist", "cnn", "lstm"])
  def test_flutes_experiment_has_our_model_and_data(
    benchmark, tmp_path, monkeypatch, case
  ):
    import torch

    made, peers = benchmark("peer_cases"), benchmark("peers")
    of_flute: dict[str, dict] = {
      "core.dataloader": {"BaseDataLoader": torch.utils.data.DataLoader},
      "core.dataset": {"BaseDataset": torch.utils.data.Dataset},
      "core.model": {"BaseModel": torch.nn.Module},
    }
    for name, attributes in of_flute.items():
      module = types.ModuleType(name)
      vars(module).update(attributes)
      monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "peers_"))
    script = module_of("benchmarks/peers_/flute_experiment.py")

    work = small_work(made, case) | {"first": str(tmp_path / "first.npz")}
    rng = np.random.default_rng(0)
    weights = {
      name: array + rng.standard_normal(array.shape, dtype=np.float32) / 8
      for name, array in made.first_weights(work).items()
    }
    np.savez(work["first"], **peers.to_torch(weights, made.layers_of(work)))
    x = inputs_of(work, 5)
    y = rng.integers(1, 7, x.shape if case == "lstm" else 5, dtype=np.int32)
    data = tmp_path / "data.npz"
    np.savez(data, x=x, y=y, client=np.array([0, 0, 0, 1, 1]))

    everyone = script.Dataset(str(data), user_idx=-1, args={})
    assert everyone.num_samples == [3, 2]
    model = script.PeerModel({"work": work})
    model.net.load_state_dict(
      module_of("benchmarks/peers_/torch_models.py").begin(work).state_dict()
    )
    total = 0.0
    for i, user in enumerate(everyone.user_list):  # as FLUTE's Client does
      one = {
        "users": [user],
        "num_samples": [everyone.num_samples[i]],
        "user_data": {user: everyone.user_data[user]},
        "user_data_label": {user: everyone.user_data_label[user]},
      }
      for mode in ("train", "val"):
        batches = list(script.DataLoader(mode, one, {"batch_size": 2}))
        assert [len(b["x"]) for b in batches] == ([2, 1] if i == 0 else [2])
      losses = [model.loss(b).item() * len(b["x"]) for b in batches]
      total += sum(losses)
    loss, _ = made.evaluate(data, weights, work)
    assert loss == pytest.approx(total / 5, rel=1e-4)


def test_what_flute_prints_is_read():
  script = module_of("benchmarks/peers_/run_flute.py")
  printed = """
Thu : Loading : 3-th client with name: f_00003, 62 samples, 1e-06s elapsed
Thu : Loading : 17-th client with name: f_00017, 8 samples, 1e-06s elapsed
Attempted to log scalar metric Training loss:
4.5
Attempted to log scalar metric secsPerRoundTotal:
0.0625
Attempted to log scalar metric secsPerRoundTotal:
1e-05
"""
  assert script.CLIENT.findall(printed) == ["62", "8"]
  assert script.SECONDS.findall(printed) == ["0.0625", "1e-05"]
  failed = "a line\n[rank0]: OSError: no file\nerrors.ChildFailedError: \n"
  assert script.FAILURE.findall(failed)[0] == "OSError: no file"


def test_workloads_of_flute_are_those_of_the_configs(benchmark):
  flute = benchmark("flute")
  for workload in flute.WORKLOADS.values():
    config = module_of(f"configs/{workload.config}").get_config()
    case = workload.case
    assert config.client.learning_rate == case.learning_rate
    assert config.client.batch_size == case.batch_size
    assert config.client.epochs == 1
    assert config.server.clients_per_round == case.clients_per_round == 10
    assert config.server.rounds == workload.reported.rounds


@pytest.mark.slow
def test_workloads_of_flute_run(tmp_path):
  written = tmp_path / "flute.json"
  options = ["--workloads=cv_lr_mnist", "--synthetic", "--scale=smoke"]
  command = [sys.executable, "-m", "benchmarks.flute", "--pairs=1"]
  done = subprocess.run(
    [*command, *options, f"--json={written}"],
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  (row,) = json.loads(written.read_text())["workloads"].values()
  assert row["data"] == "random"
  assert row["parameters"] == 7850
  assert row["alone_peak_bytes"] > 2**20
  assert row["ratios"]["one_to_bare"] > 0
  for engine in row["engines"].values():
    assert engine["rounds_per_second"] > 0
  assert row["reported"]["flute_seconds_per_round"] == 0.95
  assert "FLUTE on 4 GPUs" in done.stdout
