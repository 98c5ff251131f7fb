"""The GRU language model against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.data import FederatedData, make_dataset
from fedjax_sim.models.word_gru import word_gru
from fedjax_sim.tasks.freezing import named_variables
from problems import make_simulator, sgd

KEY = jax.random.key(0)
IDS = 6  # padding, unknown, and four words
# The first id of x is never read.
X = np.array([[0, 2, 5, 1], [0, 4, 3, 0]])
Y = np.array([[2, 5, 1, 3], [4, 3, 0, 0]])
EXAMPLES = {"x": jnp.asarray(X), "y": jnp.asarray(Y)}


def log_probabilities(arrays, y):
  """Log-probabilities of words, from what stands before each in `y`."""
  table, bias = arrays["embedding"], arrays["bias"]
  sigmoid = lambda a: 1 / (1 + np.exp(-a))
  found = np.zeros((*y.shape, IDS))
  for i, sentence in enumerate(y):
    h = np.zeros(len(arrays["gru/recurrent"]))
    for t, word in enumerate(sentence):
      logits = h @ arrays["project/kernel"] @ table.T + bias
      found[i, t, 1:] = logits - np.log(np.exp(logits).sum())
      by_input = table[word - 1] @ arrays["gru/inputs/kernel"]
      by_input = np.split(by_input + arrays["gru/inputs/bias"], 3)
      by_state = h @ arrays["gru/recurrent"] + arrays["gru/recurrent_bias"]
      by_state = np.split(by_state, 3)
      r, z = (sigmoid(by_input[k] + by_state[k]) for k in (0, 1))
      n = np.tanh(by_input[2] + r * by_state[2])
      h = (1 - z) * n + z * h
  return found


@pytest.mark.integration
def test_every_word_is_predicted_and_embeddings_are_tied():
  task = word_gru((4,), IDS, embedding=3, units=5)
  variables = jax.jit(task.init)(KEY)
  named = named_variables(variables)
  bound = (3 / 3) ** 0.5
  assert 0.5 * bound < float(abs(named["embedding"]).max()) <= bound
  named["bias"] = jnp.linspace(-1, 1, IDS - 1)
  variables = jax.tree.unflatten(
    jax.tree.structure(variables), list(named.values())
  )
  arrays = {k: np.asarray(v, np.float64) for k, v in named.items()}
  expected = log_probabilities(arrays, Y)
  real = Y != 0
  each = np.where(
    real, -np.take_along_axis(expected, Y[..., None], 2)[..., 0], 0
  )
  loss = jax.jit(task.loss)(variables, EXAMPLES, KEY)
  assert loss.weight.tolist() == [4, 2]
  np.testing.assert_allclose(loss.value, each.sum(1) / real.sum(1), rtol=1e-5)
  assert task.logits is not None
  logits = task.logits(variables, EXAMPLES)
  assert logits.shape == (2, 4, IDS)
  assert float(logits[..., 0].max()) < -1e29  # padding is never predicted
  # What is read first, and what follows the end, changes nothing.
  other = {**EXAMPLES, "x": jnp.asarray(np.where(X == 0, 5, X))}
  again = jax.jit(task.loss)(variables, other, KEY).value
  np.testing.assert_array_equal(again, loss.value)
  grad = jax.grad(
    lambda p: task.loss(variables._replace(params=p), EXAMPLES, KEY).value.sum()
  )(variables.params)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grad))


@pytest.mark.parametrize("reject", [True, False])
def test_unknown_words_are_no_right_prediction(reject):
  task = word_gru((2,), IDS, embedding=2, units=3, reject_unknown=reject)
  variables = task.init(KEY)
  named = named_variables(variables)
  named = {k: 0 * v for k, v in named.items()}
  y = np.array([[1, 2], [1, 0], [0, 0]])
  examples = {"x": np.zeros_like(y), "y": y}

  def accuracy(said):
    bias = jnp.zeros(IDS - 1).at[said - 1].set(1.0)
    values = list({**named, "bias": bias}.values())
    whole = jax.tree.unflatten(jax.tree.structure(variables), values)
    return jax.jit(task.metrics)(whole, examples)["accuracy"]

  unknown = accuracy(1)
  assert unknown.total.tolist() == ([0, 0, 0] if reject else [1, 1, 0])
  assert unknown.weight.tolist() == [2, 1, 0]
  assert accuracy(2).total.tolist() == [1, 0, 0]


def test_it_learns_sentences():
  sentence = np.array([2, 4, 3, 5, 2, 3])
  y = np.tile(sentence, (8, 1))
  x = np.concatenate([np.zeros((8, 1), int), y[:, :-1]], axis=1)
  clients = [{"x": x[i : i + 2], "y": y[i : i + 2]} for i in (0, 2, 4, 6)]
  data = make_dataset(
    "text", FederatedData.from_clients(clients), num_classes=IDS
  )
  task = word_gru((6,), IDS, embedding=8, units=16)
  simulator = make_simulator(task, fedavg(task, sgd(1.0), sgd(1.0)), data)
  rows = []
  for out in simulator.run(simulator.init(), 40):
    rows += out.rows
  assert rows[-1]["train/loss"] < 0.2 * rows[0]["train/loss"]
