"""The benchmarks run at a small scale, write all fields, and train alike.

The bare loop is SGD on the engine's batches, and PyTorch's models are ours; the
latter is tested where PyTorch is installed, which no extra for tests has.
"""

import functools
import importlib
import importlib.util
import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from fedjax_sim.models.char_lstm import CharLSTM
from fedjax_sim.models.femnist_cnn import FemnistCNN
from fedjax_sim.models.layers import group_norm
from fedjax_sim.models.logistic_regression import LogisticRegression
from fedjax_sim.models.resnet import ResNet

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


def run(module: str, arguments: list[str], *before: str) -> str:
  """What a benchmark prints, in a process of its own.

  Args:
    module: of `benchmarks`.
    arguments: of its command line.
    before: lines of Python that come first.
  """
  lines = [
    *before,
    f"from benchmarks import {module}",
    f"{module}.main({arguments!r})",
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
  return done.stdout


def run_engine(folder: pathlib.Path, *before: str, more: str = "") -> dict:
  """The JSON of LR at a small scale.

  Args:
    folder: where to write.
    before: as in `run`.
    more: another flag.
  """
  written = folder / "engine.json"
  arguments = ["--cases=lr", "--pairs=2", "--scale=smoke", f"--json={written}"]
  output = run("engine", arguments + [more] * bool(more), *before)
  report: dict = json.loads(written.read_text())
  for note in report["notes"]:
    assert note in output
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
      "process_peak_bytes",
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


@pytest.mark.integration
def test_engine_writes_all_fields(tmp_path):
  report = run_engine(tmp_path)
  check(report)
  case = report["cases"]["lr"]
  if report["notes"]:  # PyTorch is not installed
    assert case["torch"] is None
    assert all(case["ratios"][name] is None for name in OF_TORCH)
    return
  assert case["ratios"]["one_to_torch"] > 0
  theirs = case["torch"]
  tried = theirs["seconds_by_threads"]
  assert str(theirs["threads"]) == min(tried, key=tried.get)
  assert str(report["machine"]["cpu_count"]) in tried
  assert theirs["timed_batches"] == 4 < theirs["batches"]
  assert theirs["extrapolated"]


@pytest.mark.slow
def test_engine_without_pytorch_leaves_its_columns_empty(tmp_path):
  report = run_engine(tmp_path, "import sys", "sys.modules['torch'] = None")
  check(report)
  (note,) = report["notes"]
  assert "PyTorch is not installed" in note
  case = report["cases"]["lr"]
  assert case["torch"] is None
  assert all(case["ratios"][name] is None for name in OF_TORCH)


if hasattr(os, "sched_setaffinity"):

  @pytest.mark.slow
  def test_engine_on_one_core(tmp_path):
    report = run_engine(tmp_path, more="--cores=1")
    check(report)
    facts = report["machine"]
    assert (facts["cpu_count"], facts["devices"]) == (1, 1)


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
  train, steps = data.train, simulator.batchings[0].num_steps(data.train.sizes)
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


def test_pytorch_may_use_every_core(benchmark):
  threads_to_try = benchmark("pytorch").threads_to_try
  assert threads_to_try(1) == [1]
  assert threads_to_try(2) == [1, 2]
  assert threads_to_try(6) == [1, 2, 4, 6]
  assert threads_to_try(16) == [1, 2, 4, 8, 16]


def test_pytorch_is_timed_on_ten_batches_or_all(benchmark):
  cases = benchmark("cases").CASES
  assert min(case.torch_batches for case in cases.values()) >= 10


# Case -> (example shape, classes, the model whose task it is).
OURS = {
  "lr": ((12,), 3, lambda rngs: LogisticRegression(12, 3, rngs=rngs)),
  "cnn": (
    (8, 8, 1),
    5,
    lambda rngs: FemnistCNN((8, 8, 1), 5, (0.0, 0.0), rngs=rngs),
  ),
  "lstm": ((6,), 9, lambda rngs: CharLSTM(9, 8, (256, 256), rngs)),
  "resnet18": (
    (8, 9, 3),
    10,
    lambda rngs: ResNet(
      3,
      10,
      depth=18,
      stem="3x3",
      width=64,
      norm=functools.partial(group_norm, groups=2),
      rngs=rngs,
    ),
  ),
}


def in_order_of_pytorch(name: str, params, began) -> list[np.ndarray]:
  """Our parameters as PyTorch's model lists its own.

  Args:
    name: of the case.
    params: of our model.
    began: the same before any step.
  """

  def dense(layer) -> list[np.ndarray]:
    return [np.asarray(layer["kernel"][...]).T, np.asarray(layer["bias"][...])]

  def kernel(layer) -> np.ndarray:
    return np.asarray(layer["kernel"][...]).transpose(3, 2, 0, 1)

  def normed(conv, norm) -> list[np.ndarray]:
    scale, bias = (np.asarray(norm[key][...]) for key in ("scale", "bias"))
    return [kernel(conv), scale, bias]

  if name == "lr":
    return dense(params["linear"])
  if name == "cnn":
    convs = []
    for layer in (params["conv1"], params["conv2"]):
      convs += [kernel(layer), np.asarray(layer["bias"][...])]
    weight, bias = dense(params["dense1"])
    # Ours reads (height, width, features), theirs (features, height, width).
    weight = weight.reshape(128, 2, 2, 64).transpose(0, 3, 1, 2)
    return [*convs, weight.reshape(128, -1), bias, *dense(params["dense2"])]
  if name == "lstm":
    reader, first = params["reader"], began["reader"]
    found = [np.asarray(reader["embed"]["embedding"][...])]
    for i in range(2):
      layer = reader["layers"][i]
      weight, bias = dense(layer["inputs"])
      before = np.asarray(first["layers"][i]["inputs"]["bias"][...])
      # Their second bias begins at zero, and has the first one's gradient.
      recurrent = np.asarray(layer["recurrent"][...]).T
      found += [weight, recurrent, bias, bias - before]
    return found + dense(params["logits"])
  found = normed(params["stem"], params["norm"])
  for i in range(8):
    block = params["blocks"][i]
    for j in range(2):
      found += normed(block["convs"][j], block["norms"][j])
    if "around" in block:
      found += normed(*(block["around"]["layers"][j] for j in range(2)))
  return found + dense(params["logits"])


# Not skipped without PyTorch, as `.ci/run` counts what is.
if importlib.util.find_spec("torch") is not None:

  @pytest.mark.parametrize(
    "name",
    [
      pytest.param(name, marks=() if name == "lr" else pytest.mark.slow)
      for name in OURS
    ],
  )
  def test_pytorch_models_compute_and_train_as_ours(benchmark, name):
    pytorch, case = benchmark("pytorch"), benchmark("cases").CASES[name]
    torch = pytorch.load()
    shape, classes, build = OURS[name]
    rng, rate, size = np.random.default_rng(0), 0.1, 3
    tokens = case.stored == "token"
    x: np.ndarray
    if tokens:
      x = rng.integers(1, classes, (size, *shape), dtype=np.int32)
    else:
      x = rng.standard_normal((size, *shape), dtype=np.float32)
    y = rng.integers(1, classes, (size, *shape) if tokens else size)
    examples = {"x": x, "y": y.astype(np.int32)}

    task = case.model(shape, classes)
    noisy = lambda p: p + 0.02 * rng.standard_normal(p.shape, dtype=np.float32)
    drawn = task.init(jax.random.key(0))
    params = jax.tree.map(noisy, drawn.params)
    model = build(nnx.Rngs(0))
    nnx.update(model, params)
    logits = nnx.jit(lambda model, x: model(x))(model, x)

    def loss(params):
      variables = drawn._replace(params=params)
      return task.loss(variables, examples, jax.random.key(0)).value.mean()

    gradient = jax.jit(jax.grad(loss))(params)
    trained = jax.tree.map(lambda p, g: p - rate * g, params, gradient)

    loop = pytorch.Loop(torch, case.pytorch, shape, classes, rate)
    theirs = list(loop.model.parameters())
    began = in_order_of_pytorch(name, params, params)
    assert [p.shape for p in theirs] == [p.shape for p in began]
    with torch.no_grad():
      for p, value in zip(theirs, began, strict=True):
        p.copy_(torch.tensor(value.copy()))
    batches = loop.batches(examples, np.arange(size), size, lambda x: x)
    ((inputs, _),) = batches
    close = lambda a, b, atol: np.testing.assert_allclose(
      a.detach().numpy(), b, rtol=1e-3, atol=atol
    )
    close(loop.model(inputs), logits, 1e-5)
    loop.train(batches)
    ended = in_order_of_pytorch(name, trained, params)
    for p, before, after in zip(theirs, began, ended, strict=True):
      moved = np.abs(after - before).max()
      assert moved > 0
      close(p, after, 1e-3 * moved)


@pytest.mark.slow
def test_layers_run():
  output = run("layers", ["--scale=smoke", "--turns=1"])
  for way in (
    "XLA's convolutions, XLA's pooling",
    "patches in pieces",
    "one product a step",
  ):
    assert f"{way} " in output
  assert "1.00" in output


@pytest.mark.slow
def test_dense_runs():
  output = run("dense", ["--shapes=32x2x4,32x20x4", "--turns=1"])
  for shape, taken in (("32 x 2", "yes"), ("32 x 20", "no")):
    row = re.search(rf"^\| {shape} \| 4 \| [\d.]+ \| (.*) \|$", output, re.M)
    assert row
    assert row[1] == taken


@pytest.mark.slow
def test_tables_run():
  output = run("dense", ["--tables=40x8x3", "--turns=1"])
  assert re.search(r"^\| 40 x 8 \| 3 \| [\d.]+ \|$", output, re.M)


@pytest.mark.slow
def test_fast_layers_run():
  output = run("fast_layers", ["--scale=smoke", "--turns=1"])
  for way in ("nnx, models.layers", "linen, fast forms", "strided, padded"):
    assert way in output


def test_everything_is_first_in_some_turn(benchmark):
  rotated = benchmark("turns").rotated
  assert rotated({"a": 1, "b": 2, "c": 3}, 0) == ["a", "b", "c"]
  assert rotated("abc", 4) == ["b", "c", "a"]


def test_imports_are_summed_by_package(benchmark):
  text = """import time: self [us] | cumulative | imported package
import time:      1000 |       1000 |     jax._src.core
a line of the run
import time:       500 |       2500 |   jax
import time:       250 |        250 | fedjax_sim.cli
"""
  found = benchmark("startup").by_package(text)
  assert list(found.items()) == [("jax", 0.0015), ("fedjax_sim", 0.00025)]


@pytest.mark.slow
def test_startup_writes_all_fields(tmp_path):
  written = tmp_path / "startup.json"
  config = f"--config={ROOT}/configs/digits_fedavg.py:smoke"
  run("startup", [config, "--turns=1", f"--json={written}"])
  report = json.loads(written.read_text())
  assert report["medians"].keys() == {"no cache", "empty cache", "filled cache"}
  for found in report["medians"].values():
    whole = sum(
      seconds
      for part, seconds in found.items()
      if part in ("python", "imports", "config", "end of the process")
      or part.startswith("run: ")
    )
    assert whole == pytest.approx(found["whole"], abs=0.2)
    assert 0 < found["first result"] < found["whole"]
  empty, filled = (
    report["medians"][mode]["all programs: compiling"]
    for mode in ("empty cache", "filled cache")
  )
  assert filled < empty
  assert report["imports"]["jax"] > 0


def test_startup_tells_in_a_line_why_a_run_failed(benchmark):
  startup = benchmark("startup")
  with pytest.raises(SystemExit, match="--config=nope.py: there is no such fi"):
    startup.main(["--config=nope.py", "--turns=1"])


HOLDS = """
import signal, time
from benchmarks import startup
# A shell's background processes ignore Ctrl-C, and so do their children.
signal.signal(signal.SIGINT, signal.default_int_handler)
def hold(config, mode, folder):
  print(folder, flush=True)
  time.sleep(60)
startup.measure = hold
startup.main([])
"""


@pytest.mark.parametrize(
  ("number", "told"), [(signal.SIGINT, "interrupted\n"), (signal.SIGTERM, "")]
)
def test_startup_ends_without_a_traceback_and_leaves_nothing(number, told):
  with subprocess.Popen(
    [sys.executable, "-c", HOLDS],
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  ) as process:
    assert process.stdout is not None
    folder = pathlib.Path(process.stdout.readline().strip())
    assert folder.is_dir()
    process.send_signal(number)
    assert process.communicate(timeout=30)[1] == told
    assert process.returncode != 0
  assert not folder.exists()


@pytest.mark.slow
def test_scaling_writes_all_fields(tmp_path):
  written = tmp_path / "scaling.json"
  run("scaling", ["--scale=smoke", "--turns=1", f"--json={written}"])
  report = json.loads(written.read_text())
  small, large = report["cohorts"]
  assert (small["clients_per_round"], large["clients_per_round"]) == (10, 40)
  assert small["time_ratio"] == small["memory_ratio"] == 1
  for row in (small, large):
    assert row["compilations"] == 1
    assert all(math.isfinite(value) and value > 0 for value in row.values())
  assert 0 < report["step_waste"] < 1
  parts = ["python", "imports", "data", "init", "compile", "first round"]
  assert list(report["start"]) == parts
  assert all(seconds > 0 for seconds in report["start"].values())


@pytest.mark.slow
def test_stores_train_the_same_wherever_they_are(tmp_path):
  sizes = ["--clients=200", "--image_clients=20", "--clients_per_round=10"]
  command = [sys.executable, "-m", "benchmarks.store", f"--folder={tmp_path}"]
  output = subprocess.run(
    [*command, "--rounds=10", *sizes],
    cwd=ROOT,
    check=True,
    capture_output=True,
    text=True,
  ).stdout
  rows = dict(line.split(" ", 1) for line in output.splitlines())
  assert "CNN, different parameters 0" in output
  assert json.loads(output.split("\ndisk ")[1].split("\n")[0])["peak"] > 0
  assert "clients" in rows
  assert not list(tmp_path.rglob("*.npy"))


@pytest.mark.slow
def test_weak_scaling_writes_all_fields(tmp_path):
  written = tmp_path / "weak.json"
  options = ["--scale=smoke", "--turns=1", "--most-devices=2"]
  run("weak_scaling", [*options, f"--json={written}"])
  one, two = json.loads(written.read_text())["rows"]
  assert (one["devices"], two["devices"]) == (1, 2)
  assert (one["clients_per_round"], two["clients_per_round"]) == (10, 20)
  assert one["time_ratio"] == one["efficiency"] == 1
  assert two["time_ratio"] > 0
  assert one["sent_bytes"] == 0 < two["sent_bytes"]


def test_step_waste_of_sorted_waves_is_small(benchmark):
  assert 0 < benchmark("scaling").step_waste() < 0.1  # 0.6 if not sorted


def test_sizes_have_the_mean_that_is_asked_for(benchmark):
  cases = benchmark("cases")
  sizes = cases.sizes(cases.CASES["lr_large"])
  assert sizes.min() >= 1
  assert sizes.mean() == pytest.approx(10, rel=0.05)


# --- several seeds ------------------------------------------------------------


@pytest.mark.parametrize(
  ("values", "expected"),
  [
    ([0.1, 0.2, 0.3], "0.2000 +- 0.0577"),  # 0.1 / sqrt(3)
    ([0.0, 1.0], "0.5000 +- 0.5000"),  # sqrt(1/2) / sqrt(2)
    ([0.25] * 4, "0.2500 +- 0.0000"),
    ([0.94708], "0.9471 +- 0.0000"),
  ],
)
def test_mean_and_standard_error(benchmark, values, expected):
  assert benchmark("seeds").told(values) == expected


def test_variants_run_with_every_seed(benchmark, capsys):
  variants = {"a": lambda seed: seed / 2, "b": lambda seed: 1.0 - seed}
  found = benchmark("seeds").compare(variants, 3)
  assert found == {"a": [0.0, 0.5, 1.0], "b": [1.0, 0.0, -1.0]}
  lines = capsys.readouterr().out.splitlines()
  assert lines[:2] == ["seed 0, a: 0.0000", "seed 0, b: 1.0000"]
  assert lines[2] == "seed 1, a: 0.5000"
  assert len(lines) == 6


@pytest.mark.slow
@pytest.mark.parametrize(
  ("module", "options", "rows"),
  [
    ("corrupted", ["--epochs=1"], 6),
    ("few_labels", ["--burn_in=1"], 6),
  ],
)
def test_comparisons_of_seeds_run(data_folder, module, options, rows):
  smoke = ["--seeds=2", "--rounds=2", "--clients_per_round=2", *options]
  done = subprocess.run(
    [sys.executable, "-m", f"benchmarks.{module}", *smoke],
    cwd=ROOT,
    env=os.environ | {"FEDJAX_SIM_DATA": str(data_folder)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  assert (
    len(re.findall(r"^seed [01], .+: 0\.\d{4}$", done.stdout, re.M)) == 2 * rows
  )
  assert len(re.findall(r"0\.\d{4} \+- 0\.\d{4}", done.stdout)) == rows


@pytest.mark.slow
def test_algorithms_are_tuned_and_compared(tmp_path):
  plot = tmp_path / "all.png"
  out = run(
    "algorithms",
    [
      *("--data=synthetic", "--seeds=2", "--rounds=2", "--turns=1"),
      *("--algorithms=ditto,fedavg,mime", "--rates=0.003,0.01"),
      *("--tuning_seeds=1", f"--plot={plot}"),
    ],
  )
  rows = re.findall(r"^\| (\w+) \| \*{0,2}0\.\d{4} \+- 0\.", out, re.M)
  assert rows == ["ditto", "fedavg", "mime"] * 2  # of the data set, of all
  assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_rounds_of_algorithms_are_timed():
  out = run(
    "round_costs",
    ["--turns=1", "--cases=lr", "--algorithms=fedem,fedlin,moon"],
  )
  rows = re.findall(r"^\| (\w+) \| (\d*\.?\d*)", out, re.M)
  assert [name for name, _ in rows[1:]] == ["fedavg", "fedem", "fedlin", "moon"]
  assert rows[1][1] == "1.00"
  assert rows[4][1] == ""  # logistic regression has no representations


@pytest.mark.slow
def test_the_power_of_audits_is_told():
  command = [sys.executable, "-m", "benchmarks.audit", "--seeds=2"]
  done = subprocess.run(
    command, cwd=ROOT, capture_output=True, text=True, check=True
  )
  rows = [row.split(" | ") for row in done.stdout.splitlines()]
  assert len(rows) == 14
  assert all(row[6] == "100.0%" for row in rows)


@pytest.mark.slow
def test_the_memory_of_adapters_is_told():
  command = [sys.executable, "-m", "benchmarks.adapters", "--scale=smoke"]
  done = subprocess.run(
    command, cwd=ROOT, capture_output=True, text=True, check=True
  )
  _, head, *rows = done.stdout.splitlines()
  assert head.split() == ["trained", "frozen", "program", "a", "lane"]
  assert len(rows) == 5
  *_, whole = rows[0].split()
  assert all(float(row.split()[-1]) < float(whole) for row in rows[1:])


# --- trackers -----------------------------------------------------------------


@pytest.mark.slow
def test_the_cost_of_trackers_is_told():
  options = ["--turns=1", "--rounds=2", "--only=mlflow,mlflow silent"]
  done = subprocess.run(
    [sys.executable, "-m", "benchmarks.trackers", *options],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  rows = [x.strip("| ").split(" | ") for x in done.stdout.splitlines()[-3:]]
  assert [row[0] for row in rows] == ["none", "mlflow", "mlflow silent"]
  assert all(re.match(r"\d+\.\d{3} \(", row[2]) for row in rows)
  assert rows[0][2] == "1.000 (1.000 to 1.000)"


@pytest.mark.slow
def test_aggregators_meet_attacks(tmp_path):
  picture = tmp_path / "picture.png"
  options = ["--rounds=2", "--seeds=2", "--clients_per_round=8"]
  options += ["--attacks=none,backdoor", "--aggregators=weighted_mean,krum"]
  options += ["--fraction=0.25", f"--plot={picture}"]
  done = subprocess.run(
    [sys.executable, "-m", "benchmarks.robustness", *options],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  row = r"^\| (none|backdoor) (?:\| \d+\.\d \+- \d+\.\d ){2}\|$"
  rows = re.findall(row, done.stdout, re.M)
  assert rows == ["none", "backdoor", "backdoor"]  # the last one: its success
  assert picture.stat().st_size


# --- figures of papers --------------------------------------------------------


@pytest.mark.parametrize(
  ("curve", "expected"),
  [
    ([0.5, 0.96, 0.98], 2.5),  # half of the way from round 2 to round 3
    ([0.5, 0.96, 0.94, 0.98], 3.5),  # of the best so far
    ([0.98, 0.5], 1.0),
    ([0.5, 0.96], math.inf),
  ],
)
def test_rounds_to_a_target_are_interpolated(benchmark, curve, expected):
  fedavg = benchmark("papers.fedavg")
  assert fedavg.rounds_to(curve, 0.97) == pytest.approx(expected)


@pytest.mark.slow
def test_data_of_papers_are_dealt_as_told(benchmark, data_folder):
  data = benchmark("papers.data")
  two = data.two_digits_each(path=data_folder)
  for k in range(20):
    digits = {*np.unique(two.train.client(k)["y"])}
    assert digits <= {k % 10, (k + 1) % 10}
  assert two.train.num_examples + len(two.test["y"]) == 70_000
  turned = data.rotated_mnist(path=data_folder, kept=8)
  assert turned.train.num_clients == 8
  upright = turned.test["x"][:10_000]
  np.testing.assert_array_equal(
    np.rot90(upright, 3, (1, 2)), turned.test["x"][30_000:]
  )


@pytest.mark.slow
def test_figures_of_papers_are_repeated(tmp_path):
  options = ["--figures=q_ffl", "--seeds=2", "--rounds=2", f"--to={tmp_path}"]
  done = subprocess.run(
    [sys.executable, "-m", "benchmarks.papers", *options],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  rows = re.findall(r"^\| .* \| q = \d, .* \| \d+.* \+- ", done.stdout, re.M)
  assert len(rows) == 8
