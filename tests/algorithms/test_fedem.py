"""FedEM against algorithm 1 of its paper, in numpy; mixtures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim import sampling
from fedjax_sim.algorithms.fedem import fedem
from fedjax_sim.data import FederatedData, FederatedDataset
from fedjax_sim.models.logistic_regression import logistic_regression
from fedjax_sim.tasks.mixture import with_mixture
from logistic import (
  DIM,
  OFFSETS,
  SIZES,
  TASK,
  WORK,
  X,
  Y,
  all_rows,
  batches,
  cohort,
)
from problems import make_simulator, sgd, train

COMPONENTS, ETA, ROUNDS = 2, 0.4, 3
LABELS = Y.astype(np.int32)
PART = FederatedData(examples={"x": X, "y": LABELS}, offsets=OFFSETS)
DATA = FederatedDataset(
  name="labels",
  train=PART,
  num_classes=2,
  example_shape=(DIM,),
  seen=PART,
)
MIXTURE = with_mixture(
  logistic_regression((DIM,), 2, init="uniform"), COMPONENTS
)


def log_probabilities(model, rows):
  """Of every component; shape=(components, rows, 2)."""
  kernel, bias = model
  logits = np.einsum("nd,mdc->mnc", X[rows], kernel) + bias[:, None]
  return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def losses(model, rows):
  found = log_probabilities(model, rows)
  return -found[:, np.arange(len(rows)), LABELS[rows]]


def posterior(model, weights, rows):
  q = weights[:, None] * np.exp(-losses(model, rows))
  return q / q.sum(axis=0)


def by_hand(model, rounds):
  """The components, and every client's weights."""
  weights = np.full((len(SIZES), COMPONENTS), 1 / COMPONENTS)
  for r in range(rounds):
    ends = []
    for t in cohort(r):
      kernel, bias = (x.copy() for x in model)
      for rows in batches(t):
        q = posterior(model, weights[t], rows)
        slope = np.exp(log_probabilities((kernel, bias), rows))
        slope[:, np.arange(len(rows)), LABELS[rows]] -= 1
        slope *= q[..., None] / len(rows)
        kernel = kernel - ETA * np.einsum("nd,mnc->mdc", X[rows], slope)
        bias = bias - ETA * slope.sum(axis=1)
      weights[t] = posterior(model, weights[t], all_rows(t)).mean(axis=1)
      ends.append((kernel, bias))
    shares = SIZES[cohort(r)]
    model = tuple(
      np.average(x, axis=0, weights=shares) for x in zip(*ends, strict=True)
    )
  return model, weights


def parts(params):
  linear = params["linear"]
  return tuple(
    np.asarray(jax.tree.leaves(linear[k])[0], np.float64)
    for k in ("kernel", "bias")
  )


def test_it_is_the_papers_recursion():
  sampler = sampling.Sampler(
    sample=lambda seed, r: np.array(cohort(r)), sizes=(3,), expected=3.0
  )
  simulator = make_simulator(
    MIXTURE,
    fedem(MIXTURE, sgd(ETA), sgd(1.0)),
    DATA,
    batching=WORK,
    sampler=sampler,
    lanes=2,
  )
  first = jax.device_get(simulator.init().server.variables)
  np.testing.assert_array_equal(first.buffers.weights, [0.5, 0.5])
  state = train(simulator, ROUNDS)
  model, weights = by_hand(parts(first.params), ROUNDS)
  for found, expected in zip(
    parts(state.server.variables.params), model, strict=True
  ):
    np.testing.assert_allclose(found, expected, atol=3e-6)
  own = state.clients[0][: len(SIZES)]
  np.testing.assert_allclose(own, weights, atol=2e-6)
  assert np.abs(weights - 0.5).max() > 0.05
  # Clients predict by their own weights.
  measured = simulator.evaluate.clients(state, "seen").per_client()
  for t in range(len(SIZES)):
    rows = all_rows(t)
    likely = weights[t] @ np.exp(-losses(model, rows))
    assert measured["loss"][t] == pytest.approx(
      -np.log(likely).mean(), rel=1e-4
    )


def test_a_mixtures_loss_and_outputs_are_those_of_the_mean_probability():
  variables = MIXTURE.init(jax.random.key(3))
  weights = jnp.array([0.3, 0.7])
  buffers = variables.buffers._replace(weights=weights)
  variables = variables._replace(buffers=buffers)
  rows = np.arange(6)
  examples = {"x": jnp.asarray(X[rows]), "y": jnp.asarray(LABELS[rows])}
  found = log_probabilities(parts(variables.params), rows)
  expected = np.log(np.einsum("m,mnc->nc", weights, np.exp(found)))
  assert MIXTURE.logits is not None
  outputs = MIXTURE.logits(variables, examples)
  np.testing.assert_allclose(outputs, expected, rtol=1e-5)
  loss = MIXTURE.loss(variables, examples, jax.random.key(0))
  np.testing.assert_allclose(
    loss.value, -expected[rows, LABELS[rows]], rtol=1e-5
  )
  assert loss.buffers.weights is weights


def test_what_is_no_mixture_is_named():
  with pytest.raises(ValueError, match=r"set model\.mixture=3"):
    fedem(TASK, sgd(ETA), sgd(1.0))
  with pytest.raises(ValueError, match="no logits"):
    with_mixture(TASK, 2)
  with pytest.raises(ValueError, match=r"model\.mixture=1"):
    with_mixture(MIXTURE, 1)
