"""`Task.features`: what models make of an example before their last layer."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen

from fedjax_sim.models.logistic_regression import logistic_regression
from fedjax_sim.models.mlp import mlp
from fedjax_sim.models.transformer.bert import bert
from fedjax_sim.models.transformer.embeddings import mean_of_tokens
from fedjax_sim.models.transformer.gpt2 import gpt2
from fedjax_sim.tasks import linen_task
from fedjax_sim.tasks.freezing import with_frozen
from fedjax_sim.tasks.lora import with_lora
from fedjax_sim.tasks.precision import with_compute_dtype, with_remat

X = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
EXAMPLES = {"x": jnp.asarray(X)}


def read(task, examples):
  variables = task.init(jax.random.key(0))
  return variables, jax.jit(task.features)(variables, examples)


def test_of_an_mlp_they_are_the_last_layers_input():
  task = mlp((6,), 3, (4,))
  variables, found = read(task, EXAMPLES)
  first = variables.params["layers"][0]
  hidden = X @ np.asarray(first["kernel"][...]) + np.asarray(first["bias"][...])
  np.testing.assert_allclose(found, np.maximum(hidden, 0), rtol=1e-5)
  assert logistic_regression((6,), 3).features is None  # it has one layer

  for changed in (
    with_frozen(task, ("layers/0/kernel",)),
    with_remat(task),
    with_lora(task, ("layers/0/kernel",), 2),  # which begins as the model
  ):
    _, same = read(changed, EXAMPLES)
    np.testing.assert_allclose(same, found, rtol=1e-5)
  _, half = read(with_compute_dtype(task, jnp.bfloat16), EXAMPLES)
  assert half.dtype == jnp.float32
  np.testing.assert_allclose(half, found, atol=0.05)


def test_a_linen_modules_method_takes_the_same_arguments():
  class Network(linen.Module):
    def setup(self):
      self.hidden, self.last = linen.Dense(4), linen.Dense(3)
      self.dropout = linen.Dropout(0.5)

    def features(self, x, train):
      return self.dropout(self.hidden(x), deterministic=not train)

    def __call__(self, x, train):
      return self.last(self.features(x, train))

  class Wide(linen.Module):
    features: int = 4  # no method

    @linen.compact
    def __call__(self, x):
      return linen.Dense(self.features)(x)

  task = linen_task(Network(), EXAMPLES["x"], train_argument="train")
  variables, found = read(task, EXAMPLES)
  hidden = variables.params["hidden"]
  np.testing.assert_allclose(
    found,
    X @ np.asarray(hidden["kernel"]) + np.asarray(hidden["bias"]),
    rtol=1e-5,
    atol=1e-6,
  )
  assert linen_task(Wide(), EXAMPLES["x"]).features is None


def test_of_a_transformer_padding_does_not_count():
  x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
  real = np.array([[True, True, False], [False, False, False]])
  found = mean_of_tokens(jnp.asarray(x), jnp.asarray(real))
  np.testing.assert_allclose(found, [x[0, :2].mean(0), np.zeros(4)], rtol=1e-6)

  ids = {"x": jax.ShapeDtypeStruct((2, 5), np.int32)}
  for task in (
    bert((5,), 6, width=8, layers=1),
    gpt2(
      (5,),
      6,
      objective="classification",
      vocabulary=6,
      width=8,
      layers=1,
    ),
  ):
    assert task.features is not None
    variables = jax.eval_shape(task.init, jax.random.key(0))
    shape = jax.eval_shape(task.features, variables, ids).shape
    assert shape == (2, 8)
