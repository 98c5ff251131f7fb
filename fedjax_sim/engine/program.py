"""Compiled rounds: ahead of time, from shapes alone.

Compiling before any data is placed tells a run's memory beforehand, and makes
the number of compilations a fact and not a hope.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from fedjax_sim import distributed
from fedjax_sim.core import PyTree
from fedjax_sim.core.tree import nbytes
from fedjax_sim.core.types import EMPTY
from fedjax_sim.distributed import AXIS
from fedjax_sim.engine import hlo_traffic, small_programs, virtual_devices
from fedjax_sim.engine import plan as plans
from fedjax_sim.engine.client_loop import COHORT_SPEC
from fedjax_sim.engine.client_rows import ClientRows
from fedjax_sim.engine.state import RunState


def state_spec(shapes: RunState, mesh: Mesh) -> RunState:
  """Return how a state is partitioned over the devices.

  The clients' table is dealt over them, and the rest is on every one; but along
  the axis `model`, if there is one, each has a piece.
  """
  whole: Any = P()
  pieces = functools.partial(distributed.in_pieces, mesh=mesh)
  some = isinstance(shapes.clients, ClientRows)
  clients = shapes.clients.rows if some else shapes.clients
  table = distributed.in_pieces(clients, mesh, AXIS)
  if some:
    table = ClientRows(whole, table)
  return RunState(
    round=whole,
    seed=whole,
    noise_seed=whole,
    server=pieces(shapes.server),
    clients=table,
    shared=pieces(shapes.shared),
    watch=pieces(shapes.watch),
    aggregate=pieces(shapes.aggregate),
  )


# The same as COHORT_SPEC behind a leading axis of rounds.
COHORTS_SPEC = jax.tree.map(
  lambda spec: P(None, *spec), COHORT_SPEC, is_leaf=lambda x: isinstance(x, P)
)

MOST_PLAN_BYTES = 2**22
MOST_SLICE_BYTES = 2**28


class Shape(NamedTuple):
  """What a program's plans look like.

  Attributes:
    capacity: a cohort's shapes.
    passes: the algorithm's passes.
    rounds: rounds that one call can run.
  """

  capacity: plans.Capacity
  passes: int
  rounds: int


def shape_of(
  capacity: plans.Capacity,
  passes: int,
  rounds: int | None,
  most: int,
  slice_bytes: int = 0,
) -> Shape:
  """Return the shape for a capacity.

  Args:
    capacity: a cohort's shapes.
    passes: the algorithm's passes.
    rounds: rounds in one call; None: as many as have plans that are small
      beside the rest.
    most: so many at most, where `rounds` is None.
    slice_bytes: of a round's examples on one device, if they are sent.
  """
  if rounds is None:
    plan = nbytes(plans.blank(capacity, passes))
    fit = MOST_PLAN_BYTES // plan
    if slice_bytes:
      fit = min(fit, MOST_SLICE_BYTES // slice_bytes)
    rounds = max(1, min(most, fit))
  return Shape(capacity, passes, rounds)


class Program(NamedTuple):
  """A compiled round and the shapes that it was compiled for.

  Attributes:
    compiled: as `make_rounds` describes it.
    shape: what its plans look like.
    sent_bytes: that a device sends to the others in a round; None: not known,
      as where devices share a model and send in every local step.
    options: XLA's, that it was compiled with.
  """

  compiled: Any
  shape: Shape
  sent_bytes: float | None
  options: Mapping[str, str | bool] = EMPTY

  @property
  def device_bytes(self) -> int:
    """Memory that a call needs on one device, arguments included, in bytes."""
    return device_bytes(self.compiled)


def device_bytes(compiled: Any) -> int:
  """Return the memory that a compiled function needs on one device, in bytes.

  Args:
    compiled: a `jax.stages.Compiled`; its arguments count.
  """
  memory = compiled.memory_analysis()
  return int(
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    + memory.temp_size_in_bytes
    - memory.alias_size_in_bytes
  )


def trace_rounds(
  function: Callable[..., Any],
  shape: Shape,
  *,
  state: PyTree,
  hparams: PyTree,
  data: PyTree,
  data_spec: PyTree,
  server_data: PyTree,
  mesh: Mesh,
  donate: bool,
) -> jax.stages.Traced:
  """Trace a function from `make_rounds`.

  Args:
    function: the function.
    shape: what its plans look like.
    state: a state's shapes.
    hparams: the hyper-parameters' shapes.
    data: the examples' shapes.
    data_spec: how they lie on the devices.
    server_data: the server's own examples' shapes; None: it has none.
    mesh: the devices.
    donate: the state passed in is used up.
  """
  spec = state_spec(state, mesh)
  stacked = plans.blank(shape.capacity, shape.passes, shape.rounds)
  jitted = jax.jit(
    function,
    donate_argnums=(0,) if donate else (),
    out_shardings=distributed.shardings(mesh, (spec, P())),
  )
  return jitted.trace(
    distributed.abstract(state, mesh, spec),
    distributed.abstract(hparams, mesh, P()),
    distributed.abstract(data, mesh, data_spec),
    distributed.abstract(stacked, mesh, COHORTS_SPEC),
    distributed.abstract(jnp.zeros((), jnp.int32), mesh, P()),
    distributed.abstract(server_data, mesh, P()),
  )


def compile_rounds(
  traced: jax.stages.Traced, shape: Shape, mesh: Mesh, *, deterministic: bool
) -> Program:
  """Compile rounds from `trace_rounds`.

  Args:
    traced: the rounds.
    shape: what their plans look like.
    mesh: the devices.
    deterministic: floats are rounded the same on any number of devices.
  """
  small = small_programs.is_small(traced.jaxpr)
  options = compiler_options(mesh, deterministic, small)
  compiled = traced.lower().compile(compiler_options=options)
  sent, text = None, compiled.as_text()
  if text is not None and distributed.MODEL not in mesh.axis_names:
    devices = distributed.size(mesh)
    sent = hlo_traffic.sent_bytes(text, devices, shape.rounds)
  return Program(compiled, shape, sent, options)


# What XLA may put into graphs on a GPU: all that it does by default, and loops.
_GRAPHED = (
  *("FUSION", "CUBLAS", "CUBLASLT", "CUDNN", "CUSTOM_CALL"),
  *("DYNAMIC_SLICE_FUSION", "CONDITIONAL", "WHILE"),
)
GPU_GRAPHS = "FEDJAX_SIM_GPU_GRAPHS"
_OF_GRAPHS = "xla_gpu_enable_command_buffer"


_WITHOUT = "xla_disable_hlo_passes"


def compiler_options(
  mesh: Mesh, deterministic: bool, small: bool = False
) -> dict[str, str | bool]:
  """Return XLA's options for a round; none but on CPUs and GPUs.

  By default it orders a device's operations so that more of them can run at
  the same time, for which they need more memory at once. But several devices
  of one CPU share its cores already, and XLA divides no operation of theirs.

  Args:
    mesh: the devices.
    deterministic: see `compile_rounds`.
    small: no operation is worth being divided among cores.
  """
  options: dict[str, str | bool] = {}
  if jax.default_backend() == "cpu":
    if len(mesh.local_devices) > 1:
      order = "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"
      options["xla_cpu_scheduler_type"] = order
    elif small and not deterministic:
      options |= small_programs.COMPILER_OPTIONS
    if deterministic:
      options |= virtual_devices.COMPILER_OPTIONS
    # XLA would forget those that XLA_FLAGS names.
    given = re.findall(rf"--{_WITHOUT}=(\S+)", os.environ.get("XLA_FLAGS", ""))
    if given and _WITHOUT in options:
      options[_WITHOUT] = ",".join([given[-1], str(options[_WITHOUT])])
  return options | graph_options()


def graph_options() -> dict[str, str | bool]:
  """Return the options that keep a GPU's loops in graphs; none elsewhere.

  A GPU asks the host before every iteration whether a loop goes on, unless the
  loop is in a graph; and a local step is often shorter than the answer takes.
  Only where the environment asks for it by `FEDJAX_SIM_GPU_GRAPHS=1`, as it was
  never run on a GPU, and some drivers are known to fail. What `XLA_FLAGS` says
  of graphs counts more.
  """
  wanted = os.environ.get(GPU_GRAPHS) == "1"
  given = _OF_GRAPHS in os.environ.get("XLA_FLAGS", "")
  if not wanted or given or jax.default_backend() != "gpu":
    return {}
  return {_OF_GRAPHS: ",".join(_GRAPHED)}
