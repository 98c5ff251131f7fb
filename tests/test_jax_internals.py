"""What is used of JAX without a public name is still there."""

import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import jax.distributed
import pytest
from flax import nnx

from fedjax_sim.distributed import jax_internals
from fedjax_sim.tasks import nnx as nnx_tasks

ALONE = """
import sys
import jax
from fedjax_sim.distributed.jax_internals import (
  is_timeout,
  key_value_client,
  may_be_loss,
)

jax.distributed.initialize(
  sys.argv[1], 1, 0, cluster_detection_method="deactivate"
)
client = key_value_client()
client.key_value_set("folder/0", "told")
assert client.blocking_key_value_get("folder/0", 1000) == "told"
assert client.key_value_dir_get("folder") == [("folder/0", "told")]
client.wait_at_barrier("barrier", 1000)
try:
  client.blocking_key_value_get("folder/1", 10)
except jax.errors.JaxRuntimeError as error:
  assert is_timeout(error), error
  assert may_be_loss(error), error
else:
  raise AssertionError("a key that nobody has set")
"""


@pytest.mark.integration
def test_the_key_value_client_is_where_it_was():
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{probe.getsockname()[1]}"
  ended = subprocess.run(
    [sys.executable, "-c", ALONE, address],
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    check=False,
  )
  assert ended.returncode == 0, (
    "JAX's key-value client, without a public name, is not what"
    f" fedjax_sim.distributed.jax_internals takes it for: {ended.stderr}"
  )


def test_without_other_processes_there_is_no_client():
  assert not jax.distributed.is_initialized()
  with pytest.raises(RuntimeError, match=r"call jax\.distributed\.initialize"):
    jax_internals.key_value_client()


def test_a_thread_gets_the_settings_of_another():
  found = lambda: {
    name: jax.config.values[f"jax_{name}"]
    for name in ("default_matmul_precision", "debug_nans", "enable_x64")
  }
  with ThreadPoolExecutor(1) as pool:
    usual = pool.submit(found).result()
    with (
      jax.default_matmul_precision("highest"),
      jax.debug_nans(True),
      jax.enable_x64(True),
    ):
      here, settings = found(), jax_internals.settings_of_thread()

    def alike():
      with settings():
        return found()

    assert pool.submit(alike).result() == here != usual, (
      "JAX keeps the settings of a thread elsewhere than"
      " fedjax_sim.distributed.jax_internals looks for them."
    )
    assert pool.submit(found).result() == usual


def test_a_batch_norm_has_the_promotion_that_its_signature_says():
  layer = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
  assert layer.promote_dtype is nnx_tasks.PROMOTE_DTYPE, (
    "flax keeps what promotes the arguments of BatchNorm elsewhere; tell"
    " fedjax_sim.tasks.nnx, or statistics lose their float32."
  )
