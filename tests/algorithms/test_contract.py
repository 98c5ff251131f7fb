"""What holds of every algorithm in the registry."""

import dataclasses
import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim import aggregators, sampling
from fedjax_sim.algorithms import ALGORITHMS
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.core import (
  Aggregate,
  Batch,
  Client,
  Context,
  Loss,
  Members,
  Metric,
  Purpose,
  Task,
  Variables,
  key_for,
  noise_key_for,
)
from fedjax_sim.data import with_few_labels
from fedjax_sim.engine import client_loop
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.engine.plan import at_round
from fedjax_sim.engine.traffic import report_shapes
from fedjax_sim.models.gbdt import gbdt
from fedjax_sim.models.gmm import gmm
from fedjax_sim.models.heavy_hitters import heavy_hitters
from fedjax_sim.models.kmeans import kmeans as centroids_task
from fedjax_sim.models.quantiles import quantiles
from fedjax_sim.tasks.lora import with_lora
from fedjax_sim.tasks.mixture import with_mixture
from fedjax_sim.training.optimizers import optimizer
from fedjax_sim.training.replay import replay
from fedjax_sim.training.stale import stale
from fedjax_sim.transforms import adaptive_clip
from problems import blobs, flat, make_simulator, sgd
from tiers import slow_but

WITH_TRANSFORM = "fedavg with adaptive clipping"
STALE = "fedavg with stale updates"
REPLAY = "fedavg with replay on the server"
SIZES = [3, 5, 2, 4, 6]
FEATURES = 3
BATCH = 2
traces: list[int] = []


def task_of_everything():
  """Parameters, buffers, frozen variables, and noise from the step's key."""

  def init(key):
    w = jax.random.uniform(key, (FEATURES,))
    return Variables({"w": w}, {"mean": jnp.zeros(FEATURES)}, {"scale": 0.5})

  def loss(variables, examples, key):
    traces.append(1)
    x = examples["x"] + 0.1 * jax.random.uniform(key, examples["x"].shape)
    w = variables.params["w"] * variables.frozen["scale"]
    gap = w[None] - x - 0.1 * variables.buffers["mean"][None]
    mean = 0.5 * variables.buffers["mean"] + 0.5 * x.mean(0)
    value = jnp.sum(gap**2, axis=-1)
    return Loss(value, jnp.ones_like(value), {"mean": mean})

  def metrics(variables, examples):
    value = examples["x"] @ variables.params["w"]
    return {"x": Metric(value, jnp.ones_like(value))}

  def logits(variables, examples):
    return 2 * examples["x"] * variables.params["w"][None]

  def features(variables, examples):
    return examples["x"] + variables.params["w"][None]

  arrays = lambda key: jax.tree.map(jnp.asarray, init(key))
  better = {"x": True}
  return Task(
    *(arrays, loss, metrics),
    logits=logits,
    higher_is_better=better,
    features=features,
  )


def task_of_centroids():
  """Two centroids, in a range beyond which the data go."""
  return counting_traces(centroids_task((FEATURES,), 2, low=-0.6, high=0.6))


def counting_traces(task):
  """The task; whoever computes its loss is counted."""

  def loss(variables, examples, key):
    traces.append(1)
    return task.loss(variables, examples, key)

  return task._replace(loss=loss)


def task_with_adapters():
  """That of everything, behind a kernel with an adapter."""
  task = task_of_everything()

  def init(key):
    variables = task.init(key)
    kernel = jax.random.normal(key, (FEATURES, FEATURES))
    return variables._replace(params={**variables.params, "kernel": kernel})

  def loss(variables, examples, key):
    turned = examples["x"] @ variables.params["kernel"]
    return task.loss(variables, {**examples, "x": turned}, key)

  return with_lora(task._replace(init=init, loss=loss), ("k",), 2, also=("w",))


def task_with_head():
  """That of everything, and a parameter that stays with the clients."""
  task = task_of_everything()

  def init(key):
    variables = task.init(key)
    return variables._replace(params={**variables.params, "head": jnp.ones(())})

  def loss(variables, examples, key):
    moved = examples["x"] + variables.params["head"]
    return task.loss(variables, {**examples, "x": moved}, key)

  return task._replace(init=init, loss=loss)


def task_of(name):
  """What the algorithm trains."""
  own = {
    "fedem": lambda: with_mixture(task_of_everything(), 2),
    "fedex_lora": task_with_adapters,
    "gbdt": lambda: counting_traces(
      gbdt((FEATURES,), 0, 3, 2, "squared", low=-3.0, high=3.0)
    ),
    "gmm": lambda: counting_traces(
      gmm((FEATURES,), 2, covariance="full", low=-3.0, high=3.0)
    ),
    "heavy_hitters": lambda: counting_traces(
      heavy_hitters((FEATURES,), 3, hitters=2)
    ),
    "kmeans": task_of_centroids,
    "quantiles": lambda: counting_traces(
      quantiles((FEATURES,), 0, low=-3.0, high=3.0)
    ),
  }
  own |= dict.fromkeys(("fedper", "fedrep", "lg_fedavg"), task_with_head)
  return own.get(name, task_of_everything)()


def build(name, task=None):
  """The algorithm, with the arguments that its signature takes."""
  given = {
    "task": task_of(name) if task is None else task,
    "client_optimizer": optimizer("sgd", learning_rate=0.1, momentum=0.5),
    "server_optimizer": optimizer("sgd", learning_rate=0.7, momentum=0.5),
    "num_clients": len(SIZES),
    "metric": "x",
    "private": ("head",) if name != "fedbn" else None,
    "burn_in": 1,
    "threshold": 0.42,
    "least_share": 0.4,
    "mean_examples": float(np.mean(SIZES)),
  }
  if name == WITH_TRANSFORM:
    return fedavg(given["task"], sgd(0.1), sgd(1.0))
  if name == STALE:
    return stale(fedavg(given["task"], sgd(0.1), sgd(1.0)), 0.4)
  if name == REPLAY:
    base = fedavg(given["task"], sgd(0.1), sgd(1.0))
    return replay(base, given["task"], sgd(0.05), steps=3, batch_size=2)
  if name in ("fedlin", "scaffold"):  # which take no momentum
    given["client_optimizer"] = sgd(0.1)
  factory = ALGORITHMS[name]
  parameters = inspect.signature(factory).parameters
  return factory(**{k: v for k, v in given.items() if k in parameters})


def with_everything(data):
  examples = {k: v[:5] for k, v in data.train.examples.items()}
  return with_few_labels(dataclasses.replace(data, server=examples), 0.4)


@functools.cache
def simulator_of(name, lanes):
  """With three lanes, three rounds a dispatch, and all clients logged."""
  algorithm = build(name)
  simulator = make_simulator(
    task_of(name),
    algorithm,
    with_everything(blobs(SIZES, features=FEATURES)),
    aggregator=aggregators.stack()
    if algorithm.requirements.all_updates
    else None,
    sampler=sampling.uniform(
      *(1, 1) if algorithm.requirements.pools_data else (5, 3)
    ),
    batching=LocalBatching(batch_size=BATCH),
    transforms=[adaptive_clip(0.5)] if name == WITH_TRANSFORM else [],
    lanes=lanes,
    rounds_per_dispatch=lanes,
    seed=3,
  )
  return dataclasses.replace(simulator, log_clients=lanes > 1)


def run(name, rounds, lanes=1, hparams=None):
  """The states after every dispatch."""
  simulator = simulator_of(name, lanes)
  states = [simulator.init(hparams)]
  for out in simulator.run(states[0], rounds, hparams=hparams):
    states.append(out.state)
  return jax.device_get(states)


def shapes(tree):
  return jax.tree.map(lambda x: (np.shape(x), np.asarray(x).dtype), tree)


def assert_close(a, b):
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6), a, b
  )


NAMES = [*ALGORITHMS, WITH_TRANSFORM, STALE, REPLAY]
# FedAvg's program with other optimizers on the server, and FedRep's with other
# private parameters; as in k-means, a sum that the server makes a model of.
SAME_PROGRAM = (
  *("fedadagrad", "fedavgm", "fedyogi"),
  *("fedbn", "fedper", "lg_fedavg"),
  *("gmm", "quantiles"),
)
every = pytest.mark.parametrize(
  "name", slow_but([n for n in NAMES if n not in SAME_PROGRAM], NAMES)
)
# What the engine does for an algorithm differs among these: transforms, a stack
# of updates, several passes, states of clients, versions, statistics, nobody's
# gradient, pooled data.
in_lanes = pytest.mark.parametrize(
  "name",
  slow_but(
    (
      *(WITH_TRANSFORM, REPLAY, "centralized", "dga_rl", "fedbuff"),
      *("fedlabels", "fednova", "gossip", "hierarchical", "kmeans", "mime"),
      *("mime_lite", "scaffold"),
    ),
    NAMES,
  ),
)
# The others have a test of their own that compares with a plain loop.
by_loop = pytest.mark.parametrize(
  "name",
  slow_but(
    (
      *("centralized", "dga", "dga_rl", "fedex_lora", "fedlaw"),
      *("fedprox", "fedsgd", "mime", "mime_lite"),
    ),
    ALGORITHMS,
  ),
)


@every
def test_the_state_keeps_its_shapes_and_dtypes(name):
  simulator = simulator_of(name, 1)
  expected = jax.tree.map(lambda x: (x.shape, x.dtype), simulator.states.shapes)
  for state in run(name, 4):
    assert shapes(state) == expected
    assert all(
      np.isfinite(x).all()
      for x in jax.tree.leaves(state)
      if np.issubdtype(x.dtype, np.floating)
    )


@every
def test_the_global_model_is_one_of_the_tasks(name):
  algorithm = build(name)
  model = jax.device_get(task_of(name).init(jax.random.key(0)))
  first, *_, last = run(name, 4)
  for state in (first, last):
    assert shapes(algorithm.variables(state.server)) == shapes(model)
    if algorithm.personal is not None:
      row = jax.tree.map(lambda x: x[0], state.clients[0])
      message = algorithm.broadcast(state.server)
      received = algorithm.download(message, jnp.int32(0), jnp.int32(0))
      own = algorithm.personal(received, row)
      assert shapes(own) == shapes(model)
  before, after = (algorithm.variables(s.server) for s in (first, last))
  assert np.abs(flat(after.params) - flat(before.params)).max() > 1e-3
  for mean in jax.tree.leaves(after.buffers):
    assert (np.abs(mean).max() > 1e-3) == (name != "fedbn")  # which keeps them
  frozen = zip(
    *(jax.tree.leaves(v.frozen) for v in (before, after)), strict=True
  )
  changed = any(not np.array_equal(a, b) for a, b in frozen)
  assert changed == (name == "fedex_lora")  # whose kernels take the difference


@every
def test_the_global_model_can_be_replaced(name):
  algorithm, server = build(name), run(name, 2)[-1].server
  assert algorithm.with_model is not None
  other = jax.tree.map(lambda x: x + 1, algorithm.variables(server))
  replaced = algorithm.with_model(server, other)
  assert shapes(replaced) == shapes(server)
  assert_close(algorithm.variables(replaced), other)


@every
def test_one_trace_serves_all_rounds_cohorts_and_hyper_parameters(name):
  simulator = simulator_of(name, 1)
  usual = run(name, 2)[-1]
  traced = len(traces)
  run(name, 6)
  changed = 0
  leaves, treedef = jax.tree.flatten(simulator.hparams)
  for i in range(len(leaves)):
    other = [0.8 * v if j == i else v for j, v in enumerate(leaves)]
    after = run(name, 2, hparams=jax.tree.unflatten(treedef, other))[-1]
    differs = [
      not np.array_equal(a, b)
      for a, b in zip(
        jax.tree.leaves(after), jax.tree.leaves(usual), strict=True
      )
    ]
    changed += any(differs)
  # Each has a say, but for what matters with noise alone, or is 0.
  silent = {
    "fedadagrad": ["beta1"],
    "gbdt": ["min_child_weight", "min_gain"],
    "gmm": ["count_weight", "scatter_weight"],
    "heavy_hitters": ["min_share"],
    "kmeans": ["count_weight"],
  }.get(name, [])
  assert changed >= len(leaves) - len(silent)
  assert len(traces) == traced
  assert simulator.compilations == 1


@in_lanes
def test_lanes_and_rounds_per_dispatch_change_no_result(name):
  assert_close(run(name, 5, lanes=3)[-1], run(name, 5, lanes=1)[-1])


@in_lanes
def test_every_client_is_in_the_log_and_nothing_else_changes(name):
  simulator, logging = (simulator_of(name, lanes) for lanes in (1, 3))
  plain = simulator.dispatch(simulator.init(), simulator.plan(0, 1))
  out = logging.dispatch(logging.init(), logging.plan(0, 1))
  assert plain.client_log == {}
  ids = np.sort(simulator.sampler.sample(simulator.seed, 0))
  told = out.client_log
  np.testing.assert_array_equal(told["client"], ids)
  assert told["present"].all()
  assert (told["update/norm"] > 0).all()
  assert (np.abs(told["update/cosine"]) <= 1).all()
  assert_close(jax.device_get(plain.state), jax.device_get(out.state))
  assert out.rows[0].keys() == plain.rows[0].keys()


def by_hand(simulator, state):
  """One round as a plain loop over clients and steps, nothing compiled."""
  algorithm = simulator.algorithm
  plan = at_round(simulator.plan(0, 1).cohorts, 0)
  hparams = jax.tree.map(jnp.float32, simulator.hparams["algorithm"])
  message = algorithm.broadcast(state.server)
  table, reports = state.clients[0], []
  places = list(zip(*np.nonzero(plan.client >= 0), strict=True))
  ids = [int(plan.client[where]) for where in places]
  survey = algorithm.survey
  asked = () if survey is None else survey.passes

  def report_of(where, message, passes, first, finish):
    """What a client reports after these passes, `first` being before them."""
    ident = int(plan.client[where])
    these = slice(first, first + len(passes))
    client = Client(
      message=algorithm.download(message, jnp.int32(0), ident),
      state=jax.tree.map(lambda x: jnp.asarray(x[ident]), table),
      hparams=hparams,
      id=jnp.int32(ident),
      version=jnp.int32(0),
      num_examples=jnp.int32(plan.num_examples[where]),
      num_steps=jnp.asarray(plan.num_steps[where][these]),
      round=jnp.int32(0),
      key=key_for(simulator.seed, Purpose.CLIENT, 0, ident),
      noise_key=noise_key_for(state.noise_seed, Purpose.CLIENT, 0, ident),
    )
    carries: tuple[Any, ...] = ()
    for p, walked in enumerate(passes, first):
      key = client_loop.pass_key(client.key, p)
      carry = walked.start(client, *carries)
      for i in range(plan.num_steps[where][p]):
        start = plan.start[where][p] + i * simulator.batchings[p].batch_size
        entries = plan.order[p][start:][: simulator.batchings[p].batch_size]
        rows = np.where(entries < 0, ~entries, entries)
        examples = {
          k: jnp.asarray(v[rows])
          for k, v in simulator.splits[p].examples.items()
        }
        batch = Batch(examples, jnp.asarray(entries >= 0))
        carry = walked.step(client, carry, batch, jax.random.fold_in(key, i))
      carries += (carry,)
    return client, finish(client, *carries)

  mean_answer: Any = ()
  if survey is not None:
    answers = [
      report_of(w, message, asked, 0, survey.finish)[1] for w in places
    ]
    shares = np.array([float(a.weight) for a in answers])
    mean_answer = jax.tree.map(
      lambda *x: jnp.asarray(np.average(x, axis=0, weights=shares)),
      *[a.statistics for a in answers],
    )
    message = survey.message(message, mean_answer)
  for where in places:
    passes = algorithm.passes
    report = report_of(where, message, passes, len(asked), algorithm.finish)
    reports.append(algorithm.postprocess_report(*report))

  weights = np.array([float(r.weight) for r in reports])
  mean = lambda *x: jnp.asarray(np.average(x, axis=0, weights=weights))
  stacked = lambda *x: jnp.stack([jnp.asarray(one) for one in x])
  aggregate = Aggregate(
    update=jax.tree.map(
      stacked if algorithm.requirements.all_updates else mean,
      *[r.update for r in reports],
    ),
    buffers=jax.tree.map(mean, *[r.buffers for r in reports]),
    statistics=jax.tree.map(mean, *[r.statistics for r in reports]),
    weight=jnp.float32(weights.sum()),
    clients=jnp.int32(len(reports)),
    members=Members(
      id=jnp.asarray(ids),
      present=jnp.ones(len(ids), bool),
      weight=jnp.asarray(weights, jnp.float32),
      values=jax.tree.map(stacked, *[r.values for r in reports]),
    ),
  )
  context = Context(
    hparams=hparams,
    round=jnp.int32(0),
    key=key_for(simulator.seed, Purpose.SERVER, 0),
    noise_key=noise_key_for(state.noise_seed, Purpose.SERVER, 0),
    num_clients=simulator.num_clients,
    server_data=jax.tree.map(jnp.asarray, simulator.data.server),
    survey=mean_answer,
  )
  server = algorithm.apply(state.server, aggregate, context)
  for ident, report in zip(ids, reports, strict=True):
    table = jax.tree.map(
      lambda x, new, i=ident: x.at[i].set(new), table, report.state
    )
  return server, table


@by_loop
def test_the_compiled_round_does_what_a_plain_loop_does(name):
  start, after = run(name, 1)
  start = jax.tree.map(jnp.asarray, start)
  server, table = by_hand(simulator_of(name, 1), start)
  assert_close(after.server, jax.device_get(server))
  assert_close(after.clients[0], jax.device_get(table))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_what_clients_report_is_float32_whatever_the_model_is(
  name, monkeypatch
):
  """Metrics, weights, values and statistics of a model in bfloat16."""
  whole = task_of(name)
  halve = lambda x: (
    x.astype(jnp.bfloat16) if jnp.issubdtype(x.dtype, jnp.floating) else x
  )

  def init(key):  # a base that does not train may be required to be float32
    params, buffers, frozen = whole.init(key)
    params, buffers = jax.tree.map(halve, (params, buffers))
    return Variables(params, buffers, frozen)

  half = whole._replace(init=init)
  monkeypatch.setitem(globals(), "task_of", lambda name: half)
  algorithm = build(name)
  hparams = jax.tree.map(np.float32, algorithm.hparams)
  server = jax.eval_shape(algorithm.init, jax.random.key(0), hparams)
  report = report_shapes(algorithm, server, hparams)
  told = (report.metrics, report.weight, report.values, report.statistics)
  assert {x.dtype for x in jax.tree.leaves(told)} == {np.dtype("float32")}
