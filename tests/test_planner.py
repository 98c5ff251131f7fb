"""Planning and the pipeline, without a simulator."""

from __future__ import annotations

import dataclasses
import math
import threading
import types
from typing import Any

import numpy as np
import pytest

from fedjax_sim.core import Participation, Sampler
from fedjax_sim.simulation import pipeline
from fedjax_sim.simulation.planner import Cohorts, rounds_per_dispatch
from fedjax_sim.simulation.timing import Phases


@pytest.mark.parametrize(
  ("fixed", "seconds", "done", "stops", "rounds"),
  [
    (None, math.inf, 0, (), 1),  # no round was timed yet
    (None, 2.0, 0, (), 1),
    (None, 0.1, 0, (), 10),
    (None, 1e-6, 90, (), 10),  # the run ends
    (3, 1e-6, 0, (), 3),
    (None, 0.01, 5, (8, 20), 3),
    (None, 0.01, 16, (8, 20), 4),
  ],
)
def test_rounds_of_the_next_dispatch(fixed, seconds, done, stops, rounds):
  assert rounds_per_dispatch(fixed, seconds, done, 100, stops) == rounds


def test_the_smallest_size_that_holds_a_cohort():
  sampler = Sampler(lambda seed, done: np.arange(2), sizes=(2, 5), expected=2)
  cohorts = Cohorts(sampler=sampler, seed=0, num_clients=9)
  assert [cohorts.size(np.arange(n)) for n in (0, 2, 3, 5)] == [2, 2, 5, 5]
  with pytest.raises(ValueError, match="6 clients were drawn"):
    cohorts.size(np.arange(6))


def test_a_draw_that_is_no_cohort_names_its_round():
  sampler = Sampler(lambda seed, done: np.array([9]), sizes=(2,), expected=1)
  with pytest.raises(ValueError, match=r"sampler\.name: round 5: "):
    Cohorts(sampler=sampler, seed=0, num_clients=9).draw(4)


def test_draws_are_held_against_a_promise_where_an_epsilon_counts_on_it():
  """Everybody takes part in every round, where it should be in each third."""
  everybody = Sampler(
    lambda seed, done: np.arange(9),
    sizes=(9,),
    expected=9,
    participation=Participation(1.0, 3),
  )
  cohorts = Cohorts(sampler=everybody, seed=0, num_clients=9)
  with pytest.raises(ValueError, match="takes part in rounds 1 and 2"):
    cohorts.check(0, [np.arange(9), np.arange(9)])
  unheld = dataclasses.replace(cohorts, held=False)
  unheld.check(0, [np.arange(9), np.arange(9)])


class _Devices:
  """Stands for devices: a state is a number of rounds, and perhaps more."""

  def __init__(self, fails: int | None = None):
    self.fails = fails
    self.planned: list[tuple[int, int]] = []
    self.states: list[float] = []
    self.threads: set[int] = set()

  def plan(self, state: Any, first: int, most: int) -> Any:
    self.planned.append((first, most))
    self.states.append(state)
    self.threads.add(threading.get_ident())
    return types.SimpleNamespace(num_rounds=most)

  def dispatch(self, state: Any, planned: Any) -> Any:
    after = state + planned.num_rounds
    failed = self.fails is not None and after >= self.fails
    return types.SimpleNamespace(
      state=after,
      seconds=0.5 * planned.num_rounds,
      failure=ArithmeticError("diverged") if failed else None,
    )

  def run(self, last: int, ahead: bool = True) -> Any:
    return pipeline.run(
      0.0,  # type: ignore[arg-type]
      0,
      last,
      count=lambda done, seconds: min(
        1 if math.isinf(seconds) else 2, last - done
      ),
      plan=self.plan,
      dispatch=self.dispatch,
      phases=Phases(),
      ahead=ahead,
    )


def test_the_next_rounds_are_planned_ahead_and_in_another_thread():
  devices = _Devices()
  states = [out.state for out in devices.run(6)]
  assert devices.planned == [(0, 1), (1, 1), (2, 2), (4, 2)]
  assert states == [1, 2, 4, 6]
  assert threading.get_ident() not in devices.threads
  assert list(devices.run(0)) == []


def test_rounds_that_depend_on_others_are_planned_after_them():
  devices = _Devices()
  dispatches = devices.run(4, ahead=False)
  assert next(dispatches).state == 1
  assert devices.states == [0.0]
  assert dispatches.send(10.0).state == 12
  assert [out.state for out in dispatches] == [13]
  assert devices.states == [0.0, 10.0, 12.0]


def test_a_run_goes_on_with_the_state_that_is_sent():
  dispatches = _Devices().run(3)
  assert next(dispatches).state == 1
  assert dispatches.send(100.0).state == 101
  assert next(dispatches).state == 102


def test_a_failure_is_raised_after_its_rounds_were_given():
  dispatches = _Devices(fails=2).run(5)
  assert [next(dispatches).state for _ in range(2)] == [1, 2]
  with pytest.raises(ArithmeticError, match="diverged"):
    next(dispatches)
