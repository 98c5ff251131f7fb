"""Weak scaling: as many clients a device, on more and more devices.

    python -m benchmarks.weak_scaling --json=weak.json

On the CPU the devices share the machine's cores: with more devices than cores
the ideal is no longer that a round takes as long as on one device, but so many
times as long as a core has devices. Both are printed.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax

import fedjax_sim
from benchmarks import cases, machine, show
from benchmarks.rounds import Engine
from benchmarks.turns import rotated
from fedjax_sim.core.files import write_json
from fedjax_sim.distributed import cpu

CASES = ("lr", "cnn", "lstm")
EACH = 10  # clients a device and round


def weak_scaling(
  name: str, devices: Sequence[int], turns: int, scale: str
) -> list[dict[str, Any]]:
  """Measure a round with `EACH` clients a device, as a ratio to one device.

  Args:
    name: of a case.
    devices: how many, increasing from 1.
    turns: that count.
    scale: full or smoke.
  """
  case = cases.CASES[name]
  # All clients alike, so that only devices differ.
  case = replace(case, sigma=0.0, num_clients=max(devices) * EACH)
  if scale == "smoke":
    case = replace(case, mean_size=case.batch_size, rounds=1)
  data = cases.dataset(case)
  task = case.model(case.example_shape, case.num_classes)
  engines = {}
  for count in devices:
    one = replace(case, clients_per_round=EACH * count)
    simulator = cases.simulator(one, task, data, devices=count)
    engines[count] = Engine(simulator, one.rounds, 1)
  times: dict[int, list[float]] = {count: [] for count in devices}
  for turn in range(turns + 1):
    for count in rotated(devices, turn):
      seconds = engines[count].seconds()
      if turn:  # the first one compiles and warms up
        times[count].append(seconds)
  rows = []
  on_cpu = jax.default_backend() == "cpu"
  for count in devices:
    simulator = engines[count].simulator
    lanes = simulator.choose_lanes().lanes
    program = simulator.compiler.program(lanes, EACH * count)
    ratios = [a / b for a, b in zip(times[count], times[1], strict=True)]
    each = -(-count // cpu.count()) if on_cpu else 1
    rows.append(
      {
        "case": name,
        "devices": count,
        "clients_per_round": EACH * count,
        "time_ratio": statistics.median(ratios),
        "devices_per_core": each,
        "efficiency": each / statistics.median(ratios),
        "sent_bytes": program.sent_bytes,
      }
    )
    engines[count].close()
  return rows


def main(arguments: Sequence[str] | None = None) -> None:
  """Measure, print a table, and write JSON if asked to."""
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.weak_scaling",
    description="Time of a round with as many clients a device.",
  )
  parser.add_argument("--turns", type=int, default=7, help="that count")
  parser.add_argument(
    "--most-devices", type=int, default=4, help="of the CPU; else all there are"
  )
  parser.add_argument("--scale", choices=("full", "smoke"), default="full")
  parser.add_argument("--json", help="file to write")
  flags = parser.parse_args(arguments)
  for name in ("turns", "most_devices"):
    if getattr(flags, name) < 1:
      parser.error(f"--{name.replace('_', '-')}: give at least 1")
  fedjax_sim.setup(flags.most_devices)
  devices = [2**i for i in range(jax.device_count().bit_length())]
  rows = []
  for name in CASES[:1] if flags.scale == "smoke" else CASES:
    rows += weak_scaling(name, devices, flags.turns, flags.scale)
    show.progress(f"{name}: done")
  report = {"machine": machine.describe(), "rows": rows}
  show.weak_scaling(report)
  if flags.json:
    write_json(flags.json, report)


if __name__ == "__main__":
  main()
