"""Sums over devices, against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from fedjax_sim import distributed
from fedjax_sim.distributed import AXIS, make_mesh, packed_psum, reductions


@pytest.mark.parametrize("most", [0, 5, 10**6])
def test_packed_psum(monkeypatch, most):
  monkeypatch.setattr(reductions, "MOST_PACKED", most)
  rng = np.random.default_rng(0)
  tree = {
    "kernel": rng.normal(size=(2, 3, 4)).astype(np.float32),
    "half": rng.normal(size=(2, 5)).astype(np.float16),
    "scalar": rng.normal(size=(2,)).astype(np.float32),
    "bias": rng.normal(size=(2, 4)).astype(np.float32),
    "counts": rng.integers(0, 9, (2, 2)).astype(np.int32),
    "nothing": (),
    "empty": np.zeros((2, 0), np.float32),
  }
  summed = jax.jit(
    jax.shard_map(
      lambda tree: packed_psum(jax.tree.map(lambda x: x[0], tree)),
      mesh=make_mesh(2),
      in_specs=P(AXIS),
      out_specs=P(),
      check_vma=False,
    )
  )
  out = summed(tree)
  expected = jax.tree.map(lambda x: x.sum(0, dtype=x.dtype), tree)
  jax.tree.map(np.testing.assert_array_equal, out, expected)
  for name, x in expected.items():
    if name != "nothing":
      assert out[name].dtype == x.dtype
  text = str(jax.make_jaxpr(summed)(jax.tree.map(jnp.asarray, tree)))
  # One for each of three dtypes, or one for each of six arrays.
  assert text.count("psum") == {0: 6, 5: 4, 10**6: 3}[most]


def test_setup_after_the_first_operation_says_what_to_do():
  found = jax.local_device_count("cpu")
  text = rf"make {found + 7} CPU devices.*made {found} at.*restart the kernel"
  with pytest.raises(RuntimeError, match=text):
    distributed.setup(found + 7)
  assert jax.local_device_count("cpu") == found
