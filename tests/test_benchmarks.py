"""The benchmarks run, write what they promise, and train what they say."""

import importlib
import json
import math
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
RATIOS = {
  "one_to_bare",
  "all_to_bare",
  "all_to_one",
  "one_to_torch",
  "all_to_torch",
}
OF_TORCH = {"one_to_torch", "all_to_torch"}


@pytest.fixture
def benchmark(monkeypatch):
  """Imports a module of the folder, which is not installed."""
  monkeypatch.syspath_prepend(str(ROOT))
  return lambda name: importlib.import_module(f"benchmarks.{name}")


def run_smoke(folder: pathlib.Path, *before: str) -> dict:
  """The JSON of LR at a small scale, in a process of its own.

  Args:
    folder: where to write.
    before: lines of Python that come first.
  """
  written = folder / "engine.json"
  arguments = ["--cases=lr", "--pairs=2", "--scale=smoke", f"--json={written}"]
  lines = [
    *before,
    "from benchmarks import engine",
    f"engine.main({arguments!r})",
  ]
  done = subprocess.run(
    [sys.executable, "-c", "\n".join(lines)],
    cwd=ROOT,
    env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stdout
  report: dict = json.loads(written.read_text())
  for note in report["notes"]:
    assert note in done.stdout
  return report


def check(report: dict) -> None:
  """All fields are there, and finite; what may be zero is a share."""
  facts = report["machine"]
  assert facts["cpu_count"] >= 1
  assert facts["versions"]["jax"]
  assert facts["device_kind"]
  case = report["cases"]["lr"]
  engines = {"one", "all"} if facts["devices"] > 1 else {"one"}
  assert set(case["engines"]) == engines
  positive = [
    case[key]
    for key in (
      "parameters",
      "steps_per_turn",
      "flops_per_step",
      "matmul_peak",
      "peak_bytes",
    )
  ]
  for engine in case["engines"].values():
    positive += [
      engine[key]
      for key in (
        "examples_per_second",
        "clients_per_second",
        "flops_per_second",
        "share_of_peak",
        "program_bytes",
      )
    ]
    assert engine["compilations"] == 1
    for key in ("step_waste", "last_batch_waste", "device_imbalance"):
      assert 0 <= engine[key] < 1
    assert engine["step_waste"] == 0  # of one lane
  assert set(case["ratios"]) == RATIOS
  there = {k for k, v in case["ratios"].items() if v is not None}
  if len(engines) == 2:
    assert there >= RATIOS - OF_TORCH
  for name in there:
    values = case["ratios_of_turns"][name]
    assert len(values) == 2
    positive += [case["ratios"][name], *values]
  assert all(math.isfinite(x) and x > 0 for x in positive)


def test_engine_writes_all_fields(tmp_path):
  report = run_smoke(tmp_path)
  check(report)
  ratios = report["cases"]["lr"]["ratios"]
  if report["notes"]:  # PyTorch is not installed
    assert all(ratios[name] is None for name in OF_TORCH)
  else:
    assert ratios["one_to_torch"] > 0


def test_engine_without_pytorch_leaves_its_columns_empty(tmp_path):
  report = run_smoke(tmp_path, "import sys", "sys.modules['torch'] = None")
  check(report)
  (note,) = report["notes"]
  assert "PyTorch is not installed" in note
  case = report["cases"]["lr"]
  assert case["torch_threads"] is None
  assert all(case["ratios"][name] is None for name in OF_TORCH)


def sgd_in_numpy(x, y, classes, rows, batch_size, rate):
  """Softmax regression from zeros, in double precision."""
  weights, bias = np.zeros((x.shape[1], classes)), np.zeros(classes)
  for i in range(0, len(rows), batch_size):
    picked = rows[i : i + batch_size]
    inputs, labels = x[picked].astype(np.float64), y[picked]
    logits = inputs @ weights + bias
    odds = np.exp(logits - logits.max(1, keepdims=True))
    error = odds / odds.sum(1, keepdims=True) - np.eye(classes)[labels]
    weights = weights - rate * inputs.T @ error / batch_size
    bias = bias - rate * error.mean(0)
  return weights, bias


def test_bare_loop_is_plain_sgd(benchmark):
  bare = benchmark("bare")
  from fedjax_sim.models.logistic_regression import logistic_regression

  rng = np.random.default_rng(0)
  x = rng.normal(size=(40, 6)).astype(np.float32)
  y = rng.integers(0, 3, 40).astype(np.int32)
  loop = bare.Bare(
    logistic_regression((6,), 3),
    {"x": x, "y": y},
    batch_size=4,
    learning_rate=0.5,
    capacity=100,
  )
  rows = rng.integers(0, 40, 60).astype(np.int32)
  loop.train(*loop.put(rows[:20]))
  loop.train(*loop.put(rows[20:]))  # goes on; the rest of 100 is not trained on
  weights, bias = sgd_in_numpy(x, y, 3, rows, 4, 0.5)
  trained = loop.params["linear"]
  np.testing.assert_allclose(trained["kernel"][...], weights, atol=1e-5)
  np.testing.assert_allclose(trained["bias"][...], bias, atol=1e-5)
  assert np.abs(weights).max() > 0.1


def test_bare_loop_reads_the_batches_of_the_engine(benchmark):
  bare, cases = benchmark("bare"), benchmark("cases")
  engine = benchmark("engine")
  case = cases.smoke(cases.CASES["lr"])
  data = cases.dataset(case)
  task = case.model(case.example_shape, case.num_classes)
  simulator = cases.simulator(case, task, data, devices=1, lanes=1)
  plans = engine.plans_of(simulator, 3, 5)
  rows = bare.rows_of(plans, case.batch_size)
  train, steps = data.train, simulator.works[0].num_steps(data.train.sizes)
  first = 0
  for i, plan in enumerate(plans):
    ids = simulator.sampler.sample(simulator.seed, 3 + i)
    count = int(steps[ids].sum()) * case.batch_size
    assert plan.num_steps.sum() * case.batch_size == count
    part = rows[first : first + count]
    first += count
    batches = train.owner_of(part).reshape(-1, case.batch_size)
    assert (batches == batches[:, :1]).all()  # a batch is of one client
    assert set(batches.ravel()) == set(ids)
    owned = {r for c in ids for r in range(*train.offsets[[c, c + 1]])}
    assert set(part) == owned  # one epoch
  assert first == len(rows)


def test_scans_are_counted_with_all_their_passes(benchmark):
  bare, cases = benchmark("bare"), benchmark("cases")
  case = cases.smoke(cases.CASES["lstm"])
  data = cases.dataset(case)
  counts = []
  for time in (40, 80):
    cut = {k: v[:, :time] for k, v in data.train.examples.items()}
    loop = bare.Bare(
      case.model((time,), case.num_classes),
      cut,
      batch_size=4,
      learning_rate=0.1,
      capacity=4,
    )
    counts.append(loop.flops)
  assert counts[1] / counts[0] == pytest.approx(2, rel=0.02)


@pytest.mark.parametrize("name", ["lr", "cnn", "lstm", "resnet18"])
def test_pytorch_models_have_as_many_parameters(benchmark, name):
  torch = benchmark("pytorch").load()
  if torch is None:
    return  # its columns are empty
  import jax

  case = benchmark("cases").CASES[name]
  build = benchmark("pytorch").MODELS[case.pytorch]
  model = build(torch.nn, case.example_shape, case.num_classes)
  theirs = sum(p.numel() for p in model.parameters())
  task = case.model(case.example_shape, case.num_classes)
  shapes = jax.eval_shape(task.init, jax.random.key(0)).params
  ours = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
  # PyTorch's LSTM has a second bias a layer.
  extra = 2 * 4 * 256 if name == "lstm" else 0
  assert theirs == ours + extra


def test_step_waste_of_sorted_waves_is_small(benchmark):
  assert 0 < benchmark("scaling").step_waste() < 0.1  # 0.6 if not sorted


def test_sizes_have_the_mean_that_is_asked_for(benchmark):
  cases = benchmark("cases")
  sizes = cases.sizes(cases.CASES["lr_large"])
  assert sizes.min() >= 1
  assert sizes.mean() == pytest.approx(10, rel=0.05)
