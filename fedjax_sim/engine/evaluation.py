"""Evaluation: of the global model on a central set, and client by client.

Both are one program: every client of the set walks over its examples once, in
the waves and lanes of a cohort, and its metrics are summed. A central set is
cut into blocks that play the clients' part. With `Algorithm.personal` each
client is evaluated with the parameters that it would use itself.

Metrics that are no means (`Task.joint`) take the values of every example to the
host. Then every client is cut into blocks of one batch, as a central set is.
"""

from __future__ import annotations

import collections
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from fedjax_sim import distributed
from fedjax_sim.core import (
  Algorithm,
  Array,
  Examples,
  Metric,
  PyTree,
  Task,
  Variables,
  compensated,
  evaluate_batch,
)
from fedjax_sim.core.compensated import Total
from fedjax_sim.data import FederatedData, Prepare, as_stored
from fedjax_sim.data.stored import take
from fedjax_sim.engine import client_rows
from fedjax_sim.engine import plan as plans
from fedjax_sim.engine.batching import LocalBatching, evaluation_batch
from fedjax_sim.engine.client_loop import (
  COHORT_SPEC,
  PassSpec,
  over_waves,
  put_wave,
  read_batch,
)
from fedjax_sim.engine.client_metrics import ClientMetrics, joint_metrics
from fedjax_sim.engine.client_rows import ClientRows, StoredRows
from fedjax_sim.engine.evaluation_pieces import in_pieces, planned
from fedjax_sim.engine.loops import FixedLoop, repeat
from fedjax_sim.engine.plan import CohortPlan
from fedjax_sim.engine.program import graph_options
from fedjax_sim.engine.state import RunState
from fedjax_sim.engine.tracing import trace_once

# Examples that take as long as a step's own cost: a guess, as it hangs on the
# model; where steps are launched one by one, it is some thousands.
_OVERHEAD, _ELSEWHERE = {"cpu": 16}, 4096


def as_blocks(examples: Mapping[str, np.ndarray], size: int) -> FederatedData:
  """Return a central set as federated data: blocks of `size` examples."""
  count = len(next(iter(examples.values())))
  offsets = np.append(np.arange(0, count, size), count)
  return FederatedData(examples=examples, offsets=offsets)


def _blocks(offsets: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
  """Cut clients into blocks of at most `size` examples.

  Args:
    offsets: shape=(clients + 1,); clients may lack examples.
    size: of a block.

  Returns:
    Offsets of the blocks, shape=(blocks + 1,), and whose each is, (blocks,).
  """
  counts = -(-np.diff(offsets) // size)
  owner = np.repeat(np.arange(len(counts)), counts)
  first = np.repeat(np.cumsum(counts) - counts, counts)
  begins = offsets[owner] + size * (np.arange(len(owner)) - first)
  return np.append(begins, offsets[-1]), owner


class ReadRows(Protocol):
  """Reads client states on the disk.

  Attributes:
    most: rows that there is room for at a time.
  """

  most: int

  def __call__(
    self, table: StoredRows, clients: np.ndarray, count: int
  ) -> ClientRows:
    """Return what the algorithm keeps of clients, on the devices.

    Args:
      table: of a state.
      clients: ids, in any order.
      count: rows to return; the last ones may be nobody's.
    """


class Evaluated(NamedTuple):
  """What the program returns of a cohort.

  Attributes:
    sums: `Total` of name -> `Metric`, shape=(devices, waves, lanes).
    values: model -> metric of `Task.joint` -> values, leaves (devices, waves,
      lanes, batch, ...), padding included.
  """

  sums: Total
  values: dict[str, dict[str, PyTree]]


def make_evaluate(
  task: Task,
  algorithm: Algorithm,
  *,
  batch_size: int,
  mesh: Mesh,
  prepare: Prepare,
  steps: FixedLoop | None = None,
  waves: FixedLoop | None = None,
) -> Callable[[PyTree, PyTree, Examples, CohortPlan], Evaluated]:
  """Return the function that evaluates every client of a cohort.

  Where the task has joint metrics, no client has more than one batch. `steps`
  and `waves` are the loops over batches and waves, for reverse mode.

  Returns:
    (server state, clients, examples, cohort) -> `Evaluated`. `examples` are
    field -> (devices, examples, ...), each device's own; `clients` are ids and
    states of the plan's clients, leaves (devices, waves, lanes, ...); None
    evaluates the global model.
  """
  walk = PassSpec("eval", batch_size, prepare, fixed=steps)

  def device(
    server: PyTree, clients: PyTree, examples: Examples, cohort: CohortPlan
  ) -> Evaluated:
    mine = jax.tree.map(lambda x: x[0], cohort._replace(order=()))
    clients, examples = jax.tree.map(lambda x: x[0], (clients, examples))
    message = algorithm.broadcast(server)
    order = jnp.asarray(cohort.order[0])

    @trace_once
    def one(row: tuple[Array, Array, PyTree]) -> Evaluated:
      start, num_steps, client = row
      if client is None or algorithm.personal is None:
        variables = algorithm.variables(server)
      else:
        ident, state = client
        received = algorithm.download(message, jnp.zeros_like(ident), ident)
        variables = algorithm.personal(received, state)
      models = {"": variables, **algorithm.other_models(server)}
      return _client_metrics(
        task, models, examples, order, start, num_steps, walk
      )

    grid = (mine.start[..., 0], mine.num_steps[..., 0], clients)
    shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0, 0], grid))
    zeros = jax.tree.map(
      lambda x: jnp.zeros((*mine.client.shape, *x.shape), x.dtype), shapes
    )
    out = over_waves(one, grid, mine.num_waves, put_wave, zeros, waves)
    return jax.tree.map(lambda x: x[None], out)

  split, whole = P(distributed.AXIS), P()
  return distributed.over_devices(
    device,
    mesh,
    in_specs=(whole, split, split, COHORT_SPEC),
    out_specs=split,
  )


def of_model(name: str, metric: str) -> str:
  """Return what a model's metric is called; "" is the model that is trained."""
  return f"{name}/{metric}" if name else metric


def _client_metrics(
  task: Task,
  models: Mapping[str, Variables],
  examples: Examples,
  order: Array,
  start: Array,
  num_steps: Array,
  walk: PassSpec,
) -> Evaluated:
  """Return one client's metrics, name -> `Metric`, summed over its batches.

  Those of a model with a name, not "", begin with it. With joint metrics it is
  its only batch.
  """

  @trace_once
  def of_batch(
    i: Array, models: Mapping[str, Variables]
  ) -> tuple[dict[str, Metric], dict[str, Any]]:
    batch = read_batch(examples, order, start + i * walk.batch_size, walk)
    sums, values = dict[str, Metric](), dict[str, Any]()
    for name, variables in models.items():
      summed, values[name] = evaluate_batch(task, variables, batch)
      sums |= {of_model(name, metric): x for metric, x in summed.items()}
    return sums, values

  if task.joint:
    sums, values = of_batch(jnp.zeros((), jnp.int32), models)
    return Evaluated(compensated.add(compensated.zeros(sums), sums), values)
  shapes, _ = jax.eval_shape(of_batch, jnp.zeros((), jnp.int32), models)
  add = lambda i, acc, models: compensated.add(acc, of_batch(i, models)[0])
  zeros = compensated.zeros(shapes)
  return Evaluated(repeat(num_steps, add, zeros, models, walk.fixed), {})


class EvaluationSet:
  """A set of clients, with its plan and compiled program.

  A set that has room on the devices is sent once, with its plan, which is the
  same at every evaluation. A larger one is sent at every evaluation, some
  clients at a time.

  Args:
    task: what is evaluated.
    algorithm: whose server state and client states are evaluated.
    data: the set; clients may lack examples.
    mesh: the devices.
    lanes: clients that a device evaluates at once.
    batch_size: examples of a client that go through the model at once, at
      most; fewer where most clients are small.
    personal: the set's clients are the run's clients, in the same order, so
      each may be evaluated with its own state.
    prepare: see `FederatedDataset`.
    room: bytes that the examples may take on a device, if no client has more
      than half of them.
    by_client: whether to compute joint metrics of every client, too.
    rows: reads what the algorithm keeps of some clients; None if the table of
      client states is on the devices.
    rematerialize: see `FixedLoop`, for a `program` that reverse mode can pass;
      None for one that only forward mode can.

  Attributes:
    pieces: the clients, or blocks of them, that are evaluated at once.
    program: (server state, clients' table, examples, plan) -> `Evaluated` of
      the plan's clients, leaves (devices, waves, lanes, ...); not compiled.

  Raises:
    ValueError: no client has an example.
  """

  def __init__(
    self,
    task: Task,
    algorithm: Algorithm,
    data: FederatedData,
    *,
    mesh: Mesh,
    lanes: int,
    batch_size: int,
    personal: bool = False,
    prepare: Prepare = as_stored,
    room: float = math.inf,
    by_client: bool = True,
    rows: ReadRows | None = None,
    rematerialize: bool | None = None,
  ):
    if not data.num_examples:
      raise ValueError(
        f"None of the {data.num_clients} clients to be evaluated has an"
        " example; leave the set out, or raise data.heldout_fraction."
      )
    self.num_clients = data.num_clients
    self._task, self._mesh = task, mesh
    self._by_client, self._offsets = by_client, data.offsets
    self._personal = personal and algorithm.personal is not None
    self._rows = rows if self._personal else None
    overhead = _OVERHEAD.get(jax.default_backend(), _ELSEWHERE)
    size = evaluation_batch(data.sizes, batch_size, overhead)
    batching = LocalBatching(batch_size=size, shuffle=False)
    self._work = batching.fitted(data.sizes)
    self._owner = np.arange(data.num_clients)
    if task.joint:
      blocks, self._owner = _blocks(data.offsets, self._work.batch_size)
      data = FederatedData(examples=data.examples, offsets=blocks)
    self._data = data
    each = sum(x[:1].nbytes for x in data.examples.values())
    self.pieces, self._capacity = in_pieces(
      data,
      self._work,
      room / max(1, each),
      lanes=lanes,
      devices=distributed.size(mesh),
      most_clients=math.inf if self._rows is None else self._rows.most,
    )
    self._most_rows = max(map(len, self.pieces))
    steps, waves = int(self._work.num_steps(data.sizes).max()), self._capacity
    fixed = rematerialize is not None
    evaluate = make_evaluate(
      task,
      algorithm,
      batch_size=self._work.batch_size,
      mesh=mesh,
      prepare=prepare,
      steps=FixedLoop(steps, bool(rematerialize)) if fixed else None,
      waves=FixedLoop(waves.waves, bool(rematerialize)) if fixed else None,
    )

    def program(
      server: PyTree, table: PyTree, examples: Examples, plan: CohortPlan
    ) -> Evaluated:
      ids = plan.client
      if task.joint:
        owner = jnp.asarray(self._owner, jnp.int32)
        ids = owner[jnp.maximum(ids, 0)]
      clients: PyTree = None
      if self._personal:
        clients = jnp.maximum(ids, 0), client_rows.read(table, ids)
      return evaluate(server, clients, examples, plan)

    self.program = program
    whole = distributed.shardings(mesh, P())
    self._jitted = jax.jit(
      program, out_shardings=whole, compiler_options=graph_options()
    )
    self._compiled: jax.stages.Compiled | None = None  # kept for its calls
    self._kept = self.sent(*self.pieces) if len(self.pieces) == 1 else None

  def compile(self, state: RunState) -> None:
    """Compile the program, which calls with such states find then.

    A set that is sent in pieces, or whose clients' states are on the disk, is
    left to its first call.

    Args:
      state: shapes, dtypes and shardings of the states to come.
    """
    if self._kept is None or self._rows is not None:
      return
    sent, table = self._kept, self.table(state)
    lowered = self._jitted.lower(state.server, table, sent.examples, sent.plan)
    self._compiled = lowered.compile()

  def table(self, state: RunState, ids: np.ndarray | None = None) -> PyTree:
    """Return what `program` takes of the table of client states.

    Args:
      state: the state that is evaluated.
      ids: the piece that is evaluated; None for all of them, where the table is
        on the devices.
    """
    if not self._personal:
      return None
    if self._rows is None:
      return state.clients[0]
    assert ids is not None
    return self._rows(state.clients, self._owner[ids], self._most_rows)

  def read(self, outs: Iterable[tuple[np.ndarray, Evaluated]]) -> ClientMetrics:
    """Return the metrics of every client, from what the pieces returned.

    Args:
      outs: (clients, what `program` returned of them), on the host or not.
    """
    zeros = functools.partial(np.zeros, self.num_clients)
    total: dict[str, np.ndarray] = collections.defaultdict(zeros)
    weight: dict[str, np.ndarray] = collections.defaultdict(zeros)
    values: PyTree = None
    for clients, out in outs:
      real = clients >= 0
      ids = clients[real]
      sums, of_examples = jax.device_get(out)
      value, error = compensated.parts(sums)
      for name, metric in value.items():
        for into, x, lost in zip(
          (total, weight), metric, error[name], strict=True
        ):
          exact = x[real].astype(np.float64) + lost[real]
          np.add.at(into[name], self._owner[ids], exact)
      found = jax.tree.map(lambda x, real=real: x[real], of_examples)
      if values is None:
        values = jax.tree.map(self._unfilled, found)
      jax.tree.map(functools.partial(self._put, ids), values, found)
    means = ClientMetrics(total=dict(total), weight=dict(weight))
    made = {
      of_model(model, metric): (self._task.joint[metric], tree)
      for model, metrics in values.items()
      for metric, tree in metrics.items()
    }
    offsets = self._offsets if self._by_client else None
    return joint_metrics(means, made, self.num_clients, offsets)

  def __call__(self, state: RunState) -> ClientMetrics:
    """Return the metrics of every client of the set."""
    return self.read(self._evaluated(state))

  def _evaluated(
    self, state: RunState
  ) -> Iterator[tuple[np.ndarray, Evaluated]]:
    """Yield the clients of each piece, and their metrics on the devices."""
    # Devices work on a piece while the next is gathered.
    waiting: list[tuple[np.ndarray, Evaluated]] = []
    for ids in self.pieces:
      sent = self._kept or self.sent(ids)
      table = self.table(state, ids)
      out = self._jitted(state.server, table, sent.examples, sent.plan)
      waiting.append((sent.clients, out))
      if len(waiting) > 1:
        yield waiting.pop(0)
    yield from waiting

  def _unfilled(self, found: np.ndarray) -> np.ndarray:
    """Return room for the values of all examples, leaves (examples, ...)."""
    return np.empty((self._data.num_examples, *found.shape[2:]), found.dtype)

  def _put(self, ids: np.ndarray, into: np.ndarray, found: np.ndarray) -> None:
    """Put the values of blocks, (blocks, batch, ...), where they belong."""
    offsets, place = self._data.offsets, np.arange(found.shape[1])
    real = place < (offsets[ids + 1] - offsets[ids])[:, None]
    into[(offsets[ids][:, None] + place)[real]] = found[real]

  def sent(self, ids: np.ndarray) -> Sent:
    """Return some clients' examples and plan, on the devices."""
    plan, slices = planned(self._data, self._work, ids, self._capacity)
    fill = functools.partial(
      plans.fill,
      slices,
      rounds=1,
      devices=distributed.own_devices(self._mesh),
      length=self._capacity.examples[0],
      take=take,
    )
    examples = {field: fill(x)[0] for field, x in self._data.examples.items()}
    return Sent(
      clients=plan.client,
      plan=distributed.put(plan, self._mesh, COHORT_SPEC),
      examples=distributed.put_own(examples, self._mesh, P(distributed.AXIS)),
    )


class Sent(NamedTuple):
  """What a call of the program is given.

  Attributes:
    clients: shape=(devices, waves, lanes), int32; whose metrics it returns, -1
      for nobody's.
    plan: on the devices.
    examples: on the devices; field -> (devices, examples, ...).
  """

  clients: np.ndarray
  plan: CohortPlan
  examples: PyTree
