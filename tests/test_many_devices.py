"""Whole runs on four devices, of one process or of four, against one device.

pytest -m slow tests/test_many_devices.py; by default: test_sharding.py,
test_opened.py (a model in pieces) and test_pieces.py (two processes).
"""

import json

import numpy as np
import pytest

from test_processes import begin, command, finish, launch, params

pytestmark = [pytest.mark.integration, pytest.mark.slow]

PATIENT = {"runtime.peer_timeout": "60"}  # however busy the machine is


def run(folder, processes, devices, **fields):
  """A run's summary, and its parameters as one vector.

  Args:
    folder: the workdir.
    processes: with one device each; or 1.
    devices: of one process.
    **fields: of the config.
  """
  fields = {k: str(v) for k, v in fields.items()} | PATIENT
  if processes > 1:
    running = launch(processes, folder, **fields)
  else:
    count = {"FEDJAX_SIM_CPU_DEVICES": str(devices)}
    running = begin(command(folder, **fields), **count)
  code, told = finish(running)
  assert code == 0, told
  return json.loads((folder / "summary.json").read_bytes()), params(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  return run(tmp_path_factory.mktemp("whole"), 1, 1)[1]


@pytest.mark.parametrize("processes", [1, 4])
def test_a_model_in_pieces(tmp_path, whole, processes):
  pieces = {"runtime.model_devices": 2}
  summary, found = run(tmp_path, processes, 4, **pieces)
  assert len(summary["devices"]) == 4
  assert summary["processes"] == processes
  np.testing.assert_allclose(found, whole, atol=1e-6)


def test_the_same_bits_for_any_number_of_processes(tmp_path, whole):
  fixed = {"runtime.deterministic_reduction": 4}
  digests = set()
  for processes in (1, 2, 4):
    folder = tmp_path / str(processes)
    summary, found = run(folder, processes, 1, **fixed)
    assert len(summary["devices"]) == processes
    digests.add(summary["params_digest"])
    np.testing.assert_allclose(found, whole, atol=1e-6)
  assert len(digests) == 1
