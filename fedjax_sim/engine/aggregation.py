"""Aggregation of a cohort's reports over waves, lanes and devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fedjax_sim.core import Array, Members, PyTree
from fedjax_sim.engine.client_log import Entry
from fedjax_sim.engine.client_round import ClientOutcome, ClientStatus
from fedjax_sim.engine.plan import Cohort

T = TypeVar("T")


def isolate_compilation(round_: Array, function: Callable[[], T]) -> T:
  """What the function gives, compiled by itself whatever is around it.

  Compilers fuse it with its neighbours otherwise, and round in other ways
  where those are others. A branch they keep to itself, and that a round has a
  number they do not know; barriers are gone when they fuse.

  Args:
    round_: shape=(), int32; which round it is.
    function: gives arrays.
  """
  shapes = jax.eval_shape(function)
  nothing = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  result: T = lax.cond(round_ >= 0, function, nothing)
  return result


class CohortSums(NamedTuple):
  """Sums over the cohort."""

  update: PyTree  # the aggregator's accumulator
  buffers: PyTree
  statistics: PyTree
  aux: tuple[PyTree, ...]
  metrics: PyTree  # name -> `Metric`; a `compensated.Total` on a device
  weight: PyTree  # shape=(), float32; the same
  logged: PyTree = ()  # of the updates in the log, by weight


class PerClient(NamedTuple):
  """Per client, (waves, lanes, ...)."""

  state: PyTree
  status: Array
  weight: Array
  values: dict[str, Array]
  log: Entry | tuple[()] | dict[str, Array] = ()


def per_client(outcome: ClientOutcome) -> PerClient:
  """Return what a round keeps of every client."""
  report = outcome.report
  return PerClient(
    outcome.kept, outcome.status, report.weight, report.values, outcome.log
  )


def ranks(cohort: Cohort, mesh: Mesh) -> tuple[Array, Array]:
  """Every slot's client's place in the order of ids, and how many there are.

  Empty slots come after them.
  """
  whole = NamedSharding(mesh, P())
  client = lax.with_sharding_constraint(cohort.client, whole)
  there = client.ravel() >= 0
  last = jnp.iinfo(client.dtype).max
  order = jnp.argsort(jnp.where(there, client.ravel(), last))
  seat = jnp.argsort(order).astype(jnp.int32).reshape(client.shape)
  return seat, jnp.sum(there, dtype=jnp.int32)


def cohort_members(cohort: Cohort, kept: PerClient, mesh: Mesh) -> Members:
  """The clients of all devices, in the order of a stack's rows.

  Whole on every device, so that sums over them have one order.
  """
  whole = NamedSharding(mesh, P())
  flat = lambda x: lax.with_sharding_constraint(x, whole).ravel()
  present = flat(kept.status == ClientStatus.PRESENT)
  shown = lambda x: jnp.where(present, flat(x), 0)
  return Members(
    id=flat(cohort.client),
    present=present,
    weight=shown(kept.weight),
    values=jax.tree.map(shown, kept.values),
  )


def write_rows(table: PyTree, client: Array, kept: PerClient) -> PyTree:
  """Writes present clients' rows; others' go to a row beyond the table."""

  def write(path: Any, rows: Array, new: Array) -> Array:
    if new.dtype != rows.dtype or new.shape[3:] != rows.shape[1:]:
      raise TypeError(
        f"Client state {jax.tree_util.keystr(path)} was {rows.dtype}"
        f"{rows.shape[1:]} and is reported as {new.dtype}{new.shape[3:]}; keep"
        " dtype and shape."
      )
    present = kept.status == ClientStatus.PRESENT
    where = jnp.where(present, client, rows.shape[0])
    return rows.at[where].set(new, mode="drop")

  return jax.tree_util.tree_map_with_path(write, table, kept.state)
