"""What clients cost: by XLA's count, and by running them.

`scaling.py` predicts rounds from it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sim.core import Array, Batch, Client, HParams, Key, PyTree, tree
from fedjax_sim.core.tree import all_finite, nbytes
from fedjax_sim.engine import plan as plans
from fedjax_sim.engine.client_loop import augmented, with_numbers
from fedjax_sim.engine.traffic import first_client, surveyed_client
from fedjax_sim.simulation import lanes
from fedjax_sim.simulation.dispatch import PlannedRounds
from fedjax_sim.simulation.runtime import MOST_ROUNDS
from fedjax_sim.simulation.simulator import Simulator

MEASURED_CALLS = 3
MEASURED_SECONDS = 0.5  # of a call


class Speed(NamedTuple):
  """How fast a device is.

  Attributes:
    flops: FLOP/s that it sustains in local steps.
    memory: bytes a second that it reads and writes of its memory in what a
      client does beside its steps.
    fixed: seconds of a round that trains nobody.
  """

  flops: float
  memory: float = math.inf
  fixed: float = 0.0


class Cost(NamedTuple):
  """The cost of a compiled function, by XLA's count.

  Attributes:
    flops: floating-point operations of a call.
    accessed_bytes: that it reads and writes.
    temporary_bytes: memory beside arguments and results.
  """

  flops: float
  accessed_bytes: float
  temporary_bytes: int


class Costs(NamedTuple):
  """What clients cost, whatever the cohort and the devices.

  Attributes:
    step_flops: of one local step of each pass, shape=(passes,), float64.
    client_bytes: that a client reads and writes beside its steps: for its copy
      of the parameters, its update, the transforms, the weighted sum.
    lane_bytes: what a client that trains keeps: its carries, its gradients and
      all else that lives during a step.
    state_bytes: what every device has of the run's state.
    row_bytes: what one client keeps from round to round.
    summed_bytes: what the devices sum, in float32 at least.
    update_bytes: one client's update, if the aggregator keeps all of them;
      else 0.
    finishes_shares: as in `Aggregator`.
    logged_bytes: one client's update, if devices keep all of them to log.
  """

  step_flops: np.ndarray
  client_bytes: float
  lane_bytes: int
  state_bytes: int
  row_bytes: int
  summed_bytes: int
  update_bytes: int
  finishes_shares: bool
  logged_bytes: int = 0


def cost(function: Callable[..., Any], *arguments: Any) -> Cost:
  """Compile a function for arguments or shapes, and return its cost.

  XLA counts a loop's body once; matrix products in scans are counted as often
  as the scan runs, other loops are not.
  """
  traced = jax.jit(function).trace(*arguments)
  compiled = traced.lower().compile()
  counted = compiled.cost_analysis() or {}
  memory: Any = compiled.memory_analysis()
  return Cost(
    flops=float(counted.get("flops", 0.0)) + _repeats(traced.jaxpr.jaxpr),
    accessed_bytes=float(counted.get("bytes accessed", 0.0)),
    temporary_bytes=int(memory.temp_size_in_bytes) if memory else 0,
  )


def _repeats(jaxpr: Any, times: int = 1) -> float:
  """Return the operations of products in scans after each body's first pass."""
  total = 0.0
  for equation in jaxpr.eqns:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
      (contracted, _), _ = params["dimension_numbers"]
      left, out = equation.invars[0].aval, equation.outvars[0].aval
      length = math.prod(left.shape[i] for i in contracted)
      total += 2.0 * length * math.prod(out.shape) * (times - 1)
    passes = params["length"] if name == "scan" else 1
    for value in params.values():
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        total += _repeats(inner, times * passes)
  return total


def costs_of(simulator: Simulator) -> Costs:
  """Return what a run's clients cost; compile their parts, but run nothing.

  Raises:
    ValueError: several devices share a model.
  """
  if simulator.runtime.model_devices is not None:
    raise ValueError(
      "runtime.model_devices: what devices send that share a model is not"
      " predicted; unset it, by --config.runtime.model_devices=None."
    )
  aggregator = simulator.effective_aggregator
  prepare, augment = simulator.data.prepare, simulator.data.augment
  begin = functools.partial(first_client, simulator.algorithm)
  end = functools.partial(_end, simulator)
  state = simulator.states.shapes
  number = jax.dtypes.canonicalize_dtype(np.float64)
  hparams = jax.tree.map(
    lambda _: jax.ShapeDtypeStruct((), number), simulator.hparams
  )
  own = hparams["algorithm"]
  client, kept, carries = jax.eval_shape(begin, state, own)
  survey = functools.partial(surveyed_client, simulator.algorithm)
  asked, first, answer = jax.eval_shape(survey, state, own)
  ending = client, kept, carries, state.shared, hparams["transforms"]
  update, others, _, own_update = jax.eval_shape(end, *ending)
  zeros = tree.zeros_accumulator
  logged = own_update if simulator.log_clients else ()
  summed = jax.eval_shape(
    zeros, (() if aggregator.needs_all_updates else update, others, logged)
  )

  steps = []
  starts = [(asked, x) for x in first] + [(client, x) for x in carries]
  for walked, (walker, carry), data, batching in zip(
    simulator.algorithm.all_passes,
    starts,
    simulator.splits,
    simulator.batchings,
    strict=True,
  ):

    def step(
      client: Client,
      carry: PyTree,
      batch: Batch,
      key: Key,
      numbers: HParams,
      walked: Any = walked,
    ) -> PyTree:
      batch = batch._replace(examples=prepare(batch.examples))
      batch = augmented(batch, augment if walked.augmented else None, key)
      examples = with_numbers(batch.examples, numbers)
      batch = batch._replace(examples=examples)
      return walked.step(client, carry, batch, key)

    shape: Any = lambda x, size=batching.batch_size: jax.ShapeDtypeStruct(
      (size, *x.shape[1:]), jax.dtypes.canonicalize_dtype(x.dtype)
    )
    fields = {field: shape(x) for field, x in data.examples.items()}
    batch = Batch(fields, shape(np.zeros(1, bool)))
    parts = walker, carry, batch, client.key, hparams["task"]
    steps.append(cost(step, *parts))

  # An accumulator is read and written, what is added to it only read.
  statistics = () if answer is None else answer.statistics
  added = 3 * nbytes(jax.eval_shape(zeros, (update, others, statistics)))
  ends = cost(lambda *a: begin(*a)[2], state, own), cost(end, *ending)
  # Where a step is a single loop over the new carry, it needs nothing else.
  beside = max(
    max(step.temporary_bytes, nbytes(carry))
    for step, (_, carry) in zip(steps, starts, strict=True)
  )
  return Costs(
    step_flops=np.array([step.flops for step in steps]),
    client_bytes=added + sum(one.accessed_bytes for one in ends),
    lane_bytes=max(nbytes(first), nbytes(carries)) + beside,
    state_bytes=nbytes(state._replace(clients=())),
    row_bytes=nbytes((client.state, kept)),
    summed_bytes=nbytes(summed),
    update_bytes=nbytes(update) if aggregator.needs_all_updates else 0,
    finishes_shares=aggregator.finishes_shares,
    logged_bytes=nbytes(logged),
  )


def _end(
  simulator: Simulator,
  client: Client,
  kept: PyTree,
  carries: tuple[PyTree, ...],
  shared: PyTree,
  hparams: HParams,
) -> tuple[PyTree, PyTree, Array, PyTree]:
  """Return what a client leaves after its steps.

  Returns:
    The update that it sends; what else is summed, with its weight; whether all
    is finite; its update after the transforms.
  """
  report = simulator.algorithm.finish(client, *carries)
  update, released = report.update, []
  for transform, common, own in zip(
    simulator.transforms, shared, kept, strict=True
  ):
    numbers = hparams[transform.name]
    result = transform.apply(update, common, own, numbers, client.key)
    update = result.update
    released.append(result._replace(update=(), state=()))
  sent = simulator.algorithm.postprocess_report(
    client, report._replace(update=update)
  )
  others = sent.buffers, sent.statistics, released, sent.metrics
  finite = all_finite((report._replace(metrics={}), update))
  return sent.update, (others, jnp.float32(sent.weight)), finite, update


def measure(simulator: Simulator, costs: Costs) -> tuple[Speed, int]:
  """Measure how fast one of this machine's devices runs rounds.

  The same rounds are run as they are, with clients that take no step, and
  without clients; of each the fastest of a few calls counts.

  Returns:
    How fast the device is, by the model's counts; and its lanes.

  Raises:
    DivergedError: a round has no finite result.
  """
  alone = dataclasses.replace(
    simulator,
    runtime=dataclasses.replace(
      simulator.runtime,
      devices=1,
      deterministic_reduction=None,
      rounds_per_dispatch=None,
      most_rounds=MOST_ROUNDS,
    ),
  )
  state, done = alone.init(), 0

  def seconds(planned: PlannedRounds, plan: plans.CohortPlan) -> float:
    nonlocal state, done
    out = alone.dispatch(state, planned._replace(first=done, cohorts=plan))
    if out.failure is not None and plan is planned.cohorts:
      raise out.failure
    state, done = out.state, done + planned.num_rounds
    return out.seconds

  planned = alone.plan(0, 1)
  once = min(seconds(planned, planned.cohorts) for _ in range(2))
  most = max(1, min(MOST_ROUNDS, int(MEASURED_SECONDS / once)))
  planned = alone.plan(0, most)
  whole = planned.cohorts
  still = whole._replace(num_steps=np.zeros_like(whole.num_steps))
  kinds = whole, still, lanes.emptied(whole)
  turns = [
    [seconds(planned, plan) for plan in kinds] for _ in range(MEASURED_CALLS)
  ]
  all_, without_steps, without_clients = np.min(turns, axis=0)

  width = whole.client.shape[-1]
  steps = width * whole.num_steps.max(-2).sum((0, 1, 2))
  flops = float(steps @ costs.step_flops)
  accessed = width * int(whole.num_waves.sum()) * costs.client_bytes
  stepping, rest = all_ - without_steps, without_steps - without_clients
  speed = Speed(
    flops=flops / float(stepping if stepping > 0 else all_),
    memory=accessed / float(rest) if rest > 0 else math.inf,
    fixed=float(without_clients) / planned.num_rounds,
  )
  return speed, alone.choose_lanes().lanes
