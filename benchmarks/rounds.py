"""Rounds of the engine, as `Simulator.run` runs them, turn by turn.

On its own, so that revisions whose bare loops need other modules of the engine
can be compared.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

from fedjax_sim.engine.plan import PaddingWaste
from fedjax_sim.engine.program import Program
from fedjax_sim.simulation.simulator import Simulator

# Name -> devices; None: as many as there are. Each may use every core. In
# `benchmarks.engine` with `--lanes=8` names are "one_8" and "all_8".
ENGINES = {"one": 1, "all": None}


class Engine:
  """A simulator that goes on from turn to turn.

  Args:
    simulator: what runs.
    rounds: rounds a dispatch.
    dispatches: dispatches a turn.

  Attributes:
    state: the run's, after the last turn.
  """

  def __init__(self, simulator: Simulator, rounds: int, dispatches: int):
    self.simulator = simulator
    self.waste, self.clients = PaddingWaste(), 0
    self._rounds, self._dispatches = rounds, dispatches
    self._pool = ThreadPoolExecutor(1, "plan")
    self.state = simulator.init()
    self._planned = simulator.plan(0, rounds)

  @property
  def program(self) -> Program:
    """The compiled rounds; lanes may have been tried by others."""
    return self.simulator.compiler.program(*self._planned.key)

  def compile(self) -> None:
    """Compile the rounds, which the first turn does else."""
    _ = self.program

  def seconds(self) -> float:
    """Return the seconds of a turn, with the planning of as many rounds."""
    self.waste, self.clients = PaddingWaste(), 0
    began = time.perf_counter()
    for _ in range(self._dispatches):
      after = self._planned.first + self._rounds
      pending = self._pool.submit(self.simulator.plan, after, self._rounds)
      out = self.simulator.dispatch(self.state, self._planned)
      self._planned = pending.result()
      if out.failure is not None:
        raise out.failure
      self.state = out.state
      self.waste += out.waste
      self.clients += out.clients
    return time.perf_counter() - began

  def close(self) -> None:
    """End the thread that plans."""
    self._pool.shutdown()
