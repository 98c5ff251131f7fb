"""Virtual devices: how real ones share them, and what they compute."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedjax_sim.engine import virtual_devices


@given(st.integers(1, 16), st.integers(1, 100))
def test_every_device_stands_for_as_many(devices, virtual):
  split = virtual_devices.split_devices(devices, virtual)
  assert split.devices == virtual
  assert split.devices + split.idle == devices * split.each
  assert 0 <= split.idle < devices


def test_without_virtual_ones_devices_are_themselves():
  assert virtual_devices.split_devices(3, None) == (3, 0, 1)


def test_this_process_holds_the_parts_of_its_devices():
  mesh = jax.make_mesh((jax.device_count(),), ("clients",))
  parts = virtual_devices.own_parts(mesh, 3)
  assert parts == list(range(3 * jax.device_count()))


@pytest.mark.parametrize("parts", [1, 4])
def test_parts_are_done_one_by_one(parts):
  rows = np.arange(8.0, dtype=np.float32).reshape(4, 2)
  found = virtual_devices.over_parts(
    lambda i: {"sum": jnp.asarray(rows)[i].sum()}, parts
  )
  np.testing.assert_array_equal(found["sum"], rows[:parts].sum(1))


@pytest.mark.parametrize("virtual", [None, 2])
def test_isolation_changes_no_value(virtual):
  x = np.linspace(1, 2, 5, dtype=np.float32)
  isolated = jax.jit(
    lambda x, round_: virtual_devices.isolate_compilation(
      virtual, round_, lambda: (x / 3, jnp.int32(7))
    )
  )
  third, whole = isolated(x, 0)
  np.testing.assert_allclose(third, x / 3, rtol=1e-6)
  assert whole == 7


@pytest.mark.parametrize(
  ("lanes", "model_devices", "told"),
  [("auto", None, "lanes='auto' is measured anew"), (1, 2, "model_devices")],
)
def test_what_gives_other_bits_is_refused(lanes, model_devices, told):
  with pytest.raises(ValueError, match=told):
    virtual_devices.check(4, lanes, model_devices)
  virtual_devices.check(None, lanes, model_devices)
