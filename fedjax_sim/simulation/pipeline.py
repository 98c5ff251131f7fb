"""Run rounds: the host plans the next ones while the devices work."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor

import jax

from fedjax_sim.distributed import jax_internals, processes
from fedjax_sim.engine.state import RunState
from fedjax_sim.simulation.dispatch import DispatchResult, PlannedRounds
from fedjax_sim.simulation.timing import Phases


def run(
  state: RunState,
  done: int,
  last: int,
  *,
  count: Callable[[int, float], int],
  plan: Callable[[RunState, int, int], PlannedRounds],
  dispatch: Callable[[RunState, PlannedRounds], DispatchResult],
  phases: Phases,
  ahead: bool = True,
) -> Generator[DispatchResult, RunState | None, None]:
  """Run until the last round, one dispatch after the other.

  It goes on with the state that is sent to it, or with its own.

  Args:
    state: the state to go on with.
    done: number of rounds that it has behind it.
    last: number of the last round.
    count: (rounds done, seconds of a round) -> how many rounds to plan next.
    plan: (state, rounds done, rounds) -> at most so many rounds, laid out;
      called in another thread, and unless `ahead` is False before the state has
      done those rounds.
    dispatch: runs planned rounds.
    phases: measures waiting for plans.
    ahead: whether rounds can be planned before those before them are done;
      False if they depend on what clients report.

  Raises:
    DivergedError: a round left nothing finite; after the rounds before it were
      yielded.
  """
  if done >= last:
    return
  settings = jax_internals.settings_of_thread()

  def plan_here(state: RunState, first: int, most: int) -> PlannedRounds:
    with settings():
      return plan(state, first, most)

  seconds = math.inf
  planning = jax.profiler.annotate_function(plan_here, name="plan rounds")
  with ThreadPoolExecutor(1, "plan") as pool:
    pending = pool.submit(planning, state, done, count(done, seconds))
    while done < last:
      with phases("plan"):
        planned = pending.result()
      done += planned.num_rounds
      if ahead and done < last:
        pending = pool.submit(planning, state, done, count(done, seconds))
      out = dispatch(state, planned)
      # The processes have to agree how many rounds come next.
      (slowest,) = processes.greatest(out.seconds)
      seconds = slowest / planned.num_rounds
      sent = yield out
      if out.failure is not None:
        raise out.failure
      state = out.state if sent is None else sent
      if not ahead and done < last:
        pending = pool.submit(planning, state, done, count(done, seconds))
