"""Imports out of the garbage collector's sight."""

import gc

import pytest

from fedjax_sim.cli.lasting import lasting


@pytest.fixture(autouse=True)
def as_before():
  was, frozen = gc.isenabled(), gc.get_freeze_count()
  yield
  assert gc.isenabled() == was
  assert gc.get_freeze_count() >= frozen


def test_the_collector_rests_meanwhile():
  with lasting():
    assert not gc.isenabled()
  assert gc.isenabled()


def test_an_error_wakes_it():
  with pytest.raises(KeyError), lasting():
    raise KeyError
  assert gc.isenabled()


def test_one_that_was_off_stays_off():
  gc.disable()
  try:
    with lasting():
      pass
    assert not gc.isenabled()
  finally:
    gc.enable()


def test_what_was_made_is_not_looked_at():
  before = gc.get_freeze_count()
  with lasting():
    made: list[list[int]] = [[] for _ in range(1000)]
  assert gc.get_freeze_count() >= before + len(made)
