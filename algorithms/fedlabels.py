"""FedLabels: clients that have labels for only a few of their examples.

Cho, Joshi and Dimitriadis 2023, "Local or global: Selective knowledge
assimilation for federated learning with limited labels" (arXiv 2307.08809), as
FLUTE (arXiv 2203.13789) has it. In every round a client trains two copies of
the model that it receives: one on its labelled examples, and then one on its
unlabelled ones. There the received model and the client's supervised one vote;
for each example the more certain of the two gives the pseudo label, if it is
confident enough. A step's loss is

    unsup_weight * cross-entropy(strongly augmented example, pseudo label)
    + consistency_weight * certainty ratio * KL(supervised || unsupervised)
    + l2 * mean squared distance to what was received

where the second term is a mean over the examples that both models give the same
label. The server takes the plain mean of the supervised models and the mean of
the unsupervised ones by number of pseudo labels, and half of each. That weight
is FLUTE's: as in FedAvg, a model counts by the examples that it was trained on,
and those of the unsupervised one are the pseudo-labelled ones.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fedjax_sim import core
from fedjax_sim.algorithms.fedavg import ServerState, fedavg
from fedjax_sim.core import (
  Aggregate,
  Algorithm,
  Array,
  Batch,
  Client,
  Context,
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
from fedjax_sim.core.tree import in_dtype
from fedjax_sim.data.augment import augment
from fedjax_sim.training.local import (
  LocalState,
  difference,
  metric,
  zero_metric,
)
from fedjax_sim.training.optimizers import Optimizer, descend
from fedjax_sim.training.pseudo_labels import (
  COMPARISONS,
  PseudoLabels,
  pseudo_labels,
)
from fedjax_sim.training.wrappers import wrap_algorithm

MOST_STEPS = 2**20  # of a pass; an int32 has to count a round's examples


class Pair(NamedTuple):
  """Something of the supervised model, and the same of the unsupervised one."""

  supervised: PyTree
  unsupervised: PyTree


class Unlabelled(NamedTuple):
  """A client's carry through its unlabelled examples."""

  params: PyTree
  buffers: PyTree
  optimizer: PyTree
  supervised: Variables  # what the labelled examples made
  pseudo: Total  # how many examples got a pseudo label, of how many


class WithMeans(NamedTuple):
  """A server that keeps the last round's means."""

  server: ServerState
  means: Pair  # of `Variables` without the frozen ones


def fedlabels(
  task: Task,
  client_optimizer: Optimizer,
  server_optimizer: Optimizer,
  *,
  burn_in: int = 50,
  threshold: float = 0.3,
  temperature: float = 1.0,
  unsup_weight: float = 1.0,
  consistency_weight: float = 0.05,
  l2: float = 10.0,
  magnitude: float = 0.5,
  comparison: str = "variance",
  flip: bool = False,
  labelled_steps: int | None = None,
  unlabelled_steps: int | None = None,
  unlabelled_rate: float | None = None,
  evaluate_means: bool = False,
) -> Algorithm:
  """Return FedAvg on labelled examples and on pseudo labels of the others.

  Clients iterate over the splits "labelled" and "unlabelled" that
  `data.with_few_labels` makes. Labels of the second are never used. A batch in
  which no example gets a pseudo label takes no step.

  An update is a `Pair` of the two models' updates, and transforms act on both
  together: `clip` bounds their common norm. After the transforms the
  unsupervised update is multiplied by the client's number of pseudo labels over
  all of its steps, or by 1 if there were none, and the server divides by the
  mean of these numbers. Clients have weight 1, so that the aggregator
  `weighted_mean` gives both means exactly; a median would be one of products.
  Transforms with a state of the parameters' shape do not fit.

  The consistency term uses the model in evaluation mode (FLUTE: in training
  mode); the first `burn_in` rounds take the whole supervised mean (FLUTE: half
  of it). The defaults are FLUTE's, except for the magnitude.

  Args:
    task: a classifier with `Task.logits`, whose loss takes labels "y".
    client_optimizer: of both models; starts anew for each of them.
    server_optimizer: sgd with learning rate 1 takes half of each mean.
    burn_in: rounds without the unlabelled examples.
    threshold: probability that a pseudo label has to exceed; 0 to 1.
    temperature: of all softmaxes except the cross-entropy's; > 0.
    unsup_weight: weight of the cross-entropy with pseudo labels, >= 0.
    consistency_weight: weight of the divergence from the supervised model,
      >= 0.
    l2: weight of the squared distance to the received parameters, averaged over
      each array and summed over arrays; >= 0.
    magnitude: strength of `augment`, 0 to 1; FLUTE's `uda: 0` is 0. Examples
      that are not images get noise.
    comparison: which model is more certain: the one whose class probabilities
      have the larger `variance`, or the smaller `entropy`.
    flip: whether mirror images have the same class.
    labelled_steps: local steps on labelled examples; None: as the run's config
      says of all local steps.
    unlabelled_steps: the same on unlabelled examples.
    unlabelled_rate: learning rate on unlabelled examples; None: that of
      `client_optimizer`.
    evaluate_means: whether the last round's two means are evaluated by
      themselves, too: `test/supervised/accuracy`, `test/unsupervised/loss`. The
      server then keeps three models.

  Raises:
    TypeError, ValueError: a task without logits, or an argument of another
      kind or out of range.
  """
  _check(task, labelled_steps, unlabelled_steps)
  validate.one_of("comparison", comparison, COMPARISONS)
  validate.boolean("flip", flip)
  validate.boolean("evaluate_means", evaluate_means)
  numbers = _numbers(
    unlabelled_rate,
    burn_in=burn_in,
    threshold=threshold,
    temperature=temperature,
    unsup_weight=unsup_weight,
    consistency_weight=consistency_weight,
    l2=l2,
    magnitude=magnitude,
  )
  base = fedavg(task, client_optimizer, server_optimizer)
  unlabelled = _UnlabelledPass(task, client_optimizer, comparison, flip)

  def finish(client: Client, first: LocalState, second: Unlabelled) -> Report:
    report = base.finish(client, first)
    pseudo = metric(second.pseudo)
    count = jnp.maximum(pseudo.total, 1)
    unsupervised = difference(second.params, client.message.params)
    return Report(
      update=Pair(report.update, unsupervised),
      weight=jnp.ones((), jnp.float32),
      buffers=Pair(first.buffers, _times(count, second.buffers)),
      statistics=count,
      metrics={**report.metrics, "pseudo_labels": pseudo},
    )

  def apply(
    server: ServerState, aggregate: Aggregate, context: Context
  ) -> ServerState:
    return base.apply(server, _joined(aggregate, context), context)

  (labelled_pass,) = base.passes
  algorithm = base._replace(
    passes=(
      labelled_pass._replace(split="labelled", steps=labelled_steps),
      Pass(
        unlabelled.start,
        unlabelled.step,
        split="unlabelled",
        steps=unlabelled_steps,
      ),
    ),
    finish=finish,
    postprocess_report=_postprocess_report,
    apply=apply,
    hparams={**base.hparams, **numbers},
  )
  return _with_means(algorithm) if evaluate_means else algorithm


def _with_means(algorithm: Algorithm) -> Algorithm:
  """Return the algorithm whose two means are evaluated by themselves."""

  def init(server: ServerState, key: Key, hparams: HParams) -> WithMeans:
    received = server.variables._replace(frozen=())
    return WithMeans(server, Pair(received, received))

  def apply(
    state: WithMeans, aggregate: Aggregate, context: Context
  ) -> WithMeans:
    received = state.server.variables
    updates, buffers = _means(aggregate)
    means = Pair(
      *(
        Variables(
          jax.tree.map(
            lambda w, u: (w + u).astype(w.dtype), received.params, u
          ),
          jax.tree.map(
            lambda b, old: in_dtype(b, old.dtype), b, received.buffers
          ),
        )
        for u, b in zip(updates, buffers, strict=True)
      )
    )
    server = algorithm.apply(state.server, aggregate, context)
    return WithMeans(server, means)

  def other_models(state: WithMeans) -> dict[str, Variables]:
    frozen = state.server.variables.frozen
    return {
      name: model._replace(frozen=frozen)
      for name, model in state.means._asdict().items()
    }

  wrapped = wrap_algorithm(algorithm, init=init, apply=apply)
  return wrapped._replace(other_models=other_models)


def _check(task: Task, *steps: int | None) -> None:
  """Refuse a task without logits, and wrong numbers of steps."""
  validate.instance("task", task, Task, "nnx_task(make)")
  if task.logits is None:
    raise ValueError(
      "algorithm.name='fedlabels' needs a task with logits, and Task.logits is"
      " None; make the task by nnx_task or linen_task, or give that field."
    )
  names = ("labelled_steps", "unlabelled_steps")
  for name, count in zip(names, steps, strict=True):
    if count is not None:
      validate.integer(name, count, le=MOST_STEPS)


def _numbers(
  unlabelled_rate: float | None, *, burn_in: int, **given: float
) -> dict[str, float]:
  """Check the numbers that are traced.

  Args:
    unlabelled_rate: that of `fedlabels`.
    burn_in: likewise.
    **given: the others, by name.

  Raises:
    TypeError, ValueError: names the one that is no number or out of range.
  """
  bounds: dict[str, dict[str, float]] = {
    "threshold": {"ge": 0, "le": 1},
    "temperature": {"gt": 0},
    "unsup_weight": {"ge": 0},
    "consistency_weight": {"ge": 0},
    "l2": {"ge": 0},
    "magnitude": {"ge": 0, "le": 1},
  }
  numbers = {"burn_in": float(validate.integer("burn_in", burn_in, ge=0))}
  for name, limits in bounds.items():
    numbers[name] = validate.number(name, given[name], **limits)
  if unlabelled_rate is not None:
    rate = validate.number("unlabelled_rate", unlabelled_rate, ge=0)
    numbers["unlabelled_rate"] = rate
  return numbers


class _UnlabelledPass(NamedTuple):
  """A client's second pass: it trains on the labels that two models give.

  Attributes:
    task: what clients train; it has logits.
    client_optimizer: of the unsupervised model.
    comparison: a name of `COMPARISONS`.
    flip: whether mirror images have the same class.
  """

  task: Task
  client_optimizer: Optimizer
  comparison: str
  flip: bool

  def start(self, client: Client, supervised: LocalState) -> Unlabelled:
    """Return the carry before the first batch."""
    params, buffers, frozen = client.message
    optimizer = self.client_optimizer.build(_rates(client.hparams))
    return Unlabelled(
      params,
      buffers,
      optimizer.init(params),
      Variables(supervised.params, supervised.buffers, frozen),
      zero_metric(),
    )

  def step(
    self, client: Client, carry: Unlabelled, batch: Batch, key: Key
  ) -> Unlabelled:
    """Return the carry after a batch, on which burn-in rounds do not train."""
    carry = lax.cond(
      _begun(client.hparams, client.round),
      lambda: self._train(client, carry, batch, key),
      lambda: carry,
    )
    seen = jnp.sum(batch.mask, dtype=jnp.float32)
    shown = Metric(jnp.zeros_like(seen), seen)
    pseudo = compensated.add(carry.pseudo, shown)
    return carry._replace(pseudo=pseudo)

  def _train(
    self, client: Client, carry: Unlabelled, batch: Batch, key: Key
  ) -> Unlabelled:
    """Label a batch, and take a step if any example got a label."""
    hparams, examples = client.hparams, batch.examples
    get_model, supervised = (
      self._log_softmax(variables, examples, hparams)
      for variables in (client.message, carry.supervised)
    )
    pseudo = pseudo_labels(
      jnp.exp(get_model), jnp.exp(supervised), self.comparison
    )
    labelled = batch.mask & (pseudo.confidence > hparams["threshold"])
    changed = augment(
      jax.random.fold_in(key, 1),
      examples["x"],
      hparams["magnitude"],
      flip=self.flip,
    )
    labels = pseudo.label.astype(examples["y"].dtype)
    strong = Batch({**examples, "x": changed, "y": labels}, labelled)

    def loss(params: PyTree) -> tuple[Array, PyTree]:
      frozen = client.message.frozen
      variables = Variables(params, carry.buffers, frozen)
      value, (buffers, _) = core.mean_loss(
        self.task, variables, strong, jax.random.fold_in(key, 0)
      )
      new = self._log_softmax(variables, examples, hparams)
      consistency = _consistency(new, supervised, pseudo, labelled)
      distance = _distance(params, client.message.params)
      total = hparams["unsup_weight"] * value
      total += hparams["consistency_weight"] * consistency
      return total + hparams["l2"] * distance, buffers

    gradient, buffers = jax.grad(loss, has_aux=True)(carry.params)
    params, state = descend(
      self.client_optimizer.build(_rates(hparams)),
      gradient,
      carry.optimizer,
      carry.params,
    )
    trained = carry._replace(params=params, buffers=buffers, optimizer=state)
    some = jnp.any(labelled)
    kept = jax.tree.map(lambda a, b: jnp.where(some, a, b), trained, carry)
    count = jnp.sum(labelled, dtype=jnp.float32)
    pseudo_count = Metric(count, jnp.zeros_like(count))
    return kept._replace(pseudo=compensated.add(carry.pseudo, pseudo_count))

  def _log_softmax(
    self, variables: Variables, examples: Examples, hparams: HParams
  ) -> Array:
    """Return log probabilities, shape=(batch, classes).

    Raises:
      ValueError: the logits have another shape.
    """
    assert self.task.logits is not None
    logits = self.task.logits(variables, examples)
    if logits.ndim != 2:
      raise ValueError(
        "algorithm.name='fedlabels' gives an example one label; the model's"
        f" logits have shape {logits.shape}, not (batch, classes)."
      )
    return jax.nn.log_softmax(logits / hparams["temperature"])


def _rates(hparams: HParams) -> HParams:
  """Return the optimizer's numbers on unlabelled examples."""
  numbers: HParams = hparams["client"]
  if "unlabelled_rate" not in hparams:
    return numbers
  return {**numbers, "learning_rate": hparams["unlabelled_rate"]}


def _consistency(
  new: Array, supervised: Array, pseudo: PseudoLabels, labelled: Array
) -> Array:
  """Return the divergence from the supervised model; shape=().

  A mean over the labelled examples to which both models give the same label.

  Args:
    new: shape=(batch, classes); the model's log probabilities.
    supervised: the same of the supervised model.
    pseudo: the labels.
    labelled: shape=(batch,), bool; which examples got one.
  """
  ratio = jnp.where(labelled & pseudo.agree, pseudo.ratio, 0)
  divergence = jnp.sum(jnp.exp(supervised) * (supervised - new), axis=-1)
  count = jnp.sum(labelled & pseudo.agree)
  return jnp.sum(ratio * divergence) / jnp.maximum(count, 1)


def _distance(params: PyTree, get_model: PyTree) -> Array:
  """Return the mean squared differences of all arrays, summed; shape=()."""
  squares = jax.tree.map(
    lambda a, b: jnp.mean(core.in_float32(a - b) ** 2), params, get_model
  )
  distance: Array = jax.tree.reduce(jnp.add, squares)
  return distance


def _postprocess_report(client: Client, report: Report) -> Report:
  """Multiply the unsupervised update by the number of pseudo labels."""
  del client
  supervised, unsupervised = report.update
  scaled = _times(report.statistics, unsupervised)
  return report._replace(update=Pair(supervised, scaled))


def _means(aggregate: Aggregate) -> tuple[Pair, Pair]:
  """Return both means, of the updates and of the buffers."""
  count = jnp.where(aggregate.statistics > 0, aggregate.statistics, 1)
  updates, buffers = (
    Pair(pair.supervised, jax.tree.map(lambda x: x / count, pair.unsupervised))
    for pair in (aggregate.update, aggregate.buffers)
  )
  return updates, buffers


def _joined(aggregate: Aggregate, context: Context) -> Aggregate:
  """Return the aggregate with half of each model's mean for the pair."""
  begun = _begun(context.hparams, context.round)
  share = jnp.where(begun, jnp.float32(0.5), 0)
  join = lambda pair: jax.tree.map(
    lambda s, u: (1 - share) * s + share * u, *pair
  )
  update, buffers = map(join, _means(aggregate))
  return aggregate._replace(update=update, buffers=buffers)


def _begun(hparams: HParams, round_: Array) -> Array:
  """Return whether `burn_in` rounds came before this one."""
  return round_ + 1 > hparams["burn_in"]


def _times(count: Array, tree: PyTree) -> PyTree:
  """Return `count * tree`, in float32 at least."""
  return jax.tree.map(lambda x: count * x, tree)
