"""What there is, and what a config would run, as text."""

from __future__ import annotations

import inspect
import json
import math
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from fedjax_sim import aggregators, config, distributed, transforms
from fedjax_sim.algorithms import ALGORITHMS
from fedjax_sim.config.build import AUGMENTATION, Experiment, preprocessing
from fedjax_sim.config.build.privacy import MECHANISMS
from fedjax_sim.data import DATASETS, PARTITIONERS, FederatedData
from fedjax_sim.models import MODELS
from fedjax_sim.privacy.local.registry import RANDOMIZERS
from fedjax_sim.privacy.secure.aggregators import SECURE
from fedjax_sim.sampling.available import SAMPLERS
from fedjax_sim.simulation import costs, lanes, preflight, scaling
from fedjax_sim.simulation.simulator import Simulator
from fedjax_sim.training import schedules
from fedjax_sim.training.optimizers import OPTIMIZERS

REGISTRIES: Mapping[str, Mapping[str, Callable[..., Any]]] = {
  "algorithms (algorithm.name)": ALGORITHMS,
  "models (model.name)": MODELS,
  "data sets (data.name)": DATASETS,
  "partitions (data.partition)": PARTITIONERS,
  "aggregators (server.aggregator)": {**aggregators.AGGREGATORS, **SECURE},
  "samplers (server.sampling)": SAMPLERS,
  "transforms (transforms)": transforms.TRANSFORMS,
  "local privacy (local_privacy.mechanism)": RANDOMIZERS,
  "schedules (client.schedule, and so on)": schedules.SCHEDULES,
}


def listing() -> str:
  """All registries, one line an entry, and fields below an algorithm's."""
  lines = [
    "A config names one of these or, but for transforms and schedules, yours:"
    " path/to/file.py:name.",
    "",
  ]
  for title, registry in REGISTRIES.items():
    lines.append(f"{title}:")
    width = max(map(len, registry))
    for name, entry in registry.items():
      doc = (inspect.getdoc(entry) or "").splitlines()
      lines.append(f"  {name:<{width}}  {doc[0] if doc else ''}")
      if registry is ALGORITHMS:
        lines += _fields_of(entry, " " * (width + 4))
    lines.append("")
  lines.append("privacy (privacy.mechanism):")
  width = max(map(len, MECHANISMS))
  lines += [f"  {name:<{width}}  {text}" for name, text in MECHANISMS.items()]
  lines.append("")
  lines.append("optimizers (client.optimizer, server.optimizer), from optax:")
  lines.append("  " + ", ".join(OPTIMIZERS))
  return "\n".join(lines)


def _fields_of(algorithm: Callable[..., Any], indent: str) -> list[str]:
  """The fields of the section `algorithm` that it takes, as lines."""
  section = config.default_config().algorithm
  taken = [x for x in inspect.signature(algorithm).parameters if x in section]
  if not taken:
    return []
  text = f"takes {', '.join(taken)}"
  return textwrap.wrap(
    text, 80, initial_indent=indent, subsequent_indent=f"{indent}  "
  )


def _sizes(data: FederatedData) -> str:
  quantiles = np.percentile(data.sizes, [0, 50, 100]).astype(int)
  return (
    f"{data.num_clients:,} clients, {data.num_examples:,} examples"
    f" ({quantiles[0]} to {quantiles[2]} a client, median {quantiles[1]})"
  )


def describe(experiment: Experiment, source: ConfigDict) -> str:
  """What would run; compiles the round, runs nothing and places no data.

  Args:
    experiment: from `build.build(source)`.
    source: the config.
  """
  simulator, timetable = experiment.simulator, experiment.timetable
  data = simulator.data
  size, devices = simulator.sampler.sizes[0], simulator.mesh.size
  width, dealt = simulator.runtime.lanes, distributed.size(simulator.mesh)
  choices = lanes.candidates(size, dealt) if width == "auto" else [int(width)]
  down, up = simulator.bytes_per_client
  rounds = timetable.rounds
  walked = zip(simulator.works, simulator.splits, strict=True)
  steps = sum(float(w.num_steps(d.sizes).mean()) for w, d in walked)
  a_round = steps * simulator.sampler.expected
  facts = {
    "parameters": f"{simulator.num_parameters:,}",
    "train": _sizes(data.train),
    "seen": data.seen and _sizes(data.seen),
    "unseen": data.unseen and _sizes(data.unseen),
    "test": data.test and f"{len(next(iter(data.test.values()))):,} examples",
    "preprocessing": _preprocessing(source),
    "rounds": f"{rounds:,}, evaluated every {timetable.eval_every}",
    "clients a round": f"{simulator.sampler.expected:g}"
    f" ({source.server.sampling})",
    "local steps": f"about {a_round:,.0f} a round,"
    f" {a_round * rounds:,.0f} in all",
    "bytes a client and round": f"{down:,} down, {up:,} up"
    + (", before transforms" if simulator.transforms else ""),
    "privacy": _privacy(simulator, rounds),
    "noise": simulator.noise_origin,
    "privacy budget": experiment.budget_end,
    "local privacy": experiment.local_guarantee,
    "secure noise": experiment.secure_noise,
    "not covered by epsilon": ", ".join(experiment.uncovered),
    "examples": f"{simulator.residency.name} ({simulator.residency.why})",
    "evaluation": _evaluation(simulator),
    "slow layers": "; ".join(simulator.slow_layers),
    "devices": f"{devices} x {simulator.mesh.devices.flat[0].device_kind}",
  }
  for choice in choices:
    began = time.perf_counter()
    program = simulator.program(choice, size)
    seconds = time.perf_counter() - began
    waiting = simulator.waiting_bytes(choice, size)
    facts[f"memory a device, {choice} lanes"] = (
      f"{program.device_bytes / 1e6:,.1f} MB"
      + (f" and {waiting / 1e6:,.1f} MB of the next call" if waiting else "")
      + f" (predicted; compiled in {seconds:.1f} s)"
    )
  lines = [json.dumps(config.resolved(source), indent=2), ""]
  return "\n".join(lines + _aligned(facts))


def _evaluation(simulator: Simulator) -> str:
  """How large the sets for evaluation are, and where; "" without any."""
  told = []
  for name, part in simulator.evaluated.items():
    size = sum(x.nbytes for x in part.examples.values())
    stays = size <= simulator.evaluation_room * distributed.size(simulator.mesh)
    where = "on the devices" if stays else "sent at every evaluation"
    told.append(f"{name} {size / 1e6:,.1f} MB, {where}")
  return "; ".join(told)


def _preprocessing(source: ConfigDict) -> str:
  """What is done to batches, by field; "" if nothing is."""
  given = preprocessing(source)
  told = lambda keys: ", ".join(f"{key}={given[key]!r}" for key in keys)
  always = told(key for key in given if key not in AUGMENTATION)
  training = told(key for key in given if key in AUGMENTATION)
  return "; ".join(
    filter(None, [always, training and f"in training alone {training}"])
  )


def _privacy(simulator: Simulator, rounds: int) -> str:
  """The guarantee after the last round, and the noise; "" without any."""
  release, ledger = simulator.algorithm.release, simulator.ledger
  if release is None or ledger is None:
    return ""
  simulated = "simulated: " if release.simulated is not None else ""
  return (
    f"{simulated}{ledger.describe(rounds)}; noise multiplier"
    f" {release.multiplier:.4g}"
  )


def _aligned(facts: Mapping[str, Any]) -> list[str]:
  """One line a fact, those that do not hold left out."""
  keep = {k: v for k, v in facts.items() if v}
  pad = max(map(len, keep))
  return [f"{name:<{pad}}  {value}" for name, value in keep.items()]


_LARGEST = 1_000_000  # clients a round


def plan(
  experiment: Experiment,
  devices: int,
  link: float,
  host: float,
  speed: costs.Speed | None,
) -> str:
  """How rounds would go on other devices, predicted by `scaling.Model`.

  Args:
    experiment: from `build.build`.
    devices: how many there would be.
    link: as in `scaling.Hardware`.
    host: as in `scaling.Hardware`.
    speed: of a device; None: measured here, by running rounds.

  Raises:
    ValueError: a field of the config that does not go with it.
  """
  simulator = experiment.simulator
  lanes, source = simulator.runtime.lanes, "as given"
  if speed is not None and lanes == "auto":
    raise ValueError(
      "runtime.lanes='auto' has to be measured; give a number, by"
      " --config.runtime.lanes=1, or give --flops=measure."
    )
  clients = costs.costs_of(simulator)
  if speed is None:
    speed, lanes = costs.measure(simulator, clients)
    source = "measured on one device here"
  model = scaling.Model(
    simulator=simulator,
    costs=clients,
    hardware=scaling.Hardware(devices, link, host, speed),
    lanes=int(lanes),
  )
  vanishing = model.vanishing_cohort()
  rounds = [model.predict(size) for size in _cohorts(simulator)]
  first, last = rounds[0], rounds[-1]
  walked = zip(simulator.works, simulator.splits, strict=True)
  steps = [work.num_steps(data.sizes) for work, data in walked]
  facts = {
    "parameters": f"{simulator.num_parameters:,}",
    "train": _sizes(simulator.data.train),
    "local steps of a client": _each(
      f"{x.mean():,.1f} (at most {x.max():,})" for x in steps
    ),
    "FLOPs of a local step": _each(f"{x:,.0f}" for x in clients.step_flops),
    "bytes of a client beside": f"{clients.client_bytes:,.0f}",
    "devices": f"{devices:,}, lanes of each: {lanes}",
    "speed of a device": f"{_speed(speed)} ({source})",
    "links of a device": f"{_gbit(link)} to the others, {_gbit(host)} to its"
    " host",
    "summed over the devices": f"{clients.summed_bytes:,} bytes",
    "a device sends": f"{first.network_bytes:,.0f} bytes a round to the others",
    "a device gets": f"{first.host_bytes:,.0f} bytes a round from its host",
    f"memory, {first.clients:,} clients": _parts(first.memory),
    f"memory, {last.clients:,} clients": _parts(last.memory),
    f"communication under {scaling.SHARE:.0%}": "at no number of clients"
    if math.isinf(vanishing)
    else f"from {max(1, math.ceil(vanishing)):,} clients a round on",
  }
  lines = [*_aligned(facts), "", *_table(_HEAD, map(_row, rounds))]
  lines += _notes(simulator, rounds)
  return "\n".join(lines)


def _cohorts(simulator: Simulator) -> list[int]:
  """The run's cohort, 10 times as large, ..., and at last the largest."""
  first = max(1, round(simulator.sampler.expected))
  if simulator.algorithm.pooled:
    return [first]
  sizes = [first]
  while 10 * sizes[-1] < _LARGEST:
    sizes.append(10 * sizes[-1])
  return sizes if first >= _LARGEST else [*sizes, _LARGEST]


def _each(texts: Iterable[str]) -> str:
  """Of every pass."""
  return "; ".join(texts)


def _speed(speed: costs.Speed) -> str:
  texts = [f"{speed.flops:.3g} FLOP/s"]
  if math.isfinite(speed.memory):
    texts.append(f"{_gbit(speed.memory)} with its memory")
  if speed.fixed:
    texts.append(f"{speed.fixed:.2g} s a round beside")
  return ", ".join(texts)


def _gbit(rate: float) -> str:
  return f"{8 * rate / 1e9:.3g} Gbit/s"


def _mb(size: float) -> str:
  return f"{size / 1e6:,.2f}"


def _parts(memory: Mapping[str, float]) -> str:
  parts = [f"{name} {_mb(size)}" for name, size in memory.items() if size]
  return f"{', '.join(parts)} MB on a device"


_HEAD = (
  "clients",
  "compute, s",
  "network, s",
  "host, s",
  "communication",
  "lanes wait",
  "devices wait",
  "memory, MB",
)


def _row(round_: scaling.Prediction) -> tuple[str, ...]:
  """The cells below `_HEAD`."""
  return (
    f"{round_.clients:,}",
    f"{round_.compute_seconds:.3g}",
    f"{round_.network_seconds:.3g}",
    f"{round_.host_seconds:.3g}",
    f"{round_.communication:.1%}",
    f"{round_.waiting:.1%}",
    f"{round_.idle:.1%}",
    _mb(sum(round_.memory.values())),
  )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
  """Columns, aligned at their right ends."""
  cells = [head, *rows]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  for row in cells:
    padded = [f"{x:>{n}}" for x, n in zip(row, widths, strict=True)]
    yield "  ".join(padded)


def _notes(
  simulator: Simulator, rounds: Sequence[scaling.Prediction]
) -> list[str]:
  """What has to be known of some of the rows."""
  notes = []
  population = simulator.num_clients
  if rounds[-1].clients > population:
    notes.append(
      f"Beyond {population:,} clients a round, their sizes are taken several"
      " times over."
    )
  most = preflight.MOST_EXAMPLES
  long = [r.clients for r in rounds if r.entries > most]
  if long:
    notes.append(
      f"From {long[0]:,} clients on a round has more than {most:,} batch rows"
      " and would be refused."
    )
  return ["", *notes] if notes else []
