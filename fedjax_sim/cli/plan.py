"""`fedjax-sim plan`: predict a run on other devices."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from fedjax_sim import distributed
from fedjax_sim.cli import start
from fedjax_sim.cli.describe import aligned, client_sizes
from fedjax_sim.config import build, flags
from fedjax_sim.config.build import Experiment
from fedjax_sim.core import validate
from fedjax_sim.simulation import costs, preflight, scaling
from fedjax_sim.simulation.simulator import Simulator

MOST_DEVICES = 2**16  # that a round is planned for, one by one

_LARGEST = 1_000_000  # clients a round


def run(arguments: Sequence[str]) -> int:
  """Print what a run would take; return the exit code.

  Args:
    arguments: what follows `fedjax-sim plan`.

  Raises:
    UsageError: a flag is unknown, missing or has a wrong value.
    TypeError, ValueError, OSError, ImportError: the config is wrong.
  """
  values = flags.parse(
    arguments,
    *("config", "devices", "link-gbps", "flops"),
    **{"host-gbps": "", "memory-gbps": ""},
  )

  def number(name: str, other: str = "") -> float:
    value = flags.number(f"--{name}", values[name].value, float, other)
    return validate.number(f"--{name}", value, gt=0)

  def rate(name: str, default: float) -> float:
    given = values[name].value
    return number(name) * 1e9 / 8 if given else default  # bytes a second

  devices = flags.number("--devices", values["devices"].value, int)
  validate.integer("--devices", devices, le=MOST_DEVICES)
  link = rate("link-gbps", 0.0)
  host = rate("host-gbps", link)
  memory = rate("memory-gbps", math.inf)
  speed = None
  if values["flops"].value != "measure":
    speed = costs.Speed(number("flops", " or 'measure'"), memory)
  elif math.isfinite(memory):
    raise flags.UsageError(
      f"--memory-gbps={values['memory-gbps'].value} does not go with"
      " --flops=measure, which measures it; leave it out."
    )
  start.prepare()
  distributed.devices()  # what is wrong with JAX shows now
  build.check_no_password(values.config)
  experiment = build.build(values.config)
  text = plan(experiment, devices, link, host, speed)
  print(text)  # noqa: T201
  return 0


def plan(
  experiment: Experiment,
  devices: int,
  link: float,
  host: float,
  speed: costs.Speed | None,
) -> str:
  """Return how rounds would go on other devices, by `scaling.Model`, as text.

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
  walked = zip(simulator.batchings, simulator.splits, strict=True)
  steps = [batching.num_steps(data.sizes) for batching, data in walked]
  facts = {
    "parameters": f"{simulator.states.num_parameters:,}",
    "train": client_sizes(simulator.data.train),
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
  lines = [*aligned(facts), "", *_table(_HEAD, map(_row, rounds))]
  lines += _notes(simulator, rounds)
  return "\n".join(lines)


def _cohorts(simulator: Simulator) -> list[int]:
  """Return cohort sizes: the run's, 10 times as many, ..., and the largest."""
  first = max(1, round(simulator.sampler.expected))
  if simulator.algorithm.requirements.pools_data:
    return [first]
  sizes = [first]
  while 10 * sizes[-1] < _LARGEST:
    sizes.append(10 * sizes[-1])
  return sizes if first >= _LARGEST else [*sizes, _LARGEST]


def _each(texts: Iterable[str]) -> str:
  """Join the texts of every pass."""
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
  """Return the cells of a row below `_HEAD`."""
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
  """Yield the lines of a table, its columns aligned at their right ends."""
  cells = [head, *rows]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  for row in cells:
    padded = [f"{x:>{n}}" for x, n in zip(row, widths, strict=True)]
    yield "  ".join(padded)


def _notes(
  simulator: Simulator, rounds: Sequence[scaling.Prediction]
) -> list[str]:
  """Return notes on rows that reuse clients or that a run would refuse."""
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
