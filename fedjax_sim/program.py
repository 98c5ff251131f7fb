"""Compiled rounds: ahead of time, from shapes alone.

Compiling before any data is placed tells a run's memory beforehand, and makes
the number of compilations a fact and not a hope.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from fedjax_sim import cohort as cohorts
from fedjax_sim import distributed
from fedjax_sim.base import PyTree
from fedjax_sim.cohort import Cohort
from fedjax_sim.distributed import AXIS
from fedjax_sim.round import COHORT_SPEC, RunState, nbytes

# The clients' table is dealt over the devices, the rest is on every one.
STATE_SPEC = RunState(P(), P(), P(), P(AXIS), P())  # type: ignore[arg-type]

# The same as COHORT_SPEC behind a leading axis of rounds.
COHORTS_SPEC = jax.tree.map(
  lambda spec: P(None, *spec), COHORT_SPEC, is_leaf=lambda x: isinstance(x, P)
)

MOST_ROUNDS = 16
MOST_PLAN_BYTES = 2**22


class Program(NamedTuple):
  """A compiled round and the shapes that it was compiled for.

  Attributes:
    compiled: as `make_rounds` describes it.
    capacity: a cohort's shapes.
    rounds: rounds that one call can run.
  """

  compiled: Any
  capacity: cohorts.Capacity
  rounds: int

  def __call__(self, *arguments: PyTree) -> Any:
    return self.compiled(*arguments)

  @property
  def device_bytes(self) -> int:
    """Memory that a call needs on one device, arguments included, in bytes."""
    memory = self.compiled.memory_analysis()
    return int(
      memory.argument_size_in_bytes
      + memory.output_size_in_bytes
      + memory.temp_size_in_bytes
      - memory.alias_size_in_bytes
    )


def compile_rounds(
  function: Callable[..., Any],
  *,
  state: PyTree,
  hparams: PyTree,
  data: PyTree,
  capacity: cohorts.Capacity,
  passes: int,
  mesh: Mesh,
  rounds_per_dispatch: int | None,
  donate: bool,
) -> Program:
  """Compiles a function from `make_rounds`.

  Args:
    function: the function.
    state: a state's shapes.
    hparams: the hyper-parameters' shapes.
    data: the examples' shapes.
    capacity: a cohort's shapes.
    passes: the algorithm's passes.
    mesh: the devices.
    rounds_per_dispatch: rounds in one call; None: as many as have plans that
      are small beside the rest, up to 16.
    donate: the state passed in is used up.
  """
  plan = cohorts.blank(capacity, passes)
  if rounds_per_dispatch is None:
    rounds_per_dispatch = max(
      1, min(MOST_ROUNDS, MOST_PLAN_BYTES // nbytes(plan))
    )
  stacked: Cohort = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((rounds_per_dispatch, *x.shape), x.dtype),
    plan,
  )
  jitted = jax.jit(
    function,
    donate_argnums=(0,) if donate else (),
    out_shardings=(distributed.shardings(mesh, STATE_SPEC), None),
  )
  compiled = jitted.lower(
    distributed.abstract(state, mesh, STATE_SPEC),
    distributed.abstract(hparams, mesh, P()),
    distributed.abstract(data, mesh, P()),
    distributed.abstract(stacked, mesh, COHORTS_SPEC),
    distributed.abstract(jnp.zeros((), jnp.int32), mesh, P()),
  ).compile()
  return Program(compiled, capacity, rounds_per_dispatch)


def stack(plans: Sequence[Cohort], program: Program, passes: int) -> Cohort:
  """Plans behind a leading axis of the program's rounds, filled with blanks."""
  blanks = [cohorts.blank(program.capacity, passes)]
  missing = program.rounds - len(plans)
  return jax.tree.map(lambda *x: np.stack(x), *plans, *blanks * missing)
