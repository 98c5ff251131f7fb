"""The contract: what a task, an algorithm, a transform and an aggregator are.

Everything here is a NamedTuple of pure functions, in the manner of optax. The
engine (`engine/round.py`) calls them in one compiled round; whoever writes an
algorithm fills in a few of them. Shapes are those one client sees: the engine
adds the lane axis with `jax.vmap`.

Keys of `jax.random` come from `key_for`, never from a carried, mutated key, so
a run does not depend on lanes, devices or hosts.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sim.core import returned

PyTree = Any
Array = jax.Array
Key = jax.Array  # a typed key, shape=()
HParams = Mapping[str, Any]  # nested dict of scalars, all traced
Examples = Mapping[str, Array]  # field -> (examples, ...)


class Purpose(enum.IntEnum):
  """What a key is for; keys of different purposes never coincide."""

  INIT = 0
  SAMPLING = 1
  SHUFFLING = 2
  CLIENT = 3
  TRANSFORM = 4
  SERVER = 5
  DATA = 6
  AGGREGATION = 7


def key_for(seed: Array | int, purpose: Purpose, *indices: Array | int) -> Key:
  """The key of (seed, purpose, indices...), e.g. of one client in one round.

  Args:
    seed: shape=(), uint32; may be traced, so runs can be vmapped over seeds.
    purpose: what the key is for.
    *indices: shape=() integers, such as the round and the client's id.
  """
  return _folded(jax.random.key(seed), purpose, *indices)


_NOISE = 0x6E6F6973


def noise_key_for(
  noise_seed: Array, purpose: Purpose, *indices: Array | int
) -> Key:
  """Return the key of private noise, which no seed of the run determines.

  Args:
    noise_seed: shape=(2,), uint32; 64 random bits.
    purpose: who draws the noise: `SERVER`, `CLIENT` or `AGGREGATION`.
    *indices: as of `key_for`.
  """
  root = jax.random.wrap_key_data(noise_seed, impl="threefry2x32")
  # A tag, so that no fixed seed of the noise gives the keys of a run's seed.
  return _folded(jax.random.fold_in(root, _NOISE), purpose, *indices)


def _folded(key: Key, purpose: Purpose, *indices: Array | int) -> Key:
  for index in (int(purpose), *indices):
    key = jax.random.fold_in(key, index)
  return key


# --- the task: what a client trains ------------------------------------------


class Variables(NamedTuple):
  """A model's variables.

  Attributes:
    params: what is trained.
    buffers: what training changes without a gradient, such as batch
      statistics: averaged over clients, never clipped, negated or optimised.
    frozen: what nobody changes, such as the base model under LoRA: one copy a
      device, not one a lane.
  """

  params: PyTree
  buffers: PyTree = ()
  frozen: PyTree = ()


class Loss(NamedTuple):
  """The loss of every example of a batch, before the engine masks and means.

  Attributes:
    value: shape=(batch,), float; the mean loss of each example. It must be
      finite and differentiable where the weight is 0, too: a mask stops a NaN
      on the way forward, not on the way back.
    weight: shape=(batch,), float; what each example counts: 1, or the number
      of tokens in a sentence.
    buffers: the buffers after this batch.
  """

  value: Array
  weight: Array
  buffers: PyTree = ()


class Metric(NamedTuple):
  """A weighted mean in the making: `total / weight`.

  A task's metrics hold per-example arrays, shape=(batch,), a report's hold
  sums over one client, shape=().
  """

  total: Array
  weight: Array


class Batch(NamedTuple):
  """A client's batch.

  Attributes:
    examples: field -> (batch, ...). Where `mask` is false the row repeats
      another example of the same client, so that batch statistics see only the
      client's own data.
    mask: shape=(batch,), bool; false marks padding.
  """

  examples: Examples
  mask: Array


class Task(NamedTuple):
  """What a client trains, as pure functions.

  Attributes:
    init: key -> variables.
    loss: (variables, examples, key) -> `Loss`; training mode.
    metrics: (variables, examples) -> name -> `Metric` of per-example values
      (already multiplied by their weights); evaluation mode.
    check: examples as they are stored, field -> numpy (examples, ...), -> None;
      raises ValueError for values that the model cannot take, such as ids that
      it does not know. Shapes and dtypes need no check. Of a field that is
      looked up in a table it gets the table.
    logits: (variables, examples) -> what the model says before any softmax,
      (batch, classes) of a classifier; evaluation mode. None: it is not told.
    higher_is_better: metric -> whether more of it is better; a metric that is
      missing here has no direction, and cannot choose the best model or a rate.
      It may name metrics that the task lacks.
    hparams: name -> float; default numbers that `loss` takes. Examples have
      each as one more field, shape=(batch,); in training a schedule may change
      them.
  """

  init: Callable[[Key], Variables]
  loss: Callable[[Variables, Examples, Key], Loss]
  metrics: Callable[[Variables, Examples], dict[str, Metric]]
  check: Callable[[Mapping[str, np.ndarray]], None] = lambda examples: None
  logits: Callable[[Variables, Examples], Array] | None = None
  higher_is_better: Mapping[str, bool] = {"loss": False, "accuracy": True}
  hparams: HParams = {}


def mean_loss(
  task: Task, variables: Variables, batch: Batch, key: Key
) -> tuple[Array, tuple[PyTree, Metric]]:
  """The masked mean loss of a batch, ready for `jax.value_and_grad`.

  Returns:
    The loss, shape=(), and (buffers, `Metric` of the summed loss), in float32
    at least. A batch without weight has loss 0, not NaN.
  """
  made = task.loss(variables, batch.examples, key)
  size, before = batch.mask.shape, variables.buffers
  value, weight, buffers = returned.loss(made, size, before)
  value, weight = in_float32((value, weight))
  weight = jnp.where(batch.mask, weight, 0)
  total = jnp.sum(jnp.where(weight > 0, value * weight, 0))
  count = jnp.sum(weight)
  mean = total / jnp.where(count > 0, count, 1)
  return mean, (buffers, Metric(total, count))


def sum_metrics(
  task: Task, variables: Variables, batch: Batch
) -> dict[str, Metric]:
  """The task's metrics, summed over a batch without its padding.

  Returns:
    name -> `Metric`, shape=(), float32 at least.
  """
  size = batch.mask.shape
  numbers = {k: jnp.full(size, x) for k, x in task.hparams.items()}
  made = task.metrics(variables, {**batch.examples, **numbers})
  metrics = in_float32(returned.metrics("Task.metrics", made, size))
  return jax.tree.map(lambda x: jnp.sum(jnp.where(batch.mask, x, 0)), metrics)


def in_float32(tree: PyTree) -> PyTree:
  """Return the arrays in float32 at least, since sums in less lose too much.

  float16 ends at 65,504, bfloat16 has 8 bits, and int32 wraps around.
  """
  wide = lambda x: jnp.promote_types(jnp.result_type(x), jnp.float32)
  return jax.tree.map(lambda x: jnp.asarray(x, wide(x)), tree)


# --- the algorithm: how clients train and the server reacts -------------------


class Client(NamedTuple):
  """All that one client knows while it trains.

  Attributes:
    message: what the server sent it (`Algorithm.download` of the broadcast).
    state: what it kept since it last took part (`Algorithm.client_init` at
      first).
    hparams: the run's numeric hyper-parameters, traced.
    id: shape=(), int32; its index in the federated data.
    version: shape=(), int32; which of the broadcast's versions it holds; 0
      unless the cohort's plan says otherwise.
    num_examples: shape=(), int32; its examples in the first pass's split, or
      `LocalWork.max_examples` if that is less.
    num_steps: shape=(passes,), int32; local steps of each pass. Where
      `LocalWork.max_tokens` ends a pass, this and `num_examples` are what was
      planned, and once it has ended what was used.
    round: shape=(), int32.
    key: its own key in this round; the keys of steps are derived from it.
    noise_key: its own key of private noise in this round (`noise_key_for`).
  """

  message: PyTree
  state: PyTree
  hparams: HParams
  id: Array
  version: Array
  num_examples: Array
  num_steps: Array
  round: Array
  key: Key
  noise_key: Key


class Report(NamedTuple):
  """What a client sends, and what it keeps.

  Attributes:
    update: `params_after - params_before`, a delta (server optimisers see its
      negative as a gradient). Client transforms act on it, the aggregator
      joins it.
    weight: shape=(), float; its weight in weighted means.
    buffers: its non-trained variables; joined by weighted mean.
    statistics: anything else the server wants the weighted mean of, such as
      control variates or a full-batch gradient.
    state: what the client keeps for its next round; finite, as all that it
      reports, or it is left out of the round.
    metrics: name -> `Metric` of sums over this client.
    values: name -> shape=(), float; numbers that the server sees of every
      client by itself, such as the norm of its update.
  """

  update: PyTree
  weight: Array
  buffers: PyTree = ()
  statistics: PyTree = ()
  state: PyTree = ()
  metrics: dict[str, Metric] = {}
  values: dict[str, Array] = {}


class Members(NamedTuple):
  """A cohort's clients one by one; an empty slot is not present.

  Attributes:
    id: shape=(slots,), int32.
    present: shape=(slots,), bool; whether the client is in the aggregate.
    weight: shape=(slots,), float32; as reported, 0 where nobody is.
    values: name -> shape=(slots,); `Report.values`, 0 where nobody is.
  """

  id: Array
  present: Array
  weight: Array
  values: dict[str, Array]


class Aggregate(NamedTuple):
  """A cohort's reports, joined.

  Attributes:
    update: the aggregator's result, in float32 at least.
    buffers: weighted mean, in float32 at least.
    statistics: weighted mean, in float32 at least.
    weight: shape=(), float32; sum of weights.
    clients: shape=(), int32; how many are in it.
    members: who they are.
  """

  update: PyTree
  buffers: PyTree
  statistics: PyTree
  weight: Array
  clients: Array
  members: Members


class Context(NamedTuple):
  """What the server knows besides its state.

  Attributes:
    hparams: as in `Client`.
    round: shape=(), int32.
    key: the server's key in this round.
    noise_key: its key of private noise in this round (`noise_key_for`).
    num_clients: the population's size; what it was chosen to count as, where
      adding or removing a client must not show.
    server_data: the server's own examples, field -> (examples, ...), as the
      model gets them; None: it has none.
  """

  hparams: HParams
  round: Array
  key: Key
  noise_key: Key
  num_clients: int
  server_data: Examples | None = None


class Pass(NamedTuple):
  """One walk of a client over its data; FedAvg has one, Mime and IFCA two.

  Attributes:
    start: (client, *carries of the passes before) -> carry.
    step: (client, carry, batch, key) -> carry; one local step.
    split: which of the federated data sets it walks over.
    epochs: epochs over all of it whatever the run's `LocalWork` says, e.g. 1
      for a full-batch gradient; None takes the run's.
    augmented: whether its batches are changed at random as the data set says;
      False of a pass that measures.
    tokens: carry -> shape=(); the sum of the loss's weights over the steps so
      far, by which `LocalWork.max_tokens` ends the pass; None: they are not
      counted.
  """

  start: Callable[..., PyTree]
  step: Callable[[Client, PyTree, Batch, Key], PyTree]
  split: str = "train"
  epochs: int | None = None
  augmented: bool = True
  tokens: Callable[[PyTree], Array] | None = None


class Release(NamedTuple):
  """What a private algorithm releases in every round, told to accountants.

  It is a sum of clients' contributions, none of which is longer than 1 (in L2;
  in L1 with Laplace noise) in the unit of `multiplier`, plus noise.

  Attributes:
    noise: `gaussian`, `laplace` or `discrete_gaussian`.
    multiplier: of every coordinate's noise, the standard deviation; of
      Laplace's the scale. Of correlated noise it is that of the independent
      noise that it is made of.
    sensitivity: (rounds, period) -> how far one client can move the first
      `rounds` releases together, in L2, as correlated noise sees them, if it
      takes part at most once in `period` consecutive rounds; None: the noise of
      every round is independent.
    bands: of correlated noise: contributions so many rounds apart are
      orthogonal; None: none are.
    rounds: how many rounds the noise was made for; None: any number.
    simulated: the (cohort, population) whose noise relative to the sum is
      simulated with a smaller cohort; None: the noise is what it is.
    audited: server state -> what planted canaries left behind, an
      `Evidence`; None: there are none.
    most_clients: the most of a round for whom it holds; None: any number.
    distance: of the law of a round's noise, as it is drawn, from the one that
      accountants count, in total variation.
    proven: the algorithm that it was proven for, without this; None: nobody
      has proven anything, and the engine refuses it (`training.seal`).
  """

  noise: str
  multiplier: float
  sensitivity: Callable[[int, int], float] | None = None
  bands: int | None = 1
  rounds: int | None = None
  simulated: tuple[float, float] | None = None
  audited: Callable[[PyTree], PyTree] | None = None
  most_clients: int | None = None
  distance: float = 0.0
  proven: Any = None


class Algorithm(NamedTuple):
  """How clients train and the server reacts, as pure functions.

  Attributes:
    init: (key, hparams) -> server state.
    broadcast: server state -> message.
    passes: a client's walks over its data.
    finish: (client, *carries of all passes) -> `Report`.
    apply: (server state, `Aggregate`, `Context`) -> server state.
    variables: server state -> `Variables` of the global model.
    hparams: default numeric hyper-parameters, a nested dict of floats. They
      are traced: changing one between rounds recompiles nothing.
    client_init: (server state, hparams) -> what a client that never took part
      keeps; one row of the table of client states. `()` keeps nothing.
    download: (message, version) -> what one client receives. A message that
      carries several versions lets a lane pick one here.
    personal: (message, client state) -> the `Variables` that this client
      would use, for evaluation per client; None: the global model.
    on_eval: (server state, metrics) -> server state, after an evaluation;
      None: nothing to do.
    replace: (server state, `Variables`) -> the server state with this global
      model instead; None: there is no such thing.
    pooled: train on the union of all clients' data as on one client's.
    send: (client, report) -> report, after the transforms: what depends on
      the client alone, but is no part of what a transform may change.
    stacked: `apply` joins the updates itself: `Aggregate.update` is to be the
      stack of them, leaves (slots, ...), that `aggregators.stack` gives.
    weighted_mean: `apply` counts on `Aggregate.update` being that.
    uses_server_data: `apply` cannot do without `Context.server_data`.
    log_weight: (server state, hparams) -> shape=(); the logarithm of what a
      weight of 1 stands for in this round, where that differs from round to
      round; None: it does not.
    told: (server state, hparams) -> name -> shape=(); numbers of the state that
      every round's metrics show.
    draws_noise: private noise is drawn from a `noise_key`.
    checks_updates: `send` gives a weight of NaN where an update is not finite,
      so the round need not look at updates itself.
    release: what accountants have to know of it. `apply` is called whoever is
      left of a cohort, and takes the plain sum of the updates. None: it is not
      private.
  """

  init: Callable[[Key, HParams], PyTree]
  broadcast: Callable[[PyTree], PyTree]
  passes: tuple[Pass, ...]
  finish: Callable[..., Report]
  apply: Callable[[PyTree, Aggregate, Context], PyTree]
  variables: Callable[[PyTree], Variables]
  hparams: HParams
  client_init: Callable[[PyTree, HParams], PyTree] = lambda server, hparams: ()
  download: Callable[[PyTree, Array], PyTree] = lambda message, version: message
  personal: Callable[[PyTree, PyTree], Variables] | None = None
  on_eval: Callable[[PyTree, Mapping[str, float]], PyTree] | None = None
  replace: Callable[[PyTree, Variables], PyTree] | None = None
  pooled: bool = False
  send: Callable[[Client, Report], Report] = lambda client, report: report
  stacked: bool = False
  weighted_mean: bool = False
  uses_server_data: bool = False
  log_weight: Callable[[PyTree, HParams], Array] | None = None
  told: Callable[[PyTree, HParams], dict[str, Array]] = lambda *_: {}
  draws_noise: bool = False
  checks_updates: bool = False
  release: Release | None = None


# --- transforms and aggregators: what happens to updates ----------------------


class Transform(NamedTuple):
  """A pure function on a client's update: clip, quantise, noise.

  Attributes:
    name: its section in the run's hyper-parameters.
    hparams: its default numeric hyper-parameters.
    apply: (update, shared, state, hparams, key) -> (update, state, aux). `aux`
      is what the server learns besides the update, such as the indicator bit
      of adaptive clipping. A dict's numbers are metrics of the round by their
      names; `bytes` are those that the update takes when it is sent.
    init: (params, hparams) -> shared state, held by the server and known to
      all clients.
    client_init: (params, hparams) -> one client's own state, such as the
      residual of error feedback.
    update: (shared, mean of aux over clients, hparams) -> shared state, once
      a round.
  """

  name: str
  hparams: HParams
  apply: Callable[
    [PyTree, PyTree, PyTree, HParams, Key], tuple[PyTree, PyTree, PyTree]
  ]
  init: Callable[[PyTree, HParams], PyTree] = lambda params, hparams: ()
  client_init: Callable[[PyTree, HParams], PyTree] = lambda params, hparams: ()
  update: Callable[[PyTree, PyTree, HParams], PyTree] = (
    lambda shared, aux, hparams: shared
  )


class Roll(NamedTuple):
  """What a keyed aggregator knows of a round.

  Attributes:
    key: the aggregator's key in this round.
    seats: shape=(), int32; the clients of the cohort, whatever becomes of
      them. In the order of their ids they have the seats 0, 1, ...
    hparams: `Aggregator.hparams`, traced.
    noise_key: the aggregator's key of private noise (`noise_key_for`).
  """

  key: Key
  seats: Array
  hparams: HParams
  noise_key: Key


class Aggregator(NamedTuple):
  """How a cohort's updates become one.

  A streaming aggregator's accumulator is summed over devices; a stacked one's
  has a leading axis of clients and is concatenated over devices.

  Attributes:
    init: (update of one client, capacity) -> accumulator, on one device.
      `capacity` is the number of client slots on that device.
    add: (accumulator, updates (lanes, ...), weights (lanes,), present
      (lanes,), slot) -> accumulator. `slot` is the first of the wave's
      consecutive slots. Absent clients' rows may hold anything.
    finish: (accumulator, sum of weights, number of clients) -> update.
    stacked: see above.
    by_coordinate: of a stacked one: `finish` treats every coordinate by itself,
      as a median does, and takes leaves of any trailing shape. Then each
      device finishes its share of the coordinates, and none ever has the
      whole stack.
    joins: `finish` gives one update; otherwise the stack itself, leaves
      (slots, ...), for an algorithm that is `stacked`.
    weighted_mean: `finish` gives the weighted mean of the updates.
    keyed: of a streaming one: it draws random numbers. `add` and `finish` get
      one argument more, a `Roll`, and instead of `slot` `add` gets the lanes'
      seats, shape=(lanes,), int32; those of empty lanes are not below
      `Roll.seats`. Seats do not depend on lanes or devices.
    hparams: default numeric hyper-parameters, told in the `Roll`.
    draws_noise: private noise is drawn from `Roll.noise_key`.
  """

  init: Callable[[PyTree, int], PyTree]
  add: Callable[..., PyTree]
  finish: Callable[..., PyTree]
  stacked: bool = False
  by_coordinate: bool = False
  joins: bool = True
  weighted_mean: bool = False
  keyed: bool = False
  hparams: HParams = {}
  draws_noise: bool = False
