"""The files of docs/own run, do what they say, and are what the page shows."""

import csv
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
import scipy.stats
from flax import nnx

from fedjax_sim.config.build import build
from fedjax_sim.config.flags import load
from fedjax_sim.core import AggregationContext, references
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.run import experiment
from fedjax_sim.training.optimizers import optimizer
from problems import make_simulator, quadratic, quadratic_data, sgd, train
from tiers import slow_but

ROOT = pathlib.Path(__file__).resolve().parents[1]
OWN = ROOT / "docs" / "own"
FILES = sorted(OWN.glob("*.py"))
CONFIGS = [path for path in FILES if path.stem != "script"]
LANES = {"runtime.lanes": "1"}


def own(file, name):
  """An object of one of the files."""
  return references.load("test", f"{OWN / file}.py:{name}")


def config_of(file, **fields):
  return load(f"{OWN / file}.py:smoke", LANES | fields)


def test_the_page_shows_the_files():
  text = (ROOT / "docs" / "extend.md").read_text()
  shown = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
  sources = [path.read_text() for path in FILES]
  assert len(shown) == len(CONFIGS)
  for code in shown:
    assert any(code in source for source in sources), code
  for path in CONFIGS:
    command = (
      f"fedjax-sim run --config=docs/own/{path.name} --workdir=runs/{path.stem}"
    )
    assert command in text
    assert command in path.read_text()
  assert "python docs/own/script.py" in text


QUICK = [p for p in CONFIGS if p.stem in ("linen_model", "data", "metric")]


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.integration
@pytest.mark.parametrize(
  "path", slow_but(QUICK, CONFIGS), ids=lambda path: path.stem
)
def test_it_runs(path, tmp_path):
  summary = experiment.run(config_of(path.stem), tmp_path)
  assert summary["rounds"] == 2
  assert f"{path}:" in (tmp_path / "config.json").read_text()
  if path.stem == "metric":
    names = {"loss", "accuracy", "top_3", "recall_of_ones", "median_margin"}
    rows = (tmp_path / "metrics.jsonl").read_text().splitlines()
    for name in names - {"median_margin"}:
      assert json.loads(rows[-1])[f"test/{name}"] >= 0
    with (tmp_path / "clients_unseen.csv").open() as file:
      table = list(csv.DictReader(file))
    assert len(table) == 10
    assert set(table[0]) == {"client", "examples"} | names
    overall = sum(float(r["top_3"]) * int(r["examples"]) for r in table)
    total = sum(int(r["examples"]) for r in table)
    np.testing.assert_allclose(overall / total, summary["unseen/top_3"])


def test_the_metrics_are_numpys():
  simulator = build(config_of("metric")).simulator
  state = simulator.init()
  found = simulator.evaluate(state)
  test = simulator.data.test
  assert test is not None
  assert simulator.task.logits is not None
  variables = simulator.algorithm.variables(state.server)
  examples = {k: jnp.asarray(v) for k, v in test.items()}
  logits = np.asarray(simulator.task.logits(variables, examples))
  ranks = np.argsort(-logits, axis=1)
  ones = test["y"] == 1
  np.testing.assert_allclose(
    found["test/top_3"], np.mean((ranks[:, :3] == test["y"][:, None]).any(1))
  )
  np.testing.assert_allclose(
    found["test/recall_of_ones"], np.mean(ranks[ones, 0] == 1), rtol=1e-6
  )
  right = np.eye(10, dtype=bool)[test["y"]]
  others = np.where(right, -np.inf, logits).max(1)
  np.testing.assert_allclose(
    found["test/median_margin"], np.median(logits[right] - others), rtol=1e-5
  )
  better = {"loss": False, "accuracy": True}
  better |= {"top_3": True, "recall_of_ones": True, "median_margin": True}
  assert simulator.task.higher_is_better == better


@pytest.mark.parametrize(
  "present", [[True] * 6, [True, False] * 3, [False] * 6]
)
def test_the_aggregator_is_numpys(present):
  rng = np.random.default_rng(0)
  updates = {"a": rng.normal(size=(6, 3)), "b": rng.normal(size=(6, 2, 2))}
  updates["a"][:3] *= 10
  flat = np.concatenate([u.reshape(6, -1) for u in updates.values()], axis=1)
  there = flat[present]
  kept = len(there) - int(0.4 * len(there))
  short = there[np.argsort(np.linalg.norm(there, axis=1))[:kept]]
  expected = short.mean(axis=0) if kept else np.zeros(flat.shape[1])

  # A row that nobody fills holds anything.
  for leaf in updates.values():
    leaf[~np.array(present)] = np.nan
  given = {k: jnp.asarray(u, jnp.float32) for k, u in updates.items()}
  aggregator = own("aggregator", "short_mean")(0.4)
  key = jax.random.key(0)
  context = AggregationContext(
    key, key, jnp.int32(0), jnp.arange(8), jnp.int32(6), aggregator.hparams
  )
  acc = aggregator.init(jax.tree.map(lambda x: x[0], given), 8)
  for wave in (0, 2, 4):
    rows = slice(wave, wave + 2)
    acc = aggregator.add(
      acc,
      jax.tree.map(lambda x, rows=rows: x[rows], given),
      jnp.ones(2),
      jnp.array(present[rows]),
      context._replace(slot=jnp.int32(wave), rank=jnp.arange(wave, wave + 2)),
    )
  count = jnp.array(sum(present), jnp.int32)
  found = aggregator.finish(acc, count.astype(jnp.float32), count, context)
  found = np.concatenate([np.asarray(u).ravel() for u in found.values()])
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_the_optimizer_steps_by_the_sign():
  fields = {
    "server.clients_per_round": "1",
    "client.steps": "1",
    "client.decay": "0.5",
  }
  simulator = build(config_of("optimizer", **fields)).simulator
  hparams = {"learning_rate": pytest.approx(0.03), "decay": pytest.approx(0.5)}
  assert simulator.hparams["algorithm"]["client"] == hparams
  state = simulator.init()
  (client,) = simulator.sampler.sample(0, 0)
  data = simulator.data.train
  rows = slice(*data.offsets[client : client + 2])
  x, y = (data.examples[k][rows].astype(float) for k in ("x", "y"))
  # All parameters are 0.25, so all classes are as likely.
  error = 0.1 - np.eye(10)[y.astype(int)]
  variables = state.server.variables
  params = jax.tree.map(lambda p: 0.0 * p + 0.25, variables.params)
  variables = variables._replace(params=params)
  state = state._replace(server=state.server._replace(variables=variables))
  state = simulator.dispatch(state, simulator.plan(0, 1)).state
  for found in jax.tree.leaves(state.server.variables.params):
    gradient = error.sum(0) if found.ndim == 1 else x.T @ error
    sure = np.abs(gradient) > 1e-3
    expected = 0.25 - 0.03 * (np.sign(gradient) + 0.5 * 0.25)
    np.testing.assert_allclose(np.asarray(found)[sure], expected[sure], 1e-5)
    assert len(set(expected[sure])) == 2


def test_the_sampler_draws_by_size():
  sizes = np.array([1, 2, 3, 10])
  one = own("sampler", "by_size")(4, 1, sizes=sizes)
  drawn = [int(one.sample(7, r)[0]) for r in range(2000)]
  counts = np.bincount(drawn, minlength=4)
  test = scipy.stats.chisquare(counts, 2000 * sizes / sizes.sum())
  assert test.pvalue > 1e-4
  sampler = build(config_of("sampler")).simulator.sampler
  ids = sampler.sample(0, 3)
  assert len(set(ids)) == 10
  np.testing.assert_array_equal(ids, sampler.sample(0, 3))


def test_the_model_is_a_convolution():
  simulator = build(config_of("model")).simulator
  parameters = simulator.states.num_parameters
  assert parameters == (3 * 3 * 4 + 4) + 8 + 8 * 8 * 4 * 10 + 10
  variables = simulator.task.init(jax.random.key(0))
  assert simulator.task.logits is not None
  x = np.random.default_rng(0).normal(size=(2, 64)).astype(np.float32)
  params = jax.tree.map(np.asarray, nnx.to_pure_dict(variables.params))
  kernel, bias = params["conv"]["kernel"], params["conv"]["bias"]
  images = x.reshape(2, 8, 8)
  convolved = [
    [
      scipy.signal.correlate2d(image, kernel[:, :, 0, c], "same") + bias[c]
      for c in range(4)
    ]
    for image in images
  ]
  hidden = np.maximum(np.moveaxis(np.array(convolved), 1, -1), 0)
  linear = params["linear"]
  expected = hidden.reshape(2, -1) @ linear["kernel"] + linear["bias"]
  found = simulator.task.logits(variables, {"x": jnp.asarray(x)})
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_algorithm_takes_steps_of_the_clients_length():
  """One step of rate 1 goes to the client's center."""
  centers = np.array([[1.0, 0.0], [-3.0, 1.0], [5.0, -1.0], [-2.0, 2.0]])
  task = quadratic(2)
  algorithm = own("algorithm", "full_length")(task, sgd(0.5), sgd(1.0))
  simulator = make_simulator(
    task,
    algorithm,
    quadratic_data(centers),
    batching=LocalBatching(batch_size=1),
  )
  state = train(simulator, 3)
  w = np.zeros(2)
  steps = []
  for _ in range(3):
    updates = 0.5 * (centers - w)
    mean = updates.mean(axis=0)
    length = np.linalg.norm(updates, axis=1).mean()
    steps.append(min(10.0, length / np.linalg.norm(mean)))
    w = w + steps[-1] * mean
  assert steps[0] > 1
  found = algorithm.variables(state.server).params["w"]
  np.testing.assert_allclose(found, w, rtol=1e-4)


def test_the_data_are_rings():
  data = build(config_of("data")).simulator.data
  assert data.train.num_clients == 30
  assert data.train.client_name(7) == "sector 7"
  x, y = data.train.examples["x"], data.train.examples["y"]
  np.testing.assert_array_equal(np.hypot(*x.T).astype(int), y)


@pytest.mark.integration
def test_the_script_trains(capsys):
  accuracy = own("script", "main")(20)
  printed = capsys.readouterr().out.splitlines()
  assert [line.split()[0] for line in printed] == ["10", "20"]
  assert float(printed[-1].split()[1]) == accuracy > 0.6


def test_the_scripts_aggregator_counts_signs():
  updates = {"w": jnp.array([[1.0, -2.0], [3.0, 4.0], [np.nan, 5.0]])}
  aggregator = own("script", "sign_mean")()
  acc = aggregator.init({"w": updates["w"][0]}, 3)
  here = jnp.array([True, True, False])
  key, zero = jax.random.key(0), jnp.int32(0)
  context = AggregationContext(key, key, zero, jnp.arange(3), jnp.int32(3), {})
  acc = aggregator.add(acc, updates, jnp.ones(3), here, context)
  found = aggregator.finish(acc, jnp.float32(2), jnp.int32(2), context)
  np.testing.assert_array_equal(found["w"], [1.0, 0.0])


def test_the_scripts_optimizer_is_heavy_ball():
  made = optimizer(own("script", "heavy_ball"), learning_rate=0.1, friction=0.5)
  rule = made.build(made.hparams)
  state = rule.init(jnp.zeros(()))
  steps = []
  for gradient in (1.0, 2.0, -1.0):
    step, state = rule.update(jnp.float32(gradient), state)
    steps.append(float(step))
  np.testing.assert_allclose(steps, [-0.1, -0.25, -0.025], rtol=1e-6)
