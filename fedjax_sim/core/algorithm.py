"""Algorithms: how clients train and how the server reacts.

Everything here is a NamedTuple of pure functions, in the manner of optax. The
engine (`engine/round.py`) calls them in one compiled round; whoever writes an
algorithm fills in a few of them. Shapes are those one client sees: the engine
adds the lane axis with `jax.vmap`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fedjax_sim.core.task import Batch, Metric, Variables
from fedjax_sim.core.types import Array, Examples, HParams, Key, PyTree


class Client(NamedTuple):
  """All that one client knows while it trains.

  Attributes:
    message: what the server sent it (`Algorithm.download` of the broadcast).
    state: what it kept since it last took part (`Algorithm.client_init` at
      first).
    hparams: `Algorithm.hparams`, traced.
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
    server_data: the server's own examples, field -> (examples, ...), as
      `Task.loss` takes them; None if there are none.
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
