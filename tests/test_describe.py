"""`describe` and `list` tell the truth, and do nothing."""

import inspect
import json
import pathlib
import re

import jax
import numpy as np
import pytest

from fedjax_sim import config
from fedjax_sim.algorithms import ALGORITHMS
from fedjax_sim.cli import describe, listing
from fedjax_sim.config import build, flags
from fedjax_sim.engine import residency
from fedjax_sim.simulation.simulator import Simulator

DIGITS = str(pathlib.Path(__file__).parents[1] / "configs" / "digits_fedavg.py")


DEVICES = min(2, jax.device_count())
LINEAR = {"model__name": "logistic_regression", "model__hidden_sizes": "None"}


def described(**overrides):
  fields = {name.replace("__", "."): text for name, text in overrides.items()}
  source = flags.load(DIGITS, fields)
  experiment = build.build(source)
  text = describe.describe(experiment, source)
  plain, _, facts = text.rpartition("\n\n")
  assert json.loads(plain) == config.resolved(source)
  lines = [line.split("  ", 1) for line in facts.splitlines()]
  return experiment.simulator, {name: value.strip() for name, value in lines}


def test_what_would_run():
  simulator, facts = described(runtime__devices=str(DEVICES))
  assert facts["parameters"] == "4,810"
  data = simulator.data
  assert facts["train"].startswith(
    f"90 clients, {data.train.num_examples:,} examples ("
  )
  assert facts["unseen"].startswith("10 clients, ")
  assert not {"seen", "preprocessing"} & facts.keys()
  assert facts["test"] == f"{len(data.test['y']):,} examples"
  assert facts["rounds"] == "200, evaluated every 5"
  assert facts["clients a round"] == "20 (uniform)"
  steps = 20 * 5 * np.ceil(data.train.sizes / 8).mean()
  assert facts["local steps"].startswith(f"about {steps:,.0f} a round, ")
  down, up, _ = simulator.traffic
  assert down == 4 * 4810
  assert facts["bytes a client and round"] == f"{down:,} down, {up:,} up"
  assert facts["devices"] == f"{DEVICES} x {jax.devices()[0].device_kind}"


def test_what_is_done_to_batches():
  _, facts = described(
    **LINEAR,
    data__reshape="(8, 8)",
    data__normalize="(0.5, 0.25)",
    data__crop="2",
    data__flip="True",
    runtime__devices="1",
  )
  assert facts["preprocessing"] == (
    "reshape=(8, 8), normalize=(0.5, 0.25); in training alone crop=2, flip=True"
  )


def test_predicted_memory_is_that_of_the_program():
  simulator, facts = described(
    **LINEAR, runtime__lanes="1", runtime__devices="1"
  )
  (memory,) = [v for k, v in facts.items() if k.startswith("memory")]
  program = simulator.compiler.program(1, 20)
  assert memory.startswith(f"{program.device_bytes / 1e6:,.1f} MB (predicted")
  held = sum(x.nbytes for x in simulator.data.train.examples.values())
  assert program.device_bytes > held


def test_what_the_next_call_waits_with_on_a_device():
  fields = {"runtime__lanes": "1", "runtime__devices": "1"}
  fields |= {"runtime__residency": "host", "runtime__rounds_per_dispatch": "3"}
  simulator, facts = described(**LINEAR, **fields)
  (memory,) = [v for k, v in facts.items() if k.startswith("memory")]
  # Three rounds with all that the largest 20 clients have.
  largest = np.sort(simulator.data.train.sizes)[-20:].sum()
  one = sum(x[:1].nbytes for x in simulator.data.train.examples.values())
  assert f" and {3 * largest * one / 1e6:,.1f} MB of the next call" in memory


@pytest.mark.parametrize(
  ("room", "where"),
  [(1e9, "on the devices"), (10, "sent at every evaluation")],
)
def test_where_sets_for_evaluation_are(monkeypatch, room, where):
  monkeypatch.setattr(residency, "device_room", lambda mesh: room)
  simulator, facts = described(
    **LINEAR, runtime__lanes="1", runtime__devices="1"
  )
  size = sum(x.nbytes for x in simulator.data.test.values()) / 1e6
  assert f"test {size:,.1f} MB, {where}" in facts["evaluation"]
  (pieces,) = {len(s.pieces) > 1 for s in simulator.evaluate.sets.values()}
  assert pieces == (where != "on the devices")


def test_every_choice_of_lanes():
  _, facts = described(
    **LINEAR,
    runtime__lanes="auto",
    runtime__devices=str(DEVICES),
    server__clients_per_round="9",
  )
  widths = (1, 4, 5) if DEVICES == 2 else (1, 4, 9)
  memory = {k: v for k, v in facts.items() if k.startswith("memory")}
  assert list(memory) == [f"memory a device, {n} lanes" for n in widths]


def test_seen_clients_and_poisson():
  _, facts = described(
    **LINEAR,
    runtime__devices="1",
    data__heldout_fraction="0.2",
    data__unseen_clients="None",
    server__sampling="poisson",
    server__clients_per_round="2",
  )
  assert facts["seen"].startswith("100 clients, ")
  assert "unseen" not in facts
  assert facts["clients a round"] == "2 (poisson)"


def test_nothing_runs(monkeypatch):
  for name in ("init", "dispatch", "evaluate", "_call"):
    monkeypatch.setattr(Simulator, name, pytest.fail)
  monkeypatch.setattr(jax, "device_put", pytest.fail)
  described(**LINEAR, runtime__devices="1")


def test_the_listing_has_every_name_and_what_it_is():
  lines = listing.listing().splitlines()
  for title, registry in listing.REGISTRIES.items():
    at = lines.index(f"{title}:") + 1
    entries = lines[at : lines.index("", at)]
    entries = [line for line in entries if line[2] != " "]
    for line, name in zip(entries, registry, strict=True):
      assert line.split()[0] == name
      assert len(line.split()) > 2, f"{name} has no docstring"
      assert len(line) < 120
  assert "adam, adamax" in lines[-1]


def test_the_listing_has_the_fields_of_every_algorithm():
  text = listing.listing().partition("\nmodels ")[0]
  for name, make in ALGORITHMS.items():
    below = text.partition(f"\n  {name} ")[2]
    below = re.split(r"\n  \b", below)[0]
    words = set(re.findall(r"\w+", below.partition("takes ")[2]))
    parameters = inspect.signature(make).parameters.values()
    fields = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert words == fields - {"adjust", "received"}, name
