"""Which rounds are too small to be divided among cores, and their bits."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fedjax_sim import distributed
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.distributed import cpu
from fedjax_sim.engine import program, small_programs
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.engine.small_programs import is_small
from fedjax_sim.models.logistic_regression import logistic_regression
from problems import blobs, make_simulator, sgd

NUMBERS = 2**14  # 64 KiB


def rounds(client, once=8):
  """The jaxpr of a loop over rounds around one over clients."""

  def clients(i, x):
    return lax.fori_loop(0, 3 + i, lambda j, x: client(x), x)

  def run(x):
    y = lax.fori_loop(0, 2 + x.astype(int)[0], clients, x)
    return lax.fori_loop(0, 2, lambda i, z: z + y[0], jnp.zeros(once))

  return jax.make_jaxpr(run)(jnp.ones(4))


def computing(numbers):
  return lambda x: x + jnp.sum(jnp.sin(jnp.arange(numbers) * x[0]))


@pytest.mark.parametrize(
  ("client", "once", "small"),
  [
    (computing(10), 8, True),
    (computing(NUMBERS), 8, True),
    (computing(NUMBERS + 1), 8, False),
    (jax.jit(computing(NUMBERS + 1)), 8, False),
    (
      lambda x: lax.cond(x[0] > 0, computing(NUMBERS + 1), jnp.sin, x),
      8,
      False,
    ),
    (computing(10), NUMBERS + 1, True),
    (computing(10), 16 * NUMBERS + 1, False),
  ],
)
def test_what_clients_compute_decides(client, once, small):
  assert is_small(rounds(client, once)) is small


def test_keys_count_for_nothing():
  def client(x):
    keys = jax.random.split(jax.random.key(0), 2 * NUMBERS // 8)
    return x + jax.random.uniform(keys[0])

  # Their numbers, when they are read, are 8 bytes each.
  assert is_small(rounds(client))


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("devices", [1, 2])
def test_only_one_device_has_operations_to_divide(devices, deterministic):
  mesh = distributed.make_mesh(devices)
  options = program.compiler_options(mesh, deterministic, small=True)
  taken = small_programs.COMPILER_OPTIONS.items() <= options.items()
  assert taken is (devices == 1 and not deterministic)
  assert "cpu-parallel-task-assigner" not in str(
    program.compiler_options(mesh, deterministic, small=False)
  )


@pytest.mark.parametrize(
  ("small", "deterministic", "own"),
  [(True, False, "cpu-parallel-task-assigner"), (False, True, "algsimp")],
)
def test_passes_that_the_environment_leaves_out_stay_out(
  monkeypatch, small, deterministic, own
):
  monkeypatch.setenv("XLA_FLAGS", "--a=b --xla_disable_hlo_passes=cse,dce --c")
  mesh = distributed.make_mesh(1)
  options = program.compiler_options(mesh, deterministic, small)
  assert options["xla_disable_hlo_passes"] == f"cse,dce,{own}"
  neither = program.compiler_options(mesh, False, False)
  assert "xla_disable_hlo_passes" not in neither


@pytest.mark.usefixtures("exact", "optimized")
@pytest.mark.skipif(cpu.count() < 2, reason="XLA divides nothing on one core")
def test_bits_are_the_same(monkeypatch):
  def trained():
    task = logistic_regression((784,), 10)
    data = blobs([300, 500, 200], 784, 10)
    algorithm = fedavg(task, sgd(0.1), sgd(1.0))
    batching = LocalBatching(batch_size=16)
    simulator = make_simulator(task, algorithm, data, batching=batching)
    out = simulator.dispatch(simulator.init(), simulator.plan(0, 1))
    (compiled,) = simulator.compiler.compiled.values()
    text = compiled.compiled.as_text()
    divided = re.search(r'"outer_dimension_partitions":\["', text)
    model = simulator.algorithm.variables(out.state.server)
    return bool(divided), jax.tree.map(np.asarray, model.params)

  alone = trained()
  monkeypatch.setattr(small_programs, "is_small", lambda program: False)
  shared = trained()
  assert not alone[0]
  assert shared[0]
  jax.tree.map(np.testing.assert_array_equal, alone[1], shared[1])
