"""Compile a run's programs side by side, while the run gets ready.

XLA compiles without Python's lock. So threads compile the round and the
evaluations while the first state is made and written, and import meanwhile what
the end of the run needs.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import jax

from fedjax_sim import distributed
from fedjax_sim.distributed import jax_internals

if TYPE_CHECKING:
  from fedjax_sim.simulation.simulator import Simulator


class Ahead:
  """Threads that work ahead.

  Example:
    >>> with contextlib.closing(Ahead()) as ahead:
    ...   ahead.compile(simulator)
    ...   state = simulator.init()
    ...   ahead.wait()
    ...   row = simulator.evaluate(state)
  """

  def __init__(self) -> None:
    self._pool = ThreadPoolExecutor(thread_name_prefix="ahead")
    self._waiting: list[Future[Any]] = []

  def close(self) -> None:
    """Begin nothing more, and return when what was begun has ended."""
    self._pool.shutdown(cancel_futures=True)

  def compile(self, simulator: Simulator) -> None:
    """Begin to compile the round and the evaluations of a simulator.

    Left to their first call are rounds of several cohort sizes, of which not
    all may come, and all programs of several processes, which compile together.

    Args:
      simulator: what will run; its lanes are chosen.
    """
    if simulator.debug or jax.process_count() > 1:
      return
    sizes, lanes = simulator.sampler.sizes, simulator.choose_lanes().lanes
    if len(sizes) == 1:
      self._do(lambda: simulator.compiler.program(lanes, sizes[0]))
    states = simulator.states
    shapes = distributed.abstract(
      states.shapes._replace(sampler=()), simulator.mesh, states.spec
    )
    for evaluation in simulator.evaluate.sets.values():
      self._do(functools.partial(evaluation.compile, shapes))

  def load(self, modules: Sequence[str]) -> None:
    """Begin to import modules.

    Args:
      modules: their names; one that cannot be imported, whatever it raises,
        says so where it is used.
    """

    def work() -> None:
      for name in modules:
        with contextlib.suppress(Exception):
          importlib.import_module(name)

    self._pool.submit(work)

  def wait(self) -> None:
    """Return when all programs are compiled.

    Raises:
      Exception: what compiling raised.
    """
    while self._waiting:
      self._waiting.pop(0).result()

  def _do(self, work: Callable[[], Any]) -> None:
    settings = jax_internals.settings_of_thread()

    def alike() -> None:
      with settings():
        work()

    self._waiting.append(self._pool.submit(alike))
