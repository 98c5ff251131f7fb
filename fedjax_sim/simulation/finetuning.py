"""Local fine-tuning: clients adapt a trained model, then it is evaluated.

The baseline of personalization (Wang et al. 2019, "Federated evaluation of
on-device personalization", arXiv 1910.10252): every client trains its model a
little more on its own training examples, and is evaluated on those held out.
Nothing of it goes back to the server. It is a round without an update: each
client trains in one pass, and measures in another.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sim import aggregators, core
from fedjax_sim.core import (
  Aggregate,
  Algorithm,
  Array,
  Batch,
  Client,
  Context,
  HParams,
  Key,
  Metric,
  Pass,
  PyTree,
  Report,
  Sampler,
  Task,
  Variables,
  compensated,
)
from fedjax_sim.core.compensated import Total
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.engine.client_metrics import ClientMetrics
from fedjax_sim.engine.state import RunState
from fedjax_sim.simulation import preflight
from fedjax_sim.training.local import (
  Following,
  LocalState,
  following,
  local_training,
)
from fedjax_sim.training.optimizers import Optimizer

if TYPE_CHECKING:
  from fedjax_sim.simulation.simulator import Simulator

_MOST = 256  # clients of a round, whose examples are sent at once
_SPLIT = "seen"


class _Message(NamedTuple):
  """What clients get: the algorithm's message, and the global model."""

  inner: PyTree
  model: Variables


class _Server(NamedTuple):
  """The algorithm's server state, and what clients measured so far.

  Attributes:
    server: the algorithm's.
    measured: name -> `Metric`, leaves (clients,), float32; NaN: not yet.
  """

  server: PyTree
  measured: dict[str, Metric]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Finetuning:
  """Evaluates every client after fine-tuning on its training examples.

  A client begins with its own model, if the algorithm has personal ones, else
  with the global one, and is measured on its examples of `seen`. Metrics that
  are no means, such as an AUC, are left out, and so is a client whose
  fine-tuning diverges.

  Example:
    >>> finetuned = Finetuning(
    ...   simulator=simulator,
    ...   optimizer=optimizer("sgd", learning_rate=0.01),
    ...   batching=LocalBatching(batch_size=20, epochs=5),
    ... )
    >>> finetuned(state).summary("finetuned")["finetuned/accuracy/mean"]

  Attributes:
    simulator: whose states are evaluated.
    optimizer: of the fine-tuning; starts anew for every client.
    batching: how long a client trains, and its batches.

  Raises:
    ValueError: no example is held out inside clients, the algorithm pools their
      data, or client states are on the disk.
  """

  simulator: Simulator
  optimizer: Optimizer
  batching: LocalBatching

  def __post_init__(self) -> None:
    simulator = self.simulator
    if simulator.data.seen is None:
      raise ValueError(
        "client.finetune_epochs and client.finetune_steps: clients are"
        " evaluated on examples held out inside them, and none are; set"
        " data.heldout_fraction, or unset them."
      )
    if simulator.algorithm.requirements.pools_data:
      raise ValueError(
        "client.finetune_epochs and client.finetune_steps: algorithm.name pools"
        " the data of all clients, so there is no client to train; unset them."
      )
    if simulator.states.rows is not None:
      raise ValueError(
        "client.finetune_epochs and client.finetune_steps need the table of all"
        " client states, which are on the disk; unset them, or set"
        " runtime.state_residency to 'device'."
      )

  def __call__(self, state: RunState) -> ClientMetrics:
    """Return the metrics of every client after its fine-tuning.

    All processes have to call it. The same for the same model, whatever the
    round.

    Args:
      state: of `simulator`, on the devices.
    """
    tuning = self._tuning
    on_host = self.simulator.states.to_host(state)
    after = tuning.states.to_devices(
      on_host._replace(
        round=jnp.zeros_like(on_host.round),
        server=_Server(
          on_host.server,
          _unmeasured(self._names, self.simulator.num_clients),
        ),
        clients=(on_host.clients[0], ()),
        shared=(),
        watch=on_host.watch._replace(schedules={}, best={}),
        sampler=(),
        aggregate=(),
      )
    )
    for done in range(self._rounds):
      after = tuning.dispatch(after, tuning.plan(done, 1, state=after)).state
    measured: dict[str, Metric] = jax.device_get(after.server.measured)
    wide = jax.tree.map(
      lambda x: np.nan_to_num(np.asarray(x, np.float64)), measured
    )
    return ClientMetrics(
      total={name: m.total for name, m in wide.items()},
      weight={name: m.weight for name, m in wide.items()},
    )

  @functools.cached_property
  def _clients(self) -> np.ndarray:
    """The clients with examples to be evaluated on."""
    assert self.simulator.data.seen is not None
    return np.flatnonzero(self.simulator.data.seen.sizes)

  @property
  def _cohort(self) -> int:
    return min(_MOST, len(self._clients))

  @property
  def _rounds(self) -> int:
    return math.ceil(len(self._clients) / self._cohort)

  @functools.cached_property
  def _names(self) -> list[str]:
    """The metrics that are means."""
    simulator = self.simulator
    task = simulator.task._replace(joint={})
    found = preflight.metrics_of(
      task, simulator.states.variables, simulator.data
    )
    return [name for name in found if name not in simulator.task.joint]

  @functools.cached_property
  def _tuning(self) -> Simulator:
    """The simulator of the rounds in which clients are tuned and measured."""
    simulator, ids, size = self.simulator, self._clients, self._cohort
    assert simulator.data.seen is not None

    def sample(seed: int, round_: int) -> np.ndarray:
      # The last cohort is as large as the others; some are measured again.
      first = min(round_ * size, len(ids) - size)
      return ids[first : first + size]

    splits = {**simulator.data.splits, _SPLIT: simulator.data.seen}
    return dataclasses.replace(
      simulator,
      algorithm=_algorithm(
        simulator.algorithm,
        simulator.task,
        self.optimizer,
        self._names,
        simulator.num_clients,
      ),
      data=dataclasses.replace(simulator.data, splits=splits),
      sampler=Sampler(sample, (size,), size),
      batching=self.batching,
      aggregator=aggregators.weighted_mean(),
      transforms=(),
      noise_seed=0,
      runtime=dataclasses.replace(
        simulator.runtime,
        lanes=simulator.choose_lanes().lanes,
        state_residency="device",
        donate=False,  # what is on the host may be the run's own memory
      ),
      schedules={},
      best_metrics=(),
      revert_to_best=False,
      log_clients=False,
      budget=None,
    )


def _unmeasured(names: list[str], num_clients: int) -> dict[str, Metric]:
  empty = lambda: jnp.full(num_clients, jnp.nan, jnp.float32)
  return {name: Metric(empty(), empty()) for name in names}


def _algorithm(
  base: Algorithm,
  task: Task,
  optimizer: Optimizer,
  names: list[str],
  num_clients: int,
) -> Algorithm:
  """Return the algorithm whose clients tune their models and measure them.

  Args:
    base: the algorithm whose states are evaluated.
    task: what is evaluated.
    optimizer: of the fine-tuning.
    names: of the metrics.
    num_clients: rows of the table of what is measured.
  """

  def model(client: Client) -> Variables:
    if base.personal is None:
      return client.message.model
    return base.personal(client.message.inner, client.state)

  training = local_training(task, optimizer, get_model=model)

  def start(client: Client) -> Total:
    zero = jnp.zeros((), jnp.float32)
    return compensated.zeros({name: Metric(zero, zero) for name in names})

  def measure(client: Client, sums: Total, batch: Batch, key: Key) -> Total:
    found = core.sum_metrics(task, client.message.model, batch)
    return compensated.add(sums, found)

  def tuned(client: Client, carry: LocalState) -> Variables:
    frozen = model(client).frozen
    return Variables(carry.params, carry.buffers, frozen)

  def with_model(client: Client, model: Variables) -> Client:
    return client._replace(message=client.message._replace(model=model))

  def finish(client: Client, carry: LocalState, sums: Following) -> Report:
    values = compensated.rounded(sums.carry)
    return Report(
      update=(),
      weight=jnp.ones((), jnp.float32),
      state=client.state,
      values={
        f"{name}/{part}": x
        for name, m in values.items()
        for part, x in m._asdict().items()
      },
    )

  def init(key: Key, hparams: HParams) -> _Server:
    server = base.init(key, dict(base.hparams))
    return _Server(server, _unmeasured(names, num_clients))

  def apply(server: _Server, aggregate: Aggregate, context: Context) -> _Server:
    ids, present, _, values = aggregate.members
    rows = jnp.where(present, ids, num_clients)  # which are dropped

    def put(name: str, part: str, old: Array) -> Array:
      return old.at[rows].set(
        values[f"{name}/{part}"].astype(old.dtype), mode="drop"
      )

    measured = {
      name: Metric(*(put(name, part, x) for part, x in m._asdict().items()))
      for name, m in server.measured.items()
    }
    return server._replace(measured=measured)

  return Algorithm(
    init=init,
    broadcast=lambda server: _Message(
      base.broadcast(server.server), base.variables(server.server)
    ),
    passes=(
      training.local_pass,
      following(
        Pass(start, measure, split=_SPLIT, epochs=1, augmented=False),
        tuned,
        with_model,
      ),
    ),
    finish=finish,
    apply=apply,
    download=lambda message, version, ident: message._replace(
      inner=base.download(message.inner, version, ident)
    ),
    variables=lambda server: base.variables(server.server),
    hparams={"client": optimizer.hparams},
    client_init=lambda server, hparams: base.client_init(
      server.server, dict(base.hparams)
    ),
  )
