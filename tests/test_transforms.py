"""Transforms: alone against numpy, and inside of real rounds."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedjax_sim import aggregators, sampling, transforms
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.config import default_config
from fedjax_sim.config.build import build
from fedjax_sim.core import validate
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.training.optimizers import optimizer
from problems import (
  flat,
  make_simulator,
  params_of,
  quadratic,
  quadratic_data,
  sgd,
)

KEY = jax.random.key(0)
ONE_STEP = LocalBatching(batch_size=1)


def mover(dim):
  """One step of rate 1: a client's update is its centre minus the params."""
  task = quadratic(dim)
  return task, fedavg(task, sgd(1.0), sgd(1.0), weighting="uniform")


class Cohorts:
  """A sampler whose cohort can be set from outside."""

  def __init__(self, most):
    self.ids = [0]
    self.sampler = sampling.Sampler(
      sample=lambda seed, round_: np.array(self.ids),
      sizes=(most,),
      expected=float(most),
    )


# --- clip ---------------------------------------------------------------------

apply_clip = jax.jit(transforms.clip(1.0).apply)


def clipped(update, norm):
  hparams = {"norm": jnp.float32(norm)}
  result = apply_clip(update, (), (), hparams, KEY)
  assert (result.state, result.aux, result.bytes) == ((), (), None)
  longer = float(result.metrics["clipped"])
  return jax.tree.map(np.asarray, result.update), longer


def norm_of(tree):
  return np.linalg.norm(flat(tree).astype(np.float64))


def floats(most):
  """Of any size up to `most`; no subnormals, which the devices flush to 0."""
  return st.floats(-most, most, width=32, allow_subnormal=False)


def updates(most):
  leaf = lambda shape: hnp.arrays(np.float32, shape, elements=floats(most))
  return st.fixed_dictionaries({"b": leaf((2,)), "w": leaf((2, 2))})


NORMS = st.floats(2.0**-10, 2.0**10, width=32)


@given(update=updates(2.0**127), norm=NORMS)
def test_a_clipped_update_never_exceeds_the_norm(update, norm):
  out, _ = clipped(update, norm)
  assert norm_of(out) <= norm * (1 + 1e-6)


LONG, SHORT = np.float32(6.6239444e11), np.float32(7.78644e-27)


@given(update=updates(2.0**40), norm=NORMS)
@example(
  update={
    "b": np.array([SHORT, SHORT]),
    "w": np.array([[LONG, 0], [0, 0]], np.float32),
  },
  norm=9.0,
)
def test_clip_is_the_projection_onto_the_ball(update, norm):
  out, longer = clipped(update, norm)
  length = norm_of(update)
  if length < norm * (1 - 1e-6):
    assert longer == 0
    np.testing.assert_array_equal(flat(out), flat(update))
  elif length > norm * (1 + 1e-6):
    assert longer == 1
    np.testing.assert_allclose(
      flat(out),
      flat(update).astype(np.float64) * (norm / length),
      rtol=1e-5,
      # Subnormal numbers are flushed, before and after the factor of the norm.
      atol=max(norm, 1) * 2.0**-125,
    )


def test_clip_in_a_round():
  centres = np.array([[3.0, 4.0], [0.3, -0.4], [-6.0, 8.0], [0.0, 0.0]])
  task, algorithm = mover(2)
  simulator = make_simulator(
    task,
    algorithm,
    quadratic_data(centres),
    batching=ONE_STEP,
    lanes=3,
    transforms=[transforms.clip(2.0)],
  )
  start = simulator.init()
  # The norm can be changed between rounds: one program serves both.
  for norm, share in ((2.0, 0.5), (0.1, 0.75)):
    hparams = {**simulator.hparams, "transforms": {"clip": {"norm": norm}}}
    out = simulator.dispatch(start, simulator.plan(0, 1), hparams)
    lengths = np.linalg.norm(centres, axis=1)
    scale = np.minimum(1, norm / np.maximum(lengths, 1e-9))
    np.testing.assert_allclose(
      params_of(simulator, out.state)["w"],
      (centres * scale[:, None]).mean(0),
      rtol=1e-5,
    )
    assert out.rows[0]["clip/clipped"] == share
  assert simulator.compilations == 1


# --- gaussian -----------------------------------------------------------------


def test_gaussian_moments():
  zeros = {"a": jnp.zeros(40_000), "b": jnp.zeros(40_000)}
  apply = jax.jit(transforms.gaussian(1.0).apply)
  stddev = 0.25
  hparams = {"stddev": jnp.float32(stddev)}
  out, *nothing = apply(zeros, (), (), hparams, KEY)
  assert nothing == [(), (), {}, None]
  a, b = (np.asarray(out[k], np.float64) for k in ("a", "b"))
  for leaf in (a, b):
    assert scipy.stats.kstest(leaf / stddev, "norm").pvalue > 0.01
    assert abs(leaf.mean()) < 4 * stddev / np.sqrt(len(leaf))
    assert abs(leaf.std() / stddev - 1) < 4 / np.sqrt(2 * len(leaf))
  assert abs(np.corrcoef(a, b)[0, 1]) < 4 / np.sqrt(len(a))
  silent = apply(out, (), (), {"stddev": jnp.float32(0)}, KEY)[0]
  np.testing.assert_array_equal(flat(silent), flat(out))


def test_noise_belongs_to_client_round_and_place_in_the_chain():
  dim, clients = 64, 3
  task, algorithm = mover(dim)
  noise = transforms.gaussian(1.0)
  cohorts = Cohorts(clients)

  def simulator_of(lanes, chain):
    return make_simulator(
      task,
      algorithm,
      quadratic_data(np.zeros((clients, dim))),
      batching=ONE_STEP,
      lanes=lanes,
      aggregator=aggregators.sum_(),
      transforms=chain,
      sampler=cohorts.sampler,
    )

  def noise_of(simulator, ids, round_=0):
    cohorts.ids = list(ids)
    state = simulator.init()._replace(round=jnp.int32(round_))
    out = simulator.dispatch(state, simulator.plan(round_, 1))
    return params_of(simulator, out.state)["w"]

  one = simulator_of(1, [noise])
  alone = [noise_of(one, [k]) for k in range(clients)]
  later = [noise_of(one, [k], 1) for k in range(clients)]
  everything = np.stack([*alone, *later])
  assert np.all(np.abs(everything.std(axis=1) - 1) < 0.4)
  different = np.corrcoef(everything) - np.eye(len(everything))
  assert np.abs(different).max() < 0.5

  # The same whoever else takes part, in however many lanes.
  for lanes in (1, 3):
    together = simulator_of(lanes, [noise]) if lanes > 1 else one
    np.testing.assert_allclose(
      noise_of(together, range(clients)), sum(alone), atol=1e-5
    )

  twice = simulator_of(1, [noise, noise._replace(name="again")])
  second = noise_of(twice, [0]) - alone[0]
  assert abs(second.std() - 1) < 0.4
  assert abs(np.corrcoef(second, alone[0])[0, 1]) < 0.5


# --- lift ---------------------------------------------------------------------


@pytest.mark.parametrize("lanes", [1, 2])
def test_a_lifted_state_advances_only_for_clients_that_took_part(lanes):
  decay = 0.5
  centres = np.array([[0.0, 1.0], [2.0, -1.0], [4.0, 3.0], [1e30, 0.0]])
  curvatures = [1, 1, 1, 1e30]  # the last client's update is not finite
  task, algorithm = mover(2)
  cohorts = Cohorts(3)
  lifted = transforms.lift("trace", optimizer(optax.trace, decay=decay))
  assert lifted.hparams == {"decay": decay}
  simulator = make_simulator(
    task,
    algorithm,
    quadratic_data(centres, curvatures),
    batching=ONE_STEP,
    lanes=lanes,
    transforms=[lifted],
    sampler=cohorts.sampler,
  )
  state = simulator.init()
  w, traces = np.zeros(2), np.zeros((4, 2))
  for round_, ids in enumerate([[0, 1], [2, 3], [0, 2, 3], [1], [0, 1, 2]]):
    cohorts.ids = ids
    state = simulator.dispatch(state, simulator.plan(round_, 1)).state
    took_part = [k for k in ids if k != 3]
    for k in took_part:
      traces[k] = centres[k] - w + decay * traces[k]
    w = w + traces[took_part].mean(0)
    _, (own,) = state.clients
    np.testing.assert_allclose(own.trace["w"][:4], traces, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
      params_of(simulator, state)["w"], w, rtol=1e-5, atol=1e-6
    )


# --- configs ------------------------------------------------------------------


def chain_of(order=None, **sections):
  config = default_config()
  for label, fields in sections.items():
    config.transforms[label] = fields
  config.transforms.order = order
  return build(config).simulator.transforms


def test_a_config_has_sections_in_an_order():
  sections = {"gaussian": {"stddev": 0.5}, "clip": {"norm": 2.0}}
  chain = chain_of(**sections, order=("gaussian", "clip"))
  assert [t.name for t in chain] == ["gaussian", "clip"]
  assert [t.hparams for t in chain] == [{"stddev": 0.5}, {"norm": 2.0}]
  assert [t.name for t in chain_of(**sections)] == ["clip", "gaussian"]
  again = chain_of(clip={"norm": 2.0}, again={"name": "clip", "norm": 1.0})
  assert [t.name for t in again] == ["again", "clip"]
  assert not chain_of(clip=None)
  with pytest.raises(ValueError, match=r"order=\('clip',\) is no order of"):
    chain_of(**sections, order=("clip",))


@pytest.mark.parametrize(
  ("sections", "error", "match"),
  [
    (
      {"clipp": {"norm": 1.0}},
      validate.UnknownNameError,
      r"transforms.clipp.name='clipp' .*mean 'clip'\? Known: .*clip, drive, ",
    ),
    (
      {"clip": {"nrm": 1.0}},
      validate.UnknownNameError,
      r"transforms.clip does not take .*nrm'.*mean 'transforms.clip.norm'",
    ),
    ({"clip": {}}, ValueError, "transforms.clip lacks .* 'transforms.clip.n"),
    ({"clip": {"norm": 0.0}}, ValueError, "^transforms.clip.norm=0.0 .*> 0"),
    ({"clip": {"norm": -1}}, ValueError, "^transforms.clip.norm=-1.0 .*> 0"),
    ({"clip": {"norm": float("nan")}}, ValueError, "transforms.clip.norm=nan"),
    ({"clip": {"norm": "1"}}, TypeError, "transforms.clip.norm='1' is a str"),
    (
      {"gaussian": {"stddev": -0.1}},
      ValueError,
      "transforms.gaussian.stddev=-0.1 .*>= 0",
    ),
    ({"gaussian": {"stddev": None}}, ValueError, "lacks .*gaussian.stddev"),
  ],
)
def test_sections_that_are_refused(sections, error, match):
  with pytest.raises(error, match=match):
    chain_of(**sections)
