"""What clients give away, against numpy; and who is left out for it."""

import dataclasses

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedjax_sim import aggregators, sampling
from fedjax_sim.algorithms.apfl import apfl
from fedjax_sim.algorithms.centralized import centralized
from fedjax_sim.algorithms.dga import dga
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.algorithms.fedlabels import fedlabels
from fedjax_sim.algorithms.fedlaw import fedlaw
from fedjax_sim.config import default_config
from fedjax_sim.config.build import build
from fedjax_sim.core import Loss, Metric, Task, Variables
from fedjax_sim.data import FederatedData, FederatedDataset, with_few_labels
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.privacy.central import CentralDPConfig, with_central_dp
from fedjax_sim.privacy.leakage import leakage
from fedjax_sim.privacy.leakage.measurement import log_ratio
from fedjax_sim.privacy.leakage.words import guessed, words_in
from fedjax_sim.tasks.losses import token_cross_entropy, token_metrics
from fedjax_sim.training.stale import stale
from fedjax_sim.transforms import clip, gaussian
from problems import (
  MODELS,
  blobs,
  flat,
  hparams_of,
  make_simulator,
  params_of,
  sgd,
  train,
)
from tiers import slow_but

SIZES, RATE = (5, 9, 3, 7, 4, 6), 0.6
DATA = blobs(SIZES)
TASK = MODELS["lr"](DATA)
WHOLE = LocalBatching(batch_size=max(SIZES))  # a step of full-batch descent


def algorithm_of(**options):
  return leakage(fedavg(TASK, sgd(RATE), sgd(1.0)), TASK, **options)


def log_of(simulator, rounds=1, hparams=None):
  """The clients' log of a run, its rows, and its last state."""
  simulator = dataclasses.replace(simulator, log_clients=True)
  outs = list(simulator.run(simulator.init(), rounds, hparams=hparams))
  names = outs[0].client_log
  columns = {n: np.concatenate([o.client_log[n] for o in outs]) for n in names}
  return columns, [row for o in outs for row in o.rows], outs[-1].state


def only(*ids):
  """A sampler of these clients."""
  chosen = np.array(ids)
  return sampling.Sampler(lambda seed, round_: chosen, (len(ids),), len(ids))


def by_hand(client, w, b):
  """A client's leakages after one step of softmax regression, in float64."""
  examples = DATA.train.client(client)
  x, y = examples["x"].astype(np.float64), examples["y"]
  hot = np.eye(DATA.num_classes)[y]

  def log_p(w, b):
    logits = x @ w + b
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))

  error = (np.exp(log_p(w, b)) - hot) / len(x)
  after = log_p(w - RATE * x.T @ error, b - RATE * error.sum(0))
  return np.abs(((after - log_p(w, b)) * hot).sum(1))


def first_model(simulator):
  params = params_of(simulator, simulator.init())
  b, w = sorted(jax.tree.leaves(params), key=np.ndim)
  return np.float64(w), np.float64(b)


@pytest.mark.parametrize(
  ("statistic", "lanes", "devices"),
  slow_but(
    [("max", 2, 2), ("mean", 1, 1)],
    [(name, n, n) for name in ("max", "mean") for n in (1, 2)],
  ),
)
def test_softmax_regression_by_hand(statistic, lanes, devices):
  simulator = make_simulator(
    TASK,
    algorithm_of(statistic=statistic),
    DATA,
    batching=WHOLE,
    lanes=lanes,
    devices=devices,
  )
  columns, rows, _ = log_of(simulator)
  reduce = getattr(np, statistic)
  wanted = [reduce(by_hand(i, *first_model(simulator))) for i in range(6)]
  np.testing.assert_allclose(columns["value/leakage"], wanted, rtol=1e-4)
  assert rows[0]["train/leakage"] == pytest.approx(np.mean(wanted), rel=1e-4)
  assert "train/left_out" not in rows[0]


@pytest.mark.slow
def test_batches_do_not_matter_to_the_measurement():
  """The model is FedAvg's; leakage is of all examples, whatever a batch."""
  batching = LocalBatching(batch_size=4, epochs=2)
  plain = make_simulator(
    TASK, fedavg(TASK, sgd(RATE), sgd(1.0)), DATA, batching=batching
  )
  simulator = make_simulator(TASK, algorithm_of(), DATA, batching=batching)
  np.testing.assert_array_equal(
    flat(params_of(plain, train(plain, 2))),
    flat(params_of(simulator, train(simulator, 2))),
  )
  columns, _, _ = log_of(simulator)
  alone = dataclasses.replace(plain, sampler=only(2), seed=simulator.seed)
  start, end = alone.init(), train(alone, 1)
  before = alone.algorithm.variables(start.server)
  after = alone.algorithm.variables(end.server)
  examples = jax.tree.map(jnp.asarray, dict(DATA.train.client(2)))
  wanted = float(jnp.max(log_ratio(TASK, before, after, examples)))
  assert columns["value/leakage"][2] == pytest.approx(wanted, rel=1e-4)


def test_a_text_counts_by_word_and_not_its_padding():
  ids = np.array([[1, 2, 3, 0], [2, 2, 0, 0], [0, 0, 0, 0]])
  examples = {"x": jnp.asarray(ids), "y": jnp.asarray(np.roll(ids, -1, 1))}
  rng = np.random.default_rng(0)
  tables = rng.normal(size=(2, 4, 4))

  def metrics(variables, examples):
    return token_metrics(variables.params[examples["x"]], examples)

  task = TASK._replace(metrics=metrics)
  before, after = [Variables(jnp.asarray(t, jnp.float32)) for t in tables]
  found = log_ratio(task, before, after, examples)
  logs = [t - np.log(np.exp(t).sum(-1, keepdims=True)) for t in tables]
  gap = logs[1] - logs[0]
  first = [gap[1, 2] + gap[2, 3], gap[2, 2]]  # ends in 0, which is no word
  y = np.asarray(examples["y"])
  assert y[0].tolist() == [2, 3, 0, 1]  # what rolled around is a word, too
  first[0] += gap[0, 1]
  assert y[1].tolist() == [2, 0, 0, 2]
  first[1] += gap[0, 2]
  wanted = [abs(first[0]) / 3, abs(first[1]) / 2, 0]
  np.testing.assert_allclose(found, wanted, rtol=1e-5)


# --- who is left out ----------------------------------------------------------


def kept_by(threshold, simulator):
  model = first_model(simulator)
  worst = np.array([by_hand(i, *model).max() for i in range(6)])
  return np.flatnonzero(worst <= threshold), worst


def middle(simulator):
  """A threshold between the third and the fourth of six clients."""
  _, worst = kept_by(np.inf, simulator)
  return float(np.sort(worst)[2:4].mean())


CENTRAL = CentralDPConfig(clip_norm=0.5, noise_multiplier=0.0, denominator=6.0)
same = lambda algorithm: algorithm

# What is inside, and what is around it: leakage goes between them.
ALGORITHMS = {
  "fedavg": (lambda: fedavg(TASK, sgd(RATE), sgd(1.0)), same),
  "dga": (lambda: dga(TASK, sgd(RATE), sgd(1.0), beta=2.0), same),
  "apfl": (lambda: apfl(TASK, sgd(RATE), sgd(1.0)), same),
  "learned": (lambda: fedlaw(TASK, sgd(RATE), sgd(1.0)), same),
  "stale": (lambda: fedavg(TASK, sgd(RATE), sgd(1.0)), lambda a: stale(a, 0.0)),
  "of stale": (lambda: stale(fedavg(TASK, sgd(RATE), sgd(1.0)), 0.0), same),
  "private": (
    lambda: fedavg(TASK, sgd(RATE), sgd(1.0)),
    lambda a: with_central_dp(a, CENTRAL),
  ),
}


@pytest.mark.parametrize("name", slow_but(["fedavg", "apfl"], ALGORITHMS))
def test_who_is_left_out_is_not_in_the_aggregate(name):
  """The model is that of a round without those clients."""
  make, outer = ALGORITHMS[name]
  data, aggregator = DATA, aggregators.weighted_mean()
  if name == "learned":
    data = dataclasses.replace(DATA, server=dict(DATA.train.client(0)))
    aggregator = aggregators.stack()
  options = {"batching": WHOLE, "aggregator": aggregator}
  reference = make_simulator(TASK, outer(make()), data, **options)
  threshold = middle(reference)
  kept, worst = kept_by(threshold, reference)
  assert len(kept) == 3
  algorithm = outer(leakage(make(), TASK, threshold=threshold))
  simulator = make_simulator(TASK, algorithm, data, **options)
  columns, (row,), state = log_of(simulator)
  np.testing.assert_array_equal(columns["value/left_out"], worst > threshold)
  assert row["train/left_out"] == 0.5
  assert row["leakage/threshold"] == np.float32(threshold)
  reference = dataclasses.replace(reference, sampler=only(*kept))
  np.testing.assert_allclose(
    flat(params_of(simulator, state)),
    flat(params_of(reference, train(reference, 1))),
    rtol=1e-5,
    atol=1e-6,
  )


def test_if_all_are_left_out_the_server_stays_as_it_is():
  simulator = make_simulator(TASK, algorithm_of(threshold=0.0), DATA)
  columns, rows, state = log_of(simulator, 2)
  assert [row["train/left_out"] for row in rows] == [1, 1]
  np.testing.assert_array_equal(columns["weight"], 0)
  first = simulator.init()
  np.testing.assert_array_equal(
    flat(params_of(simulator, state)), flat(params_of(simulator, first))
  )


@pytest.mark.parametrize(
  ("lanes", "devices"), slow_but([(2, 2)], [(1, 1), (2, 2)])
)
def test_the_threshold_follows_a_quantile(lanes, devices):
  first, q = 0.5, 0.6
  simulator = make_simulator(
    TASK,
    algorithm_of(threshold=first, quantile=q),
    DATA,
    clients_per_round=4,
    lanes=lanes,
    devices=devices,
  )
  columns, rows, _ = log_of(simulator, 4)
  threshold = first
  for i, row in enumerate(rows):
    assert row["leakage/threshold"] == pytest.approx(threshold, rel=1e-5)
    seen = columns["value/leakage"][columns["round"] == i + 1]
    assert row["train/left_out"] == np.mean(seen > threshold)
    threshold = np.quantile(np.float64(seen), q)
  assert len({row["train/left_out"] for row in rows}) > 1


def test_thresholds_are_traced():
  simulator = make_simulator(TASK, algorithm_of(threshold=0.5), DATA)
  state, shares = simulator.init(), []
  for most in (1e9, 0.0):
    own = {"thresholds": {"leakage": most}, "quantiles": {}}
    hparams = hparams_of(simulator, limits=own)
    out = simulator.dispatch(state, simulator.plan(0, 1), hparams)
    shares.append(out.rows[0]["train/left_out"])
    assert out.rows[0]["leakage/threshold"] == most
  assert shares == [0, 1]
  assert simulator.compilations == 1


# --- words --------------------------------------------------------------------


@hypothesis.given(
  hnp.arrays(np.int32, (3, 5), elements=st.integers(0, 9)),
  hnp.arrays(bool, 3),
)
@hypothesis.settings(max_examples=30)
def test_words_in_a_batch(ids, mask):
  found = words_in(jnp.asarray(ids), jnp.asarray(mask), 8)
  wanted = set(ids[mask].ravel()) - {0, 8, 9}  # 8 and 9 have no row
  assert set(np.flatnonzero(found)) == wanted


@hypothesis.given(st.integers(0, 2**32 - 1), st.integers(0, 9))
@hypothesis.settings(max_examples=30)
def test_the_guess_names_the_rows_that_changed_most(seed, count):
  rng = np.random.default_rng(seed)
  rows = rng.normal(size=(10, 3)) * (rng.uniform(size=(10, 1)) < 0.6)
  rows *= 10.0 ** rng.integers(-25, 3)
  length = np.linalg.norm(rows[1:], axis=1)
  wanted = 1 + np.argsort(-length)[: min(count, np.sum(length > 0))]
  found = guessed(jnp.asarray(rows, jnp.float32), jnp.asarray(count))
  assert set(np.flatnonzero(found)) == set(wanted)


WORDS = 40


def texts(clients=4, seed=0) -> FederatedDataset:
  """Clients with different halves of a vocabulary, texts of 6 ids."""
  rng = np.random.default_rng(seed)
  own = [1 + rng.permutation(WORDS - 1)[:15] for _ in range(clients)]
  x = np.concatenate([rng.choice(w, (8, 6)) for w in own]).astype(np.int32)
  y = np.concatenate([x[:, 1:], np.zeros_like(x[:, :1])], axis=1)
  return FederatedDataset(
    name="texts",
    train=FederatedData(examples={"x": x, "y": y}, offsets=np.arange(5) * 8),
    num_classes=WORDS,
    example_shape=(6,),
  )


def bigram() -> Task:
  """The next word from the embedding of this one."""

  def init(key):
    one, other = jax.random.split(key)
    return Variables(
      {
        "embed": 0.1 * jax.random.normal(one, (WORDS, 8)),
        "out": 0.1 * jax.random.normal(other, (8, WORDS)),
      }
    )

  def logits(variables, examples):
    return variables.params["embed"][examples["x"]] @ variables.params["out"]

  def loss(variables, examples, key):
    value, weight = token_cross_entropy(logits(variables, examples), examples)
    return Loss(value, weight)

  def metrics(variables, examples):
    return token_metrics(logits(variables, examples), examples)

  return Task(init, loss, metrics)


def words_of(transforms=(), **options):
  data, task = texts(), bigram()
  algorithm = leakage(
    fedavg(task, sgd(0.5), sgd(1.0)), task, embedding="embed", **options
  )
  simulator = make_simulator(task, algorithm, data, transforms=transforms)
  return simulator, data


def test_without_noise_all_words_are_told():
  """All but those that no other word follows: nothing learns from them."""
  simulator, data = words_of()
  columns, (row,), _ = log_of(simulator)
  clients = [data.train.client(i)["x"] for i in range(4)]
  kinds = np.array([len(np.unique(x)) for x in clients])
  right = np.array([len(np.unique(x[:, :-1])) for x in clients])
  np.testing.assert_allclose(columns["value/words_recovered"], right / kinds)
  told = row["train/words_recovered"], row["train/words_by_chance"]
  chance = np.sum(kinds**2 / (WORDS - 1)) / kinds.sum()
  assert told == pytest.approx((right.sum() / kinds.sum(), chance))


def test_noise_leaves_chance():
  """What is seen is the update after the transforms."""
  simulator, _ = words_of([clip(1.0), gaussian(10.0)])
  _, rows, _ = log_of(simulator, 40)
  found, chance = (
    np.mean([row[f"train/words_{name}"] for row in rows])
    for name in ("recovered", "by_chance")
  )
  # 160 draws of about 15 words of 39: a standard error of about 0.008.
  assert found == pytest.approx(chance, abs=0.04)


def test_who_gives_too_many_words_away_is_left_out():
  simulator, _ = words_of(word_threshold=0.99)
  columns, _, _ = log_of(simulator)
  share = columns["value/words_recovered"]
  np.testing.assert_array_equal(columns["value/left_out"], share > 0.99)
  assert np.any(share > 0.99)


# --- what is refused ----------------------------------------------------------


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"statistic": "most"}, r"leakage\.statistic='most'.* 'max'|unknown"),
    ({"threshold": -1.0}, r"^threshold=-1\.0"),
    ({"quantile": 0.5}, r"^quantile=0\.5 needs a threshold"),
    ({"threshold": 1.0, "quantile": 1.5}, r"^quantile=1\.5"),
    ({"word_threshold": 0.5}, "set embedding"),
    ({"embedding": "embed"}, r"'embed' matches no parameter; there are"),
    ({"embedding": ""}, r"leakage\.embedding='' matches parameters of shape"),
    ({"embedding": ".*bias"}, r"let it match one, of shape \(ids, dim"),
  ],
)
def test_arguments_that_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    algorithm_of(**options)


def test_algorithms_that_do_not_fit():
  with pytest.raises(ValueError, match="pools the data of all"):
    leakage(centralized(TASK, sgd(RATE)), TASK)
  private = with_central_dp(fedavg(TASK, sgd(RATE), sgd(1.0)), CENTRAL)
  with pytest.raises(ValueError, match="put the measurement inside"):
    leakage(private, TASK)
  few = with_few_labels(DATA, 0.5, 0)
  labelled = fedlabels(TASK, sgd(RATE), sgd(1.0))
  with pytest.raises(ValueError, match="do not send the update of the model"):
    _ = make_simulator(TASK, leakage(labelled, TASK), few).states.shapes
  algorithm = algorithm_of(threshold=1.0)
  with pytest.raises(ValueError, match="set aggregator.name='weighted_mean'"):
    make_simulator(TASK, algorithm, DATA, aggregator=aggregators.median())


def test_tasks_that_do_not_fit():
  def metrics(variables, examples):
    return {"error": Metric(examples["y"], examples["y"])}

  task = TASK._replace(metrics=metrics)
  algorithm = leakage(fedavg(task, sgd(RATE), sgd(1.0)), task)
  with pytest.raises(ValueError, match="metric 'loss'; there are error"):
    make_simulator(task, algorithm, DATA).trace()
  algorithm = algorithm_of(embedding=".*kernel")
  with pytest.raises(ValueError, match="'x' is float32; its words have to be"):
    make_simulator(TASK, algorithm, DATA).trace()


# --- configs ------------------------------------------------------------------


def test_a_config_asks_for_it():
  source = default_config()
  source.leakage.statistic = "mean"
  source.leakage.threshold = 0.25
  source.leakage.quantile = 0.9
  simulator = build(source).simulator
  assert simulator.algorithm.hparams["limits"] == {
    "thresholds": {"leakage": 0.25},
    "quantiles": {"leakage": 0.9},
  }
  assert len(simulator.algorithm.passes) == 2


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (
      {"threshold": 0.5},
      r"leakage\.threshold=0\.5: nothing takes it; set leakage.statistic",
    ),
    (
      {"embedding": "x"},
      r"leakage\.embedding='x': nothing takes it; set leakage.statistic",
    ),
    ({"statistic": "max", "word": 1}, r"does not take 'leakage\.word'"),
  ],
)
def test_configs_that_are_refused(fields, message):
  source = default_config()
  for field, value in fields.items():
    source.leakage[field] = value
  with pytest.raises(ValueError, match=message):
    build(source)


def test_a_private_run_has_no_adaptive_threshold():
  source = default_config()
  source.privacy.mechanism = "gaussian"
  source.privacy.clip_norm, source.privacy.delta = 1.0, 1e-3
  source.leakage.statistic = "max"
  source.leakage.threshold = 1.0
  source.leakage.quantile = 0.5
  with pytest.raises(ValueError, match=r"leakage\.quantile=0\.5 lets"):
    build(source)
