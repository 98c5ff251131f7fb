"""The news recommender against numpy, on made-up titles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.core.weights import write_weights
from fedjax_sim.data import FederatedData, make_dataset
from fedjax_sim.data.news import News, write_news
from fedjax_sim.models import MODELS
from fedjax_sim.models.news_recommender import click_cross_entropy
from fedjax_sim.tasks.freezing import named_variables
from problems import make_simulator, normal, sgd

KEY = jax.random.key(0)
CLICKED, CANDIDATES, NEGATIVES = 22, 5, 2
SMALL = {
  "clicked": CLICKED,
  "negatives": NEGATIVES,
  "heads": 2,
  "head_size": 3,
  "pooling": 4,
}
TITLES = np.array([[0] * 5, [1, 2, 3, 0, 0], [4, 4, 5, 1, 2], [3, 5, 0, 0, 0]])
# News 1 and 3 were shown, and news 2 in an impression of them; 0 is padding.
X = np.zeros((3, CLICKED + CANDIDATES), np.int32)
X[:, CLICKED - 3 : CLICKED] = [[1, 2, 3], [0, 0, 2], [0, 0, 0]]
X[:, CLICKED:] = [[1, 2, 3, 2, 0], [3, 1, 0, 0, 0], [2, 1, 3, 0, 0]]
Y = np.array([[1, 0, 0, 1, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]], np.uint8)
EXAMPLES = {"x": X, "y": Y}


def files(folder, titles=TITLES, dimensions=4):
  count = int(titles.max())
  words = tuple(f"word{i}" for i in range(count))
  write_news(folder / "news.npz", News(titles.astype(np.int32), words))
  rng = np.random.default_rng(0)
  vectors = rng.normal(size=(count + 1, dimensions)).astype(np.float32)
  write_weights(folder / "vectors.npz", {"vectors": vectors})
  given = {"news": "news.npz", "embedding": "vectors.npz"}
  return {k: str(folder / name) for k, name in given.items()}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
  given = files(tmp_path_factory.mktemp("news"))
  shape = (CLICKED + CANDIDATES,)
  return MODELS["news_recommender"](shape, 2, **given, **SMALL)


@pytest.fixture(scope="module")
def variables(task):
  return jax.jit(task.init)(KEY)


# --- the same in numpy --------------------------------------------------------


def softmax(a, axis):
  a = np.exp(a - a.max(axis, keepdims=True))
  return a / a.sum(axis, keepdims=True)


def attention(arrays, path, x):
  """Two heads of three dimensions each, one after the other."""
  q, k, v = (
    x @ arrays[f"{path}/{n}/kernel"] for n in ("query", "key", "value")
  )
  heads = []
  for i in (0, 3):
    part = slice(i, i + 3)
    weights = softmax(q[:, part] @ k[:, part].T / 3**0.5, 1)
    heads.append(weights @ v[:, part])
  return np.concatenate(heads, axis=1)


def pooling(arrays, path, x):
  linear = lambda n, a: (
    a @ arrays[f"{path}/{n}/kernel"] + arrays[f"{path}/{n}/bias"]
  )
  weights = softmax(linear("weight", np.tanh(linear("hidden", x))), 0)
  return (weights * x).sum(0)


def gru(arrays, path, x):
  sigmoid = lambda a: 1 / (1 + np.exp(-a))
  h = np.zeros(arrays[f"{path}/recurrent"].shape[0])
  for step in x:
    by_input = step @ arrays[f"{path}/inputs/kernel"]
    by_input = np.split(by_input + arrays[f"{path}/inputs/bias"], 3)
    by_state = (
      h @ arrays[f"{path}/recurrent"] + arrays[f"{path}/recurrent_bias"]
    )
    by_state = np.split(by_state, 3)
    r, z = (sigmoid(by_input[k] + by_state[k]) for k in (0, 1))
    h = (1 - z) * np.tanh(by_input[2] + r * by_state[2]) + z * h
  return h


def title(arrays, news):
  words = arrays["frozen/embedding"][TITLES[news]]
  kernel = arrays["title/conv/kernel"]
  seen = [
    np.einsum("wd,wdf->f", words[i : i + 3], kernel)
    for i in range(len(words) - 2)
  ]
  seen = np.maximum(np.array(seen) + arrays["title/conv/bias"], 0)
  seen = np.maximum(attention(arrays, "title/attention", seen), 0)
  return pooling(arrays, "title/pooling", seen)


def scores(arrays, x):
  news = np.array([title(arrays, i) for i in x])
  clicks = news[:CLICKED]
  long = pooling(
    arrays, "user/clicks", attention(arrays, "user/attention", clicks)
  )
  short = gru(arrays, "user/gru", clicks[-20:])
  user = pooling(arrays, "user/both", np.stack([long, short]))
  return news[CLICKED:] @ user


@pytest.mark.integration
def test_scores_are_those_of_numpy(task, variables):
  named = named_variables(variables)
  arrays = {k: np.asarray(v, np.float64) for k, v in named.items()}
  expected = [scores(arrays, x) for x in X]
  np.testing.assert_allclose(
    task.logits(variables, EXAMPLES), expected, rtol=1e-4
  )


# --- losses and metrics -------------------------------------------------------


def without_dropout(tmp_path):
  shape = (CLICKED + CANDIDATES,)
  return MODELS["news_recommender"](
    shape, 2, **files(tmp_path), **SMALL, dropout=0.0
  )


def test_training_reads_a_click_and_some_others(tmp_path, variables):
  """The first 1 + negatives candidates, without those that are missing."""
  task = without_dropout(tmp_path)
  loss = jax.jit(task.loss)(variables, EXAMPLES, KEY)
  said = np.asarray(task.logits(variables, EXAMPLES))
  few = said[0, : NEGATIVES + 1]
  first = np.log(np.exp(few).sum()) - few[0]
  second = np.log(np.exp(said[1, :2]).sum()) - said[1, 1]
  np.testing.assert_allclose(loss.value[:2], [first, second], rtol=1e-4)
  assert loss.weight.tolist() == [1, 1, 0]
  assert loss.value[2] == 0
  other = X.copy()
  other[:, CLICKED + NEGATIVES + 1 :] = 3
  again = jax.jit(task.loss)(variables, {"x": other, "y": Y}, KEY).value
  np.testing.assert_array_equal(again, loss.value)


def test_evaluation_ranks_all_candidates(task, variables):
  found = jax.jit(task.metrics)(variables, EXAMPLES)
  said = np.asarray(task.logits(variables, EXAMPLES))
  assert set(found) == {"loss", "accuracy", "auc", "mrr", "ndcg5", "ndcg10"}
  assert set(found) <= set(task.higher_is_better)
  assert found["auc"].weight.tolist() == [1, 1, 0]
  clicks, others = said[0, [0, 3]], said[0, [1, 2]]
  apart = clicks[:, None] - others[None]
  expected = np.mean((apart > 0) + 0.5 * (apart == 0))
  assert float(found["auc"].total[0]) == pytest.approx(expected)
  place = 1 + (said[1, 0] > said[1, 1])
  assert float(found["mrr"].total[1]) == pytest.approx(1 / place)
  log = said[0, :4] - np.log(np.exp(said[0, :4]).sum())
  loss = -(log[0] + log[3]) / 2
  assert float(found["loss"].total[0]) == pytest.approx(loss, rel=1e-4)


def test_dropout_is_for_training(task, variables):
  loss = jax.jit(task.loss)
  one, other = (loss(variables, EXAMPLES, jax.random.key(i)) for i in (1, 2))
  assert (one.value[:2] != other.value[:2]).all()


def test_published_sizes(tmp_path):
  given = files(tmp_path, np.zeros((2, 30)) + 1, dimensions=300)
  task = MODELS["news_recommender"]((350,), 2, **given)
  shapes = jax.eval_shape(task.init, KEY)
  count = lambda tree: sum(np.prod(x.shape) for x in jax.tree.leaves(tree))
  # A title: 3 * 300 * 400 + 400; 3 * 400 * 400; 400 * 200 + 200 + 200 + 1. A
  # user: 3 * 400 * 400; 3 * 400 * (400 + 400 + 2); twice 80,401.
  assert count(shapes.params) == 2_524_003
  assert count(shapes.frozen) == 2 * 30 + 2 * 300


def test_it_learns_what_a_user_likes(tmp_path):
  """News 1 and 2 are liked by those who have clicked them."""
  rng = np.random.default_rng(0)
  likes = rng.integers(1, 3, 32)
  x = np.zeros((32, CLICKED + CANDIDATES), np.int32)
  x[:, CLICKED - 4 : CLICKED] = likes[:, None]
  x[:, CLICKED] = likes
  x[:, CLICKED + 1] = 3 - likes
  y = np.zeros((32, CANDIDATES), np.uint8)
  y[:, 0] = 1
  clients = FederatedData.from_assignment({"x": x, "y": y}, np.arange(32) % 4)
  data = make_dataset("news", clients, num_classes=2)
  task = without_dropout(tmp_path)
  simulator = make_simulator(task, fedavg(task, sgd(0.3), sgd(1.0)), data)
  state = simulator.init()
  before = named_variables(jax.jit(task.init)(KEY))["frozen/embedding"]
  rows = []
  for out in simulator.run(state, 30):
    rows += out.rows
    state = out.state
  assert rows[-1]["train/loss"] < 0.5 * rows[0]["train/loss"]
  after = [
    leaf for leaf in jax.tree.leaves(state.server) if leaf.shape == before.shape
  ]
  assert any(np.array_equal(leaf, before) for leaf in after)


# --- what is refused ----------------------------------------------------------


@pytest.mark.parametrize(
  ("shape", "options", "message"),
  [
    ((24,), {}, r"shape \(24,\); give \(25 or more,\), 22 clicks"),
    ((27, 2), {}, r"shape \(27, 2\)"),
    ((27,), {"heads": 0}, "heads=0 is out of range"),
    ((27,), {"negatives": 1.0}, "negatives=1.0 is a float"),
    ((27,), {"dropout": 1.0}, "dropout=1.0 is out of range"),
    ((27,), {"news": "no.npz"}, "There is no no.npz .from news"),
    ((27,), {"embedding": "no.txt"}, "There is no no.txt .from embedding"),
  ],
)
def test_what_is_refused(tmp_path, monkeypatch, shape, options, message):
  monkeypatch.delenv("FEDJAX_SIM_DATA", raising=False)
  given = {**files(tmp_path), **SMALL, **options}
  with pytest.raises((TypeError, ValueError, OSError), match=message):
    MODELS["news_recommender"](shape, 2, **given)


def test_classes_titles_and_ids(tmp_path, task):
  given = files(tmp_path)
  with pytest.raises(ValueError, match="num_classes=3 is out of range"):
    MODELS["news_recommender"]((27,), 3, **given, **SMALL)
  with pytest.raises(ValueError, match="holds 4; news=.* ids go from 0 to 3"):
    task.check({"x": np.array([[0, 4]])})
  short = files(tmp_path, TITLES[:, :2])
  with pytest.raises(ValueError, match="titles of 2 words; give at least 3"):
    MODELS["news_recommender"]((27,), 2, **short, **SMALL)


def test_losses_of_scores_in_bfloat16_are_float32():
  scores = jnp.asarray(normal(0, 3, CANDIDATES), jnp.bfloat16)
  examples = {"x": jnp.asarray(X), "y": jnp.asarray(Y)}
  found, weight = click_cross_entropy(scores, examples, clicked=CLICKED)
  assert found.dtype == weight.dtype == np.float32
  said = np.asarray(scores, np.float64)
  first = np.log(np.exp(said[0, :4]).sum()) - (said[0, 0] + said[0, 3]) / 2
  second = np.log(np.exp(said[1, :2]).sum()) - said[1, 1]
  np.testing.assert_allclose(found[:2], [first, second], rtol=1e-6)
