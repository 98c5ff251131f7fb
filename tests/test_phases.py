"""Phases: nested ones, sums, errors."""

import pytest

from fedjax_sim.simulation.timing import MEANING, Phases


class Clock:
  """A clock that is set by hand."""

  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now


@pytest.fixture
def clock():
  return Clock()


def spend(clock, seconds):
  clock.now += seconds


def test_an_inner_phase_takes_its_time_from_the_outer_one(clock):
  phases = Phases(clock)
  spend(clock, 1)
  with phases("evaluate"):
    spend(clock, 2)
    with phases("compile"):
      spend(clock, 4)
    spend(clock, 8)
  spend(clock, 16)
  with phases("evaluate"):
    spend(clock, 32)
  expected = {"other": 17, "evaluate": 42, "compile": 4}
  assert phases.seconds() == {name: expected.get(name, 0) for name in MEANING}
  assert sum(phases.seconds().values()) == clock.now - 100


def test_the_sum_is_whole_while_a_phase_is_open(clock):
  phases = Phases(clock)
  with phases("checkpoint"):
    spend(clock, 3)
    assert phases.seconds()["checkpoint"] == 3
    spend(clock, 4)
  assert phases.seconds()["checkpoint"] == 7
  assert phases.seconds()["other"] == 0


def test_an_error_ends_its_phase(clock):
  phases = Phases(clock)

  def fail():
    with phases("train"):
      spend(clock, 2)
      raise KeyError

  with pytest.raises(KeyError):
    fail()
  spend(clock, 5)
  assert phases.seconds()["train"] == 2
  assert phases.seconds()["other"] == 5
