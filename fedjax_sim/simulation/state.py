"""The state of a run: initial, on the devices, and on the host.

Devices share the table of client states in equal parts, so that it may have
rows beyond the last client; on the host it has one row for every client,
whatever the devices. Where the rows lie on the disk, the table is a
`StoredRows`, which stays on the host.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding
from jax.sharding import PartitionSpec as P

from fedjax_sim import distributed
from fedjax_sim.core import (
  Algorithm,
  HParams,
  Purpose,
  PyTree,
  Transform,
  Variables,
  key_for,
  tree,
)
from fedjax_sim.core.tree import nbytes
from fedjax_sim.distributed import pieces, processes
from fedjax_sim.engine import program as programs
from fedjax_sim.engine.hparams import Schedule
from fedjax_sim.engine.state import RunState
from fedjax_sim.engine.tracing import jitted_once
from fedjax_sim.engine.traffic import numbers_sent, update_shapes
from fedjax_sim.simulation import client_residency, monitor
from fedjax_sim.simulation.row_store import RowStore
from fedjax_sim.simulation.run_hparams import traced_hparams
from fedjax_sim.simulation.runtime import Runtime


def initial_state(
  seed: jax.Array,
  noise_seed: jax.Array,
  hparams: HParams,
  *,
  algorithm: Algorithm,
  transforms: Sequence[Transform],
  schedules: Mapping[str, Schedule],
  best_metrics: Sequence[str],
  table_rows: int | None,
  keeps_aggregate: bool = False,
) -> RunState:
  """Return the state before the first round.

  Args:
    seed: seed of the run, shape=().
    noise_seed: what private noise is drawn from, shape=(2,).
    hparams: numeric hyper-parameters.
    algorithm: the algorithm.
    transforms: transforms of the client updates.
    schedules: hyper-parameter -> its schedule.
    best_metrics: metrics, of each of which the best model is kept.
    table_rows: rows of the table of client states; None for the row alone that
      all clients begin with.
    keeps_aggregate: `Aggregator.keeps_previous`.
  """
  server = algorithm.init(key_for(seed, Purpose.INIT), hparams["algorithm"])
  params = algorithm.variables(server).params
  if transforms or keeps_aggregate:
    sent = update_shapes(algorithm, server, hparams["algorithm"])
    reported: Any = jax.tree.structure(sent)
    if reported != jax.tree.structure(params):
      params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sent)
  own = hparams["transforms"]
  row = (
    algorithm.client_init(server, hparams["algorithm"]),
    tuple(t.client_init(params, own[t.name]) for t in transforms),
  )
  whole = lambda x: jnp.broadcast_to(x, (table_rows, *jnp.shape(x)))
  table = jax.tree.map(jnp.asarray if table_rows is None else whole, row)
  shared = tuple(t.init(params, own[t.name]) for t in transforms)
  return RunState(
    round=jnp.zeros((), jnp.int32),
    seed=seed,
    noise_seed=noise_seed,
    server=server,
    clients=table,
    shared=shared,
    watch=monitor.first(schedules, server, best_metrics),
    aggregate=tree.zeros_accumulator(params) if keeps_aggregate else (),
  )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class States:
  """Makes the states of a run, and moves them between devices and host.

  Attributes:
    algorithm: the algorithm.
    transforms: transforms of the client updates.
    schedules: hyper-parameter -> its schedule.
    hparams: numeric hyper-parameters, at their defaults.
    best_metrics: metrics, of each of which the best model is kept.
    seed: seed of the run.
    noise_seed: fixes private noise, in simulations; None for fresh entropy.
    draws_noise: whether any private noise is drawn.
    num_clients: number of clients that may train.
    mesh: the devices.
    sampler: makes the sampler's state before the first round, on the host.
    keeps_aggregate: `Aggregator.keeps_previous`.
    runtime: says where client states are to be.
  """

  algorithm: Algorithm
  transforms: Sequence[Transform]
  schedules: Mapping[str, Schedule]
  hparams: HParams
  best_metrics: Sequence[str]
  seed: int
  noise_seed: int | None
  draws_noise: bool
  num_clients: int
  mesh: Mesh
  sampler: Callable[[], PyTree]
  keeps_aggregate: bool
  runtime: Runtime

  @functools.cached_property
  def residency(self) -> tuple[str, str]:
    """Where client states are, "device" or "disk", and why.

    Raises:
      ValueError: the disk is asked for, where it does not go.
    """
    asked = self.runtime.state_residency
    rows = nbytes(self._row), self.num_clients
    return client_residency.residency(asked, *rows, self.mesh)

  @functools.cached_property
  def rows(self) -> RowStore | None:
    """The client states on the disk; None if they are on the devices."""
    if self.residency[0] == "device":
      return None
    folder = self.runtime.state_folder
    place = None if folder is None else Path(folder)
    return RowStore(self._row, self.num_clients, place)

  @property
  def sent_row_bytes(self) -> int:
    """Bytes of a client's state that a call is sent; 0 if devices have them."""
    return 0 if self.rows is None else self.rows.row_bytes

  @property
  def _row(self) -> PyTree:
    """Shapes and dtypes of what one client keeps."""
    cut = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
    return jax.tree.map(cut, self.shapes.clients)

  def initial(
    self, seed: jax.Array, noise_seed: jax.Array, hparams: HParams
  ) -> RunState:
    """Return the state before the first round, to be traced.

    Args:
      seed: shape=(), uint32.
      noise_seed: shape=(2,), uint32.
      hparams: numeric hyper-parameters, arrays.
    """
    return self._initial(seed, noise_seed, hparams, self._table_rows)

  def _initial(
    self,
    seed: jax.Array,
    noise_seed: jax.Array,
    hparams: HParams,
    table_rows: int | None,
  ) -> RunState:
    return initial_state(
      seed,
      noise_seed,
      hparams,
      algorithm=self.algorithm,
      transforms=self.transforms,
      schedules=self.schedules,
      best_metrics=self.best_metrics,
      table_rows=table_rows,
      keeps_aggregate=self.keeps_aggregate,
    )

  @functools.cached_property
  def _jitted(self) -> Callable[..., RunState]:
    like = np.uint32(self.seed), np.zeros(2, np.uint32), self.traced()
    begin, spec = self.initial, self.spec
    if self.rows is not None:
      begin = functools.partial(self._initial, table_rows=None)
      spec = spec._replace(clients=P())
    return jitted_once(begin, like, distributed.shardings(self.mesh, spec))

  def init(self, hparams: HParams | None) -> RunState:
    """Return the state before the first round, on the devices.

    Args:
      hparams: numeric hyper-parameters; None for the defaults.
    """
    words = noise_words(self.noise_seed, self.draws_noise)
    state = self._jitted(np.uint32(self.seed), words, self.traced(hparams))
    if self.rows is not None:
      first = self.rows.first(distributed.fetch(state.clients))
      state = state._replace(clients=first)
    return state._replace(sampler=self.sampler())

  def stacked(
    self, seeds: np.ndarray, words: np.ndarray, hparams: PyTree
  ) -> RunState:
    """Return the states of several runs before the first round, on the host.

    Args:
      seeds: of the runs, shape=(runs,), uint32.
      words: what private noise is drawn from, shape=(runs, 2), uint32.
      hparams: numeric hyper-parameters, leaves (runs,).

    Returns:
      Leaves (runs, ...), with a row of the table for every client.
    """
    like = seeds, words, hparams
    made = jitted_once(jax.vmap(self.initial), like, None)(*like)
    own = lambda x: np.asarray(x)[:, : self.num_clients]
    return jax.tree.map(np.asarray, made)._replace(
      clients=jax.tree.map(own, made.clients)
    )

  def traced(self, hparams: HParams | None = None) -> PyTree:
    """Return hyper-parameters as arrays of one dtype.

    Args:
      hparams: sections that replace those of the defaults; None for none.

    Raises:
      TypeError, ValueError: names the number.
    """
    return traced_hparams(hparams, self.hparams, self.algorithm.privacy)

  @functools.cached_property
  def shapes(self) -> RunState:
    """Shapes and dtypes of a state's arrays on the devices.

    Raises:
      TypeError: it holds typed random keys, which files cannot keep.
    """
    shapes: RunState = jax.eval_shape(
      self.initial,
      np.uint32(self.seed),
      np.zeros(2, np.uint32),
      self.traced(),
    )
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
      if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        raise TypeError(
          f"State {jax.tree_util.keystr(path)} is a {leaf.dtype}; keep"
          " jax.random.key_data of it, or derive keys with key_for."
        )
    return shapes

  @property
  def placed(self) -> RunState:
    """The same, without the clients' table if their rows are on the disk."""
    shapes = self.shapes
    return shapes if self.rows is None else shapes._replace(clients=())

  @property
  def variables(self) -> Variables:
    """Shapes and dtypes of the global model."""
    found: Variables = jax.eval_shape(
      self.algorithm.variables, self.shapes.server
    )
    return found

  @property
  def models(self) -> dict[str, Variables]:
    """The same of all models that are evaluated; "" is the global one."""
    others = jax.eval_shape(self.algorithm.other_models, self.shapes.server)
    return {"": self.variables, **others}

  @property
  def num_parameters(self) -> int:
    """Number of trained parameters of the global model."""
    leaves = jax.tree.leaves(self.variables.params)
    return sum(math.prod(x.shape) for x in leaves)

  @property
  def num_sent(self) -> int:
    """Number of numbers that a client sends as its update."""
    hparams = self.traced()["algorithm"]
    return numbers_sent(self.algorithm, self.shapes.server, hparams)

  @functools.cached_property
  def spec(self) -> RunState:
    """How a state lies on the devices."""
    return programs.state_spec(self.shapes, self.mesh)

  @property
  def _table_rows(self) -> int:
    """Rows of the table of client states, as many on every device."""
    devices = distributed.size(self.mesh)
    return -(-self.num_clients // devices) * devices

  @functools.cached_property
  def _shardings(self) -> RunState:
    """How each array lies on the devices, as a state."""
    where = distributed.shardings(self.mesh, self.spec)
    is_sharding = lambda x: isinstance(x, Sharding)
    return jax.tree.map(
      lambda sharding, part: jax.tree.map(lambda _: sharding, part),
      where,
      self.shapes._replace(sampler=()),
      is_leaf=is_sharding,
    )

  @property
  def spread(self) -> bool:
    """Whether some array lies in pieces over several processes."""
    return any(map(pieces.is_spread, jax.tree.leaves(self._shardings)))

  def ranges(self) -> RunState:
    """Return where this process's pieces of each spread array lie.

    Returns:
      For each array the ranges of its pieces, as a `pieces.Wanted`; None for
      those that every process has whole. As a state, of which the sampler's
      part has None everywhere.
    """

    def ranges(part: PyTree, where: PyTree, rows: int | None) -> PyTree:
      return jax.tree.map(
        lambda x, sharding: pieces.Wanted(
          pieces.wanted_ranges(x.shape, sharding, rows)
          if pieces.is_spread(sharding)
          else None
        ),
        part,
        where,
      )

    whole = self.shapes._replace(sampler=(), clients=())
    found: RunState = ranges(whole, self._shardings._replace(clients=()), None)
    return found._replace(
      clients=ranges(
        self.shapes.clients, self._shardings.clients, self.num_clients
      ),
      sampler=jax.tree.map(lambda _: pieces.Wanted(None), self.sampler()),
    )

  def to_devices(self, state: PyTree) -> RunState:
    """Put a state that is on the host on the devices.

    Args:
      state: with a row for every client, as `to_host` or `to_pieces` returns
        it.
    """
    if any(isinstance(x, pieces.Pieces) for x in jax.tree.leaves(state)):
      return self._placed(state)
    if self.rows is not None:
      spec = self.spec._replace(clients=())
      bare = state._replace(clients=(), sampler=())
      return distributed.put(bare, self.mesh, spec)._replace(
        clients=self.rows.adopt(state.clients), sampler=state.sampler
      )
    missing = self._table_rows - self.num_clients

    def pad(x: np.ndarray) -> np.ndarray:
      return np.concatenate([x, np.repeat(x[-1:], missing, axis=0)])

    padded = jax.tree.map(pad, state.clients)
    placed: RunState = distributed.put(
      state._replace(clients=padded, sampler=()), self.mesh, self.spec
    )
    return placed._replace(sampler=state.sampler)  # it stays on the host

  def to_host(self, state: RunState) -> RunState:
    """Return a state on the host, with a row for every client.

    All processes have to call it.
    """
    if self.rows is not None:
      bare: RunState = distributed.fetch(state._replace(clients=(), sampler=()))
      return bare._replace(clients=state.clients, sampler=state.sampler)
    fetched: RunState = distributed.fetch(state._replace(sampler=()))
    own = jax.tree.map(lambda x: x[: self.num_clients], fetched.clients)
    return fetched._replace(clients=own, sampler=state.sampler)

  def to_pieces(self, state: RunState) -> RunState:
    """Return a state on the host, as `to_host`, but gather nothing.

    Arrays that lie in pieces over several processes are `Pieces`, those that
    this process has to store.
    """

    def own(x: jax.Array, rows: int | None) -> Any:
      if pieces.is_spread(x.sharding):
        return pieces.to_pieces(x, rows)
      return np.asarray(x)[:rows]

    whole = lambda x: own(x, None) if x.ndim else np.asarray(x)
    rest = jax.tree.map(whole, state._replace(sampler=(), clients=()))
    table = jax.tree.map(lambda x: own(x, self.num_clients), state.clients)
    return rest._replace(clients=table, sampler=state.sampler)

  def _placed(self, state: PyTree) -> RunState:
    """Put a state on the devices of which some arrays are `Pieces`."""

    def put(x: Any, shape: jax.ShapeDtypeStruct, sharding: Any) -> jax.Array:
      if isinstance(x, pieces.Pieces):
        return pieces.place(x, shape.shape, sharding)
      missing = shape.shape[:1] and shape.shape[0] - len(x)
      if missing:  # rows of a table that every process has
        x = np.concatenate([x, np.repeat(x[-1:], missing, axis=0)])
      return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])

    on_host = state._replace(sampler=())
    shapes = self.shapes._replace(sampler=())
    placed: RunState = jax.tree.map(put, on_host, shapes, self._shardings)
    return placed._replace(sampler=state.sampler)

  @functools.cached_property
  def _copied(self) -> Callable[[PyTree], PyTree]:
    on_disk = self.rows is not None
    spec = self.spec._replace(clients=()) if on_disk else self.spec
    return copier(self.mesh, spec)

  def copy(self, state: RunState) -> RunState:
    """Return a copy of a state, for whoever keeps it while a run uses it up."""
    bare = state._replace(sampler=())
    if self.rows is None:
      return self._copied(bare)._replace(sampler=state.sampler)
    copied: RunState = self._copied(bare._replace(clients=()))
    return copied._replace(clients=state.clients, sampler=state.sampler)

  @functools.cached_property
  def host_shapes(self) -> RunState:
    """Shapes and dtypes of what `to_host` returns."""
    rows = self.num_clients
    many = lambda x: jax.ShapeDtypeStruct((rows, *x.shape), x.dtype)
    table = jax.tree.map(many, self._row)
    if self.rows is not None:
      table = self.rows.host_shapes
    return self.shapes._replace(clients=table, sampler=self.sampler())

  @property
  def noise_origin(self) -> str:
    """Where private noise comes from, for summaries; "" without any."""
    if not self.draws_noise:
      return ""
    if self.noise_seed is None:
      return (
        "from fresh entropy, which the checkpoints keep: who has them can"
        " take the noise off"
      )
    return (
      f"simulation only: whoever knows noise_seed={self.noise_seed} can take"
      " the noise off"
    )


def copier(mesh: Mesh, spec: PyTree) -> Callable[[PyTree], PyTree]:
  """Return a function that copies a tree on the devices.

  Args:
    mesh: the devices.
    spec: how the tree lies on them.
  """
  where = distributed.shardings(mesh, spec)
  copied: Callable[[PyTree], PyTree] = jax.jit(
    lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=where
  )
  return copied


def noise_words(noise_seed: int | None, draws_noise: bool) -> np.ndarray:
  """Return `RunState.noise_seed` of a run that begins, the same everywhere.

  Args:
    noise_seed: fixes private noise, in simulations; None for fresh entropy.
    draws_noise: whether any is drawn; if not, the words are 0.
  """
  bits = noise_seed or 0
  if noise_seed is None and draws_noise:
    bits = processes.from_first(lambda: secrets.randbits(64))
  return np.array([bits >> 32, bits & 0xFFFFFFFF], np.uint32)
