"""What `import fedjax_sim` gives, and what it does not load."""

import subprocess
import sys

import pytest

import fedjax_sim as fs


def loaded(code):
  """Names of the modules that a new process has after running the code."""
  code = f"import fedjax_sim as fs\n{code}\nimport sys; print(*sys.modules)"
  command = [sys.executable, "-c", code]
  out = subprocess.run(command, check=True, capture_output=True, text=True)
  return set(out.stdout.split())


def test_the_import_alone_loads_neither_jax_nor_a_package():
  modules = loaded("")
  assert {m for m in modules if m.startswith("fedjax_sim")} == {"fedjax_sim"}
  assert not {"jax", "numpy", "flax", "optax"} & modules


def test_a_name_loads_what_it_needs_alone():
  modules = loaded("fs.sampling.uniform(10, 2); fs.data.load_digits()")
  assert "fedjax_sim.sampling" in modules
  for other in ("flax", "optax", "fedjax_sim.engine", "fedjax_sim.algorithms"):
    assert other not in modules
  assert not {"sklearn", "scipy.stats"} & modules  # the half of a run's imports


def test_every_name_is_there():
  for name in fs.__all__:
    assert getattr(fs, name) is not None
  assert fs.algorithms.fedavg.fedavg is fs.algorithms.ALGORITHMS["fedavg"]
  assert fs.models.MODELS
  assert callable(fs.aggregators.median)
  assert callable(fs.transforms.clip)
  assert callable(fs.schedules.plateau)
  assert callable(fs.data.load_digits)


def test_an_unknown_name_is_refused():
  with pytest.raises(AttributeError, match="has no attribute 'simulated'"):
    _ = fs.simulated
