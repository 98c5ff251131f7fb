"""Arrays that lie spread over processes: saved and restored in pieces."""

import json
import os
import pathlib
import shutil
import socket
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fedjax_sim.distributed import make_mesh, pieces
from fedjax_sim.run.checkpoint_files import (
  check_files,
  pieces_folder,
  rounds_in,
)
from fedjax_sim.run.orbax_internals import separate_saves

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "digits_fedavg.py"
FIELDS = {
  "algorithm.name": "scaffold",  # it has a table of client states
  "data.num_clients": "21",  # no multiple of the devices: rows of padding
  "data.unseen_clients": "2",
  "client.optimizer": "sgd",
  "client.epochs": "1",
  "server.clients_per_round": "4",
  "server.rounds": "6",
  "server.eval_every": "6",
  "runtime.checkpoint_every": "2",
  "runtime.rounds_per_dispatch": "1",
  "runtime.lanes": "1",
  "runtime.peer_timeout": "60",
  "runtime.deterministic_reduction": "4",
}


@pytest.mark.parametrize("rows", [None, 3])
def test_pieces_of_an_array(rows):
  mesh = make_mesh(2)
  sharding = NamedSharding(mesh, P("clients"))
  whole: np.ndarray = np.arange(12, dtype=np.float32).reshape(4, 3)
  array = jax.device_put(jnp.asarray(whole), sharding)
  found = pieces.to_pieces(array, rows)
  stored = whole[:rows]
  assert found.shape == stored.shape
  assert found.nbytes == stored.nbytes
  everything = ((0, len(stored)), (0, 3))
  joined = pieces.assemble(everything, found.dtype, found.own.items())
  np.testing.assert_array_equal(joined, stored)
  wanted = pieces.wanted_ranges(array.shape, sharding, rows)
  assert wanted == list(found.own)
  placed = pieces.place(found, array.shape, sharding)
  assert placed.sharding == sharding
  np.testing.assert_array_equal(np.asarray(placed)[:rows], stored)
  part = ((1, len(stored)), (0, 3))
  with pytest.raises(ValueError, match="3 of its values are missing"):
    pieces.assemble(everything, found.dtype, [(part, whole[1:rows])])


# One of several processes, in which nothing may gather a state.
PROGRAM = """
import sys
from fedjax_sim import distributed
from fedjax_sim.config import flags
from fedjax_sim.distributed import processes
from fedjax_sim.run import experiment
from fedjax_sim.simulation.state import States


def refused(*_):
  raise AssertionError("it was gathered")


address, guarded, workdir, config, *fields = sys.argv[1:]
if guarded == "guarded":
  States.to_host = processes.arrays_from_first = refused
distributed.setup()
processes.join(address, 60, 200)
given = dict(field.split("=", 1) for field in fields)
experiment.run(flags.load(config, given), workdir)
"""


def free_port():
  with socket.socket() as found:
    found.bind(("127.0.0.1", 0))
    return found.getsockname()[1]


def run(popen, workdir, folders, devices, guarded="guarded", **changes):
  """Runs in one process for each of the working folders; what they say."""
  port, started = free_port(), []
  for rank, folder in enumerate(folders):
    address = f"127.0.0.1:{port},{rank},{len(folders)}"
    fields = FIELDS | {k.replace("__", "."): v for k, v in changes.items()}
    started.append(
      popen(
        [
          *(sys.executable, "-c", PROGRAM),
          "off" if len(folders) == 1 else address,
          "free" if len(folders) == 1 else guarded,
          *(str(workdir), str(CONFIG)),
          *(f"{name}={value}" for name, value in fields.items()),
        ],
        cwd=folder,
        env=os.environ
        | {
          "PYTHONPATH": str(ROOT),
          "JAX_PLATFORMS": "cpu",
          "FEDJAX_SIM_CPU_DEVICES": str(devices),
        },
      )
    )
  told = [process.communicate(timeout=280)[1] for process in started]
  assert [process.returncode for process in started] == [0] * len(folders), told
  return "".join(told)


def digest(folder):
  return json.loads((folder / "summary.json").read_bytes())["params_digest"]


@pytest.mark.slow
@pytest.mark.integration
def test_a_table_of_clients_is_saved_by_its_processes(popen, tmp_path):
  """Two processes of two devices, then one of four, and two again."""
  folder, alone = tmp_path / "two", tmp_path / "one"
  one, two = [tmp_path], [tmp_path] * 2
  run(popen, alone, one, 4)
  run(popen, folder, two, 2, server__rounds="2")
  saved = folder / "checkpoints"
  for process in (0, 1):
    assert (pieces_folder(saved / "2", process) / "state").is_dir()
  check_files(saved / "2")
  run(popen, folder, one, 4, server__rounds="4")
  assert not pieces_folder(saved / "4", 0).exists()
  told = run(popen, folder, two, 2, server__rounds="5")
  assert "damaged" not in told
  # All agree on the one before, whoever finds the damage.
  (path,) = (pieces_folder(saved / "5", 1) / "record").glob("metadata")
  path.write_bytes(path.read_bytes()[:-1] + b" ")
  told = run(popen, folder, two, 2)
  assert told.count("The checkpoint of round 5 is damaged (the SHA-256") == 1
  assert digest(folder) == digest(alone)


@pytest.mark.integration
def test_a_model_in_pieces_over_two_processes(popen, tmp_path):
  fields = {
    "runtime__model_devices": "4",
    "runtime__deterministic_reduction": "None",
    "model__hidden_sizes": "(64,)",
  }
  folder, alone = tmp_path / "two", tmp_path / "one"
  run(popen, folder, [tmp_path] * 2, 2, server__rounds="4", **fields)
  path = folder / "checkpoints" / "4" / "record" / "metadata"
  assert None in json.loads(path.read_bytes())["sha256"]
  shutil.copytree(folder, alone)
  run(popen, folder, [tmp_path], 4, **fields)
  run(popen, alone, [tmp_path], 4, **fields)
  assert rounds_in(folder / "checkpoints")[-1] == 6
  assert digest(folder) == digest(alone)


@pytest.mark.slow
@pytest.mark.integration
def test_a_folder_that_not_all_see(popen, tmp_path):
  folders = [tmp_path / "a", tmp_path / "b"]
  for folder in folders:
    folder.mkdir()
  told = run(popen, "run", folders, 2, "free", server__rounds="2")
  assert told.count("Not all processes see run: the first one gathers") == 1
  newest = folders[0] / "run" / "checkpoints" / "2"
  assert not pieces_folder(newest, 0).exists()
  assert not (folders[1] / "run").exists()


def test_saves_of_processes_have_numbers_of_their_own():
  from orbax.checkpoint._src.futures import synchronization

  numbers = synchronization.OperationIdGenerator
  before = numbers._operation_id_counter
  try:
    first = []
    for process in (0, 1):
      separate_saves(process)
      first.append(numbers.next_operation_id())
    assert first[1] - first[0] > 10**9
  finally:
    numbers._operation_id_counter = before
