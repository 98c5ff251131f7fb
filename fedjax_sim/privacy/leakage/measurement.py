"""What a client's update gives away, as the client itself measures it.

After FLUTE's practical epsilon (arXiv 2203.13789), which is a ratio of
log-probabilities instead. After its local work a client measures how far its
own model has moved from the server's on the examples that it trained on. For an
example with input x and label y, of which p is the probability under a model,

    leakage = |log p_after(y | x) - log p_before(y | x)|

in nats, for a text the mean over its words. Its exponential is the factor by
which training on the client has made its data more likely, or less: the form of
differential privacy's epsilon (Dwork et al. 2006), but for one outcome, that
was seen. It is a measurement, not a bound: nothing is guaranteed about other
data, or other attacks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_sim.core import (
  Algorithm,
  Array,
  Batch,
  Client,
  Examples,
  HParams,
  Key,
  Metric,
  Pass,
  PyTree,
  Report,
  Task,
  Variables,
  compensated,
  validate,
)
from fedjax_sim.core.compensated import Total
from fedjax_sim.engine.traffic import report_shapes
from fedjax_sim.privacy.leakage.words import guessed, words_in
from fedjax_sim.tasks.freezing import matching
from fedjax_sim.training.local import metric, zero_metric
from fedjax_sim.training.wrappers import unwrap_client, wrap_algorithm

STATISTICS = ("max", "mean")


def log_ratio(
  task: Task, before: Variables, after: Variables, examples: Examples
) -> Array:
  """Return |log p_after - log p_before| of every example, in nats.

  Args:
    task: its metric `loss` is the negative logarithm of a probability: the
      cross-entropy of a class, or that of a text, by word.
    before: a model.
    after: another one.
    examples: field -> (batch, ...).

  Returns:
    shape=(batch,), float; 0 of an example that has no weight.

  Raises:
    ValueError: the task has no metric `loss`.
  """

  def loss(variables: Variables) -> tuple[Array, Array]:
    metrics = task.metrics(variables, examples)
    if "loss" not in metrics:
      raise ValueError(
        "statistic needs a task with the metric 'loss'; there are"
        f" {', '.join(metrics)}."
      )
    total, weight = metrics["loss"]
    return total / jnp.where(weight > 0, weight, 1), weight

  (old, weight), (new, _) = loss(before), loss(after)
  return jnp.where(weight > 0, jnp.abs(new - old), 0)


class Measured(NamedTuple):
  """A client's carry through the examples that it has trained on.

  Attributes:
    report: what it is going to send, before transforms.
    worst: shape=(); the largest leakage of an example so far.
    total: of all examples so far, and how many they are; see `local.metric`.
    words: shape=(size,), bool; the client's words; () if nobody asks.
  """

  report: Report
  worst: Array
  total: Total
  words: PyTree


class Own(NamedTuple):
  """A client's state, and which words it has, until it sends its report."""

  state: PyTree
  words: PyTree


def measured(
  algorithm: Algorithm, task: Task, statistic: str, embedding: str | None
) -> Algorithm:
  """Return the algorithm whose clients report what their updates give away.

  The value and metric `leakage` is of the model that the client's update makes
  of the one it received, before transforms. It costs a further walk over the
  client's examples, forwards, with two models.

  With an `embedding` there are the value and metric `words_recovered`: the
  share of the client's different words that `words.guessed` names from the
  update as transforms leave it; and the metric `words_by_chance`, what naming
  as many words blindly would give.

  Args:
    algorithm: its clients receive a model and send that model's update.
    task: what they train; see `log_ratio`.
    statistic: of a client's examples: `max` or `mean`.
    embedding: pattern of the parameter, shape=(size, dimensions), whose rows
      belong to the ids in the examples' field "x".

  Raises:
    TypeError, ValueError: an unknown statistic, a pattern that does not match
      one matrix, or an algorithm that this does not fit.
  """
  validate.one_of("statistic", statistic, STATISTICS)
  if algorithm.requirements.groups > 1:
    raise ValueError(
      f"statistic={statistic!r} measures what one model's updates leak, and"
      " algorithm.name has a model for each group of clients; take another"
      " algorithm, or unset it."
    )
  if algorithm.requirements.pools_data:
    raise ValueError(
      f"statistic={statistic!r} measures clients, and algorithm.name"
      " pools the data of all; take another algorithm, or unset it."
    )
  if algorithm.privacy is not None:
    raise ValueError(
      "The algorithm is private already, and hides its clients' updates; put"
      " the measurement inside: central(leakage(...), ...)."
    )
  if algorithm.survey is not None:
    raise ValueError(
      f"statistic={statistic!r} measures what updates leak, and algorithm.name"
      " has clients answer a survey, too, which is not measured; take another"
      " algorithm, or unset it."
    )
  leaf, size = (None, 0) if embedding is None else _find(embedding, task)
  walked = len(algorithm.passes)

  def start(client: Client, *carries: PyTree) -> Measured:
    report = algorithm.finish(unwrap_client(algorithm, client), *carries)
    zero = jnp.zeros((), jnp.float32)
    words = () if leaf is None else jnp.zeros(size, bool)
    return Measured(report, zero, zero_metric(), words)

  def step(client: Client, carry: Measured, batch: Batch, key: Key) -> Measured:
    del key
    before = _model(client.message)
    after = before._replace(
      params=jax.tree.map(jnp.add, before.params, carry.report.update),
      buffers=carry.report.buffers,
    )
    gaps = log_ratio(task, before, after, batch.examples)
    gaps = jnp.where(batch.mask, gaps, 0).astype(jnp.float32)
    words = carry.words
    if leaf is not None:
      words = words | words_in(batch.examples["x"], batch.mask, size)
    count = jnp.sum(batch.mask, dtype=jnp.float32)
    return Measured(
      carry.report,
      jnp.maximum(carry.worst, jnp.max(gaps)),
      compensated.add(carry.total, Metric(jnp.sum(gaps), count)),
      words,
    )

  def finish(client: Client, *carries: PyTree) -> Report:
    del client
    last: Measured = carries[walked]
    total, weight = metric(last.total)
    mean = total / jnp.maximum(weight, 1)
    value = last.worst if statistic == "max" else mean
    one = jnp.ones((), jnp.float32)
    return last.report._replace(
      state=Own(last.report.state, last.words),
      values={**last.report.values, "leakage": value},
      metrics={**last.report.metrics, "leakage": Metric(value, one)},
    )

  def postprocess_report(
    client: Client, report: Report, inner: Callable[[Report], Report]
  ) -> Report:
    del client
    own: Own = report.state
    values, metrics = dict(report.values), dict(report.metrics)
    if leaf is not None:
      rows = jax.tree.leaves(report.update)[leaf]
      known = jnp.sum(own.words)
      right = jnp.sum(guessed(rows, known) & own.words).astype(jnp.float32)
      count = known.astype(jnp.float32)
      values["words_recovered"] = right / jnp.maximum(count, 1)
      metrics["words_recovered"] = Metric(right, count)
      metrics["words_by_chance"] = Metric(count**2 / (size - 1), count)
    return inner(
      report._replace(state=own.state, values=values, metrics=metrics)
    )

  split = algorithm.passes[0].split
  return wrap_algorithm(
    algorithm,
    check=functools.partial(_check, algorithm),
    passes=(Pass(start, step, split, epochs=1, augmented=False),),
    finish=finish,
    postprocess_report=postprocess_report,
  )


def _model(message: PyTree) -> PyTree:
  """Return the model in what a client receives; None: there is none."""
  if isinstance(message, Variables):
    return message
  return getattr(message, "variables", None)


def _find(pattern: str, task: Task) -> tuple[int, int]:
  """Return the embedding's index among parameters, and its number of rows."""
  params = jax.eval_shape(task.init, jax.random.key(0)).params
  hits = matching("leakage.embedding", (pattern,), params)
  shapes = [x.shape for x in jax.tree.leaves(params)]
  found = [i for i, hit in enumerate(hits) if hit]
  if len(found) > 1 or len(shapes[found[0]]) != 2:
    named = ", ".join(str(shapes[i]) for i in found)
    raise ValueError(
      f"leakage.embedding={pattern!r} matches parameters of shape {named}; let"
      " it match one, of shape (ids, dimensions)."
    )
  return found[0], shapes[found[0]][0]


def _check(algorithm: Algorithm, server: PyTree, hparams: HParams) -> None:
  """Refuse clients that do not send the update of the model they receive."""
  zero = jnp.zeros((), jnp.int32)
  message = algorithm.download(algorithm.broadcast(server), zero, zero)
  model = _model(message)
  update = report_shapes(algorithm, server, hparams).update
  structure: Any = jax.tree.structure
  if model is None or structure(model.params) != structure(update):
    raise ValueError(
      "leakage.statistic: clients of algorithm.name do not send the update of"
      " the model that they receive; take another algorithm, or unset it."
    )
