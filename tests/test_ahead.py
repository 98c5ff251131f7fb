"""Programs that are compiled ahead are those that a run calls."""

import contextlib
import dataclasses
import sys
import threading
import types

import jax
import numpy as np
import pytest

import problems
from fedjax_sim import sampling
from fedjax_sim.algorithms.apfl import apfl
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.data import splits
from fedjax_sim.engine.tracing import jitted_once
from fedjax_sim.models.logistic_regression import logistic_regression
from fedjax_sim.models.mlp import mlp
from fedjax_sim.simulation.ahead import Ahead

COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture
def compiled():
  """The names of the functions that JAX has compiled so far."""
  found, active = [], [True]

  def listen(event, duration_secs, **facts):
    if active[0] and event == COMPILED:
      found.append(facts["fun_name"])

  jax.monitoring.register_event_duration_secs_listener(listen)
  yield found
  active[0] = False  # JAX cannot be told to forget it


def simulator(algorithm=fedavg, clients=6, **options):
  data = problems.blobs([8, 12, 20, 9, 11, 30][:clients] + [5] * (clients - 6))
  train, seen = splits.split_clients(data.train, 0.25, seed=0)
  data = dataclasses.replace(data, train=train, seen=seen)
  task = logistic_regression(data.example_shape, data.num_classes)
  made = algorithm(task, problems.sgd(0.1), problems.sgd(1.0))
  return problems.make_simulator(task, made, data, **options)


@pytest.mark.parametrize("algorithm", [fedavg, apfl])
@pytest.mark.parametrize("devices", [1, 2])
def test_nothing_is_compiled_twice(compiled, algorithm, devices):
  made = simulator(algorithm, devices=devices)
  with contextlib.closing(Ahead()) as ahead:
    ahead.compile(made)
    ahead.wait()
  of_programs = lambda: [n for n in compiled if "rounds" in n or "program" in n]
  assert len(of_programs()) == 1 + len(made.evaluate.sets) == 2
  state = made.init()
  made.evaluate(state)
  for out in made.run(state, 2):
    made.evaluate(out.state)
  assert len(of_programs()) == 2
  assert made.compilations == 1


def test_rounds_of_several_sizes_wait_for_their_first():
  sampler = sampling.poisson(60, 30)
  assert len(sampler.sizes) > 1
  made = simulator(clients=60, sampler=sampler)
  with contextlib.closing(Ahead()) as ahead:
    ahead.compile(made)
  assert not made.compiler.compiled


def test_what_compiling_raises_is_raised():
  made = simulator()
  broken = dataclasses.replace(made.compiler, shape=lambda lanes, size: 1 / 0)
  made.__dict__["compiler"] = broken
  with contextlib.closing(Ahead()) as ahead:
    ahead.compile(made)
    with pytest.raises(ZeroDivisionError):
      ahead.wait()


def test_the_setting_of_floats_goes_with_it(x64, compiled):
  made = simulator()
  with contextlib.closing(Ahead()) as ahead:
    ahead.compile(made)
    ahead.wait()
  state = made.init()
  del compiled[:]
  made.evaluate(state)
  problems.train(made, 1)
  assert not [n for n in compiled if "rounds" in n or "program" in n]


def test_the_precision_of_products_goes_with_it(compiled):
  assert jax.config.values["jax_default_matmul_precision"] == "highest"
  made = simulator()
  with jax.default_matmul_precision("default"):  # of this thread
    with contextlib.closing(Ahead()) as ahead:
      ahead.compile(made)
      ahead.wait()
    state = made.init()
    del compiled[:]
    made.evaluate(state)
  assert not [n for n in compiled if "program" in n]
  (program,) = made.compiler.compiled.values()
  assert "operand_precision" not in program.compiled.as_text()


def test_modules_are_loaded_and_missing_ones_are_not_missed(
  monkeypatch, tmp_path
):
  monkeypatch.delitem(sys.modules, "wave", raising=False)
  (tmp_path / "broken_module.py").write_text("raise OSError('no cache')")
  monkeypatch.syspath_prepend(tmp_path)
  with contextlib.closing(Ahead()) as ahead:
    ahead.load(["no_module_of_this_name", "broken_module", "wave"])
    ahead.wait()
  assert "wave" in sys.modules


def test_modules_are_not_waited_for(monkeypatch, tmp_path):
  slow = "import gate\ngate.opened = gate.event.wait(20)\n"
  (tmp_path / "slow_module.py").write_text(slow)
  monkeypatch.syspath_prepend(tmp_path)
  gate = types.ModuleType("gate")
  vars(gate).update(event=threading.Event(), opened=None)
  monkeypatch.setitem(sys.modules, "gate", gate)
  with contextlib.closing(Ahead()) as ahead:
    ahead.load(["slow_module"])
    ahead.wait()
    waits = vars(gate)["opened"] is None
    vars(gate)["event"].set()
  assert waits


def test_quick_compilation_draws_the_same_bits(optimized):
  init = mlp((28, 28), 10, (32,)).init
  key = jax.random.key_data(jax.random.key(5))
  draw = lambda data: init(jax.random.wrap_key_data(data))
  found = jitted_once(draw, (key,), None)(key)
  expected = jax.jit(draw)(key)
  jax.tree.map(np.testing.assert_array_equal, found, expected)
