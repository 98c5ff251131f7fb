"""Many runs in one compiled program: rounds and evaluations, run by run.

Each device runs rounds of its own, for its own runs; devices exchange nothing.
On a CPU the groups of a device (see `layout.py`) run one after the other, as a
group is as fast as it can be on its own; elsewhere side by side.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import (
  Callable,
  Collection,
  Iterator,
  Mapping,
  Sequence,
)
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from fedjax_sim import distributed
from fedjax_sim.core import PyTree
from fedjax_sim.engine import plan as plans
from fedjax_sim.engine import program as programs
from fedjax_sim.engine.client_metrics import ClientMetrics
from fedjax_sim.engine.evaluation import EvaluationSet, Sent
from fedjax_sim.engine.state import RoundMetrics, RunState
from fedjax_sim.simulation.arguments import is_private
from fedjax_sim.simulation.dispatch import PlannedRounds
from fedjax_sim.simulation.planner import Cohorts, Planner
from fedjax_sim.simulation.simulator import Simulator
from fedjax_sim.studies.layout import Layout

RUNS = "runs"  # the mesh axis that runs are dealt over
_SMALL = 2**17  # bytes of parameters
_WIDE = 16  # rows of a group of small models, on a CPU


def make_mesh(devices: Sequence[jax.Device]) -> Mesh:
  """Return a mesh of devices that have runs of their own."""
  grid = np.array(devices).reshape(len(devices), 1)
  axes = (RUNS, distributed.AXIS)
  return Mesh(grid, axes, axis_types=(AxisType.Auto, AxisType.Auto))


def widest(simulator: Simulator) -> int:
  """Return how many rows of a group a device works on side by side, at most.

  Side by side, a CPU gains where a model is so small that its operations cost
  more than their arithmetic, and loses where it is large. Other devices are
  given all.
  """
  if jax.default_backend() != "cpu":
    return 2**16
  params = simulator.states.variables.params
  nbytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
  return _WIDE if nbytes <= _SMALL else 1


def _over_runs(
  function: Callable[..., Any],
  own: Sequence[bool],
  grouped: Sequence[bool],
  mesh: Mesh,
) -> Callable[..., Any]:
  """Return the function of one run for runs in (devices, groups, rows).

  Args:
    function: of arrays.
    own: for every argument, whether each run has its own.
    grouped: for every argument, whether each group has its own.
    mesh: the devices, see `make_mesh`.
  """
  rows = jax.vmap(function, [0 if x else None for x in own])

  def groups(*arguments: Any) -> Any:
    mine = [x or y for x, y in zip(own, grouped, strict=True)]
    if jax.default_backend() != "cpu":
      return jax.vmap(rows, [0 if x else None for x in mine])(*arguments)
    count = {
      len(leaf)
      for x, argument in zip(mine, arguments, strict=True)
      for leaf in jax.tree.leaves(argument)
      if x
    }

    def of_group(index: jax.Array) -> Any:
      at = lambda tree: jax.tree.map(lambda leaf: leaf[index], tree)
      return rows(
        *(at(a) if x else a for x, a in zip(mine, arguments, strict=True))
      )

    return jax.lax.map(of_group, jnp.arange(count.pop()))

  def device(*arguments: Any) -> Any:
    first = lambda tree: jax.tree.map(lambda leaf: leaf[0], tree)
    given = [
      first(a) if x or y else a
      for x, y, a in zip(own, grouped, arguments, strict=True)
    ]
    return jax.tree.map(lambda leaf: leaf[None], groups(*given))

  split, whole = P(RUNS), P()
  specs = [
    split if x or y else whole for x, y in zip(own, grouped, strict=True)
  ]
  return jax.shard_map(
    device,
    mesh=mesh,
    in_specs=tuple(specs),
    out_specs=split,
    axis_names={RUNS, distributed.AXIS},
    check_vma=False,
  )


_ROUNDS_OWN = (True, True, False, False, False, False)
_ROUNDS_GROUPED = (False, False, False, True, False, False)
_EVALUATE_OWN = (True, True, False, False)
_EVALUATE_GROUPED = (False, False, False, False)


class StudyProgram:
  """The rounds and evaluations of runs that are one program.

  Args:
    simulator: of any of the runs.
    devices: the devices, each of which has runs of its own.
    lanes: clients of a run that are trained at once.
  """

  def __init__(
    self, simulator: Simulator, devices: Sequence[jax.Device], lanes: int
  ):
    self.simulator = simulator
    self._mesh, self._lanes = make_mesh(devices), lanes
    self._size = simulator.sampler.sizes[-1]
    self._compiled: dict[tuple[int, ...], Any] = {}
    self.compilations = 0  # how many layouts were compiled
    self._kept: dict[str, Sent] = {}
    self._planners: dict[Simulator, Planner] = {}

  @property
  def devices(self) -> int:
    """How many devices there are."""
    return int(self._mesh.shape[RUNS])

  def put(self, tree: PyTree) -> PyTree:
    """Put leaves (devices, groups, ...) on their devices."""
    return distributed.put(tree, self._mesh, P(RUNS))

  def _whole(self, tree: PyTree) -> PyTree:
    return distributed.put(tree, self._mesh, P())

  @functools.cached_property
  def shape(self) -> programs.Shape:
    """The shape of the plans of a run."""
    return self.simulator.planner.shape(self._lanes, self._size)

  @functools.cached_property
  def _data(self) -> PyTree:
    shape, residency = self.shape, self.simulator.residency
    return self._whole(residency.shapes(shape.capacity, shape.rounds))

  @functools.cached_property
  def _server_data(self) -> PyTree:
    return self._whole(self.simulator.data.server)

  def compiled(self, places: tuple[int, ...]) -> Any:
    """Return the compiled rounds for a layout of (devices, groups, rows)."""
    if places not in self._compiled:
      self._compiled[places] = self._compile(places)
      self.compilations += 1
    return self._compiled[places]

  def release(self) -> None:
    """Give up what is compiled, and the examples on the devices.

    Both are made again when they are needed.
    """
    self._compiled.clear()
    self._kept.clear()
    for cached in ("_data", "_server_data", "_evaluations"):
      self.__dict__.pop(cached, None)

  def _compile(self, places: tuple[int, ...]) -> Any:
    simulator, shape = self.simulator, self.shape
    function = _over_runs(
      simulator.compiler.function, _ROUNDS_OWN, _ROUNDS_GROUPED, self._mesh
    )

    def like(tree: PyTree, axes: tuple[int, ...]) -> PyTree:
      stacked = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((*axes, *np.shape(x)), x.dtype), tree
      )
      spec = P(RUNS) if axes else P()
      return distributed.abstract(stacked, self._mesh, spec)

    blank = plans.blank(shape.capacity, len(simulator.batchings), shape.rounds)
    data = simulator.residency.shapes(shape.capacity, shape.rounds)
    state = simulator.states.host_shapes._replace(sampler=())
    jitted = jax.jit(
      function,
      donate_argnums=(0,),
      out_shardings=distributed.shardings(self._mesh, P(RUNS)),
    )
    lowered = jitted.lower(
      like(state, places),
      like(simulator.states.traced(), places),
      like(data, ()),
      like(blank, places[:2]),
      like(np.zeros((), np.int32), ()),
      like(simulator.data.server, ()),
    )
    options = programs.compiler_options(self._mesh, deterministic=False)
    return lowered.compile(compiler_options=options)

  def device_bytes(self, places: tuple[int, ...]) -> int:
    """Return the memory of a call on one device, arguments included."""
    compiled = self.compiled(places)
    return programs.Program(compiled, self.shape, None).device_bytes

  def plan(
    self,
    layout: Layout,
    simulators: Sequence[Simulator],
    done: int,
    most: int,
  ) -> list[list[PlannedRounds]]:
    """Lay out rounds for every group, on the host.

    Args:
      layout: where the runs stand.
      simulators: of all runs.
      done: rounds that they have done.
      most: rounds; fewer if one call cannot run as many.
    """
    leaders = layout.leaders()
    found = {
      run: self._planner(simulators[run]).plan(done, most, self._lanes)
      for run in {run for row in leaders for run in row}
    }
    return [[found[run] for run in row] for row in leaders]

  def _planner(self, simulator: Simulator) -> Planner:
    """Return the planner of a run, which shares the examples of all runs.

    It is kept, as it holds what it draws against what the sampler promises.
    """
    if simulator not in self._planners:
      # Cohorts of all sizes run in one program.
      sampler = simulator.sampler._replace(sizes=(self._size,))
      self._planners[simulator] = dataclasses.replace(
        self.simulator.planner,
        cohorts=Cohorts(
          sampler=sampler,
          seed=simulator.seed,
          num_clients=simulator.num_clients,
          held=is_private(simulator.algorithm, simulator.aggregator),
        ),
      )
    return self._planners[simulator]

  def call(
    self,
    layout: Layout,
    state: RunState,
    hparams: PyTree,
    planned: list[list[PlannedRounds]],
  ) -> tuple[RunState, RoundMetrics]:
    """Run planned rounds.

    Args:
      layout: where the runs stand.
      state: of all runs, on the devices; used up.
      hparams: numeric hyper-parameters, on the devices.
      planned: as `plan` returns them.

    Returns:
      The states after them, on the devices; metrics on the host, leaves
      (runs, rounds, ...).
    """
    cohorts = stack([stack([p.cohorts for p in row]) for row in planned])
    rounds = np.int32(planned[0][0].num_rounds)
    state, metrics = self.compiled(layout.place.shape)(
      state,
      hparams,
      self._data,
      self.put(cohorts),
      self._whole(rounds),
      self._server_data,
    )
    return state, layout.unpack(jax.device_get(metrics))

  def evaluate(
    self, layout: Layout, state: RunState, names: Collection[str]
  ) -> list[dict[str, ClientMetrics]]:
    """Return for every run the metrics of its clients, by evaluation set.

    Args:
      layout: where the runs stand.
      state: of all runs, on the devices.
      names: which sets to evaluate.
    """
    found: list[dict[str, ClientMetrics]] = [
      {} for _ in range(int(layout.used.sum()))
    ]
    for name, evaluation in self.simulator.evaluate.sets.items():
      if name not in names:
        continue
      evaluate, table = self._evaluations[name], evaluation.table(state)
      outs = []
      for sent in self._pieces(name):
        out = evaluate(state.server, table, sent.examples, sent.plan)
        outs.append((sent.clients, layout.unpack(jax.device_get(out))))
      for run, row in enumerate(found):
        at = functools.partial(jax.tree.map, lambda x, run=run: x[run])
        row[name] = evaluation.read((ids, at(out)) for ids, out in outs)
    return found

  @functools.cached_property
  def _evaluations(self) -> Mapping[str, Callable[..., Any]]:
    """The evaluation of each set, which is compiled for each layout."""
    split = distributed.shardings(self._mesh, P(RUNS))

    def jitted(evaluation: EvaluationSet) -> Callable[..., Any]:
      function = _over_runs(
        evaluation.program, _EVALUATE_OWN, _EVALUATE_GROUPED, self._mesh
      )
      return jax.jit(function, out_shardings=split)

    sets = self.simulator.evaluate.sets
    return {name: jitted(evaluation) for name, evaluation in sets.items()}

  def _pieces(self, name: str) -> Iterator[Sent]:
    """Yield the examples of a set, whole on every device, piece by piece.

    A set in one piece, which has room there, is sent once.
    """
    if name in self._kept:
      yield self._kept[name]
      return
    evaluation = self.simulator.evaluate.sets[name]
    for ids in evaluation.pieces:
      sent = evaluation.sent(ids)
      plan, examples = jax.device_get((sent.plan, sent.examples))
      placed = sent._replace(
        plan=self._whole(plan), examples=self._whole(examples)
      )
      if len(evaluation.pieces) == 1:
        self._kept[name] = placed
      yield placed


def stack(trees: Sequence[PyTree]) -> PyTree:
  """Return trees of equal structure as one, with a leading axis."""
  return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)
