"""Algorithms: how clients train and how the server reacts.

Everything here is a NamedTuple of pure functions, in the manner of optax. The
engine (`engine/round.py`) calls them in one compiled round; an algorithm fills
in a few of them. Shapes are those that one client sees: the engine adds the
lane axis with `jax.vmap`.

Instances share the defaults of their fields, so no default can be changed in
place: mappings default to `types.EMPTY`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fedjax_sim.core.task import Batch, Metric, Variables
from fedjax_sim.core.types import EMPTY, Array, Examples, HParams, Key, PyTree


class Client(NamedTuple):
  """All that one client knows while it trains.

  Attributes:
    message: what the server sent it (`Algorithm.download` of the broadcast).
    state: what it has kept since it last took part; at first what
      `Algorithm.client_init` returns.
    hparams: `Algorithm.hparams`, traced.
    id: shape=(), int32; index of the client in the federated data.
    version: shape=(), int32; which version of the broadcast the client holds;
      0 unless the plan of the cohort says otherwise.
    num_examples: shape=(), int32; its number of examples in the first pass's
      split, at most `LocalBatching.max_examples`.
    num_steps: shape=(passes,), int32; local steps of each pass. If
      `LocalBatching.max_tokens` ends a pass, this and `num_examples` hold the
      planned numbers during the pass and the used ones after it.
    round: shape=(), int32; number of the round.
    key: its key in this round; the keys of local steps are derived from it.
    noise_key: its key of private noise in this round (`noise_key_for`).
    byzantine: shape=(), bool; whether it attacks in this round, which only an
      attack looks at (`attacks`).
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
  byzantine: Array | bool = False


class Report(NamedTuple):
  """What a client sends to the server, and what it keeps.

  Attributes:
    update: `params_after - params_before`. Transforms act on it and the
      aggregator reduces it; server optimizers take its negative as a gradient.
    weight: shape=(), float; weight of the client in weighted means.
    buffers: its non-trained variables, reduced by a weighted mean.
    statistics: anything else whose weighted mean the server needs, such as
      control variates or a full-batch gradient.
    state: what the client keeps for its next round. A client whose report or
      state is not finite is left out of the round.
    metrics: name -> `Metric` of sums over this client.
    values: name -> shape=(), float; numbers that the server sees for every
      client separately, such as the norm of its update.
  """

  update: PyTree
  weight: Array
  buffers: PyTree = ()
  statistics: PyTree = ()
  state: PyTree = ()
  metrics: Mapping[str, Metric] = EMPTY
  values: Mapping[str, Array] = EMPTY


class Members(NamedTuple):
  """The clients of a cohort one by one; empty slots are not present.

  Attributes:
    id: shape=(slots,), int32; -1 for an empty slot.
    present: shape=(slots,), bool; whether the client is in the aggregate.
    weight: shape=(slots,), float32; as reported, 0 where not present.
    values: name -> shape=(slots,); `Report.values`, 0 where not present.
  """

  id: Array
  present: Array
  weight: Array
  values: Mapping[str, Array]


class Aggregate(NamedTuple):
  """The reduced reports of a cohort.

  Attributes:
    update: result of the aggregator, in float32 or wider.
    buffers: weighted mean, in float32 or wider.
    statistics: weighted mean, in float32 or wider.
    weight: shape=(), float32; sum of weights.
    clients: shape=(), int32; number of clients in the aggregate.
    members: the clients one by one.
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
    hparams: `Algorithm.hparams`, traced.
    round: shape=(), int32; number of the round.
    key: the server's key in this round.
    noise_key: its key of private noise in this round (`noise_key_for`).
    num_clients: size of the population. Where adding or removing a client must
      not show, the size that was chosen in advance.
    server_data: the server's own examples, field -> (examples, ...), as
      `Task.loss` takes them; None if there are none.
    survey: mean of the answers to `Algorithm.survey`, in float32 or wider; ()
      without one.
  """

  hparams: HParams
  round: Array
  key: Key
  noise_key: Key
  num_clients: int
  server_data: Examples | None = None
  survey: PyTree = ()


class Pass(NamedTuple):
  """One pass of a client over its data; FedAvg has one, Mime and IFCA two.

  Attributes:
    start: (client, *carries of the passes before) -> carry.
    step: (client, carry, batch, key) -> carry; one local step.
    split: name of the federated data set that the pass reads.
    epochs: number of epochs, whatever the run's `LocalBatching` says, such as
      1 for a full-batch gradient; None takes the run's.
    steps: number of local steps, whatever the run's `LocalBatching` says; None
      takes the run's, or `epochs`.
    augmented: whether batches are augmented as the data set says; False for a
      pass that measures.
    tokens: carry -> shape=(); sum of the loss weights over the steps so far, by
      which `LocalBatching.max_tokens` ends the pass; None if they are not
      counted.
  """

  start: Callable[..., PyTree]
  step: Callable[[Client, PyTree, Batch, Key], PyTree]
  split: str = "train"
  epochs: int | None = None
  augmented: bool = True
  tokens: Callable[[PyTree], Array] | None = None
  steps: int | None = None


class Survey(NamedTuple):
  """What a cohort answers before it trains, for algorithms of two exchanges.

  Mime and FedLin need the mean gradient of the very cohort that trains. In a
  round with a survey the server broadcasts, every client makes the survey's
  passes and answers, and the weighted mean of the answers goes out with a
  second message; then all clients train.

  Attributes:
    passes: a client's passes over its data in the survey. `Client.num_steps`
      has their numbers of steps alone, as that of training has those of
      `Algorithm.passes`.
    finish: (client, *carries of these passes) -> `Report`, of which only
      `weight` and `statistics` count. Neither transforms nor the aggregator act
      on them. A client whose answer is not finite is left out of the mean.
    message: (message, mean of statistics, in float32 or wider) -> message that
      `Algorithm.download` and training get. Personal models and `Survey.passes`
      get the message before.
  """

  passes: tuple[Pass, ...]
  finish: Callable[..., Report]
  message: Callable[[PyTree, PyTree], PyTree]


class Requirements(NamedTuple):
  """What an algorithm needs of the other parts of a run.

  Attributes:
    all_updates: `apply` reduces the updates itself. `Aggregate.update` has to
      be the stack of them, leaves (slots, ...), which `aggregators.stack`
      returns.
    weighted_mean: `apply` needs `Aggregate.update` to be the weighted mean.
    server_data: `apply` needs `Context.server_data`.
    pools_data: trains on the union of all clients' data as on one client's.
    groups: into how many groups updates are aggregated, each by itself. Clients
      then report `aggregators.Grouped` updates, by `postprocess_report`, after
      the transforms.
    client_values: `apply` needs `Members.values`, which private clients do not
      send.
    own_weights: clients have to weigh what they report, so that what the server
      adds up stays in step with what they keep. A sampler's factors, see
      `Sampler.weights`, would change that.
  """

  all_updates: bool = False
  weighted_mean: bool = False
  server_data: bool = False
  pools_data: bool = False
  groups: int = 1
  client_values: bool = False
  own_weights: bool = False


class PrivacySpec(NamedTuple):
  """What accountants must know of a private algorithm.

  In every round it releases a sum of clients' contributions plus noise. No
  contribution is longer than 1, the unit of `multiplier`: in L2, or in L1 with
  Laplace noise.

  Attributes:
    noise: `gaussian`, `laplace` or `discrete_gaussian`.
    multiplier: noise standard deviation (scale, for Laplace) per coordinate, in
      units of the clipping norm. For correlated noise, that of the underlying
      i.i.d. noise.
    sensitivity: (rounds, period) -> L2 distance, as correlated noise sees it,
      by which one client can move the first `rounds` releases together if it
      takes part at most once in `period` consecutive rounds. None if the noise
      of every round is independent.
    bands: contributions so many rounds apart are orthogonal under correlated
      noise; None if none are.
    rounds: number of rounds that the noise was made for; None for any number.
    simulated: (cohort, population) whose noise relative to the sum is simulated
      with a smaller cohort; None if nothing is simulated.
    audited: server state -> `Evidence` left by planted canaries; None without
      canaries.
    most_clients: largest cohort that the specification holds for; None for any.
    distance: total-variation distance between the noise that a round draws and
      the noise that accountants count.
    checks_updates: `postprocess_report` returns a weight of NaN where an update
      is not finite, so that the engine need not check updates itself.
    proven: the algorithm that the specification was proven for, without this
      field. None if there is no proof; the engine then refuses the algorithm
      (`training.seal`).
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
  checks_updates: bool = False
  proven: Any = None


class Algorithm(NamedTuple):
  """How clients train and how the server reacts, as pure functions.

  Attributes:
    init: (key, hparams) -> server state.
    broadcast: server state -> message.
    passes: a client's passes over its data.
    finish: (client, *carries of all passes) -> `Report`.
    survey: what the cohort answers before it trains; None if nothing.
    apply: (server state, `Aggregate`, `Context`) -> server state.
    variables: server state -> `Variables` of the global model.
    hparams: default numeric hyper-parameters, a nested dict of floats, in
      `Simulator.hparams["algorithm"]`. They are traced: changing one between
      rounds recompiles nothing. Functions that take `hparams` get these alone,
      whatever the names of other parts' numbers.
    client_init: (server state, hparams) -> state of a client that has not taken
      part yet, one row of the table of client states; `()` keeps nothing.
    download: (message, version, id) -> what one client receives. For a message
      with several versions, or with models of several clients or groups of
      clients, selects one.
    personal: (what `download` returns, client state) -> `Variables` that this
      client would use, for evaluation per client; None for the global model.
    other_models: server state -> name -> `Variables` of models that are
      evaluated besides the global one, such as those that it is a mean of.
      Their metrics have the name before their own: `test/NAME/accuracy`.
    on_eval: (server state, metrics) -> server state, after an evaluation; None
      if nothing changes.
    with_model: (server state, `Variables`) -> server state with this global
      model; None if the model cannot be replaced.
    postprocess_report: (client, report) -> report, after the transforms. For
      changes that depend on the client alone and that transforms must not see,
      such as scaling by a private count. May change the report's structure.
    broadcast_bytes: server state -> shape=(); what a broadcast takes that all
      clients of the federation receive, absent ones too. None: the cohort alone
      receives the message, as it is.
    requirements: what the algorithm needs of other parts.
    log_weight: (server state, hparams) -> shape=(); log of the weight unit used
      this round, for algorithms whose weights are only defined up to a
      per-round factor; None if weights are absolute.
    state_metrics: (server state, hparams) -> name -> shape=(); numbers of the
      state that appear in the metrics of every round.
    links: how many times a client sends and receives in a round, on average:
      its number of neighbors where clients send models to each other; 1 where
      they send them to a server.
    draws_noise: whether private noise is drawn from a `noise_key`.
    sends_whole: whether `postprocess_report` leaves nothing of the transforms'
      codes, as noise on every number does; whole updates are then sent.
    differentiable: as in `Transform`; False where messages are rounded.
    privacy: what accountants must know; None if the algorithm is not private.
      If private, `apply` is called even if no client of a cohort is left, and
      receives the plain sum of the updates.
  """

  init: Callable[[Key, HParams], PyTree]
  broadcast: Callable[[PyTree], PyTree]
  passes: tuple[Pass, ...]
  finish: Callable[..., Report]
  apply: Callable[[PyTree, Aggregate, Context], PyTree]
  variables: Callable[[PyTree], Variables]
  hparams: HParams
  client_init: Callable[[PyTree, HParams], PyTree] = lambda server, hparams: ()
  download: Callable[[PyTree, Array, Array], PyTree] = (
    lambda message, version, ident: message
  )
  personal: Callable[[PyTree, PyTree], Variables] | None = None
  other_models: Callable[[PyTree], Mapping[str, Variables]] = lambda server: (
    EMPTY
  )
  on_eval: Callable[[PyTree, Mapping[str, float]], PyTree] | None = None
  with_model: Callable[[PyTree, Variables], PyTree] | None = None
  postprocess_report: Callable[[Client, Report], Report] = (
    lambda client, report: report
  )
  broadcast_bytes: Callable[[PyTree], Array] | None = None
  requirements: Requirements = Requirements()
  log_weight: Callable[[PyTree, HParams], Array] | None = None
  state_metrics: Callable[[PyTree, HParams], Mapping[str, Array]] = (
    lambda server, hparams: EMPTY
  )
  links: float = 1.0
  draws_noise: bool = False
  sends_whole: bool = False
  differentiable: bool = True
  privacy: PrivacySpec | None = None
  survey: Survey | None = None

  @property
  def all_passes(self) -> tuple[Pass, ...]:
    """All passes of a round: those of the survey, then those of training."""
    first = () if self.survey is None else self.survey.passes
    return (*first, *self.passes)
