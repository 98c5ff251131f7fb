"""`fedjax-sim describe`: describe what a config would run."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from fedjax_sim import config as configs
from fedjax_sim import distributed
from fedjax_sim.config import components
from fedjax_sim.config.build import AUGMENTATION, Experiment, preprocessing
from fedjax_sim.data import FederatedData
from fedjax_sim.simulation import lanes
from fedjax_sim.simulation.simulator import Simulator


def client_sizes(data: FederatedData) -> str:
  """Return how many clients and examples there are, as text."""
  quantiles = np.percentile(data.sizes, [0, 50, 100]).astype(int)
  return (
    f"{data.num_clients:,} clients, {data.num_examples:,} examples"
    f" ({quantiles[0]} to {quantiles[2]} a client, median {quantiles[1]})"
  )


def describe(experiment: Experiment) -> str:
  """Return what would run: the config's fields, and what follows from them.

  Compiles the round, runs nothing and places no data.

  Args:
    experiment: from `build.build`.
  """
  source = experiment.config
  simulator, timetable = experiment.simulator, experiment.timetable
  data = simulator.data
  size, devices = simulator.sampler.sizes[0], simulator.mesh.size
  width, dealt = simulator.runtime.lanes, distributed.size(simulator.mesh)
  choices = lanes.candidates(size, dealt) if width == "auto" else [int(width)]
  down, up, *_ = simulator.traffic
  rounds = timetable.rounds
  walked = zip(simulator.batchings, simulator.splits, strict=True)
  steps = sum(float(w.num_steps(d.sizes).mean()) for w, d in walked)
  a_round = steps * simulator.sampler.expected
  facts = {
    "parameters": f"{simulator.states.num_parameters:,}",
    "train": client_sizes(data.train),
    "seen": data.seen and client_sizes(data.seen),
    "unseen": data.unseen and client_sizes(data.unseen),
    "test": data.test and f"{len(next(iter(data.test.values()))):,} examples",
    "preprocessing": _preprocessing(source),
    "rounds": f"{rounds:,}, evaluated every {timetable.eval_every}",
    "clients a round": f"{simulator.sampler.expected:g}"
    f" ({source.sampler.name})",
    "local steps": f"about {a_round:,.0f} a round,"
    f" {a_round * rounds:,.0f} in all",
    "bytes a client and round": f"{down:,} down, {up:,} up"
    + ", before transforms"
    * bool(simulator.transforms or source.downlink.order),
    "privacy": _privacy(simulator, rounds),
    "noise": simulator.states.noise_origin,
    "privacy budget": experiment.budget_end,
    "local privacy": experiment.local_guarantee,
    "secure noise": experiment.secure_noise,
    "not covered by epsilon": ", ".join(experiment.uncovered),
    "examples": f"{simulator.residency.name} ({simulator.residency.why})",
    "client states": _client_states(simulator),
    "evaluation": _evaluation(simulator),
    "slow layers": "; ".join(simulator.slow_layers),
    "devices": f"{devices} x {simulator.mesh.devices.flat[0].device_kind}",
  }
  for choice in choices:
    began = time.perf_counter()
    program = simulator.compiler.program(choice, size)
    seconds = time.perf_counter() - began
    waiting = simulator.planner.waiting_bytes(choice, size)
    facts[f"memory a device, {choice} lanes"] = (
      f"{program.device_bytes / 1e6:,.1f} MB"
      + (f" and {waiting / 1e6:,.1f} MB of the next call" if waiting else "")
      + f" (predicted; compiled in {seconds:.1f} s)"
    )
    given = program.options.items()
    facts["compiler options"] = ", ".join(f"{k}={v}" for k, v in given)
  return "\n".join([*sections(experiment.config), "", *aligned(facts)])


def sections(config: ConfigDict) -> list[str]:
  """Return the fields of a complete config, some lines a section.

  Fields that are None are off, and a section in which nothing is on is left
  out.
  """
  slots = [*components.SLOTS, *components.LABELED]
  order = dict.fromkeys(["seed", *(slot.section for slot in slots), *config])
  lines = []
  for name in order:
    section = config[name]
    if not isinstance(section, ConfigDict):
      lines += _wrapped(name, [repr(section)])
      continue
    own = components.slots_of(name)
    if own and all(section.get(s.switch or s.key) is None for s in own):
      continue
    fields = dict(configs.fields_of(section))
    names = [slot.key for slot in own if slot.key in fields]
    shown = [
      f"{field}={fields[field]!r}"
      for field in dict.fromkeys([*names, *fields])
      if fields[field] not in (None, ())
    ]
    lines += _wrapped(name, shown) if shown else []
  return lines


def _wrapped(name: str, fields: list[str]) -> list[str]:
  """Return a section's fields in lines of at most 80 characters."""
  return textwrap.wrap(
    " ".join([f"{name:<13}", *(field.replace(" ", "") for field in fields)]),
    80,
    subsequent_indent=" " * 14,
    break_long_words=False,
    break_on_hyphens=False,
  )


def _client_states(simulator: Simulator) -> str:
  """Return where client states are, and why; "" if clients keep nothing."""
  if not jax.tree.leaves(simulator.states.shapes.clients):
    return ""
  name, why = simulator.states.residency
  return f"{name} ({why})"


def _evaluation(simulator: Simulator) -> str:
  """Return the evaluation sets' sizes and places, as text; "" without any."""
  told = []
  for name, part in simulator.evaluate.parts.items():
    size = sum(x.nbytes for x in part.examples.values())
    stays = size <= simulator.evaluate.room * distributed.size(simulator.mesh)
    where = "on the devices" if stays else "sent at every evaluation"
    told.append(f"{name} {size / 1e6:,.1f} MB, {where}")
  return "; ".join(told)


def _preprocessing(source: ConfigDict) -> str:
  """Return the preprocessing of batches, by field; "" without any."""
  given = preprocessing(source)
  told = lambda keys: ", ".join(f"{key}={given[key]!r}" for key in keys)
  always = told(key for key in given if key not in AUGMENTATION)
  training = told(key for key in given if key in AUGMENTATION)
  return "; ".join(
    filter(None, [always, training and f"in training alone {training}"])
  )


def _privacy(simulator: Simulator, rounds: int) -> str:
  """Return the guarantee after the last round, and the noise; "" if none."""
  release, ledger = simulator.algorithm.privacy, simulator.account.ledger
  if release is None or ledger is None:
    return ""
  simulated = "simulated: " if release.simulated is not None else ""
  return (
    f"{simulated}{ledger.describe(rounds)}; noise multiplier"
    f" {release.multiplier:.4g}"
  )


def aligned(facts: Mapping[str, Any]) -> list[str]:
  """Return one line for each fact, without those whose value is empty."""
  keep = {k: v for k, v in facts.items() if v}
  pad = max(map(len, keep))
  return [f"{name:<{pad}}  {value}" for name, value in keep.items()]
