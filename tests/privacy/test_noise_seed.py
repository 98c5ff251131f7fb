"""Private noise comes from a seed of its own, which no config need hold."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim import aggregators
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.core import Purpose, key_for, noise_key_for
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.privacy.central import CentralDPConfig, with_central_dp
from fedjax_sim.privacy.local import with_local_dp
from fedjax_sim.privacy.local.additive import gaussian
from fedjax_sim.privacy.secure import secure
from fedjax_sim.privacy.secure.distributed_gaussian import distributed_gaussian
from problems import (
  flat,
  make_simulator,
  params_of,
  quadratic,
  quadratic_data,
  sgd,
  train,
)

DIM = 100
KINDS = ["central", "local", "secure"]


def simulator_of(kind, clip_norm=1.0, seed=0):
  task = quadratic(DIM)
  algorithm = fedavg(task, sgd(1.0), sgd(1.0), weighting="uniform")
  aggregator = None
  if kind == "central":
    settings = CentralDPConfig(
      clip_norm=clip_norm, noise_multiplier=1.0, denominator=2.0
    )
    algorithm = with_central_dp(algorithm, settings)
  elif kind == "local":
    noise = gaussian(clip_norm, stddev=1.0, delta=1e-3)
    algorithm = with_local_dp(algorithm, noise)
  elif kind == "secure":
    code = distributed_gaussian(2, clip=clip_norm, noise_multiplier=1.0)
    aggregator = secure(code, neighbors=2)
  return make_simulator(
    task,
    algorithm,
    quadratic_data(np.zeros((2, DIM))),  # nobody moves
    batching=LocalBatching(batch_size=1),
    aggregator=aggregator or aggregators.weighted_mean(),
    seed=seed,
  )


def noise_of(simulator, rounds=1):
  return flat(params_of(simulator, train(simulator, rounds)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_noise_seed_alone_determines_the_noise(kind):
  simulator = simulator_of(kind)
  fixed = noise_of(simulator)
  again = dataclasses.replace(simulator, seed=5)
  if kind != "secure":  # whose clients round by chance, of the same bits
    np.testing.assert_array_equal(noise_of(again), fixed)
  other = noise_of(dataclasses.replace(simulator, noise_seed=1))
  assert abs(np.corrcoef(fixed, other)[0, 1]) < 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_two_runs_of_one_seed_do_not_subtract_to_the_exact_sum(kind):
  """By default the noise of every run is new, whatever the seed."""
  one, other = (
    dataclasses.replace(simulator_of(kind, clip_norm), noise_seed=None)
    for clip_norm in (1.0, 2.0)
  )
  first, second = noise_of(one), noise_of(other) / 2
  assert abs(np.corrcoef(first, second)[0, 1]) < 0.5
  once, twice = one.init().noise_seed, one.init().noise_seed
  assert once.shape == (2,)
  assert not np.array_equal(once, twice)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_goes_on_has_the_noise_that_it_began_with(kind):
  """The state keeps the seed, which is all that a checkpoint has."""
  simulator = dataclasses.replace(simulator_of(kind), noise_seed=None)
  start = simulator.init()
  whole = [out.state for out in simulator.run(start, 2)]
  kept = jax.device_get(simulator.states.to_host(whole[0]))
  later = dataclasses.replace(simulator)  # knows nothing of the first
  (out,) = later.run(later.states.to_devices(kept), 2)
  np.testing.assert_array_equal(
    flat(params_of(later, out.state)), flat(params_of(simulator, whole[1]))
  )


def test_without_private_noise_there_is_no_entropy():
  simulator = dataclasses.replace(simulator_of("none"), noise_seed=None)
  np.testing.assert_array_equal(simulator.init().noise_seed, [0, 0])
  assert simulator.states.noise_origin == ""


def test_no_fixed_seed_gives_the_keys_of_a_run():
  for seed in (0, 7):
    for purpose in Purpose:
      noise = noise_key_for(jnp.array([0, seed], jnp.uint32), purpose, 3)
      plain = key_for(seed, purpose, 3)
      same = jax.random.key_data(noise) == jax.random.key_data(plain)
      assert not same.all()


def test_what_is_told():
  simulator = simulator_of("central")
  assert simulator.states.noise_origin.startswith("simulation only: ")
  fresh = dataclasses.replace(simulator, noise_seed=None)
  assert fresh.states.noise_origin.startswith("from fresh entropy")
  with pytest.raises(ValueError, match="noise_seed=-1"):
    dataclasses.replace(simulator, noise_seed=-1)
