"""What a round is on a GPU, compiled for one that is not there.

    python -m benchmarks.gpu_program --cases=lr,cnn,lstm,resnet18 --lanes=1,16

XLA compiles the engine's round for the device that `--target` describes, and
this counts what the program launches: kernels of a local step, of a wave beside
its steps, of a round beside its waves; library calls; loops, and whether they
run on the device; the memory that it needs. From that and the description it
predicts a step's time three times, by what it launches, moves and multiplies:
the largest is what bounds it. How long the kernels take it cannot know.

It needs the compiler, not a GPU: `jax-cuda13-plugin[with-cuda]` and
`jax-cuda13-pjrt` of jaxlib's version.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from benchmarks import cases, gpu_text, show
from benchmarks.gpu_text import Loop, Work
from fedjax_sim.core.files import write_json
from fedjax_sim.distributed import AXIS
from fedjax_sim.engine import program as programs

TARGET = pathlib.Path(__file__).with_name("h200.txtpb")

# Seconds that a launch takes on a recent GPU: assumptions, not measured here.
LAUNCH = 2.5e-6  # of a kernel by the host, one after the other
NODE = 1e-6  # of a kernel in a graph, after the one before it
GRAPH = 5e-6  # of a graph by the host
ASK = 10e-6  # the host waits for a loop's condition and reads it


class Device(NamedTuple):
  """What a target's description says of its speed.

  Attributes:
    bandwidth: of its memory, bytes a second.
    flops: float32 operations a second, without tensor cores.
  """

  bandwidth: float
  flops: float


def device(target: str) -> Device:
  """Return what the description of a target says.

  Args:
    target: text of XLA's `GpuTargetConfigProto`.
  """
  names = "memory_bandwidth", "core_count", "fpus_per_core", "clock_rate_ghz"
  found = {n: re.search(rf"\b{n}: ([\d.]+)", target) for n in names}
  missing = [name for name, match in found.items() if match is None]
  if missing:
    raise ValueError(f"the target does not say {', '.join(missing)}")
  values = {name: float(match[1]) for name, match in found.items() if match}
  units = values["core_count"] * values["fpus_per_core"]
  # A multiplication and an addition a cycle.
  return Device(
    values["memory_bandwidth"], 2e9 * units * values["clock_rate_ghz"]
  )


def compiled_text(
  name: str, lanes: int, target: str, options: Mapping[str, str | bool]
) -> tuple[str, str, int]:
  """Compile a case's round for a target.

  Args:
    name: of `cases.CASES`.
    lanes: clients that the device trains side by side.
    target: its description.
    options: of XLA, beside the engine's.

  Returns:
    The program and its thunks, as text, and the bytes that a device needs.
  """
  case = cases.CASES[name]
  size = max(case.clients_per_round, lanes)
  case = dataclasses.replace(
    case, clients_per_round=size, num_clients=max(case.num_clients, size)
  )
  found = topologies.get_topology_desc(
    platform="cuda",
    topology_name="",
    target_config=target,
    topology="1x1x1",  # hosts, devices of each and slices
  )
  mesh = Mesh(np.array(found.devices[:1]), (AXIS,), axis_types=(AxisType.Auto,))
  # What asks for the backend is to choose what it would choose on the target.
  with (
    mock.patch.object(jax, "default_backend", return_value="gpu"),
    tempfile.TemporaryDirectory() as folder,
  ):
    task = case.model(case.example_shape, case.num_classes)
    data = cases.dataset(case)
    simulator = cases.simulator(case, task, data, devices=1, lanes=lanes)
    vars(simulator)["mesh"] = mesh  # where the cached property keeps it
    simulator.trace()
    traced = simulator.compiler.traced[lanes, size]
    compiled = traced.lower().compile(
      compiler_options={
        **programs.compiler_options(mesh, False),
        **options,
        "xla_dump_to": folder,
      }
    )
    # Those after XLA's passes come last, if the passes changed any.
    thunks = sorted(pathlib.Path(folder).glob("*thunk_sequence*.txt"))
    text = compiled.as_text()
    assert text is not None
    return text, thunks[-1].read_text(), programs.device_bytes(compiled)


def nested(work: Work, depth: int) -> list[Loop]:
  """Return the loops over rounds, waves and steps, `depth` of them."""
  if not depth:
    return []
  chains = [
    [loop, *nested(loop.work, depth - 1)]
    for loop in work.loops
    if loop.trips is None
  ]
  return max(
    chains,
    key=lambda chain: (len(chain), chain[-1].work.total.kernels),
    default=[],
  )


def launch_seconds(loop: Loop) -> float:
  """Return the seconds that launching an iteration takes, at least."""
  work, launch = loop.work, loop.launch
  assert launch is not None
  inner = sum((x.trips or 0) * launch_seconds(x) for x in work.loops)
  if launch.graphed:
    return NODE * (work.kernels + loop.condition) + inner
  asked = ASK + LAUNCH * loop.condition if loop.trips is None else 0.0
  graphed = work.kernels - launch.loose
  return (
    asked
    + GRAPH * launch.graphs
    + NODE * graphed
    + LAUNCH * launch.loose
    + inner
  )


def summary(whole: Work, device_bytes: int, speed: Device) -> dict[str, Any]:
  """Return what is reported of a program.

  Args:
    whole: its work, with the loops' launches.
    device_bytes: memory that it needs.
    speed: of the device.
  """
  rounds, waves, steps = nested(whole, 3)
  step = steps.work.total
  loops = list(_all(whole))
  seconds = {
    "launches": launch_seconds(steps),
    "memory": step.moved_bytes / speed.bandwidth,
    "compute": step.flops / speed.flops,
  }
  return {
    "step_kernels": step.kernels,
    "step_copies": step.copies,
    "wave_kernels": _beside(waves, steps),
    "round_kernels": _beside(rounds, waves),
    "step_calls": dict(step.calls),
    "dynamic_loops": sum(loop.trips is None for loop in loops),
    "known_loops": sum(loop.trips is not None for loop in loops),
    "graphed_loops": sum(bool(x.launch and x.launch.graphed) for x in loops),
    "device_bytes": device_bytes,
    "step_bytes": step.moved_bytes,
    "step_flops": step.flops,
    "seconds": seconds,
    "bound": max(seconds, key=lambda name: seconds[name]),
  }


def _all(work: Work) -> list[Loop]:
  """Return all loops, those inside others too."""
  return [x for loop in work.loops for x in (loop, *_all(loop.work))]


def _beside(outer: Loop, inner: Loop) -> int:
  """Return kernels of an iteration beside those of one loop inside it."""
  others = tuple(loop for loop in outer.work.loops if loop is not inner)
  return outer.work._replace(loops=others).total.kernels


def measure(
  name: str, lanes: int, target: str, options: Mapping[str, str | bool]
) -> dict[str, Any]:
  """Compile a case in this process; return its summary."""
  text, thunks, device_bytes = compiled_text(name, lanes, target, options)
  entry, computations = gpu_text.parse(text)
  whole = gpu_text.with_launches(
    gpu_text.work(computations, entry), iter(gpu_text.launches(thunks))
  )
  return summary(whole, device_bytes, device(target))


def apart(arguments: Sequence[str]) -> dict[str, Any]:
  """Measure one case in a process of its own, which the compiler may end.

  Args:
    arguments: of the command, for one case and one number of lanes.
  """
  done = subprocess.run(
    [sys.executable, "-m", "benchmarks.gpu_program", "--alone", *arguments],
    # It would look for a GPU, and for programs that it could load.
    env=os.environ
    | {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    | {programs.GPU_GRAPHS: os.environ.get(programs.GPU_GRAPHS, "1")},
    cwd=TARGET.parents[1],
    capture_output=True,
    text=True,
    check=False,
  )
  if done.returncode == 0:
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result
  lines = done.stderr.strip().splitlines() or [f"ended: {done.returncode}"]
  failed = [x for x in lines if "Check failed" in x or "Error: " in x]
  return {"error": (failed or lines)[-1]}


def missing() -> str | None:
  """Return why this cannot run here; None if it can."""
  import importlib.util

  names = "jax_cuda13_plugin", "jax_plugins.xla_cuda13"
  try:
    lacking = [n for n in names if importlib.util.find_spec(n) is None]
  except ModuleNotFoundError as error:
    lacking = [str(error.name)]
  if not lacking:
    return None
  return (
    f"{', '.join(lacking)} is not installed; the compiler for GPUs is in"
    f' "jax-cuda13-plugin[with-cuda]" and "jax-cuda13-pjrt", both'
    f" =={jax.__version__}"
  )


def _row(name: str, result: Mapping[str, Any]) -> list[str]:
  """Return a program's row of the table."""
  if "error" in result:
    return [name, "failed", *["-"] * (len(COLUMNS) - 2)]
  calls = result["step_calls"].items()
  mega = ("device_bytes", "step_bytes", "step_flops")
  micro = ("launches", "memory", "compute")
  return [
    name,
    *(str(result[f"{part}_kernels"]) for part in ("step", "wave", "round")),
    ", ".join(f"{count} {target}" for target, count in calls) or "none",
    *(str(result[f"{kind}_loops"]) for kind in ("dynamic", "known", "graphed")),
    *(show.number(result[key] / 1e6) for key in mega),
    *(show.number(result["seconds"][key] * 1e6) for key in micro),
    result["bound"],
  ]


COLUMNS = (
  *("case (lanes)", "kernels of a step", "of a wave", "of a round"),
  *("library calls of a step", "dynamic loops", "known", "in graphs"),
  *("memory, MB", "a step moves, MB", "multiplies, MFLOP"),
  *("launches, us", "memory, us", "compute, us", "bound by"),
)


def main(arguments: Sequence[str] | None = None) -> None:
  """Compile, count, and print a table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--cases", default="lr,cnn,lstm,resnet18")
  parser.add_argument("--lanes", default="1,16", help="a program for each")
  parser.add_argument(
    "--target", default=str(TARGET), help="description of the device"
  )
  parser.add_argument(
    "--option",
    action="append",
    default=[],
    metavar="NAME=VALUE",
    help="of XLA, beside the engine's; can be repeated",
  )
  parser.add_argument("--json", help="file to write")
  parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
  flags = parser.parse_args(arguments)
  names = flags.cases.split(",")
  for name in names:
    if name not in cases.CASES:
      parser.error(f"--cases: {name!r} is none of {', '.join(cases.CASES)}")
  lanes = [int(n) for n in flags.lanes.split(",")]
  if min(lanes) < 1:
    parser.error("--lanes: give at least 1")
  if (why := missing()) is not None:
    parser.error(why)
  target = pathlib.Path(flags.target).read_text()
  if flags.alone:
    words: dict[str, str | bool] = {"true": True, "false": False}
    pairs = (option.split("=", 1) for option in flags.option)
    options = {name: words.get(value, value) for name, value in pairs}
    print(json.dumps(measure(names[0], lanes[0], target, options)))
    return
  results: dict[str, dict[str, Any]] = {}
  for name in names:
    for count in lanes:
      one = [f"--cases={name}", f"--lanes={count}", f"--target={flags.target}"]
      one += [f"--option={option}" for option in flags.option]
      results[f"{name} ({count})"] = result = apart(one)
      if "error" in result:
        show.progress(f"{name} ({count}): {result['error']}")
  if flags.json:
    write_json(flags.json, results)
  rows = [_row(name, result) for name, result in results.items()]
  for row in (COLUMNS, ["---"] * len(COLUMNS), *rows):  # as in documents
    print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
  main()
