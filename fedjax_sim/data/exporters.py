"""Writes clients in the formats that other simulators read."""

from __future__ import annotations

import contextlib
import errno
import json
import sqlite3
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedjax_sim import reporting
from fedjax_sim.core import validate
from fedjax_sim.core.optional import library
from fedjax_sim.data.federated import FederatedData
from fedjax_sim.data.store.column import header
from fedjax_sim.data.store.rewrite import Told, client_blocks

Examples = Mapping[str, np.ndarray]


def export(
  data: FederatedData,
  path: Path,
  format: str,
  progress: Told | None = None,
) -> None:
  """Write clients as a file, which is there whole or not at all.

  Args:
    data: the clients.
    path: the file, which must not be there yet.
    format: a name of `EXPORTERS`.
    progress: a function that is called with the format and how many clients
      and examples are written; None: none.

  Raises:
    FileExistsError: there is something at `path`.
    ModuleNotFoundError: the format needs a library.
    OSError: the disk is full.
    ValueError: no such format, or it does not hold such clients.
  """
  write = validate.lookup("format", format, EXPORTERS)
  if format in _TABLES and "client" in data.examples:
    raise ValueError(
      f"The field 'client' would be in the place of the clients' names in"
      f" {format}; give another format."
    )
  if path.exists() or path.is_symlink():
    raise FileExistsError(f"{path} is there already; give another name.")
  if not path.parent.is_dir():
    raise FileNotFoundError(f"There is no folder {path.parent}; make it first.")

  def told(client: int) -> None:
    if progress:
      progress(format, client + 1, int(data.offsets[client + 1]))

  reporting.replace_atomically(path, lambda file: write(data, file, told))


def _clients(
  data: FederatedData, told: Callable[[int], None]
) -> Iterator[tuple[str, Examples]]:
  for i in range(data.num_clients):
    yield data.client_name(i), data.client(i)
    told(i)


def _leaf_json(
  data: FederatedData, file: Path, told: Callable[[int], None]
) -> None:
  """Write LEAF's JSON; FLUTE reads it, too."""
  if set(data.examples) - {"x", "y"}:
    raise ValueError(
      f"LEAF's JSON holds x and y, and there are {', '.join(data.examples)};"
      " give another format."
    )
  with file.open("w") as out:
    names = [data.client_name(i) for i in range(data.num_clients)]
    sizes = json.dumps(data.sizes.tolist())
    out.write(f'{{"users": {json.dumps(names)}, "num_samples": {sizes}')
    begin = ', "user_data": {'
    for name, examples in _clients(data, told):
      held = json.dumps({k: x.tolist() for k, x in examples.items()})
      out.write(f"{begin}{json.dumps(name)}: {held}")
      begin = ", "
    out.write("}}")


def _tff_hdf5(
  data: FederatedData, file: Path, told: Callable[[int], None]
) -> None:
  """Write TFF's and FedML's HDF5: `examples/<client>/<field>`."""
  h5py = library("h5py", "hdf5")
  _check_nodes(data)
  # Of a full disk HDF5 itself does not tell.
  with file.open("w+b") as plain, h5py.File(plain, "w") as out:
    for name, examples in _clients(data, told):
      group = out.create_group(f"examples/{name}")
      for field, values in examples.items():
        group.create_dataset(field, data=values)


def _flute_hdf5(
  data: FederatedData, file: Path, told: Callable[[int], None]
) -> None:
  """Write FLUTE's HDF5: `user_data/<user>/x`, `user_data_label/<user>`."""
  h5py = library("h5py", "hdf5")
  _check_nodes(data)
  with file.open("w+b") as plain, h5py.File(plain, "w") as out:
    out["users"] = [data.client_name(i) for i in range(data.num_clients)]
    out["num_samples"] = data.sizes
    for name, examples in _clients(data, told):
      for field, values in examples.items():
        where = f"user_data/{name}/{field}"
        out[f"user_data_label/{name}" if field == "y" else where] = values


def _check_nodes(data: FederatedData) -> None:
  """Refuse clients whose names cannot be those of HDF5 groups."""
  for i in range(data.num_clients):
    name = data.client_name(i)
    if "/" in name or "\0" in name or name in ("", "."):
      raise ValueError(
        f"Client {name!r} cannot name a group of HDF5; give another format."
      )


def _fedjax_sqlite(
  data: FederatedData, file: Path, told: Callable[[int], None]
) -> None:
  """Write FedJAX's SQLite; see `fedjax_sim.data.importers.fedjax_sqlite`."""
  msgpack = library("msgpack", "sqlite")

  def packed(x: np.ndarray) -> Any:
    held = (x.shape, x.dtype.name, x.tobytes())
    return msgpack.ExtType(1, msgpack.packb(held))

  file.unlink(missing_ok=True)
  with _as_os_error(), contextlib.closing(sqlite3.connect(file)) as out, out:
    out.execute(
      "CREATE TABLE federated_data (client_id BLOB NOT NULL PRIMARY KEY,"
      " data BLOB NOT NULL, num_examples INTEGER NOT NULL)"
    )
    for name, examples in _clients(data, told):
      held = msgpack.packb({k: packed(x) for k, x in examples.items()})
      size = len(next(iter(examples.values())))
      out.execute(
        "INSERT INTO federated_data VALUES (?, ?, ?)",
        (name.encode(), zlib.compress(held), size),
      )


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
  try:
    yield
  except sqlite3.OperationalError as error:  # the disk is full, say
    raise OSError(errno.EIO, str(error)) from error


def _parquet(
  data: FederatedData, file: Path, told: Callable[[int], None]
) -> None:
  """Write Parquet, a row an example; arrays become lists of fixed sizes."""
  arrow = library("pyarrow", "parquet")
  parquet = library("pyarrow.parquet", "parquet")

  def array(x: np.ndarray) -> Any:
    flat = arrow.array(x.reshape(-1))
    for size in reversed(x.shape[1:]):
      flat = arrow.FixedSizeListArray.from_arrays(flat, size)
    return flat

  out: Any = None
  each = sum(x[:1].nbytes for x in data.examples.values())
  try:
    for first, last in client_blocks(data, each):
      begin, end = data.offsets[first], data.offsets[last]
      names = [data.client_name(i) for i in range(first, last)]
      owners = np.repeat(np.array(names, object), data.sizes[first:last])
      columns = {"client": arrow.array(owners, arrow.string())}
      for field, values in data.examples.items():
        columns[field] = array(np.ascontiguousarray(values[begin:end]))
      table = arrow.table(columns)
      out = out or parquet.ParquetWriter(file, table.schema)
      out.write_table(table)
      told(last - 1)
  finally:
    if out is not None:
      out.close()


def _npz(data: FederatedData, file: Path, told: Callable[[int], None]) -> None:
  """Write an array per field, and `client`, each example's client's name."""
  names = [data.client_name(i) for i in range(data.num_clients)]
  for name in names:
    if name.endswith("\0"):
      raise ValueError(
        f"Client {name!r} ends in what .npz cuts off; give another format."
      )
  width = max(1, *map(len, names))
  each = sum(x[:1].nbytes for x in data.examples.values()) + 4 * width
  blocks = list(client_blocks(data, each))
  with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as out:
    with out.open("client.npy", "w", force_zip64=True) as member:
      member.write(header(np.dtype(f"<U{width}"), (data.num_examples,)))
      for first, last in blocks:
        owners = np.repeat(
          np.array(names[first:last], f"<U{width}"), data.sizes[first:last]
        )
        member.write(owners.tobytes())
    for field, values in data.examples.items():
      with out.open(f"{field}.npy", "w", force_zip64=True) as member:
        member.write(header(values.dtype, values.shape))
        for first, last in blocks:
          begin, end = data.offsets[first], data.offsets[last]
          member.write(np.ascontiguousarray(values[begin:end]).tobytes())
  told(data.num_clients - 1)


_TABLES = ("npz", "parquet")  # which name clients in a column

EXPORTERS: Mapping[
  str, Callable[[FederatedData, Path, Callable[[int], None]], None]
] = {
  "fedjax_sqlite": _fedjax_sqlite,
  "flute_hdf5": _flute_hdf5,
  "leaf_json": _leaf_json,
  "npz": _npz,
  "parquet": _parquet,
  "tff_hdf5": _tff_hdf5,
}
