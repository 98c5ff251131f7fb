"""What a branch takes over of its origin's state, and what begins anew.

A part of the state is taken over where the branch has one of the same shape
that means the same: it belongs to the same component, and rests on the same
data and metrics.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from fedjax_sim import config as configs
from fedjax_sim.config.build import SCHEDULED
from fedjax_sim.core import PyTree, Variables
from fedjax_sim.engine.client_rows import StoredRows
from fedjax_sim.engine.state import MonitorState, RunState
from fedjax_sim.run.client_states import FOLDER
from fedjax_sim.run.workdir import ConfigChangedError
from fedjax_sim.simulation.simulator import Simulator

_TRANSFORMS = r"transforms\.(order|.*\.(name|error_feedback|ef21))"
# The data are compared themselves, and the first weights are long gone.
_MEASURED = (
  r"data\.(?!path$|lookup$|label_lookup$).*"
  r"|model\.(?!initial$|initial_only$).*"
)


class Side(NamedTuple):
  """One of two runs: a branch, or its origin.

  Attributes:
    simulator: of the run.
    fields: "section.field" -> its value as JSON holds it; a user's own code by
      its content, so that a file is the same wherever it lies.
    folder: the workdir; None if it is not read.
  """

  simulator: Simulator
  fields: Mapping[str, Any]
  folder: Path | None = None

  def matching(self, pattern: str) -> dict[str, Any]:
    """Return the fields whose names match a regular expression."""
    return {k: v for k, v in self.fields.items() if re.fullmatch(pattern, k)}

  @property
  def is_personal(self) -> bool:
    """Whether clients have models of their own, of which `seen/` tells."""
    return self.simulator.algorithm.personal is not None


def fields_by_content(
  resolved: Mapping[str, Any], sources: Mapping[str, str]
) -> dict[str, Any]:
  """Return `Side.fields`.

  Args:
    resolved: the config, complete, as JSON holds it.
    sources: "section.field" -> what a user's own code is, by its content.
  """
  fields = dict(configs.fields_of(ConfigDict(dict(resolved))))
  return {**fields, **{k: v for k, v in sources.items() if k in fields}}


def after_end(old: RunState, origin: Side) -> RunState:
  """Return the state after a run's end as if the run went on.

  Args:
    old: of the origin after its last round, on the host.
    origin: whose `server.revert_to_best` may go on with the best model.
  """
  react = origin.simulator.react
  on_host = dataclasses.replace(react, copied=lambda server: server)
  return on_host.continued(old)


def grafted(
  old: RunState, fresh: RunState, origin: Side, branch: Side, same_data: bool
) -> tuple[RunState, list[str]]:
  """Return the fresh state with what fits of the old one, and what did not.

  Args:
    old: of the origin, on the host.
    fresh: before the branch's first round, on the host.
    origin: the run that it branches from.
    branch: the branch.
    same_data: whether both train on the same data.

  Raises:
    ConfigChangedError: the model is another one, or the branch's algorithm
      cannot begin with it.
  """
  graft = Graft(origin, branch, same_data)
  same = graft.keeps
  server = old.server
  if not _alike(server, fresh.server):
    graft.missing.append("the server's state")
    server = _with_model(old, fresh, origin.simulator, branch.simulator)
  whole = fresh._replace(
    server=server,
    clients=graft.clients(old.clients, fresh.clients),
    shared=graft.take(
      "the states of transforms", old.shared, fresh.shared, same(_TRANSFORMS)
    ),
    sampler=graft.take(
      "the sampler's state",
      old.sampler,
      fresh.sampler,
      same_data and same(r"sampler\.name"),
    ),
    watch=graft.watch(old.watch, fresh.watch),
    aggregate=graft.take(
      "the aggregator's last result",
      old.aggregate,
      fresh.aggregate,
      same(r"aggregator\.name"),
    ),
  )
  return whole, graft.missing


@dataclasses.dataclass
class Graft:
  """What is decided as a branch takes over its origin's state.

  Attributes:
    origin: the run that it branches from.
    branch: the branch.
    same_data: whether both train on the same data.
    missing: what begins anew, in words.
  """

  origin: Side
  branch: Side
  same_data: bool
  missing: list[str] = dataclasses.field(default_factory=list)

  def take(self, words: str, old: PyTree, fresh: PyTree, same: bool) -> PyTree:
    """Return the old part if it fits and means the same, else the fresh one."""
    if same and _alike(old, fresh):
      return old
    if jax.tree.leaves(old) or jax.tree.leaves(fresh):
      self.missing.append(words)
    return fresh

  def clients(self, old: PyTree, fresh: PyTree) -> PyTree:
    """Return what clients keep, as far as the branch can go on with it.

    Raises:
      ConfigChangedError: one run's rows are on the disk, the other's are not.
    """
    stored = isinstance(old, StoredRows), isinstance(fresh, StoredRows)
    if stored[0] != stored[1]:
      before, now = ("disk" if x else "device" for x in stored)
      raise ConfigChangedError(
        f"--branch-from: the origin's client states are on the {before}, the"
        f" branch's on the {now}; give runtime.state_residency={before!r}."
      )

    def taken(old: PyTree, fresh: PyTree) -> PyTree:
      (own_before, sent_before), (own, sent) = old, fresh
      own = self.take(
        "the clients' states",
        own_before,
        own,
        self.same_data and self.keeps(r"algorithm\.name"),
      )
      sent = self.take(
        "what transforms keep of clients",
        sent_before,
        sent,
        self.same_data and self.keeps(_TRANSFORMS),
      )
      return own, sent

    if not stored[0]:
      return taken(old, fresh)
    first = taken(old.initial, fresh.initial)
    kept = [a is b for a, b in zip(first, old.initial, strict=True)]
    many = lambda x, count: np.broadcast_to(x, (count, *np.shape(x)))

    def rows(read: PyTree, count: int) -> PyTree:
      return tuple(
        part if same else jax.tree.map(lambda x: many(x, count), new)
        for part, same, new in zip(read, kept, first, strict=True)
      )

    if not any(kept):
      return fresh
    store, folder = self.branch.simulator.states.rows, self.origin.folder
    assert store is not None
    assert folder is not None
    return store.imported(folder / FOLDER, old, rows)

  def keeps(self, pattern: str) -> bool:
    """Return whether fields have the same values in both runs."""
    return self.origin.matching(pattern) == self.branch.matching(pattern)

  def measures(self, metric: str) -> bool:
    """Return whether both runs mean the same by a metric."""
    same = self.same_data and self.keeps(_MEASURED)
    sides = self.origin, self.branch
    if metric.startswith("seen/") and any(side.is_personal for side in sides):
      return same and self.keeps(r"algorithm\..*")
    return same

  def watch(self, old: MonitorState, fresh: MonitorState) -> MonitorState:
    """Return what evaluations left, as far as the branch can go on with it."""
    field = {name: f"{section}.schedule" for section, name in SCHEDULED.items()}
    schedules, best = {}, {}
    for name, schedule in self.branch.simulator.react.schedules.items():
      follows = schedule.metric is None or self.measures(schedule.metric)
      schedules[name] = self.take(
        f"what the schedule of {name} has seen",
        old.schedules.get(name, ()),
        fresh.schedules[name],
        follows and self.keeps(re.escape(field[name])),
      )
    for metric, none in fresh.best.items():
      best[metric] = self.take(
        f"the best model by {metric}",
        old.best.get(metric, ()),
        none,
        self.measures(metric),
      )
    return MonitorState(schedules, best)


def _alike(a: PyTree, b: PyTree) -> bool:
  """Return whether two trees have the same structure, shapes and dtypes."""
  kinds = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
  structures = jax.tree.structure(a), jax.tree.structure(b)
  return len({*structures}) == 1 and kinds(a) == kinds(b)


def _with_model(
  old: RunState, fresh: RunState, before: Simulator, now: Simulator
) -> PyTree:
  """Return the fresh server state, with the model of the old one."""
  model: Variables = before.algorithm.variables(old.server)
  wanted = now.algorithm.variables(fresh.server)
  if not _alike(model._replace(frozen=()), wanted._replace(frozen=())):
    raise ConfigChangedError(
      "--branch-from: the model is another one than the branch's; begin from"
      " some of its weights, by model.initial of what `fedjax-sim export`"
      " writes."
    )
  if now.algorithm.with_model is None:
    raise ConfigChangedError(
      "--branch-from: the branch's algorithm cannot go on with another one's"
      " model; begin from its weights, by model.initial of what `fedjax-sim"
      " export` writes."
    )
  changed = now.algorithm.with_model(fresh.server, model)
  server: PyTree = jax.device_get(changed)
  return server
