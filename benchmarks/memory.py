"""The memory of a device that a run takes, against what is predicted.

    python -m benchmarks.memory --cases=cnn,lstm --lanes=8,32

Cases are those of `benchmarks.engine`. The prediction is `fedjax-sim
describe`'s: of the compiled rounds, and of the next call, which waits for its
turn. What is taken is the greatest that the device's allocator has given out,
in a process of its own that only trains, on one device. CPU devices do not tell
it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import jax

import fedjax_sim
from benchmarks import cases, show
from benchmarks.apart import apart
from fedjax_sim.core.files import write_json

DISPATCHES = 3  # the first places the examples


def taken(
  name: str, lanes: int, clients_per_round: int | None, small: bool
) -> dict[str, Any]:
  """Train; return what was predicted and taken, in bytes.

  Args:
    name: of a case.
    lanes: clients that the device trains at once.
    clients_per_round: of the case; None: its own.
    small: as little as a test needs.
  """
  fedjax_sim.setup()
  case = cases.CASES[name]
  if clients_per_round is not None:
    case = cases.with_cohort(case, clients_per_round)
  if small:
    case = cases.smoke(case)
  data = cases.dataset(case)
  task = case.model(case.example_shape, case.num_classes)
  simulator = cases.simulator(case, task, data, devices=1, lanes=lanes)
  for done in simulator.run(simulator.init(), DISPATCHES * case.rounds):
    jax.block_until_ready(done.state)
  size = simulator.sampler.sizes[0]
  device = simulator.mesh.devices.flat[0]
  return {
    "program_bytes": simulator.compiler.program(lanes, size).device_bytes,
    "waiting_bytes": simulator.planner.waiting_bytes(lanes, size),
    "taken_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
    "device_kind": device.device_kind,
  }


def main(arguments: Sequence[str] | None = None) -> None:
  """Measure, print a table, and write JSON if asked to."""
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.memory",
    description=str(__doc__).splitlines()[0],
  )
  parser.add_argument(
    "--cases",
    default=",".join(cases.CASES),
    help="comma-separated, of: %(default)s",
  )
  parser.add_argument(
    "--lanes", default="1,8,32", help="by default %(default)s"
  )
  parser.add_argument("--clients-per-round", type=int, help="of every case")
  parser.add_argument("--scale", choices=("full", "smoke"), default="full")
  parser.add_argument("--json", help="file to write")
  flags = parser.parse_args(arguments)
  names, lanes = flags.cases.split(","), flags.lanes.split(",")
  for name in names:
    if name not in cases.CASES:
      parser.error(f"--cases: {name!r} is none of {', '.join(cases.CASES)}")
  for number in lanes:
    if not number.isdecimal() or int(number) < 1:
      parser.error(f"--lanes: {number!r} is no number > 0")
  small = flags.scale == "smoke"
  report: dict[str, Any] = {"rows": []}
  for name in names:
    for number in map(int, lanes):
      of = name, number, flags.clients_per_round, small
      found = apart(taken, *of)
      del found["peak"]  # the host's
      report["rows"].append({"case": name, "lanes": number, **found})
      show.progress(f"{name}, {number} lanes: done")
      if flags.json:  # what is there if a later one fails
        write_json(flags.json, report)
  show.memory(report)


if __name__ == "__main__":
  main()
