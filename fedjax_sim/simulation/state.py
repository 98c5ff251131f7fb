"""The state of a run: initial, on the devices, and on the host.

Devices share the table of client states in equal parts, so that it may have
rows beyond the last client; on the host it has one row for every client,
whatever the devices.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fedjax_sim import distributed
from fedjax_sim.core import (
  Aggregator,
  Algorithm,
  HParams,
  Purpose,
  PyTree,
  Release,
  Task,
  Transform,
  key_for,
  validate,
)
from fedjax_sim.distributed import processes
from fedjax_sim.engine.hparams import Schedule
from fedjax_sim.engine.state import RunState
from fedjax_sim.privacy.central import guard
from fedjax_sim.simulation import monitor


def default_hparams(
  task: Task,
  algorithm: Algorithm,
  aggregator: Aggregator,
  transforms: Sequence[Transform],
) -> HParams:
  """Return the numeric hyper-parameters of all parts, at their defaults.

  Args:
    task: what is trained.
    algorithm: the algorithm.
    aggregator: the aggregator in use.
    transforms: transforms of the client updates.
  """
  hparams = dict(algorithm.hparams)
  hparams["transforms"] = {t.name: t.hparams for t in transforms}
  if task.hparams:
    hparams["task"] = task.hparams
  if aggregator.keyed:
    hparams["aggregator"] = aggregator.hparams
  return hparams


def traced_hparams(
  given: HParams | None, defaults: HParams, release: Release | None
) -> PyTree:
  """Return hyper-parameters as arrays of one dtype.

  Args:
    given: sections that replace those of the defaults; None for none.
    defaults: all hyper-parameters of the run.
    release: of the algorithm, whose noise must stay what is counted; None if
      it is not private.

  Raises:
    TypeError, ValueError: names the number.
  """
  hparams = {**defaults, **(given or {})}
  expected: Any = jax.tree.structure(defaults)
  if jax.tree.structure(hparams) != expected:
    raise ValueError(
      f"hparams={hparams!r} does not have the structure of"
      f" Simulator.hparams, {defaults!r}; change values, not keys."
    )
  for path, value in jax.tree_util.tree_leaves_with_path(hparams):
    number = value.item() if hasattr(value, "item") else value
    validate.real(f"hparams{jax.tree_util.keystr(path)}", number)
  if release is not None:
    guard.check_numbers(hparams, defaults)
  dtype = jax.dtypes.canonicalize_dtype(np.float64)
  return jax.tree.map(lambda x: np.asarray(x, dtype), hparams)


def initial_state(
  seed: jax.Array,
  noise_seed: jax.Array,
  hparams: HParams,
  *,
  algorithm: Algorithm,
  transforms: Sequence[Transform],
  schedules: Mapping[str, Schedule],
  keeps_best: bool,
  table_rows: int,
) -> RunState:
  """Return the state before the first round.

  Args:
    seed: seed of the run, shape=().
    noise_seed: what private noise is drawn from, shape=(2,).
    hparams: numeric hyper-parameters.
    algorithm: the algorithm.
    transforms: transforms of the client updates.
    schedules: hyper-parameter -> its schedule.
    keeps_best: whether the best model is kept.
    table_rows: rows of the table of client states.
  """
  server = algorithm.init(key_for(seed, Purpose.INIT), hparams)
  params = algorithm.variables(server).params
  own = hparams["transforms"]
  row = (
    algorithm.client_init(server, hparams),
    tuple(t.client_init(params, own[t.name]) for t in transforms),
  )
  table = jax.tree.map(
    lambda x: jnp.broadcast_to(x, (table_rows, *jnp.shape(x))), row
  )
  shared = tuple(t.init(params, own[t.name]) for t in transforms)
  return RunState(
    round=jnp.zeros((), jnp.int32),
    seed=seed,
    noise_seed=noise_seed,
    server=server,
    clients=table,
    shared=shared,
    watch=monitor.first(schedules, server, keeps_best),
  )


def shapes_of(
  init: Callable[..., RunState], seed: int, hparams: PyTree
) -> RunState:
  """Return shapes and dtypes of a state.

  Args:
    init: (seed, noise seed, hparams) -> the initial state.
    seed: seed of the run.
    hparams: numeric hyper-parameters, as arrays.

  Raises:
    TypeError: the state holds typed random keys, which files cannot keep.
  """
  shapes: RunState = jax.eval_shape(
    init, np.uint32(seed), np.zeros(2, np.uint32), hparams
  )
  for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
      raise TypeError(
        f"State {jax.tree_util.keystr(path)} is a {leaf.dtype}; keep"
        " jax.random.key_data of it, or derive keys with key_for."
      )
  return shapes


def table_rows(num_clients: int, mesh: Mesh) -> int:
  """Return the rows of the table of client states, as many on every device.

  Args:
    num_clients: number of clients that may train.
    mesh: the devices.
  """
  devices = distributed.size(mesh)
  return -(-num_clients // devices) * devices


def to_devices(
  state: RunState, num_clients: int, mesh: Mesh, spec: RunState
) -> RunState:
  """Put a state on the devices that is on the host.

  Args:
    state: with a row for every client, as `to_host` returns it.
    num_clients: number of clients that may train.
    mesh: the devices.
    spec: how a state lies on them.
  """
  missing = table_rows(num_clients, mesh) - num_clients

  def pad(x: np.ndarray) -> np.ndarray:
    return np.concatenate([x, np.repeat(x[-1:], missing, axis=0)])

  padded = jax.tree.map(pad, state.clients)
  placed: RunState = distributed.put(
    state._replace(clients=padded, sampler=()), mesh, spec
  )
  return placed._replace(sampler=state.sampler)  # it stays on the host


def to_host(state: RunState, num_clients: int) -> RunState:
  """Return a state on the host, with a row for every client.

  All processes have to call it.

  Args:
    state: on the devices.
    num_clients: number of clients that may train.
  """
  fetched = distributed.fetch(state._replace(sampler=()))
  own = jax.tree.map(lambda x: x[:num_clients], fetched.clients)
  result: RunState = fetched._replace(clients=own, sampler=state.sampler)
  return result


def host_shapes(shapes: RunState, num_clients: int) -> RunState:
  """Return shapes and dtypes of what `to_host` returns.

  Args:
    shapes: of a state on the devices.
    num_clients: number of clients that may train.
  """
  cut = lambda x: jax.ShapeDtypeStruct((num_clients, *x.shape[1:]), x.dtype)
  return shapes._replace(clients=jax.tree.map(cut, shapes.clients))


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


def count(params: PyTree) -> int:
  """Return the number of parameters, from their shapes."""
  return sum(math.prod(x.shape) for x in jax.tree.leaves(params))


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


def noise_origin(noise_seed: int | None, draws_noise: bool) -> str:
  """Describe where private noise comes from, for summaries.

  Args:
    noise_seed: fixes private noise, in simulations; None for fresh entropy.
    draws_noise: whether any is drawn.

  Returns:
    Words; none if no noise is drawn.
  """
  if not draws_noise:
    return ""
  if noise_seed is None:
    return (
      "from fresh entropy, which the checkpoints keep: who has them can"
      " take the noise off"
    )
  return (
    f"simulation only: whoever knows noise_seed={noise_seed} can take"
    " the noise off"
  )
