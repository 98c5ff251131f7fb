"""How many clients a device trains at once: measured, not guessed.

On a CPU one lane is often the fastest, on a GPU many lanes fill the chip. For
a few choices the compiled round runs a short part of a real plan; the time of
one wave step, times the steps that a whole round has with that many lanes,
predicts the round, lanes that wait for the longest of their wave included. On a
CPU, where it gains the least, it takes no more than a tenth of the run.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from jax.sharding import Mesh

from fedjax_sim import distributed
from fedjax_sim.distributed import memory, processes
from fedjax_sim.engine.plan import CohortPlan, wave_steps
from fedjax_sim.engine.program import Program
from fedjax_sim.simulation.dispatch import PlannedRounds
from fedjax_sim.simulation.timing import Phases

log = logging.getLogger(__name__)

WORTH = 1.1  # more lanes must be faster by this factor
PROBE_STEPS = 64
PROBE_CALLS = 4  # of each plan; the first warms up
SHARE = 0.1  # of the run's rounds, which choosing may take
CAUTION = 1.5  # the next size may take so many times as long as the last


class Choice(NamedTuple):
  """How many lanes, and in words why so many."""

  lanes: int
  reason: str


class Probe(NamedTuple):
  """What was measured with a number of lanes.

  Attributes:
    seconds: predicted time of a round.
    device_bytes: memory on one device.
    compiling: seconds of compiling, which are no loss if this is chosen.
    measuring: seconds of everything else.
  """

  seconds: float
  device_bytes: int
  compiling: float = 0.0
  measuring: float = 0.0


class Trial(NamedTuple):
  """How to plan, compile and time a round with any number of lanes.

  Attributes:
    plan: (rounds done, lanes) -> the next round, laid out.
    program: (lanes, cohort size) -> the compiled round.
    waiting_bytes: (lanes, cohort size) -> bytes on a device of the call that
      waits for its turn.
    seconds: planned round -> seconds of one call, from the initial state.
  """

  plan: Callable[[int, int], PlannedRounds]
  program: Callable[[int, int], Program]
  waiting_bytes: Callable[[int, int], int]
  seconds: Callable[[PlannedRounds], float]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Chooser:
  """Chooses the number of lanes of a run, once.

  Attributes:
    wanted: the number; "auto" to measure it.
    trial: how to plan, compile and time a round.
    cohort_size: size of the smallest cohort.
    mesh: the devices.
  """

  wanted: int | Literal["auto"]
  trial: Trial
  cohort_size: int
  mesh: Mesh

  @functools.cached_property
  def _choices(self) -> list[Choice]:
    return []

  def __call__(
    self, rounds: float = math.inf, phases: Phases | None = None
  ) -> Choice:
    """Return the choice; with "auto" the first call measures it.

    Args:
      rounds: number of rounds of the run, of whose time choosing takes a small
        share on a CPU; infinite if unknown.
      phases: measures what it takes; None if nobody asks.
    """
    phases = Phases() if phases is None else phases
    if not self._choices:
      with phases("lanes"):
        self._choices.append(self._choose(rounds, phases))
    return self._choices[0]

  def _choose(self, rounds: float, phases: Phases) -> Choice:
    if self.wanted != "auto":
      return Choice(self.wanted, "as given")
    return measured(self.trial, self.cohort_size, self.mesh, rounds, phases)


def candidates(cohort_size: int, devices: int) -> list[int]:
  """Return 1, 4, 16, ... and at last the whole cohort's share of one device.

  Args:
    cohort_size: number of clients of a round.
    devices: number of devices.
  """
  most = max(1, -(-cohort_size // devices))
  powers = [4**i for i in range(12) if 4**i < most]
  return [*powers, most]


def probe_steps(run: float) -> int:
  """Return how many steps to time; 0 if the run is too short for a single one.

  Half of the time that choosing may take is for them.

  Args:
    run: number of steps of the run; infinite if unknown.
  """
  return int(min(PROBE_STEPS, SHARE / 2 * run / PROBE_CALLS))


def shortened(plan: CohortPlan, most: int = PROBE_STEPS) -> CohortPlan:
  """Return a plan with the first waves alone, so that it has few steps.

  Waves that are left out have no steps, so `wave_steps` counts what is run.

  Args:
    plan: of a round.
    most: number of steps of a device, about.
  """
  steps = plan.num_steps.max(axis=-2).sum(axis=-1)  # (..., devices, waves)
  before = np.cumsum(steps, axis=-1) - steps
  waves = np.minimum(plan.num_waves, (before < most).sum(axis=-1))
  run = np.arange(steps.shape[-1]) < waves[..., None]
  steps_of_run = np.where(run[..., None, None], plan.num_steps, 0)
  return plan._replace(
    num_waves=waves.astype(np.int32),
    num_steps=np.minimum(steps_of_run, most),
  )


def emptied(plan: CohortPlan) -> CohortPlan:
  """Return a plan without any wave, to time a call that trains nobody."""
  return plan._replace(
    num_waves=np.zeros_like(plan.num_waves),
    num_steps=np.zeros_like(plan.num_steps),
  )


def probe(
  trial: Trial,
  size: int,
  *,
  rounds: float,
  limit: float,
  phases: Phases,
) -> Probe | None:
  """Time a short part of a round.

  Args:
    trial: how to plan, compile and time it.
    size: number of lanes.
    rounds: number of rounds of the run; infinite if unknown.
    limit: bytes that fit on a device; what needs more is not run.
    phases: measures compiling for one lane, which most runs go on with.

  Returns:
    What was measured; None if such a run has too few steps to time one.
  """
  began = time.perf_counter()
  plans = (trial.plan(i, size) for i in range(100))
  trains = lambda planned: (planned.cohorts.client >= 0).any()
  planned = next(filter(trains, plans), None) or trial.plan(0, size)
  planned = planned._replace(first=0)
  whole = planned.cohorts
  steps = probe_steps(rounds * max(wave_steps(whole), 1))
  if not steps:
    return None
  before = time.perf_counter()
  with phases("compile" if size == 1 else "lanes"):
    device_bytes = trial.program(*planned.key).device_bytes
  device_bytes += trial.waiting_bytes(*planned.key)
  after, seconds = time.perf_counter(), math.inf
  if device_bytes <= limit:
    short = shortened(whole, steps)
    fixed = _seconds(trial, planned._replace(cohorts=emptied(whole)))
    some = _seconds(trial, planned._replace(cohorts=short)) - fixed
    share = wave_steps(whole) / max(wave_steps(short), 1)
    seconds = fixed + max(some, 0.0) * share
  spent = time.perf_counter() - began
  compiling, spent = processes.greatest(after - before, spent)
  return Probe(seconds, device_bytes, compiling, spent - compiling)


def _seconds(trial: Trial, planned: PlannedRounds) -> float:
  """Return the shortest time of a few calls, after one that warms up."""
  times = [trial.seconds(planned) for _ in range(PROBE_CALLS)]
  (slowest,) = processes.greatest(min(times[1:]))
  return slowest


def measured(
  trial: Trial, cohort_size: int, mesh: Mesh, rounds: float, phases: Phases
) -> Choice:
  """Choose the number of lanes by measuring a few.

  Args:
    trial: how to plan, compile and time a round.
    cohort_size: size of the smallest cohort.
    mesh: the devices.
    rounds: number of rounds of the run, of whose time choosing takes a small
      share on a CPU; infinite if unknown.
    phases: measures what choosing takes.
  """
  sizes = candidates(cohort_size, distributed.size(mesh))
  if len(sizes) == 1:
    return Choice(sizes[0], "a device has no more clients a round")
  own = mesh.local_devices[0]
  if own.platform != "cpu":
    rounds = math.inf  # there many lanes are worth the time
  (negative,) = processes.greatest(-memory.memory_limit(own))
  limit = -negative
  one = functools.partial(
    probe, trial, rounds=rounds, limit=limit, phases=phases
  )
  choice = choose(one, sizes, limit, rounds)
  log.info("%d lanes a device: %s", *choice)
  return choice


def choose(
  probe: Callable[[int], Probe | None],
  sizes: list[int],
  limit: float,
  rounds: float = math.inf,
) -> Choice:
  """Choose the number of lanes with the shortest predicted round.

  Goes up the sizes until one is clearly slower than the best or does not fit,
  or until the next would take more than `SHARE` of the run's rounds, with what
  was spent before; the first is taken even if it does not fit.

  Args:
    probe: lanes -> what was measured; None if the run is too short for it.
    sizes: numbers of lanes to try, increasing.
    limit: bytes that fit on a device.
    rounds: number of rounds of the run; infinite if choosing may take any time.
  """
  best, seconds = sizes[0], math.inf
  spent = needed = 0.0  # what compiles the best is needed anyway
  tried: list[str] = []
  cost = 0.0
  for size in sizes:
    if tried and spent - needed + CAUTION * cost > SHARE * rounds * seconds:
      tried.append(f"{size}: not tried in a run this short")
      break
    measured = probe(size)
    if measured is None:
      return Choice(best, "the run is too short to measure others")
    cost = measured.compiling + measured.measuring
    spent += cost
    if measured.device_bytes > limit:
      tried.append(f"{size}: too large, {measured.device_bytes / 1e6:.0f} MB")
      break
    tried.append(f"{size}: {1e3 * measured.seconds:.3g} ms")
    if measured.seconds * WORTH < seconds:
      best, seconds = size, measured.seconds
      needed = measured.compiling
    elif measured.seconds > WORTH * seconds:
      break
  return Choice(best, "predicted time of a round by lanes: " + ", ".join(tried))
