"""Imports out of the garbage collector's sight."""

import gc
import sys
import weakref

import pytest

from fedjax_sim.cli.lasting import lasting


@pytest.fixture(autouse=True)
def young(monkeypatch):
  """A process that has not imported JAX yet."""
  monkeypatch.delitem(sys.modules, "jax", raising=False)


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


def test_a_process_that_lives_on_frees_what_it_made(monkeypatch):
  class Run:
    def __init__(self):
      self.itself = self

  made = Run()
  gone = weakref.ref(made)
  monkeypatch.setitem(sys.modules, "jax", sys)
  with lasting():
    pass
  del made
  gc.collect()
  assert gone() is None
