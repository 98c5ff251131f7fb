"""No client moves the sum by more than its bound, in the compiled round.

Updates of any finite size, from subnormal to the largest, are put through the
program that a run executes, and what it releases is compared with clipping in
double precision.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedjax_sim import aggregators
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.core import Aggregator, Algorithm
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.privacy.central import (
  CentralDPConfig,
  integers,
  with_central_dp,
)
from fedjax_sim.privacy.local import with_local_dp
from fedjax_sim.privacy.local.additive import gaussian, laplace
from fedjax_sim.privacy.secure import secure
from fedjax_sim.privacy.secure.distributed_gaussian import distributed_gaussian
from fedjax_sim.tasks import function_task
from problems import make_simulator, quadratic_data, sgd
from tiers import slow_but

CLIENTS, DIM = 4, 8  # of which 3 are the leaf `b`
CLIP = 2.0
COARSE = 2.0**11  # noise for which the clipping norm has 256 steps
NORMS: dict[str, dict[str, Any]] = {
  "l2": {},
  "l1": {"noise": "laplace"},
  "layers": {"per_layer": True},
  "l1 layers": {"noise": "laplace", "per_layer": True},
  "quantile": {"quantile": 0.5},
  "integers": {"noise": "discrete_gaussian", "most_clients": CLIENTS},
  "coarse integers": {
    "noise": "discrete_gaussian",
    "most_clients": CLIENTS,
    "noise_multiplier": COARSE,  # the same noise each time
  },
}
LOCAL = {  # their noise is the same whatever the updates
  "local l2": lambda: gaussian(CLIP, delta=0.1, stddev=1.0),
  "local l1": lambda: laplace(CLIP, epsilon=18.0),
}
ANY = st.floats(allow_nan=False, allow_infinity=False, width=32)
UPDATES = hnp.arrays(np.float32, (CLIENTS, DIM), elements=ANY)


def one(value, rows=1, width=1):
  """Clients of zeros, but for some whose first numbers are `value`."""
  x = np.zeros((CLIENTS, DIM), np.float32)
  x[:rows, :width] = value
  return x


class Recording(NamedTuple):
  """A server, and the last aggregate that it was given, in float32 at least."""

  server: Any
  seen: Any


def recorded(algorithm):
  """The algorithm, whose server stays as it is and keeps what it is given."""

  def init(key, hparams):
    server = algorithm.init(key, hparams)
    params = algorithm.variables(server).params
    wide = lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32))
    return Recording(server, jax.tree.map(wide, params))

  return algorithm._replace(
    init=init,
    broadcast=lambda state: algorithm.broadcast(state.server),
    apply=lambda state, aggregate, context: Recording(
      state.server,
      jax.tree.map(
        lambda x, like: x.astype(like.dtype), aggregate.update, state.seen
      ),
    ),
    variables=lambda state: algorithm.variables(state.server),
  )


def linear(dtype):
  """A task whose gradient at any parameters is minus the example."""

  def init(key):
    del key
    return {"a": jnp.zeros(DIM - 3, dtype), "b": jnp.zeros(3, dtype)}

  def loss(params, examples):
    w = jnp.concatenate([params["a"], params["b"]])
    return -jnp.sum(w[None] * examples["x"].astype(dtype), axis=-1)

  return function_task(init, loss)


@functools.cache
def released(norm, lanes, dtype):
  """A compiled round: (clients, DIM) updates -> their sum over the norm."""
  task = linear(dtype)
  inner = recorded(fedavg(task, sgd(1.0), sgd(1.0), weighting="uniform"))
  algorithm: Algorithm = inner
  aggregator: Aggregator | None = aggregators.sum_()
  if norm in NORMS:
    aggregator = None
    algorithm = with_central_dp(
      inner,
      CentralDPConfig(
        clip_norm=CLIP,
        denominator=1.0,
        **{"noise_multiplier": 0.0} | NORMS[norm],
      ),
    )
  elif norm in LOCAL:
    algorithm = with_local_dp(inner, LOCAL[norm]())
  else:
    code = distributed_gaussian(CLIENTS, clip=CLIP, noise_multiplier=1e-5)
    aggregator = secure(code, neighbors=2)
  data = quadratic_data(np.zeros((CLIENTS, DIM)))
  simulator = make_simulator(
    task,
    algorithm,
    data,
    batching=LocalBatching(batch_size=1),
    lanes=lanes,
    aggregator=aggregator,
  )
  planned = simulator.plan(0, 1)
  state = simulator.init()

  def call(updates):
    put = lambda path, x: (
      jax.device_put(updates.astype(x.dtype), x.sharding)
      if path[-1].key == "x"
      else x
    )
    examples = jax.tree_util.tree_map_with_path(put, planned.examples)
    after, _ = simulator.compiler.call(
      state,
      planned._replace(examples=examples),
      simulator.states.traced(),
    )
    recording = after.server if norm not in NORMS else after.server.server
    seen = recording.seen
    sums = np.concatenate([seen["a"], seen["b"]]).astype(np.float64) / CLIP
    if norm == "coarse integers":  # as they were, in units of the scale
      grid = integers.grid(CLIENTS, COARSE)
      sums = np.round(sums * grid.unit(DIM)) / grid.scale
    return sums

  return call


def clip(update, norm):
  """In double precision; numbers that devices flush to 0 are 0."""
  update = np.where(np.abs(update) < np.finfo(np.float32).tiny, 0, update)
  order = 1 if norm.startswith("l1") else 2
  if "layers" in norm:
    parts = [update[: DIM - 3], update[DIM - 3 :]]
    share = 2.0 ** (-1 / order)
  else:
    parts, share = [update], 1.0
  cut = []
  for part in parts:
    size = np.linalg.norm(part, order)
    cut.append(part / max(size, share * CLIP) * share)
  return np.concatenate(cut)


def check(norm, lanes, dtype, updates):
  order = 1 if "l1" in norm else 2
  as_trained = np.asarray(jnp.asarray(updates, dtype), np.float64)
  call = released(norm, lanes, dtype)
  whole = call(updates)
  assert np.isfinite(whole).all()
  if norm in NORMS and norm != "coarse integers":
    expected = sum(clip(x, norm) for x in as_trained)
    np.testing.assert_allclose(whole, expected, rtol=0, atol=CLIENTS * 2e-5)
  for i in range(CLIENTS):
    without = updates.copy()
    without[i] = 0
    moved = np.linalg.norm(whole - call(without), order)
    # Sums of the others' contributions round, too.
    assert moved <= 1 + (1e-6 if norm in NORMS else 1e-2)


QUICK = [
  ("l2", 4, "bfloat16"),
  ("layers", 2, "float64"),
  ("quantile", 2, "float32"),
  ("local l2", 2, "float32"),
  ("secure", 2, "float32"),
  ("coarse integers", 2, "float32"),
]
# Every norm once, and the plain one in other lanes and dtypes.
FEW = [
  *((norm, 2, "float32") for norm in [*NORMS, *LOCAL, "secure"]),
  ("l2", 1, "float32"),
  ("l2", 4, "bfloat16"),
  ("layers", 2, "float64"),
]
ALL = [
  (norm, lanes, dtype)
  for norm in [*NORMS, *LOCAL, "secure"]
  for lanes in (1, 2, 4)
  for dtype in ("float32", "bfloat16", "float64")
]
LARGEST = float(np.finfo(np.float32).max)
EXAMPLES = [
  one(3e38),
  one(1e38, rows=4, width=DIM),
  one(LARGEST, rows=2, width=DIM),
  one(-LARGEST, rows=3, width=5),
  one(2.0**-126, rows=4, width=DIM),
  one(2.0**-149, rows=4, width=DIM),
]


def check_drawn(norm, lanes, dtype, examples):
  """`check` of the updates above, and of so many that hypothesis draws."""
  if dtype == "bfloat16":  # the largest float32 would round to infinity
    narrow = lambda updates: np.clip(updates, -3.3e38, 3.3e38)
  else:
    narrow = lambda updates: updates

  @settings(max_examples=examples)
  @given(updates=UPDATES)
  def drawn(updates):
    check(norm, lanes, dtype, narrow(updates))

  with jax.enable_x64(dtype == "float64"):
    for updates in EXAMPLES:
      check(norm, lanes, dtype, narrow(updates))
    drawn()


@pytest.mark.parametrize(("norm", "lanes", "dtype"), slow_but(QUICK, FEW))
def test_no_update_moves_the_sum_beyond_its_bound(norm, lanes, dtype):
  check_drawn(norm, lanes, dtype, examples=10)


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "lanes", "dtype"), ALL)
def test_nor_in_any_lanes_and_dtypes(norm, lanes, dtype):
  check_drawn(norm, lanes, dtype, examples=200)
