"""What there is, and what a config would run, as text."""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from fedjax_sim import aggregators, config, lanes, sampling, transforms
from fedjax_sim.algorithms import ALGORITHMS
from fedjax_sim.build import Experiment
from fedjax_sim.data import DATASETS, PARTITIONERS, FederatedData
from fedjax_sim.models import MODELS
from fedjax_sim.optimizers import OPTIMIZERS

REGISTRIES: Mapping[str, Mapping[str, Callable[..., Any]]] = {
  "algorithms (algorithm.name)": ALGORITHMS,
  "models (model.name)": MODELS,
  "data sets (data.name)": DATASETS,
  "partitions (data.partition)": PARTITIONERS,
  "aggregators (server.aggregator)": aggregators.AGGREGATORS,
  "samplers (server.sampling)": sampling.SAMPLERS,
  "transforms (transforms)": transforms.TRANSFORMS,
}


def listing() -> str:
  """All registries, one line an entry."""
  lines = []
  for title, registry in REGISTRIES.items():
    lines.append(f"{title}:")
    width = max(map(len, registry))
    for name, entry in registry.items():
      doc = (inspect.getdoc(entry) or "").splitlines()
      lines.append(f"  {name:<{width}}  {doc[0] if doc else ''}")
    lines.append("")
  lines.append("optimizers (client.optimizer, server.optimizer), from optax:")
  lines.append("  " + ", ".join(OPTIMIZERS))
  return "\n".join(lines)


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
  simulator, schedule = experiment.simulator, experiment.schedule
  data = simulator.data
  size, devices = simulator.sampler.sizes[0], simulator.mesh.size
  width = simulator.runtime.lanes
  choices = lanes.candidates(size, devices) if width == "auto" else [int(width)]
  down, up = simulator.bytes_per_client
  rounds = schedule.rounds
  walked = zip(simulator.works, simulator.splits, strict=True)
  steps = sum(float(w.num_steps(d.sizes).mean()) for w, d in walked)
  a_round = steps * simulator.sampler.expected
  facts = {
    "parameters": f"{simulator.num_parameters:,}",
    "train": _sizes(data.train),
    "seen": data.seen and _sizes(data.seen),
    "unseen": data.unseen and _sizes(data.unseen),
    "test": data.test and f"{len(next(iter(data.test.values()))):,} examples",
    "rounds": f"{rounds:,}, evaluated every {schedule.eval_every}",
    "clients a round": f"{simulator.sampler.expected:g}"
    f" ({source.server.sampling})",
    "local steps": f"about {a_round:,.0f} a round,"
    f" {a_round * rounds:,.0f} in all",
    "bytes a client and round": f"{down:,} down, {up:,} up",
    "devices": f"{devices} x {simulator.mesh.devices.flat[0].device_kind}",
  }
  for choice in choices:
    began = time.perf_counter()
    program = simulator.program(choice, size)
    seconds = time.perf_counter() - began
    facts[f"memory a device, {choice} lanes"] = (
      f"{program.device_bytes / 1e6:,.1f} MB"
      f" (predicted; compiled in {seconds:.1f} s)"
    )
  lines = [json.dumps(config.resolved(source), indent=2), ""]
  keep = {k: v for k, v in facts.items() if v}
  pad = max(map(len, keep))
  lines += [f"{name:<{pad}}  {value}" for name, value in keep.items()]
  return "\n".join(lines)
