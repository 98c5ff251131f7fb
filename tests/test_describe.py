"""`describe` and `list` tell the truth, and do nothing."""

import ast
import pathlib

import jax
import numpy as np
import pytest

from fedjax_sim import config
from fedjax_sim.cli import describe, listing
from fedjax_sim.config import build, components, flags
from fedjax_sim.engine import residency
from fedjax_sim.simulation.compiler import Compiler
from fedjax_sim.simulation.evaluator import Evaluator
from fedjax_sim.simulation.simulator import Simulator
from fedjax_sim.training.optimizers import OPTIMIZERS

DIGITS = str(pathlib.Path(__file__).parents[1] / "configs" / "digits_fedavg.py")


DEVICES = min(2, jax.device_count())
LINEAR = {"model__name": "logistic_regression", "model__hidden_sizes": "None"}


def check_fields(text, source):
  """Every field that is on is there, with its value, and no other."""
  section = ""
  shown: dict[str, object] = {}
  for line in text.splitlines():
    assert len(line) <= 80
    head, body = line[:14].strip(), line[14:]
    section = head or section
    for word in body.split():
      name, equals, value = word.partition("=")
      name = f"{section}.{name}" if equals else section
      shown[name] = ast.literal_eval(value or word)
  true = {k: v for k, v in config.fields_of(source) if v not in (None, ())}
  off = {k for k in true.keys() - shown.keys() if k.startswith("replay.")}
  assert shown == {k: v for k, v in true.items() if k not in off}


def described(**overrides):
  fields = {name.replace("__", "."): text for name, text in overrides.items()}
  source = flags.load(DIGITS, fields)
  experiment = build.build(source)
  text = describe.describe(experiment)
  listed, _, facts = text.rpartition("\n\n")
  check_fields(listed, experiment.config)
  assert len(text.splitlines()) < 60
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
  down, up, *_ = simulator.traffic
  assert down == 4 * 4810
  assert facts["bytes a client and round"] == f"{down:,} down, {up:,} up"
  assert facts["devices"] == f"{DEVICES} x {jax.devices()[0].device_kind}"
  options = facts.get("compiler options", "")
  ordered = "xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"
  assert (options == ordered) == (DEVICES > 1)


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


@pytest.mark.slow
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
    sampler__name="poisson",
    server__clients_per_round="2",
  )
  assert facts["seen"].startswith("100 clients, ")
  assert "unseen" not in facts
  assert facts["clients a round"] == "2 (poisson)"


def test_nothing_runs(monkeypatch):
  for owner, name in (
    (Simulator, "init"),
    (Simulator, "dispatch"),
    (Compiler, "call"),
    (Evaluator, "measure"),
  ):
    monkeypatch.setattr(owner, name, pytest.fail)
  monkeypatch.setattr(jax, "device_put", pytest.fail)
  described(**LINEAR, runtime__devices="1")


SLOTS = [*components.SLOTS, *components.LABELED]


def test_the_listing_has_every_name_and_what_it_is():
  text = listing.run([])
  lines = text.splitlines()
  for slot in SLOTS:
    for name in slot.registry:
      found = [x for x in lines if x.split()[:1] == [name]]
      if slot.registry is OPTIMIZERS:
        assert any(f" {name}," in x or x.endswith(name) for x in lines)
        continue
      assert found, name
      assert all(len(x.split()) > 2 for x in found), f"{name} has no docstring"
      assert all(len(x) < 120 for x in found)
  assert "plateau" in text


@pytest.mark.parametrize("kind", [*listing.kinds()])
def test_the_listing_of_a_component_has_its_fields(kind):
  slot = listing.kinds()[kind]
  assert len(listing.run([kind]).splitlines()) > 1
  for name in slot.registry:
    text = listing.run([kind, name])
    fields = slot.fields(name)
    lines = [x for x in text.splitlines() if ": " in x and x[:3].strip()]
    section = f"{kind}.{name}" if slot in components.LABELED else slot.section
    for key, field in fields.items():
      (line,) = [x for x in lines if x.startswith(f"  {section}.{key}: ")]
      default = "required" if field.required else f"{field.default!r}"
      assert line.endswith(default)
    assert text.count(f"\n  {section}.") == len(fields)


def test_every_field_of_ours_says_what_it_means():
  silent = []
  for kind, slot in listing.kinds().items():
    for name, function in slot.registry.items():
      if slot.registry is OPTIMIZERS:
        continue
      text = listing.run([kind, name])
      section = f"{kind}.{name}" if slot in components.LABELED else slot.section
      for key in slot.fields(name):
        after = text.partition(f"\n  {section}.{key}: ")[2].splitlines()
        if len(after) < 2 or not after[1].startswith("    "):
          silent.append(f"{slot.field}={name}: {key}")
      assert function.__doc__
  assert not silent


@pytest.mark.parametrize(
  ("names", "match"),
  [
    (["algoritm"], "kind='algoritm' is unknown. Did you mean 'algorithm'"),
    (["algorithm", "fedprx"], "algorithm.name='fedprx'.*mean 'fedprox'"),
  ],
)
def test_the_listing_refuses(names, match):
  with pytest.raises(ValueError, match=match):
    listing.run(names)
