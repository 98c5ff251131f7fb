"""FedJAX's SQLite files.

A table `federated_data` has `client_id`, `data` and `num_examples`; `data` is
zlib-compressed msgpack of field -> array, where an array is the extension 1,
(shape, dtype's name, bytes), or for text 4, (shape, list of bytes). After
Ro, Suresh, Wu (2021, "FedJAX: federated learning simulation with JAX", arXiv
2108.02117).
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from fedjax_sim.core.optional import library
from fedjax_sim.data.importers.blocks import (
  Block,
  files_of,
  reading,
  source,
)

_ROWS = (
  "SELECT client_id, data, num_examples FROM federated_data ORDER BY rowid"
)
_ARRAY, _TEXT = 1, 4


@source
def fedjax_sqlite(path: str | os.PathLike[str]) -> Iterator[Block]:
  """Read a FedJAX file, or a folder of them, a client at a time.

  Raises:
    FileNotFoundError: there is no such file.
    ModuleNotFoundError: msgpack is not installed.
    ValueError: a file is damaged, or of another layout; names file, client and
      field.
  """
  for file in files_of(path, ".sqlite", ".sqlite3", ".db"):
    whole = file.resolve()
    for journal in ("wal", "journal"):
      beside = whole.with_name(f"{whole.name}-{journal}")
      if beside.exists() and beside.stat().st_size:
        raise ValueError(
          f"{file} is not all of it: {beside.name} has what was not written to"
          " it yet. Open and close it with sqlite3 once, or leave that out."
        )
    address = f"file:{quote(str(whole))}?mode=ro&immutable=1"
    with (
      reading(file, "SQLite"),
      contextlib.closing(sqlite3.connect(address, uri=True)) as connection,
    ):
      for client, data, count in connection.execute(_ROWS):
        yield _block(file, client, data, count)


def _block(file: Path, client: Any, data: Any, count: Any) -> Block:
  where = f"{file}: client {client!r:.80}"
  if not isinstance(client, (bytes, str)) or not isinstance(data, bytes):
    raise ValueError(
      f"{where}: expected client_id and data of bytes, found"
      f" {type(client).__name__} and {type(data).__name__}."
    )
  try:
    name = client if isinstance(client, str) else client.decode()
  except UnicodeDecodeError as error:
    raise ValueError(f"{where} has a name that is no UTF-8.") from error
  examples = _decoded(where, data)
  size = max(map(len, examples.values()), default=0)
  if size != count:
    raise ValueError(
      f"{where}: num_examples is {count!r}; expected {size}, as data has."
    )
  return Block(str(file), [name], [size], examples, whole=True)


def _decoded(where: str, data: bytes) -> dict[str, np.ndarray]:
  msgpack = library("msgpack", "sqlite")
  try:
    held = msgpack.unpackb(zlib.decompress(data), ext_hook=_array, raw=False)
  except Exception as error:  # msgpack, zlib and numpy have many
    raise ValueError(
      f"{where}: data is no zlib-compressed msgpack of arrays:"
      f" {str(error).rstrip('.') or type(error).__name__}."
    ) from error
  if not isinstance(held, dict):
    raise ValueError(
      f"{where}: expected fields by name, found a {type(held).__name__}."
    )
  for field, values in held.items():
    if not isinstance(values, np.ndarray) or not values.ndim:
      raise ValueError(
        f"{where}: field {field!r}: expected an array, one entry an example."
      )
  return held


def _array(code: int, data: bytes) -> Any:
  msgpack = library("msgpack", "sqlite")
  if code == _ARRAY:
    shape, dtype, content = msgpack.unpackb(data, raw=True)
    return np.frombuffer(content, np.dtype(dtype.decode())).reshape(shape)
  if code == _TEXT:
    shape, texts = msgpack.unpackb(data, raw=True)
    return np.array([t.decode() for t in texts], object).reshape(shape)
  raise ValueError(f"msgpack extension {code} is no array")
