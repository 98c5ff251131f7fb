"""Batches of the server's own examples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim.engine.client_loop import random_batch

EXAMPLES = {"x": jnp.arange(12.0).reshape(6, 2), "y": jnp.arange(6)}


@pytest.mark.parametrize("size", [1, 4, 5])
def test_a_random_batch_is_without_replacement(size):
  seen = set()
  for seed in range(60):
    batch = random_batch(EXAMPLES, size, jax.random.key(seed))
    rows = np.asarray(batch.examples["y"])
    assert len(set(rows.tolist())) == size == len(batch.mask)
    assert batch.mask.all()
    np.testing.assert_array_equal(batch.examples["x"], EXAMPLES["x"][rows])
    seen |= set(rows.tolist())
  assert seen == set(range(6))


@pytest.mark.parametrize("size", [6, 7])
def test_a_batch_of_all_is_all_in_order(size):
  batch = random_batch(EXAMPLES, size, jax.random.key(0))
  np.testing.assert_array_equal(batch.examples["y"], np.arange(6))
  assert batch.mask.tolist() == [True] * 6
