"""The state of a run, and the metrics of a round."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from fedjax_sim.core import Array, Metric, PyTree, TransformResult


class RunState(NamedTuple):
  """The whole state of a run; what a checkpoint holds.

  Attributes:
    round: shape=(), int32; rounds done.
    seed: shape=(), uint32.
    noise_seed: shape=(2,), uint32; the 64 bits that private noise comes from.
    server: the algorithm's server state.
    clients: the table of what clients keep: leaves (rows, ...), a row a client
      (and padding to a multiple of the devices). Where rows lie on the disk it
      is a `StoredRows`, and the compiled round gets `ClientRows`.
    shared: the transforms' shared states, a tuple.
    watch: what evaluations left; see `simulation/monitor.py`.
    sampler: the sampler's state, numpy arrays on the host; () without one. The
      compiled round never gets it.
    aggregate: the aggregator's last result, as `AggregationContext.previous`.
  """

  round: Array
  seed: Array
  noise_seed: Array
  server: PyTree
  clients: PyTree
  shared: PyTree
  watch: MonitorState
  sampler: PyTree = ()
  aggregate: PyTree = ()


class RoundMetrics(NamedTuple):
  """What one round tells.

  Attributes:
    clients: shape=(), int32; clients in the aggregate.
    rejected: shape=(), int32; clients left out, not finite.
    metrics: name -> `Metric`, summed over the clients in the aggregate; float32
      at least.
    transforms: name of a transform -> mean over them of its metrics and bytes.
    client_rejected: shape=(devices, waves, lanes), bool.
    nan_losses: shape=(), int32; clients whose update is finite, but whose
      metrics hold a NaN: labels beyond the model's outputs do that.
    finite: shape=(), bool; whether the global model is, afterwards.
    client_values: column -> shape=(devices, waves, lanes), NaN of who is not in
      the aggregate; empty unless clients are logged.
    scheduled: hyper-parameter -> its value in this round, shape=().
    state_metrics: `Algorithm.state_metrics`, before the server's step.
    observed: name -> shape=(devices, waves, lanes), what a sampler observes,
      NaN of who is not in the aggregate; empty unless the sampler observes.
    broadcast_bytes: shape=(), `Algorithm.broadcast_bytes`; () without it.
  """

  clients: Array
  rejected: Array
  metrics: Mapping[str, Metric]
  transforms: dict[str, TransformResult]
  client_rejected: Array
  finite: Array
  nan_losses: Array
  client_values: dict[str, Array]
  scheduled: dict[str, Array]
  state_metrics: Mapping[str, Array]
  observed: dict[str, Array]
  broadcast_bytes: Array | tuple[()] = ()


class Best(NamedTuple):
  """The best model so far, by one metric.

  Attributes:
    value: shape=(), float32; of the metric; NaN: there is none yet.
    round: shape=(), int32; rounds done then; -1: there is none yet.
    server: the algorithm's server state then.
  """

  value: Array
  round: Array
  server: PyTree


class MonitorState(NamedTuple):
  """What evaluations left.

  Attributes:
    schedules: hyper-parameter -> its schedule's state.
    best: metric -> its best model; {} if none is kept.
  """

  schedules: dict[str, PyTree]
  best: dict[str, Best]
