"""Client states on the disk: the same bits as on the devices, and no loss."""

import dataclasses
import itertools
import pathlib
import random
import signal
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

import fedjax_sim as fs
from fedjax_sim.algorithms.ditto import ditto
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.algorithms.scaffold import scaffold
from fedjax_sim.cli.main import main
from fedjax_sim.config import build
from fedjax_sim.core import Algorithm
from fedjax_sim.core.digests import tree_digest
from fedjax_sim.engine import residency
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.engine.client_rows import NOBODY, ClientRows
from fedjax_sim.run import experiment
from fedjax_sim.run.checkpoint_reader import CheckpointReader
from fedjax_sim.run.workdir import ConfigChangedError
from fedjax_sim.simulation import client_residency, row_file, row_store
from fedjax_sim.simulation.row_file import RowsError
from fedjax_sim.simulation.row_store import RowStore, read_row
from fedjax_sim.simulation.runtime import Runtime
from fedjax_sim.studies.runs import refusal
from fedjax_sim.transforms.error_feedback import error_feedback
from fedjax_sim.transforms.quantize import quantize
from problems import MODELS, blobs, make_simulator, sgd
from test_extend import quick, run
from test_resume import command, rows, started
from tiers import slow_but
from workdirs import first_rounds

SHAPES = (
  {"a": jax.ShapeDtypeStruct((3, 2), np.float32)},
  (
    jax.ShapeDtypeStruct((), np.int32),
    jax.ShapeDtypeStruct((2,), jax.numpy.bfloat16),
    jax.ShapeDtypeStruct((0, 4), np.float32),
  ),
)


def rows_of_numbers(numbers):
  """Rows that are told apart by a number each."""
  fill = lambda x: np.broadcast_to(
    np.asarray(numbers).reshape(-1, *[1] * len(x.shape)),
    (len(numbers), *x.shape),
  ).astype(x.dtype)
  return jax.tree.map(fill, SHAPES)


def numbers_in(store, table, count):
  """The numbers of the rows of all clients, as `rows_of_numbers` made them."""
  found = store.gather(table, np.arange(count), count).rows
  one, (two, three, _) = found[0]["a"], found[1]
  for leaf in (one, three.astype(np.float32)):
    expected = np.broadcast_to(
      two.reshape(-1, *[1] * (leaf.ndim - 1)), leaf.shape
    )
    np.testing.assert_array_equal(leaf, expected)
  return two.tolist()


def first_of(store):
  return store.first(jax.tree.map(lambda x: x[0], rows_of_numbers([0])))


def test_tables_are_values_and_the_file_is_used_again(tmp_path, monkeypatch):
  """Against dicts, with tables that live, and that checkpoints keep."""
  for name, value in (("_FEW", 1), ("_OF_FILE", 4), ("_OF_CLIENTS", 100)):
    monkeypatch.setattr(row_store, name, value)
  monkeypatch.setattr(row_file, "BUFFER", 100)  # two rows at a time
  rng = np.random.default_rng(0)
  clients = 20
  store = RowStore(SHAPES, clients, tmp_path)
  table, model = first_of(store), [0] * clients
  kept = {}  # round -> (a checkpoint's copy of the table, its numbers)
  alive = table, model
  for round_ in range(1, 120):
    ids = np.unique(rng.integers(0, clients, 5)).astype(np.int32)
    new = rng.integers(1, 200, len(ids)).tolist()
    padded = np.append(ids, NOBODY).astype(np.int32)
    some = ClientRows(padded, rows_of_numbers([*new, 0]))
    table = store.scatter(table, some)
    model = model.copy()
    for client, number in zip(ids, new, strict=True):
      model[client] = number
    if round_ % 9 == 0:
      alive = table, model
    if round_ % 5 == 0:
      copied = table._replace(
        records=table.records.copy(), sums=table.sums.copy()
      )
      kept[round_] = copied, model
      store.pin(round_, table)
      for old in [r for r in kept if r < round_ - 10 and r != 5]:
        del kept[old]
      store.unpin(round_, [*kept])
    assert numbers_in(store, table, clients) == model
    assert numbers_in(store, *alive[:1], clients) == alive[1]
    for held, numbers in kept.values():
      assert numbers_in(store, held, clients) == numbers
  size = (tmp_path / "rows.bin").stat().st_size // store.row_bytes
  assert size < 8 * clients  # of 600 that were written
  store.close()

  # A process that goes on knows nothing but the checkpoints.
  after = RowStore(SHAPES, clients, tmp_path)
  for round_, (held, _) in kept.items():
    after.pin(round_, held)
  last = max(kept)
  table, model = after.adopt(kept[last][0]), kept[last][1]
  for number in range(30):
    some = ClientRows(
      np.arange(6, dtype=np.int32), rows_of_numbers([number] * 6)
    )
    table = after.scatter(table, some)
  assert numbers_in(after, table, clients) == [29] * 6 + model[6:]
  for held, numbers in kept.values():
    assert numbers_in(after, held, clients) == numbers


def test_what_is_wrong_with_the_file_is_said(tmp_path):
  store = RowStore(SHAPES, 4, tmp_path)
  some = ClientRows(np.arange(3, dtype=np.int32), rows_of_numbers([7, 8, 9]))
  table = store.scatter(first_of(store), some)
  assert read_row(tmp_path, table, 2)[1][0] == 9
  assert read_row(tmp_path, table, 3)[1][0] == 0
  with pytest.raises(RowsError, match="another run writes to it"):
    RowStore(SHAPES, 4, tmp_path).scatter(table, some)
  path = tmp_path / "rows.bin"
  content = bytearray(path.read_bytes())
  content[store.row_bytes + 5] ^= 1
  path.write_bytes(content)
  with pytest.raises(RowsError, match=r"row of client 1 .* CRC32 differs"):
    store.gather(table, np.arange(4), 4)
  path.write_bytes(content[:-1])
  with pytest.raises(RowsError, match="lacks rows that a checkpoint counts on"):
    store.adopt(table)
  with pytest.raises(RowsError, match="shorter than it was"):
    store.gather(table, np.array([2]), 1)


ALGORITHMS: dict[str, Callable[..., Algorithm]] = {
  "scaffold": scaffold,
  "ditto": ditto,
}


def trained(simulator, **changes):
  """Rounds, two a call, in which clients take part twice; everything left."""
  changes = {"lanes": 2, "rounds_per_dispatch": 2, "donate": True} | changes
  simulator = dataclasses.replace(simulator, runtime=Runtime(**changes))
  state = simulator.init()
  lines: list[dict[str, float]] = []
  for out in simulator.run(state, 5):
    state, lines = out.state, lines + out.rows
  metrics = simulator.evaluate(state)
  kept = simulator.states.to_host(simulator.states.copy(state))
  if changes["state_residency"] == "disk":
    count = simulator.num_clients
    found = simulator.states.rows.gather(kept.clients, np.arange(count), count)
    kept = kept._replace(clients=found.rows)
  return jax.tree.leaves(kept), lines, metrics


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(
  ("name", "devices", "changes"),
  slow_but(
    [("scaffold", 2, "")],
    itertools.product(ALGORITHMS, [1, 2], ["", "virtual", "host", "debug"]),
  ),
)
def test_disk_and_device_are_bit_identical(name, devices, changes, monkeypatch):
  monkeypatch.setattr(row_store, "_EVALUATED", 200)  # two clients at a time
  data = blobs([3, 9, 1, 14, 6, 8, 5])
  if name == "ditto":
    data = dataclasses.replace(data, seen=blobs([2, 4, 1, 6, 3, 2, 5]).train)
  task = MODELS["lr"](data)
  simulator = make_simulator(
    task,
    ALGORITHMS[name](task, sgd(0.1), sgd(1.0)),
    data,
    clients_per_round=4,
    batching=LocalBatching(batch_size=4, epochs=2),
    transforms=[error_feedback(quantize(0.9, bits=4))],
  )
  fields: dict[str, Any] = {}
  if changes == "virtual":
    fields["deterministic_reduction"] = 2
  if changes == "host":
    fields["residency"] = "host"
  if changes == "debug":
    simulator = dataclasses.replace(simulator, debug=True)
  (one, lines, metrics), (other, same, equal) = (
    trained(simulator, devices=devices, state_residency=where, **fields)
    for where in ("device", "disk")
  )
  assert lines == same
  assert metrics == equal
  assert bool(metrics) == (name == "ditto")
  for x, y in zip(one, other, strict=True):
    np.testing.assert_array_equal(x, y)


def test_where_client_states_are(monkeypatch):
  data = blobs([3] * 6)
  task = MODELS["lr"](data)
  of = lambda make, **fields: dataclasses.replace(
    make_simulator(task, make(task, sgd(0.1), sgd(1.0)), data),
    runtime=Runtime(**fields),
  )
  assert of(fedavg, state_residency="disk").states.residency == (
    "device",
    "clients keep nothing",
  )
  assert of(scaffold).states.residency[0] == "device"
  monkeypatch.setattr(client_residency, "_SMALL", 0)
  assert "room for" in of(scaffold).states.residency[1]
  monkeypatch.setattr(residency, "device_room", lambda mesh: 10)
  simulator = of(scaffold)
  assert simulator.states.residency[0] == "disk"
  assert "too many for memory" in simulator.states.residency[1]
  assert "runtime.state_residency" in refusal(
    build.build(quick(2, algorithm__name="scaffold"))
  )
  with pytest.raises(ValueError, match=r"disk.*hypergradients"):
    fs.hypergradient(simulator, 1, of=("client.learning_rate",))
  with pytest.raises(ValueError, match=r"state_residency='ram'"):
    Runtime(state_residency="ram")  # type: ignore[arg-type]


PERSONAL = {
  "algorithm__name": "ditto",
  "data__heldout_fraction": "0.2",
  "runtime__checkpoint_every": "2",
  "runtime__keep_checkpoints": "9",
  "runtime__rounds_per_dispatch": "1",
}
ON_DISK = PERSONAL | {"runtime__state_residency": "disk"}


class StoppedError(Exception):
  """Raised after a round."""


def stop_after(last):
  def stop(round_):
    if round_ == last:
      raise StoppedError

  return stop


def own_rows(folder):
  """What every client keeps, by the newest checkpoint of a run."""
  opened = fs.load(folder)
  count = opened.simulator.num_clients
  return [tree_digest(opened.client_state(i)) for i in range(count)]


@pytest.mark.integration
@pytest.mark.usefixtures("same_programs", "no_pictures")
def test_runs_on_the_disk_go_on_branch_and_are_verified(
  tmp_path, monkeypatch, capsys
):
  whole, cut = tmp_path / "whole", tmp_path / "cut"
  expected = run(whole, 6, **PERSONAL)
  assert expected["state_residency"] == "device"
  with monkeypatch.context() as patch:
    patch.setattr(client_residency, "_SMALL", 0)
    patch.setattr(residency, "device_room", lambda mesh: 10)
    for last in (0, 5):  # at first before there is a row
      with pytest.raises(StoppedError):
        experiment.run(quick(6, **PERSONAL), cut, stop_after(last))
      patch.undo()
  # It goes on as it began, where there is room now.
  summary = run(cut, 6, **PERSONAL)
  assert summary["state_residency"] == "disk"
  for name in ("metrics.jsonl", "clients_seen.csv"):
    assert (cut / name).read_bytes() == (whole / name).read_bytes()
  assert summary["params_digest"] == expected["params_digest"]
  assert own_rows(cut) == own_rows(whole)
  examples = {"x": np.ones((2, 64), np.float32)}
  np.testing.assert_array_equal(
    *(fs.load(folder).predict(examples, client=3) for folder in (whole, cut))
  )

  assert main(["verify", f"--workdir={cut}"]) == 0
  assert "verified: all equal" in capsys.readouterr().out
  (cut / "client_states" / "rows.bin").rename(tmp_path / "rows.bin")
  (cut / "client_states" / "rows.bin").write_bytes(b"")
  with pytest.raises(RowsError, match="lacks rows"):
    run(cut, 7, **PERSONAL)
  (tmp_path / "rows.bin").rename(cut / "client_states" / "rows.bin")

  branch = tmp_path / "branch"
  config = quick(6, **ON_DISK)
  experiment.run(config, branch, branch_from=f"{cut}:4")
  assert own_rows(branch) == own_rows(whole)
  with pytest.raises(ConfigChangedError, match="runtime.state_residency"):
    experiment.run(quick(6, **PERSONAL), branch)
  with pytest.raises(ConfigChangedError, match="are on the disk, the branch's"):
    experiment.run(quick(6, **PERSONAL), tmp_path / "b", branch_from=f"{cut}:4")
  with pytest.raises(ValueError, match="leave out the bucket"):
    experiment.run(config, tmp_path / "c", sync_to=f"file://{tmp_path}/d")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_any_moment_it_loses_nothing(seed, tmp_path):
  """Bit for bit, the rows of the file included."""
  rng = random.Random(seed)
  fields = {
    "algorithm__name": "scaffold",
    "runtime__checkpoint_every": "1",
    "runtime__keep_checkpoints": "2",
    "server__optimizer": "sgd",
    "server__learning_rate": "1.0",
    "server__eval_every": "50",
    "runtime__rounds_per_dispatch": "1",
  }
  last, kills = 400, 0
  folders = {name: tmp_path / name for name in ("device", "disk", "killed")}
  arguments = {
    name: command(
      folder,
      last,
      runtime__state_residency="device" if name == "device" else "disk",
      **fields,
    )
    for name, folder in folders.items()
  }
  killed = folders["killed"]
  while kills < 5:
    before, earlier = rows(killed), first_rounds(killed)
    with started(arguments["killed"], tmp_path) as process:
      while process.poll() is None and (
        len(first_rounds(killed)) == len(earlier)
        or rows(killed) < before + rng.randint(1, 60)
      ):
        time.sleep(0.001)
      time.sleep(rng.random() * 0.05)
      process.send_signal(signal.SIGKILL)
      process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert rows(killed) < last
    kills += 1
  for name in folders:
    with started(arguments[name], tmp_path) as process:
      _, err = process.communicate(timeout=250)
    assert process.returncode == 0, err
  outcomes = {name: _outcome(folder) for name, folder in folders.items()}
  assert outcomes["killed"] == outcomes["disk"] == outcomes["device"]


def _outcome(folder: pathlib.Path):
  """Metrics, and the digest of what every client keeps."""
  simulator = fs.load(folder).simulator
  reader = CheckpointReader(folder / "checkpoints")
  table = reader.read(max(reader.rounds()), simulator.states.host_shapes)
  clients = table.state.clients
  reader.close()
  digests = [
    tree_digest(
      read_row(folder / "client_states", clients, i)
      if hasattr(clients, "records")
      else jax.tree.map(lambda x, i=i: x[i], clients)
    )
    for i in range(simulator.num_clients)
  ]
  return (folder / "metrics.jsonl").read_bytes(), digests
