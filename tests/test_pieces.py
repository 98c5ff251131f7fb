"""Arrays that lie spread over processes: saved and restored in pieces."""

import contextlib
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import fedjax_sim
from fedjax_sim.config import flags
from fedjax_sim.distributed import make_mesh, pieces
from fedjax_sim.run import checkpoint_pieces, experiment
from fedjax_sim.run.checkpoint import CheckpointError
from fedjax_sim.run.checkpoint_files import (
  check_files,
  pieces_file,
  pieces_record,
  rounds_in,
)
from workdirs import first_rounds, skip_pictures

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


# Leaves of a state: whole, and rows of others in two processes.
WHOLE: np.ndarray = np.arange(3.0)
TABLE: np.ndarray = np.arange(12, dtype=np.float32).reshape(4, 3)
HALVES: np.ndarray = np.arange(8).astype(jnp.bfloat16).reshape(4, 2)


def rows_of_two(array: np.ndarray) -> list[pieces.Pieces]:
  """The pieces of two processes; the second one has two of them."""
  found = []
  for bounds in ([(0, 2)], [(2, 3), (3, 4)]):
    width = int(array.shape[1])
    own: dict[pieces.Ranges, np.ndarray] = {
      ((a, b), (0, width)): array[a:b] for a, b in bounds
    }
    found.append(pieces.Pieces(array.shape, array.dtype, own))
  return found


@pytest.fixture
def written(tmp_path):
  """The pieces of two processes, in files."""
  for process in (0, 1):
    leaves: list[Any] = [
      WHOLE,
      rows_of_two(TABLE)[process],
      rows_of_two(HALVES)[process],
    ]
    checkpoint_pieces.write_pieces(tmp_path, process, leaves)
  return tmp_path


def test_every_process_has_a_file_of_its_pieces(written):
  assert sorted(p.name for p in written.iterdir()) == [
    *("pieces_0.bin", "pieces_1.bin", "record_0.json", "record_1.json")
  ]
  sizes = [pieces_file(written, i).stat().st_size for i in (0, 1)]
  assert sizes == [TABLE[:2].nbytes + HALVES[:2].nbytes] * 2
  stored = checkpoint_pieces.stored_pieces(written, 2)
  assert sorted(stored) == [1, 2]
  for leaf, array in ((1, TABLE), (2, HALVES)):
    assert len(stored[leaf]) == 3
    for ranges in (((0, 4), (0, array.shape[1])), ((1, 3), (1, 2))):
      parts = [
        (piece.ranges, checkpoint_pieces.read_piece(piece, array.dtype))
        for piece in stored[leaf]
      ]
      found = pieces.assemble(ranges, array.dtype, parts)
      np.testing.assert_array_equal(found, pieces.cut(array, ranges))


@pytest.mark.parametrize("left", [0, 30, 31])
def test_damaged_pieces_are_found(written, left):
  (stored, *_) = checkpoint_pieces.stored_pieces(written, 2)[2]
  checkpoint_pieces.read_piece(stored, HALVES.dtype)
  os.truncate(stored.path, left)
  with pytest.raises(ValueError, match=r"SHA-256 .* pieces_0\.bin differs, at"):
    checkpoint_pieces.read_piece(stored, HALVES.dtype)
  stored.path.unlink()
  with pytest.raises(FileNotFoundError):
    checkpoint_pieces.read_piece(stored, HALVES.dtype)


def test_pieces_that_the_disk_gives_back_otherwise(tmp_path, monkeypatch):
  """There is no record of them, and so no checkpoint."""
  replace = checkpoint_pieces.replace_atomically

  def torn(path, write):
    replace(path, write)
    os.truncate(path, 20)

  monkeypatch.setattr(checkpoint_pieces, "replace_atomically", torn)
  with pytest.raises(OSError, match="does not hold what was written"):
    checkpoint_pieces.write_pieces(tmp_path, 0, rows_of_two(TABLE)[:1])
  assert not pieces_record(tmp_path, 0).exists()


# One of several processes, in which nothing may gather a state.
PROGRAM = """
import sys
from fedjax_sim import distributed, reporting
from fedjax_sim.config import flags
from fedjax_sim.distributed import processes
from fedjax_sim.run import experiment, report
from fedjax_sim.run.checkpoint import CheckpointError
from fedjax_sim.simulation.state import States


def refused(*_):
  raise AssertionError("it was gathered")


reporting.draw_curves = report.write_report = lambda *_: None
address, guarded, workdirs, config, *fields = sys.argv[1:]
if guarded == "guarded":
  States.to_host = processes.arrays_from_first = refused
distributed.setup()
processes.join(address, 60, 200)
given = dict(field.split("=", 1) for field in fields)
code = 0
for workdir in workdirs.split(","):
  try:
    experiment.run(flags.load(config, given), workdir)
  except CheckpointError as error:
    print(error, file=sys.stderr)
    code = 1
sys.exit(code)
"""


def free_port():
  with socket.socket() as found:
    found.bind(("127.0.0.1", 0))
    return found.getsockname()[1]


def environment(devices):
  return os.environ | {
    "PYTHONPATH": str(ROOT),
    "JAX_PLATFORMS": "cpu",
    "FEDJAX_SIM_CPU_DEVICES": str(devices),
  }


def run(workdir, folders, devices, guarded="guarded", returncode=0, **changes):
  """Runs in one process for each of the working folders; what each says."""
  port, started = free_port(), []
  with contextlib.ExitStack() as stack:
    for rank, folder in enumerate(folders):
      address = f"127.0.0.1:{port},{rank},{len(folders)}"
      fields = FIELDS | {k.replace("__", "."): v for k, v in changes.items()}
      started.append(
        subprocess.Popen(
          [
            *(sys.executable, "-c", PROGRAM),
            "off" if len(folders) == 1 else address,
            "free" if len(folders) == 1 else guarded,
            *(str(workdir), str(CONFIG)),
            *(f"{name}={value}" for name, value in fields.items()),
          ],
          cwd=folder,
          env=environment(devices),
          stdout=subprocess.PIPE,
          stderr=subprocess.PIPE,
          text=True,
        )
      )
      stack.callback(started[-1].communicate)
      stack.callback(started[-1].kill)
    said = [process.communicate(timeout=280)[1] for process in started]
  codes = [process.returncode for process in started]
  assert codes == [returncode] * len(folders), said
  return said


def fedjax_sim_says(*arguments):
  """The output of a command, on four devices in one process."""
  done = subprocess.run(
    [sys.executable, "-m", "fedjax_sim", *map(str, arguments)],
    env=environment(4),
    capture_output=True,
    text=True,
    check=False,
    timeout=280,
  )
  assert done.returncode == 0, done.stderr + done.stdout
  assert "damaged" not in done.stderr
  return done.stdout


def digest(folder):
  return json.loads((folder / "summary.json").read_bytes())["params_digest"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
  """A run of 6 rounds in one process, on one device."""
  folder = tmp_path_factory.mktemp("one")
  if jax.default_backend() != "cpu":  # on which the others train
    run(folder / "run", [folder], 4)
    return folder / "run"
  fields = FIELDS | {"runtime.devices": "1"}
  with pytest.MonkeyPatch.context() as patch:
    skip_pictures(patch)
    experiment.run(flags.load(str(CONFIG), fields), folder / "run")
  return folder / "run"


@pytest.fixture(scope="module")
def spread(tmp_path_factory):
  """The first 4 of 6 rounds, in two processes of two devices."""
  folder = tmp_path_factory.mktemp("two")
  run(folder / "run", [folder] * 2, 2, server__rounds="4")
  assert first_rounds(folder / "run") == [1]
  return folder / "run"


@pytest.mark.integration
def test_one_process_goes_on_where_a_checkpoint_is_whole(
  spread, undisturbed, tmp_path
):
  """It first stops at a workdir without any."""
  folder, other = (shutil.copytree(spread, tmp_path / n) for n in ("run", "no"))
  before = lose_pieces(other)
  given = flags.load(str(CONFIG), FIELDS)
  with pytest.raises(CheckpointError, match="No checkpoint in") as caught:
    experiment.run(given, other)
  assert str(other / "checkpoints") in str(caught.value)
  assert before == {p: p.read_bytes() for p in other.rglob("*") if p.is_file()}
  with pytest.MonkeyPatch.context() as patch:
    skip_pictures(patch)
    experiment.run(given, folder)
  check_as_undisturbed(folder, undisturbed)


@pytest.mark.slow  # test_processes.py has two that go on
@pytest.mark.integration
@pytest.mark.parametrize(("count", "devices"), [(2, 2), (1, 4), (3, 1)])
def test_other_processes_go_on_where_a_checkpoint_is_whole(
  spread, undisturbed, tmp_path, count, devices
):
  """The same processes first stop at a workdir without any."""
  folder, other = (shutil.copytree(spread, tmp_path / n) for n in ("run", "no"))
  before = lose_pieces(other)
  said = run(f"{other},{folder}", [tmp_path] * count, devices, returncode=1)
  for text in said:
    assert text.count("No checkpoint in") == 1
    assert f"No checkpoint in {other / 'checkpoints'}" in text
  assert before == {p: p.read_bytes() for p in other.rglob("*") if p.is_file()}
  assert str(folder) not in "".join(said)
  check_as_undisturbed(folder, undisturbed)
  check_files(folder / "checkpoints" / "6")


def lose_pieces(workdir):
  """Leave no checkpoint whole; return the files that are left."""
  for path in workdir.glob("checkpoints/*/pieces_1*"):
    path.unlink()
  return {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}


def check_as_undisturbed(folder, undisturbed):
  assert first_rounds(folder) == [1, 5]
  assert digest(folder) == digest(undisturbed)
  metrics = (folder / "metrics.jsonl").read_bytes()
  rows = [json.loads(line)["round"] for line in metrics.splitlines()]
  assert rows == list(range(1, 7))


@pytest.mark.slow
@pytest.mark.integration
def test_commands_read_what_processes_wrote(spread, undisturbed, tmp_path):
  folder = shutil.copytree(spread, tmp_path / "run")
  before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
  shown = fedjax_sim_says("verify", f"--workdir={folder}", "--rounds=all")
  lines = shown.splitlines()
  assert [line.split(":")[0] for line in lines[1:3]] == [
    "rounds 1 to 2",
    "rounds 3 to 4",
  ]
  assert "differ" not in shown
  branch = tmp_path / "branch"
  fields = FIELDS | {"server.rounds": "6"}
  fedjax_sim_says(
    *("run", f"--config={CONFIG}", f"--workdir={branch}"),
    f"--branch-from={folder}:4",
    *(f"--config.{name}={value}" for name, value in fields.items()),
  )
  assert first_rounds(branch) == [5]
  assert digest(branch) == digest(undisturbed)
  assert before == {p: p.read_bytes() for p in before}


@pytest.mark.slow
@pytest.mark.integration
def test_all_fall_back_whoever_finds_the_damage(spread, undisturbed, tmp_path):
  folder = shutil.copytree(spread, tmp_path / "run")
  path = folder / "checkpoints" / "4" / "pieces_1.bin"
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)
  said = "".join(run(folder, [tmp_path] * 2, 2))
  assert said.count("The checkpoint of round 4 is damaged (the SHA-256") == 1
  assert first_rounds(folder) == [1, 3]
  assert digest(folder) == digest(undisturbed)


@pytest.mark.slow
@pytest.mark.integration
def test_processes_run_again_and_again(undisturbed, tmp_path):
  """Runs of the same processes, each with checkpoints of its own."""
  run("a,b", [tmp_path] * 2, 2)
  for name in "ab":
    assert rounds_in(tmp_path / name / "checkpoints") == [2, 4, 6]
    assert digest(tmp_path / name) == digest(undisturbed)


@pytest.mark.slow
@pytest.mark.integration
def test_a_model_in_pieces_over_two_processes(tmp_path):
  fields = {
    "runtime__model_devices": "4",
    "runtime__deterministic_reduction": "None",
    "model__hidden_sizes": "(64,)",
  }
  folder, alone = tmp_path / "two", tmp_path / "one"
  run(folder, [tmp_path] * 2, 2, server__rounds="4", **fields)
  path = folder / "checkpoints" / "4" / "record" / "metadata"
  assert None in json.loads(path.read_bytes())["sha256"]
  shutil.copytree(folder, alone)
  for there, count in ((folder, 2), (alone, 1)):
    said = run(there, [tmp_path] * count, 4 // count, **fields)
    assert "damaged" not in "".join(said)
    assert first_rounds(there) == [1, 5]
    assert rounds_in(there / "checkpoints")[-1] == 6
  assert (
    None
    in json.loads(
      (folder / "checkpoints" / "6" / "record" / "metadata").read_bytes()
    )["sha256"]
  )
  params = [fedjax_sim.load(there).params for there in (folder, alone)]
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *params
  )


@pytest.mark.slow
@pytest.mark.integration
def test_a_folder_that_not_all_see(tmp_path):
  folders = [tmp_path / "a", tmp_path / "b"]
  for folder in folders:
    folder.mkdir()
  told = "".join(run("run", folders, 2, "free", server__rounds="2"))
  assert told.count("Not all processes see run: the first one gathers") == 1
  newest = folders[0] / "run" / "checkpoints" / "2"
  assert not pieces_file(newest, 0).exists()
  assert not (folders[1] / "run").exists()
  run("run", folders, 2, "free", server__rounds="4")
  assert first_rounds(folders[0] / "run") == [1, 3]
