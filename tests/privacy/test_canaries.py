"""Canaries: what they send, how they are scored, and which clips they catch."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim import sampling
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.core import Aggregate, Context, Members, PrivacySpec
from fedjax_sim.core import tree as trees
from fedjax_sim.privacy.accounting import Ledger
from fedjax_sim.privacy.central import (
  CentralDPConfig,
  Contribution,
  contribution,
  with_central_dp,
  worst_case,
)
from fedjax_sim.privacy.central.audit import audit
from fedjax_sim.privacy.central.canaries import KINDS, AuditState, Canaries
from fedjax_sim.tasks import function_task
from problems import sgd

SIZES = {"a": (12, 40), "b": (516,), "c": (4,)}
LIKE = {name: jnp.zeros(shape) for name, shape in SIZES.items()}
DELTA = 1e-5
SIGMAS = {1.0: 3.7306, 8.0: 0.60023}  # Balle and Wang 2018, one round
EVERY_ROUND = sampling.Participation(1.0, 1, True)
LARGEST = float(np.finfo(np.float32).max)


# --- clips --------------------------------------------------------------------


def scaled(tree, length, bound):
  scale = (1 - trees.MARGIN) / jnp.maximum(length, bound)
  return jax.tree.map(lambda x: (x * scale).astype(jnp.float32), tree)


def no_clip(tree, bound, order=2):
  return scaled(tree, jnp.zeros(()), bound)


def flushed_clip(tree, bound, order=2):
  """Long updates have no length, as where the inverse is flushed to zero."""
  length = trees.tree_norm(tree, order)
  return scaled(tree, jnp.where(length >= 2.0**126, 0, length), bound)


def layers_to_the_whole_bound(tree, bound, order=2):
  return {
    name: trees.clip_to_unit_norm(x, bound, order) for name, x in tree.items()
  }


def clip_without_layer(tree, bound, order=2):
  return scaled(tree, trees.tree_norm([tree["a"], tree["b"]], order), bound)


def centred_clip(tree, bound, order=2):
  """The standard deviation instead of the root of the mean square."""
  flat = jnp.concatenate([x.ravel() for x in jax.tree.leaves(tree)])
  return scaled(tree, trees.tree_norm(flat - flat.mean(), order), bound)


BROKEN = {
  "none": no_clip,
  "flushed": flushed_clip,
  "whole bound by layer": layers_to_the_whole_bound,
  "without a layer": clip_without_layer,
  "centred": centred_clip,
}


# --- a private round, without its clients' training ---------------------------


def private_algorithm(canaries, participation=EVERY_ROUND, **settings):
  task = function_task(
    lambda key: LIKE,
    lambda params, batch: jnp.zeros(len(batch["x"])) * params["c"][0],
  )
  defaults = {"clip_norm": 2.0, "noise_multiplier": 1.0, "denominator": 4.0}
  return with_central_dp(
    fedavg(task, sgd(1.0), sgd(1.0), weighting="uniform"),
    CentralDPConfig(
      canaries=Canaries(canaries, participation), **(defaults | settings)
    ),
  )


def program(algorithm, rounds=1):
  """(noise multiplier, seed, sum of clients) -> evidence, compiled."""

  def run(multiplier, seed, clients):
    hparams = jax.tree.map(jnp.float32, algorithm.hparams)
    hparams["privacy"]["noise_multiplier"] = multiplier
    key = jax.random.key(seed)
    nobody = Members(
      id=jnp.zeros(1, jnp.int32),
      present=jnp.zeros(1, bool),
      weight=jnp.zeros(1),
      values={},
    )
    aggregate = Aggregate(
      update=Contribution(clients, (), (), ()),
      buffers=(),
      statistics=(),
      weight=jnp.float32(0),
      clients=jnp.int32(0),
      members=nobody,
    )

    def one(round_, state):
      own = jax.random.fold_in(key, round_)
      context = Context(hparams, round_, own, own, 4)
      return algorithm.apply(state, aggregate, context)

    state = algorithm.init(key, hparams)
    return algorithm.privacy.audited(jax.lax.fori_loop(0, rounds, one, state))

  return jax.jit(run)


def judged(evidence, epsilon, rounds=1):
  ledger = Ledger(PrivacySpec("gaussian", SIGMAS[epsilon]), EVERY_ROUND, DELTA)
  return audit(jax.device_get(evidence), ledger, rounds, resamples=0)


# --- what is caught -----------------------------------------------------------


def test_honest_rounds_pass_and_noise_too_small_by_four_is_caught():
  run = program(private_algorithm(500))
  for epsilon, sigma in SIGMAS.items():
    for seed in range(3):
      honest = judged(run(sigma, seed, LIKE), epsilon)
      assert not honest.accused
      assert honest.longest <= 1
      assert abs(honest.claimed - epsilon) < 0.01
      quiet = judged(run(sigma / 4, seed, LIKE), epsilon)
      assert quiet.accused
      assert quiet.noise > 2 * epsilon


@pytest.mark.parametrize(
  "name",
  [
    "flushed",
    "whole bound by layer",
    *(
      pytest.param(name, marks=pytest.mark.slow)
      for name in ("none", "without a layer", "centred")
    ),
  ],
)
def test_a_broken_clip_is_caught(monkeypatch, name):
  per_layer = name == "whole bound by layer"
  where = "clipped_by_layer" if per_layer else "clip_to_unit_norm"
  monkeypatch.setattr(contribution, where, BROKEN[name])
  run = program(private_algorithm(40, per_layer=per_layer))
  for epsilon, sigma in SIGMAS.items():
    found = judged(run(sigma, 0, LIKE), epsilon)
    assert found.accused
    assert "long, where 1 is the most" in found.describe()
    if per_layer:
      assert abs(found.longest - np.sqrt(3)) < 1e-3
    else:
      assert found.longest > 10
    # What is released alone gives away what is too long by far.
    assert per_layer or found.noise > epsilon


@pytest.mark.parametrize("clip", [no_clip, flushed_clip])
def test_canaries_as_long_as_the_norm_see_none_of_it(clip):
  directions = jnp.ones(100) / 10
  assert worst_case.measured(clip(3.0 * directions, 3.0), 2) <= 1


def by_hand(clip, direction, length):
  return float(worst_case.measured(clip(worst_case.raw(direction, length)), 2))


def test_the_gradient_finds_what_random_directions_do_not(monkeypatch):
  rng = np.random.default_rng(0)
  blind = jax.tree.map(lambda x: rng.normal(size=x.shape), LIKE)
  blind = jax.tree.map(jnp.float32, worst_case.unit(blind))
  dot = lambda x, y: sum(
    jnp.vdot(x[k], y[k], precision="highest") for k in LIKE
  )

  def clip(tree):
    """Does not count what is along one direction."""
    along = dot(tree, blind)
    rest = jax.tree.map(lambda x, d: x - along * d, tree, blind)
    return scaled(tree, trees.tree_norm(rest), 1.0)

  def seek() -> worst_case.Worst:
    one = jnp.float32(1)
    seek = jax.jit(lambda key: worst_case.worst(key, LIKE, clip, one))
    return seek(jax.random.key(0))

  for i in range(20):  # random ones of any length pass
    signs = jax.tree.map(lambda x: rng.choice([-1.0, 1.0], x.shape), LIKE)
    for length in (1.0, 1e3, 1e30):
      assert by_hand(clip, worst_case.unit(signs), length) < 1.02, i
  found = seek()
  assert found.contributes > 10
  assert float(jnp.abs(dot(found.direction, blind))) > 0.99
  monkeypatch.setattr(worst_case, "STEPS", 0)
  assert seek().contributes < 1.02


def test_of_a_right_clip_no_worse_case_is_found():
  found = jax.jit(
    lambda key: worst_case.worst(
      key,
      LIKE,
      functools.partial(trees.clip_to_unit_norm, bound=0.5),
      jnp.float32(0.5),
    )
  )(jax.random.key(0))
  assert 1 - 2 * trees.MARGIN < found.contributes <= 1


# --- what canaries are --------------------------------------------------------


def flat(tree):
  return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def keyed(size, participation=EVERY_ROUND):
  """Canaries and the part of their state that all but the worst case reads."""
  key = jax.random.key_data(jax.random.key(0))
  nothing: Any = ()
  state = AuditState(key, nothing, nothing, nothing, nothing)
  return Canaries(size, participation), state


def test_raw_updates_of_every_kind():
  canaries, state = keyed(30)
  everyone = canaries._directions(state, LIKE)
  seen = np.zeros(1000)
  for i in range(8):
    update = canaries._update(jnp.int32(i), everyone, jnp.float32(2))
    x = flat(update).astype(np.float64)
    kind = KINDS[i % 4]
    if kind == "spike":
      assert (x == 0).sum() == 0
      assert (np.abs(x) < np.finfo(np.float32).tiny).sum() == 999
      x = np.where(np.abs(x) > 1, x, 0)
      assert np.abs(x).max() == LARGEST
    elif kind == "huge":
      assert set(np.abs(x)) == {0, LARGEST}
    else:
      long = 2.0 if kind == "exact" else 2e4
      np.testing.assert_allclose(np.linalg.norm(x), long, rtol=2e-4)
    assert (x != 0).sum() == (1 if kind == "spike" else 34 if i < 10 else 33)
    seen += x != 0
  assert seen.max() == 1  # no two share a coordinate


def test_a_canary_scores_its_contribution_whatever_else_is_sent():
  part = sampling.Participation(0.5, 2, True)
  rounds, size = 6, 30
  algorithm = private_algorithm(size, part)
  rng = np.random.default_rng(0)
  clients = jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), LIKE
  )
  found = jax.device_get(program(algorithm, rounds)(0.0, 5, clients))
  taken = found.present.number
  assert (taken + found.absent.number == rounds).all()
  assert (taken[:-1][~found.included] == 0).all()
  assert 0 < taken[:-1].sum() <= found.included.sum() * rounds / 2
  scores = found.present.total / np.maximum(taken, 1)
  some = taken > 0
  np.testing.assert_allclose(scores[some], 1, atol=2e-4)
  np.testing.assert_allclose(found.present.squares[some], taken[some], 1e-3)
  np.testing.assert_allclose(found.absent.total, 0, atol=1e-4)


@pytest.mark.parametrize(
  ("values", "order", "expected"),
  [
    ([3.0, 4.0], 2, 5.0),
    ([3.0, -4.0], 1, 7.0),
    ([1e38, 1.0], 2, np.float32(1e38)),
    ([np.nan, 1.0], 2, np.inf),
    ([np.inf, 1.0], 1, np.inf),
    ([1e-40, 0.0], 2, 0.0),
  ],
)
def test_lengths_as_they_are(values, order, expected):
  tree = {"a": jnp.asarray(values, jnp.float32), "b": jnp.zeros(0)}
  found = jax.jit(worst_case.measured, static_argnums=1)(tree, order)
  np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-30)


def test_units_of_any_length():
  for size in (1e-37, 1e-20, 1.0, 1e20, 3e38):
    tree = {"a": jnp.float32([size, 0]), "b": jnp.float32(-size)}
    found = flat(jax.jit(worst_case.unit)(tree))
    np.testing.assert_allclose(found, [0.5**0.5, 0, -(0.5**0.5)], rtol=1e-6)
  assert not flat(jax.jit(worst_case.unit)({"a": jnp.zeros(3)})).any()


def test_more_canaries_than_parameters():
  with pytest.raises(ValueError, match=r"privacy.canaries=1001.*1000; plant"):
    Canaries(1001, EVERY_ROUND).init(
      jax.random.key(0), LIKE, lambda update: update, jnp.float32(1)
    )


def test_canaries_take_part_as_the_sampler_lets_clients():
  canaries, state = keyed(1000, sampling.Participation(0.3, 4, True))
  included = np.asarray(canaries.included(state))
  present = np.stack([canaries.present(state, jnp.int32(r)) for r in range(16)])
  present, worst = present[:, :-1], present[:, -1]
  assert abs(included.mean() - 0.5) < 0.07
  assert not present[:, ~included].any()
  # Once in four rounds at most, and then with the probability.
  assert (present[:4].sum(0) <= 1).all()
  taken = present[:, included].sum()
  assert abs(taken / (4 * included.sum()) - 0.3) < 0.05
  assert not worst[np.arange(16) % 4 != 0].any()  # its turn is the 1000th's
