"""What is computed in another form on a GPU is the same, computed here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.engine.loops import repeat
from fedjax_sim.tasks.losses import negative_log_likelihood
from problems import MODELS, blobs, flat, make_simulator, params_of, sgd, train

SIZES = (5, 17, 3, 8, 30, 1)


def trained(lanes):
  """Parameters and losses after two rounds of clients of unlike sizes."""
  data = blobs(SIZES, features=6, classes=3)
  task = MODELS["mlp"](data)
  simulator = make_simulator(
    task,
    fedavg(task, sgd(0.1), sgd(1.0)),
    data,
    clients_per_round=len(SIZES),
    batching=LocalBatching(batch_size=4, epochs=2),
    lanes=lanes,
  )
  return flat(params_of(simulator, train(simulator, 2)))


@pytest.mark.parametrize("lanes", [1, 4])
def test_clients_train_alike(monkeypatch, lanes):
  expected = trained(lanes)
  with monkeypatch.context() as patch:
    patch.setattr(jax, "default_backend", lambda: "gpu")
    got = trained(lanes)
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_each_lane_repeats_as_often_as_it_should(monkeypatch, backend):
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  counts = jnp.array([0, 3, 1, 7])

  def one(count, start):
    step = lambda i, carry, more: carry * 2 + i + more
    return repeat(count, step, start, jnp.float32(1))

  def plain(count, start):
    for i in range(count):
      start = start * 2 + i + 1
    return start

  got = jax.jit(jax.vmap(one))(counts, jnp.arange(4.0))
  expected = [plain(int(n), float(i)) for i, n in enumerate(counts)]
  np.testing.assert_array_equal(got, expected)
  for count, start in ((0, 5.0), (4, 5.0)):
    assert jax.jit(one)(count, start) == plain(count, start)


LABELS = jnp.array([0, 2, 4, 1, -1])  # the third and the last are no class


@pytest.mark.parametrize(
  "special", [0.0, 1e4, -jnp.inf], ids=["plain", "large", "impossible"]
)
def test_the_likelihood_of_a_label(monkeypatch, special):
  logits = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4)))
  logits = logits.at[0, 3].add(special)
  value = lambda z: negative_log_likelihood(z, LABELS)
  slope = jax.grad(lambda z: jnp.sum(jnp.where(LABELS >= 0, value(z), 0)))
  expected, slopes = value(logits), slope(logits)
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert np.isnan(expected[jnp.array([2, 4])]).all()
  np.testing.assert_allclose(value(logits), expected, rtol=1e-5)
  np.testing.assert_allclose(slope(logits), slopes, rtol=1e-5, atol=1e-7)


def test_a_label_that_cannot_be_has_an_infinite_loss(monkeypatch):
  logits, label = jnp.array([[0.0, -jnp.inf]]), jnp.array([1])
  expected = negative_log_likelihood(logits, label)
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert expected == negative_log_likelihood(logits, label) == jnp.inf
