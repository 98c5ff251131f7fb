"""FedRep: clients fit their own heads first, then the shared representation.

Collins et al. 2021, "Exploiting shared representations for personalized
federated learning" (arXiv 2102.07078), algorithm 1. In a round client i makes
steps on its head h_i alone, with the representation phi as the server sent it,
and then steps on phi alone, with the new h_i; the server averages the phi.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fedjax_sim.algorithms.private_parameters import (
  Private,
  own_model,
  private_parameters,
  split_variables,
)
from fedjax_sim.core import (
  Algorithm,
  Client,
  Examples,
  Key,
  Loss,
  PyTree,
  Report,
  Task,
  Variables,
  validate,
)
from fedjax_sim.training.local import (
  Following,
  LocalState,
  following,
  local_training,
)
from fedjax_sim.training.optimizers import Optimizer

MOST_EPOCHS = 10_000  # in one round


def fedrep(
  task: Task,
  client_optimizer: Optimizer,
  server_optimizer: Optimizer,
  *,
  private: Sequence[str],
  head_epochs: int = 10,
  weighting: str = "examples",
) -> Algorithm:
  """Return FedAvg of the body, before which each client fits its own head.

  The reported loss is that of the body's steps.

  Args:
    task: what clients train.
    client_optimizer: of heads and body, one after the other; starts anew for
      each.
    server_optimizer: of the body; sgd with learning rate 1 takes the mean.
    private: patterns of the head, such as `("head/",)`.
    head_epochs: epochs of a round that train the head, from 1 to 10,000; the
      run's epochs, or steps, are those of the body.
    weighting: as in `fedavg`.

  Raises:
    TypeError, ValueError: a pattern is none or matches nothing, or one of head
      and body has no parameter; head_epochs is out of range.
  """
  validate.integer("head_epochs", head_epochs, le=MOST_EPOCHS)
  split = split_variables(task, private)
  if not any(split.params.private):
    raise ValueError(
      f"algorithm.private={tuple(private)!r} holds no parameter, and"
      " algorithm.name='fedrep' trains the head by itself; add a pattern of the"
      " head, or take algorithm.name='fedper'."
    )
  base = private_parameters(
    task,
    client_optimizer,
    server_optimizer,
    private=private,
    weighting=weighting,
  )

  def head_of(client: Client) -> Variables:
    _, buffers, rest = own_model(split, client)
    return Variables(
      client.state.params, buffers, (client.message.params, rest)
    )

  def body_of(client: Client) -> Variables:
    _, buffers, rest = own_model(split, client)
    return Variables(
      client.message.params, buffers, (client.state.params, rest)
    )

  head = local_training(
    _of_part(task, lambda own, other: split.params.joined(other, own)),
    client_optimizer,
    get_model=head_of,
  )
  body = local_training(
    _of_part(task, split.params.joined),
    client_optimizer,
    weighting=weighting,
    get_model=body_of,
  )

  def with_head(client: Client, fitted: Variables) -> Client:
    """Return the client after its steps on the head."""
    state = Private(fitted.params, split.buffers.part(fitted.buffers, True))
    shared = split.buffers.part(fitted.buffers, False)
    message = client.message._replace(buffers=shared)
    return client._replace(state=state, message=message)

  def finish(client: Client, fitted: LocalState, carry: Following) -> Report:
    del fitted
    report = body.finish(with_head(client, carry.known), carry.carry)
    buffers = carry.carry.buffers
    return report._replace(
      buffers=split.buffers.part(buffers, False),
      state=Private(carry.known.params, split.buffers.part(buffers, True)),
    )

  return base._replace(
    passes=(
      head.local_pass._replace(epochs=head_epochs, tokens=None),
      following(
        body.local_pass,
        lambda client, fitted: Variables(fitted.params, fitted.buffers),
        with_head,
      ),
    ),
    finish=finish,
  )


def _of_part(task: Task, joined: Callable[[PyTree, PyTree], PyTree]) -> Task:
  """Return the task of some parameters; the others are frozen.

  Args:
    task: of all parameters.
    joined: (those that train, the others) -> all of them. `Variables.frozen` is
      a pair, the others and what is frozen of the task.
  """

  def loss(variables: Variables, examples: Examples, key: Key) -> Loss:
    params, buffers, (others, rest) = variables
    whole = Variables(joined(params, others), buffers, rest)
    return task.loss(whole, examples, key)

  return task._replace(loss=loss)
