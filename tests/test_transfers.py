"""Nothing is sent to a device but what the loop asks for."""

import concurrent.futures
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim import aggregators, sampling, transforms
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.simulation import pipeline
from fedjax_sim.simulation.runtime import Runtime
from fedjax_sim.simulation.simulator import Simulator
from problems import MODELS, blobs, flat, params_of, sgd
from tiers import slow_but


def guarded(function):
  """The function, with implicit transfers forbidden in whatever thread."""

  @functools.wraps(function)
  def call(*args, **kwargs):
    with jax.transfer_guard("disallow"):
      return function(*args, **kwargs)

  return call


class GuardedPool(concurrent.futures.ThreadPoolExecutor):
  def submit(self, function, /, *args, **kwargs):
    return super().submit(guarded(function), *args, **kwargs)


def test_the_guard_sees_transfers_in_both_threads():
  add = jax.jit(lambda x: x + 1)
  with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
    guarded(add)(np.ones(3, np.float32))
  with GuardedPool(1) as pool:
    failure = pool.submit(add, np.ones(3, np.float32)).exception()
  assert "Disallowed host-to-device transfer" in str(failure)


QUICK = [
  ("weighted_mean", {}, 2, "device"),
  ("mean", {"deterministic_reduction": 3}, 2, "host"),
  ("mean", {"model_devices": 2}, 2, "host"),
]
CASES = [
  *QUICK,
  ("median", {}, 1, "device"),
  ("weighted_mean", {}, 1, "host"),
  ("median", {}, 2, "host"),
  ("mean", {"deterministic_reduction": 3}, 1, "device"),
  ("mean", {"model_devices": 2}, 2, "device"),
]


@pytest.mark.parametrize(
  ("aggregator", "fields", "devices", "residency"), slow_but(QUICK, CASES)
)
def test_training_and_planning_without_implicit_transfers(
  monkeypatch, devices, residency, aggregator, fields
):
  if devices > jax.device_count():
    pytest.skip(f"needs 2 devices, there is {jax.device_count()}")
  data = blobs([5, 9, 3, 12, 7, 7])
  task = MODELS["lr"](data)

  def simulator():
    return Simulator(
      task=task,
      algorithm=fedavg(task, sgd(0.3), sgd(1.0)),
      data=data,
      sampler=sampling.uniform(6, 4),
      aggregator=aggregators.AGGREGATORS[aggregator](),
      transforms=[transforms.clip(0.5), transforms.gaussian(0.01)],
      runtime=Runtime(
        devices=devices,
        lanes=1,
        residency=residency,
        rounds_per_dispatch=1,
        **fields,
      ),
    )

  def train(simulator, state):
    for out in simulator.run(state, 4):
      state = out.state
    return state

  free = simulator()
  expected = params_of(free, train(free, free.init()))

  strict = simulator()
  state = strict.init()
  strict.compiler.program(1, 4)  # compiling makes constants
  monkeypatch.setattr(pipeline, "ThreadPoolExecutor", GuardedPool)
  state = guarded(train)(strict, state)
  np.testing.assert_array_equal(flat(params_of(strict, state)), flat(expected))
  assert jnp.isfinite(flat(expected)).all()
