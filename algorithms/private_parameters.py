"""Shared and private variables: what FedPer, FedRep, FedBN and LG-FedAvg share.

Patterns on paths, as those of `model.frozen`, say which variables of a model
are a client's own. They are its state, and never leave it: the server sends,
and clients report, only the shared ones. Before a buffer's path is `buffers/`,
such as `buffers/norm/mean`.

All clients begin with the same private variables, those of the initial model.
They are evaluated with their own, beside the current shared ones. The global
model, with which clients are evaluated that never train, has the initial ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from fedjax_sim.algorithms.fedavg import ServerState, fedavg
from fedjax_sim.core import (
  Algorithm,
  Client,
  HParams,
  Key,
  PyTree,
  Report,
  Task,
  Variables,
)
from fedjax_sim.core.tree import paths_of
from fedjax_sim.tasks.freezing import BUFFERS, matching_paths
from fedjax_sim.training.local import LocalState
from fedjax_sim.training.optimizers import Optimizer


class Private(NamedTuple):
  """Private variables, in the trees of all; None for the shared ones."""

  params: PyTree
  buffers: PyTree


class Kept(NamedTuple):
  """What is frozen of the model that the server sends.

  Attributes:
    private: the initial private variables, which clients have from the start.
    rest: what is frozen of the task.
  """

  private: Private
  rest: PyTree


class Half(NamedTuple):
  """Which leaves of a tree are private."""

  treedef: Any
  private: tuple[bool, ...]

  def part(self, tree: PyTree, private: bool) -> PyTree:
    """Return the private, or the shared leaves; None for the others."""
    leaves = zip(self.treedef.flatten_up_to(tree), self.private, strict=True)
    kept = [x if hit == private else None for x, hit in leaves]
    return jax.tree.unflatten(self.treedef, kept)

  def joined(self, shared: PyTree, private: PyTree) -> PyTree:
    """Return the tree of these parts."""
    own, others = map(iter, (jax.tree.leaves(private), jax.tree.leaves(shared)))
    leaves = [next(own if hit else others) for hit in self.private]
    return jax.tree.unflatten(self.treedef, leaves)


class Split(NamedTuple):
  """Which variables of a model are private."""

  params: Half
  buffers: Half

  def private(self, params: PyTree, buffers: PyTree) -> Private:
    """Return the private ones of all parameters and buffers."""
    return Private(
      self.params.part(params, True), self.buffers.part(buffers, True)
    )

  def sent(self, variables: Variables) -> Variables:
    """Return the shared variables, as the server keeps and sends them."""
    params, buffers, frozen = variables
    return Variables(
      self.params.part(params, False),
      self.buffers.part(buffers, False),
      Kept(self.private(params, buffers), frozen),
    )

  def joined(self, sent: Variables, private: Private) -> Variables:
    """Return the task's variables."""
    params, buffers, kept = sent
    return Variables(
      self.params.joined(params, private.params),
      self.buffers.joined(buffers, private.buffers),
      kept.rest,
    )


def split_variables(task: Task, patterns: Sequence[str]) -> Split:
  """Return which variables of a task's model are private.

  Args:
    task: what clients train.
    patterns: patterns of the private variables.

  Raises:
    TypeError, ValueError: a pattern is none or matches nothing; nothing is
      private, or no parameter is shared.
  """
  field = "algorithm.private"
  shapes = jax.eval_shape(task.init, jax.random.key(0))
  names = paths_of(shapes.params)
  count = len(names)
  names += [BUFFERS + path for path in paths_of(shapes.buffers)]
  hits = matching_paths(field, patterns, names, "variable")
  told = f"{field}={tuple(patterns)!r}"
  if not any(hits):
    raise ValueError(
      f"{told} keeps nothing private; give a pattern of some of"
      f" {', '.join(names)}, or take algorithm.name='fedavg'."
    )
  if all(hits[:count]):
    raise ValueError(
      f"{told} leaves no parameter to share; leave one out of"
      f" {', '.join(names[:count])}."
    )
  return Split(
    Half(jax.tree.structure(shapes.params), tuple(hits[:count])),
    Half(jax.tree.structure(shapes.buffers), tuple(hits[count:])),
  )


def own_model(split: Split, client: Client) -> Variables:
  """Return the variables of a client: the shared ones, and its own."""
  return split.joined(client.message, client.state)


def private_parameters(
  task: Task,
  client_optimizer: Optimizer,
  server_optimizer: Optimizer,
  *,
  private: Sequence[str],
  weighting: str = "examples",
) -> Algorithm:
  """Return FedAvg some of whose variables stay with the clients.

  Clients train all variables together, in the same steps.

  Args:
    task: what clients train.
    client_optimizer: of all variables; starts anew in every round.
    server_optimizer: of the shared ones; sgd with learning rate 1 takes the
      clients' mean.
    private: patterns of the private variables.
    weighting: as in `fedavg`.

  Raises:
    TypeError, ValueError: see `split_variables`.
  """
  split = split_variables(task, private)
  base = fedavg(
    task,
    client_optimizer,
    server_optimizer,
    weighting=weighting,
    get_model=lambda client: own_model(split, client),
  )

  def init(key: Key, hparams: HParams) -> ServerState:
    sent = split.sent(task.init(key))
    optimizer = server_optimizer.build(hparams["server"])
    return ServerState(sent, optimizer.init(sent.params))

  def finish(client: Client, carry: LocalState) -> Report:
    report = base.finish(client, carry)
    return report._replace(
      update=split.params.part(report.update, False),
      buffers=split.buffers.part(report.buffers, False),
      state=split.private(carry.params, carry.buffers),
    )

  return base._replace(
    init=init,
    finish=finish,
    variables=lambda server: split.joined(
      server.variables, server.variables.frozen.private
    ),
    with_model=lambda server, variables: server._replace(
      variables=split.sent(variables)
    ),
    client_init=lambda server, hparams: server.variables.frozen.private,
    personal=split.joined,
  )
