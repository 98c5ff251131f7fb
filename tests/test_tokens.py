"""Weights and ends by tokens, the loss's weights, against a plain loop."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim.algorithms.apfl import apfl
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.algorithms.fedprox import fedprox
from fedjax_sim.algorithms.fedsgd import fedsgd
from fedjax_sim.algorithms.per_fedavg import per_fedavg
from fedjax_sim.config import default_config
from fedjax_sim.config.build import build
from fedjax_sim.core import Loss, Task, Variables
from fedjax_sim.data import FederatedData, FederatedDataset
from fedjax_sim.engine.batching import LocalBatching
from problems import make_simulator, params_of, sgd, train
from tiers import slow_but

SIZES = [7, 3, 5, 1]
RATE, BATCH = 0.25, 2


def texts() -> FederatedDataset:
  """Examples x with 0 to 5 tokens each."""
  rng = np.random.default_rng(4)
  count = sum(SIZES)
  tokens = rng.integers(0, 6, count)
  tokens[[7, 12]] = 0
  return FederatedDataset(
    name="texts",
    train=FederatedData(
      examples={
        "x": rng.normal(size=(count, 2)).astype(np.float32),
        "tokens": tokens.astype(np.float32),
      },
      offsets=np.concatenate([[0], np.cumsum(SIZES)]),
    ),
    num_classes=0,
    example_shape=(2,),
  )


DATA = texts()


def task() -> Task:
  """|w - x|^2 / 2, of which every example has as many as it has tokens."""

  def loss(variables, examples, key):
    del key
    gap = variables.params["w"][None] - examples["x"]
    return Loss(0.5 * jnp.sum(gap**2, axis=-1), examples["tokens"])

  return Task(
    init=lambda key: Variables({"w": jnp.zeros(2)}),
    loss=loss,
    metrics=lambda variables, examples: {},
  )


def client_by_hand(x, tokens, w, epochs, most):
  """FLUTE's loop: it ends before a step once the count reaches the most."""
  start, steps, count = w, 0, 0.0
  examples = set()
  for _ in range(epochs):
    for at in range(0, len(x), BATCH):
      if most is not None and count >= most:
        break
      rows = slice(at, at + BATCH)
      weight = tokens[rows].sum()
      gradient = tokens[rows] @ (w - x[rows]) / max(weight, 1)
      w = w - RATE * gradient
      count += weight
      steps += 1
      examples |= set(range(len(x))[rows])
  return w - start, count, steps, len(examples)


def round_by_hand(w, weighting, epochs, most):
  updates, weights, told = [], [], []
  for i in range(len(SIZES)):
    own = {k: np.float64(v) for k, v in DATA.train.client(i).items()}
    update, count, steps, used = client_by_hand(
      own["x"], own["tokens"], w, epochs, most
    )
    updates.append(update)
    weights.append({"tokens": count, "examples": used, "uniform": 1}[weighting])
    told.append((steps, used))
  return w + np.average(updates, axis=0, weights=weights), told


def simulator_of(make=fedavg, batching=None, **options):
  return make_simulator(
    task(),
    make(task(), sgd(RATE), sgd(1.0), **options.pop("algorithm", {})),
    DATA,
    batching=batching or LocalBatching(batch_size=BATCH, shuffle=False),
    **options,
  )


@pytest.mark.parametrize(
  ("weighting", "epochs", "most", "lanes", "devices"),
  slow_but(
    [("tokens", 2, None, 1, 1), ("tokens", 1, 5, 3, 2)],
    [
      ("tokens", 2, None, 1, 1),
      ("tokens", 1, 5, 1, 1),
      ("tokens", 1, 5, 3, 2),
      ("examples", 1, 5, 2, 1),
      ("uniform", 3, 16, 2, 1),
    ],
  ),
)
def test_a_round_is_that_of_a_loop(weighting, epochs, most, lanes, devices):
  batching = LocalBatching(
    batch_size=BATCH, epochs=epochs, shuffle=False, max_tokens=most
  )
  simulator = simulator_of(
    batching=batching,
    algorithm={"weighting": weighting},
    lanes=lanes,
    devices=devices,
  )
  w = np.zeros(2)
  for _ in range(2):
    w, told = round_by_hand(w, weighting, epochs, most)
  state = train(simulator, 2)
  np.testing.assert_allclose(params_of(simulator, state)["w"], w, rtol=1e-5)
  if most is not None:  # it ends some of them early
    steps, _ = zip(*told, strict=True)
    assert sum(steps) < sum(epochs * -(-n // BATCH) for n in SIZES)


@pytest.mark.parametrize("make", slow_but([apfl], [fedprox, apfl]))
def test_other_algorithms_end_as_fedavg_does(make):
  still = {"mu": 0.0} if make is fedprox else {}
  batching = LocalBatching(batch_size=BATCH, shuffle=False, max_tokens=5)
  one, other = (
    simulator_of(make, batching, algorithm={"weighting": "tokens"} | options)
    for make, options in ((fedavg, {}), (make, still))
  )
  np.testing.assert_allclose(
    params_of(one, train(one, 2))["w"],
    params_of(other, train(other, 2))["w"],
    rtol=1e-5,
  )


def test_an_algorithm_is_told_what_was_used():
  """FedNova and its like divide by the number of steps that were taken."""
  base = fedavg(task(), sgd(RATE), sgd(1.0))
  sizes = ["num_steps", "num_examples"]

  def told(client):
    values = {name: getattr(client, name) for name in sizes}
    return {k: jnp.sum(v).astype(jnp.float32) for k, v in values.items()}

  seen = []

  def apply(server, aggregate, context):
    jax.debug.callback(lambda v: seen.append(v), aggregate.members.values)
    return base.apply(server, aggregate, context)

  algorithm = base._replace(
    finish=lambda client, carry: base.finish(client, carry)._replace(
      values={f"finish_{k}": v for k, v in told(client).items()}
    ),
    postprocess_report=lambda client, report: report._replace(
      values={**report.values, **told(client)}
    ),
    apply=apply,
  )
  batching = LocalBatching(
    batch_size=BATCH, epochs=2, shuffle=False, max_tokens=16
  )
  simulator = make_simulator(
    task(), algorithm, DATA, batching=batching, lanes=4
  )
  jax.block_until_ready(train(simulator, 1))
  jax.effects_barrier()
  _, expected = round_by_hand(np.zeros(2), "uniform", 2, 16)
  (values,) = seen
  for column, name in enumerate(sizes):
    wanted = sorted(row[column] for row in expected)
    assert sorted(values[name].tolist()) == wanted
    assert sorted(values[f"finish_{name}"].tolist()) == wanted


def test_an_end_beyond_all_tokens_changes_no_bit():
  plain = simulator_of()
  batching = dataclasses.replace(plain.batching, max_tokens=10**6)
  far = simulator_of(batching=batching)
  np.testing.assert_array_equal(
    params_of(plain, train(plain, 2))["w"], params_of(far, train(far, 2))["w"]
  )


@pytest.mark.parametrize("make", [per_fedavg, fedsgd])
def test_algorithms_that_do_not_count_are_refused(make):
  arguments = (sgd(1.0),) if make is fedsgd else (sgd(1.0), sgd(1.0))
  with pytest.raises(
    ValueError, match=r"client\.max_tokens=5: algorithm\.name"
  ):
    make_simulator(
      task(),
      make(task(), *arguments),
      DATA,
      batching=LocalBatching(batch_size=BATCH, max_tokens=5),
    )


def test_secure_means_by_tokens_need_their_largest_weight():
  source = default_config()
  source.algorithm.weighting = "tokens"
  source.aggregator.name = "secure_mean"
  source.aggregator.clip = 1.0
  with pytest.raises(ValueError, match=r"set aggregator\.max_weight"):
    build(source)
  source.aggregator.max_weight = 50.0
  build(source)
