"""Samplers that observe what clients report, power-of-choice among them."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.core import Participation, Report, Sampler
from fedjax_sim.privacy.central import CentralDPConfig, with_central_dp
from fedjax_sim.privacy.local.additive import gaussian
from fedjax_sim.privacy.local.mechanism import with_local_dp
from fedjax_sim.run.checkpoint import Checkpoints
from fedjax_sim.run.checkpoint_reader import StateChangedError
from fedjax_sim.sampling import power_of_choice
from fedjax_sim.sampling.draws import generator
from problems import MODELS, blobs, flat, make_simulator, params_of, sgd

SIZES = [3, 9, 1, 14, 7, 5, 5, 12, 2, 8]
CLIENTS = len(SIZES)


def choosing(**changes):
  """A simulator of logistic regression with power-of-choice."""
  data = blobs(SIZES, seed=3)
  task = MODELS["lr"](data)
  arguments = {
    "sampler": power_of_choice(CLIENTS, 3, np.array(SIZES), candidates=6),
    "rounds_per_dispatch": 8,
    **changes,
  }
  algorithm = arguments.pop("algorithm", fedavg(task, sgd(0.3), sgd(1.0)))
  return make_simulator(task, algorithm, data, **arguments)


def run(simulator, rounds, state=None):
  """Run; the final state, every round's cohort, and every round's losses."""
  state = simulator.init() if state is None else state
  simulator = dataclasses.replace(simulator, log_clients=True)
  cohorts, losses = [], []
  for out in simulator.run(state, rounds):
    assert len(out.rows) == 1
    cohorts.append(out.client_log["client"])
    losses.append(out.client_log["loss"])
    state = out.state
  return state, cohorts, losses


def chosen(losses, sizes, size, candidates, seed, round_):
  """Whom power-of-choice takes, one candidate after the other, in Python."""
  times = generator(seed, round_).exponential(size=len(sizes)) / sizes
  drawn = sorted(range(len(sizes)), key=lambda k: times[k])[:candidates]
  best: list[int] = []
  for _ in range(size):
    left = [k for k in drawn if k not in best]
    best.append(max(left, key=lambda k: (losses[k], -left.index(k))))
  return sorted(best)


# --- power of choice ----------------------------------------------------------


def test_the_largest_last_known_losses_are_taken_round_after_round():
  _, cohorts, reported = run(choosing(), 12)
  losses = dict.fromkeys(range(CLIENTS), np.inf)
  for round_, (cohort, loss) in enumerate(zip(cohorts, reported, strict=True)):
    expected = chosen(losses, SIZES, 3, 6, 0, round_)
    assert cohort.tolist() == expected
    losses |= dict(zip(cohort.tolist(), loss.tolist(), strict=True))
  assert len({tuple(cohort) for cohort in cohorts}) > 3


def test_a_client_never_seen_comes_before_any_other():
  sampler = power_of_choice(6, 2, np.ones(6), candidates=6)
  assert sampler.init is not None
  assert sampler.observe is not None
  losses = sampler.init()
  seen: list[int] = []
  for round_ in range(3):
    ids = sampler.sample(0, round_, losses)
    seen.extend(ids)
    values = {"loss": np.full(2, 1e30, np.float32)}
    losses = sampler.observe(losses, round_, ids, np.ones(2, bool), values)
  assert sorted(seen) == list(range(6))


def test_candidates_are_drawn_by_size():
  sizes = np.array([1, 2, 3, 4])
  sampler = power_of_choice(4, 1, sizes, candidates=1)
  losses = np.zeros(4, np.float32)
  drawn = [int(sampler.sample(0, r, losses)[0]) for r in range(4000)]
  share = np.bincount(drawn, minlength=4) / len(drawn)
  np.testing.assert_allclose(share, sizes / sizes.sum(), atol=0.03)


def test_who_is_left_out_keeps_its_last_known_loss():
  observe = power_of_choice(4, 2, np.ones(4)).observe
  assert observe is not None
  before = np.array([1, 2, np.inf, 3], np.float32)
  values = {"loss": np.array([5, np.nan], np.float32)}
  present = np.array([True, False])
  after = observe(before, 0, np.array([0, 1]), present, values)
  np.testing.assert_array_equal(after, [5, 2, np.inf, 3])
  np.testing.assert_array_equal(before, [1, 2, np.inf, 3])


@pytest.mark.parametrize(
  ("candidates", "match"),
  [(1, "candidates=1 .* from 2 to 9"), (10, "candidates=10 .* from 2 to 9")],
)
def test_power_of_choice_refuses_candidates(candidates, match):
  with pytest.raises(ValueError, match=match):
    power_of_choice(9, 2, np.ones(9), candidates)


def test_lanes_and_devices_do_not_matter():
  _, one, _ = run(choosing(), 8)
  for lanes, devices in ((3, 1), (1, 2)):
    _, other, _ = run(choosing(lanes=lanes, devices=devices), 8)
    np.testing.assert_array_equal(one, other)


# --- the state ----------------------------------------------------------------


def test_a_run_that_was_stopped_goes_on_with_the_same_bits(tmp_path):
  whole, cohorts, _ = run(choosing(), 9)
  state, before, _ = run(choosing(), 4)
  saved = Checkpoints(tmp_path, keep=2)
  saved.save(4, choosing().states.to_host(state), {})
  again = choosing()
  restored = saved.restore(again.states.host_shapes, pytest.fail)
  assert restored is not None
  assert restored.state.sampler.dtype == np.float32
  state, after, _ = run(again, 9, again.states.to_devices(restored.state))
  np.testing.assert_array_equal([*before, *after], cohorts)
  assert flat(params_of(again, state)).tobytes() == (
    flat(params_of(again, whole)).tobytes()
  )
  assert state.sampler.tobytes() == whole.sampler.tobytes()
  with pytest.raises(StateChangedError, match="sampler"):
    saved.restore(choosing(sampler=None).states.host_shapes, pytest.fail)
  saved.close()


def counting(num_clients, **changes):
  """A sampler that takes everybody, and counts in 64 bits who took part."""

  def observe(state, round_, ids, present, values):
    count = state["count"].copy()
    count[ids] += present
    return {"count": count, "last": np.int64(round_)}

  sampler = Sampler(
    sample=lambda seed, round_, state: np.arange(num_clients),
    sizes=(num_clients,),
    expected=num_clients,
    init=lambda: {"count": np.zeros(num_clients), "last": np.int64(-1)},
    observe=observe,
  )
  return sampler._replace(**changes)


def test_the_state_stays_on_the_host_in_64_bits():
  simulator = choosing(sampler=counting(CLIENTS))
  state, _, _ = run(simulator, 3)
  np.testing.assert_array_equal(state.sampler["count"], np.full(CLIENTS, 3.0))
  assert state.sampler["count"].dtype == np.float64
  assert state.sampler["last"] == 2
  moved = simulator.states.to_devices(simulator.states.to_host(state))
  assert moved.sampler["count"].dtype == np.float64


def test_values_are_those_of_each_client_and_of_who_is_present():
  seen = []

  def observe(state, round_, ids, present, values):
    seen.append((ids, present, values))
    return state

  data = blobs(SIZES, seed=3)
  task = MODELS["lr"](data)
  base = fedavg(task, sgd(0.3), sgd(1.0))

  def finish(client, carry) -> Report:
    report = base.finish(client, carry)
    lost = client.id == 4
    update = jax.tree.map(
      lambda u: jax.numpy.where(lost, np.nan, u), report.update
    )
    values = {"twice": 2.0 * client.id}
    return report._replace(update=update, values=values)

  simulator = choosing(
    sampler=counting(CLIENTS, observe=observe),
    algorithm=base._replace(finish=finish),
    lanes=3,
  )
  state, _, losses = run(simulator, 1)
  ((ids, present, values),) = seen
  np.testing.assert_array_equal(ids, np.arange(CLIENTS))
  np.testing.assert_array_equal(present, ids != 4)
  doubled = np.where(present, 2.0 * ids, np.nan)
  np.testing.assert_array_equal(values["twice"], doubled)
  np.testing.assert_array_equal(values["loss"], losses[0])
  assert np.isnan(values["loss"][4])
  assert state.sampler["last"] == -1


# --- what is refused ----------------------------------------------------------


def test_a_metric_and_a_value_of_one_name_are_refused():
  data = blobs(SIZES)
  base = fedavg(MODELS["lr"](data), sgd(0.3), sgd(1.0))
  finish = lambda client, carry: base.finish(client, carry)._replace(
    values={"loss": 1.0 * client.id}
  )
  simulator = choosing(algorithm=base._replace(finish=finish))
  with pytest.raises(ValueError, match=r"both have \['loss'\].* rename"):
    simulator.trace()


@pytest.mark.parametrize(
  ("changes", "match"),
  [
    ({"observe": None}, "init and Sampler.observe belong together"),
    ({"init": None}, "init and Sampler.observe belong together"),
    ({"participation": Participation(1.0)}, "participation cannot hold"),
  ],
)
def test_halves_of_a_state_and_promises_are_refused(changes, match):
  with pytest.raises(ValueError, match=match):
    choosing(sampler=counting(CLIENTS, **changes))


def test_a_state_that_changes_its_shape_names_the_round():
  shrinks = counting(CLIENTS, observe=lambda *_: {"count": np.zeros(1)})
  with pytest.raises(ValueError, match=r"round 1: .*keep structure, shapes"):
    run(choosing(sampler=shrinks), 2)
  words = counting(CLIENTS, init=lambda: np.array(["no"]))
  with pytest.raises(TypeError, match=r"Sampler.init: .*array of numbers"):
    choosing(sampler=words).init()


def test_a_plan_needs_the_state():
  simulator = choosing()
  with pytest.raises(ValueError, match=r"plan\(first, most, state=state\)"):
    simulator.plan(0, 1)
  state = simulator.init()
  planned = simulator.plan(0, 5, state=state)
  assert planned.num_rounds == 1
  assert simulator.dispatch(state, planned).rows[0]["clients"] == 3


def test_an_algorithm_without_a_loss_is_refused_by_name():
  data = blobs(SIZES)
  base = fedavg(MODELS["lr"](data), sgd(0.3), sgd(1.0))
  finish = lambda client, carry: base.finish(client, carry)._replace(metrics={})
  simulator = choosing(algorithm=base._replace(finish=finish))
  with pytest.raises(ValueError, match="power_of_choice needs the metric"):
    next(simulator.run(simulator.init(), 1))


def test_private_runs_refuse_to_observe():
  task = MODELS["lr"](blobs(SIZES))
  base = fedavg(task, sgd(0.3), sgd(1.0), weighting="uniform")
  noise = CentralDPConfig(clip_norm=1.0, noise_multiplier=1.0, denominator=3.0)
  local = with_local_dp(base, gaussian(1.0, epsilon=1.0, delta=1e-5))
  for private in (with_central_dp(base, noise), local):
    with pytest.raises(ValueError, match="no epsilon covers"):
      choosing(algorithm=private)
