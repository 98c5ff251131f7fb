"""What travels between server and clients, in bytes, before transforms."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_sim.core import (
  Algorithm,
  Client,
  HParams,
  Pass,
  Purpose,
  PyTree,
  Report,
  Variables,
  key_for,
  noise_key_for,
)
from fedjax_sim.core.tree import nbytes, zeros_accumulator
from fedjax_sim.engine.state import RunState


class Traffic(NamedTuple):
  """Bytes between the server and one client in a round.

  Attributes:
    down: that the client receives.
    up: that it sends.
    update: those of `up` that are the update's.
    message: those of `down` that are the first message's; in the others are the
      answers to a survey.
    population: how many clients receive a broadcast that goes to all.
    links: `Algorithm.links`, which the sizes above are multiplied by.
    coded: whether an update is sent as transforms say.
  """

  down: int
  up: int
  update: int
  message: int
  population: int
  links: float
  coded: bool


def first_client(
  algorithm: Algorithm, state: RunState, hparams: HParams
) -> tuple[Client, PyTree, tuple[PyTree, ...]]:
  """Client 0 before any step; its transforms' own states; its carries.

  Args:
    algorithm: what it does.
    state: a state.
    hparams: `Algorithm.hparams`.
  """
  own, transforms = jax.tree.map(lambda x: x[0], state.clients)
  client, carries = _begin(algorithm, state.server, own, hparams)
  return client, transforms, carries


def surveyed_client(
  algorithm: Algorithm, state: RunState, hparams: HParams
) -> tuple[Client, tuple[PyTree, ...], Report | None]:
  """Client 0 before any step of the survey; its carries; its answer.

  The arguments are those of `first_client`. Without a survey there are no
  carries, and there is no answer.
  """
  own, _ = jax.tree.map(lambda x: x[0], state.clients)
  message = algorithm.broadcast(state.server)
  return _survey(algorithm, message, own, hparams)


def _begin(
  algorithm: Algorithm, server: PyTree, own: PyTree, hparams: HParams
) -> tuple[Client, tuple[PyTree, ...]]:
  """Return a client that keeps `own`, before any step, and its carries."""
  message = algorithm.broadcast(server)
  _, _, answer = _survey(algorithm, message, own, hparams)
  if algorithm.survey is not None and answer is not None:
    mean = zeros_accumulator(answer.statistics)
    message = algorithm.survey.message(message, mean)
  return _start(algorithm, algorithm.passes, message, own, hparams)


def _survey(
  algorithm: Algorithm, message: PyTree, own: PyTree, hparams: HParams
) -> tuple[Client, tuple[PyTree, ...], Report | None]:
  """Return a client before any step of the survey, its carries, its answer."""
  survey = algorithm.survey
  passes = () if survey is None else survey.passes
  client, carries = _start(algorithm, passes, message, own, hparams)
  answer = None if survey is None else survey.finish(client, *carries)
  return client, carries, answer


def _start(
  algorithm: Algorithm,
  passes: tuple[Pass, ...],
  message: PyTree,
  own: PyTree,
  hparams: HParams,
) -> tuple[Client, tuple[PyTree, ...]]:
  """Return a client that gets the message, and its carries of the passes."""
  zero = jnp.zeros((), jnp.int32)
  client = Client(
    message=algorithm.download(message, zero, zero),
    state=own,
    hparams=hparams,
    id=zero,
    version=zero,
    num_examples=zero,
    num_steps=jnp.zeros((len(passes),), jnp.int32),
    round=zero,
    key=key_for(0, Purpose.CLIENT),
    noise_key=noise_key_for(jnp.zeros(2, jnp.uint32), Purpose.CLIENT),
  )
  carries: tuple[PyTree, ...] = ()
  for walked in passes:
    carries += (walked.start(client, *carries),)
  return client, carries


def report_shapes(
  algorithm: Algorithm, server: PyTree, hparams: HParams
) -> Report:
  """Return shapes and dtypes of what a client reports, after postprocessing.

  Args:
    algorithm: what it does.
    server: a server state, or its shapes.
    hparams: `Algorithm.hparams`, or their shapes.
  """

  def visit(server: PyTree, hparams: HParams) -> Report:
    own = algorithm.client_init(server, hparams)
    client, carries = _begin(algorithm, server, own, hparams)
    report = algorithm.finish(client, *carries)
    return algorithm.postprocess_report(client, report)

  shapes: Report = jax.eval_shape(visit, server, hparams)
  return shapes


def numbers_sent(algorithm: Algorithm, server: PyTree, hparams: HParams) -> int:
  """Return how many numbers a client sends as its update.

  More than the model has parameters where an update is a statistic, such as a
  histogram. Under central privacy with all that is released beside the update.
  The arguments are those of `report_shapes`.
  """
  report = report_shapes(algorithm, server, hparams)
  return sum(x.size for x in jax.tree.leaves(report.update))


def update_shapes(
  algorithm: Algorithm, server: PyTree, hparams: HParams
) -> PyTree:
  """Return shapes and dtypes of what transforms get: a client's update.

  The arguments are those of `report_shapes`.
  """

  def visit(server: PyTree, hparams: HParams) -> PyTree:
    own = algorithm.client_init(server, hparams)
    client, carries = _begin(algorithm, server, own, hparams)
    return algorithm.finish(client, *carries).update

  return jax.eval_shape(visit, server, hparams)


def traffic(
  algorithm: Algorithm,
  state: RunState,
  hparams: HParams,
  population: int = 1,
  number_bits: int | None = None,
) -> Traffic:
  """Return what one client receives and sends in a round, before transforms.

  What is frozen of a model does not count: clients have had it from the start.

  Args:
    algorithm: what it does.
    state: a state, or its shapes.
    hparams: `Algorithm.hparams`, or their shapes.
    population: number of clients in the federation; only `Traffic.population`
      depends on it.
    number_bits: `Aggregator.number_bits`.
  """

  def visit(
    state: RunState, hparams: HParams
  ) -> tuple[PyTree, PyTree, Report, Report | None]:
    asked, _, answer = surveyed_client(algorithm, state, hparams)
    client, _, carries = first_client(algorithm, state, hparams)
    report = algorithm.finish(client, *carries)
    report = report._replace(state=(), metrics={})
    return asked.message, client.message, report, answer

  first, second, report, answer = jax.eval_shape(visit, state, hparams)
  message = down = message_bytes(first)
  up, update = nbytes(report), nbytes(report.update)
  if number_bits is not None:
    numbers = sum(x.size for x in jax.tree.leaves(report.update))
    whole = -(-numbers * number_bits // 8)
    up, update = up - update + whole, whole
  if answer is not None:  # the second message has what the first one had
    down = max(down, message_bytes(second))
    up += nbytes((answer.weight, answer.statistics))
  times = lambda size: round(algorithm.links * size)
  return Traffic(
    down=times(down),
    up=times(up),
    update=times(update),
    message=times(message),
    population=population,
    links=algorithm.links,
    coded=number_bits is None and not algorithm.sends_whole,
  )


def message_bytes(message: PyTree) -> int:
  """Return the size of a message without what is frozen of models.

  Args:
    message: arrays or their shapes, and models as `Variables`.
  """
  sent = [
    x._replace(frozen=()) if _is_model(x) else x
    for x in jax.tree.leaves(message, is_leaf=_is_model)
  ]
  return nbytes(sent)


def _is_model(part: PyTree) -> bool:
  return isinstance(part, Variables)
