"""Tables with a row an example and a column that names its client.

Parquet is read by pyarrow, JSON lines by Python; `csv_table.py` has CSV.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from fedjax_sim.core.optional import library
from fedjax_sim.data.importers import blocks
from fedjax_sim.data.importers.blocks import (
  Block,
  client_names,
  column,
  files_of,
  grouped,
  opened,
  reading,
  source,
)
from fedjax_sim.data.importers.fields import columns_of


@source
def parquet(
  path: str | os.PathLike[str],
  *,
  client: str,
  fields: Mapping[str, str] | None = None,
) -> Iterator[Block]:
  """Read the rows of a Parquet file, or of a folder of them.

  A column of lists of one length each is an array; so is one of lists of such
  lists.

  Args:
    path: `.parquet`, or their folder.
    client: the column that names a row's client: texts or whole numbers.
    fields: field -> column, or a pattern such as "pixel*" of columns that
      become one array, (examples, columns); None: all columns but `client`.

  Raises:
    FileNotFoundError: there is no such file.
    ModuleNotFoundError: pyarrow is not installed.
    ValueError: a file is damaged, a column is missing, or holds what is no
      number or text; names file, column and row.
  """
  read = library("pyarrow.parquet", "parquet")
  for file in files_of(path, ".parquet"):
    with (
      reading(file, "Parquet"),
      read.ParquetFile(file) as held,
    ):
      wanted = columns_of(str(file), held.schema_arrow.names, client, fields)
      rows = held.metadata.num_rows
      first = next(held.iter_batches(batch_size=64, columns=wanted), None)
      bytes_ = first.nbytes if first is not None else 0  # as it is in memory
      each = max(1, blocks.BLOCK * min(64, rows) // max(bytes_, 1))
      batches = held.iter_batches(batch_size=each, columns=wanted)
      yield from of_batches(str(file), batches, client, fields)


def of_batches(
  where: str,
  batches: Iterable[Any],
  client: str,
  fields: Mapping[str, str] | None,
  blank: bool = True,
) -> Iterator[Block]:
  """Yield blocks of arrow's batches of rows; `blank`: see `client_names`."""
  row = 0
  for batch in batches:
    held = dict(zip(batch.schema.names, batch.columns, strict=True))
    wanted = columns_of(where, list(held), client, fields)
    names = client_names(where, client, held[client].to_pylist(), row, blank)
    arrays = {
      k: _array(f"{where}: column {k!r}", held[k], row)
      for k in wanted
      if k != client
    }
    yield grouped(where, names, arrays, fields, row)
    row += len(names)


def _array(where: str, values: Any, row: int, each: int = 1) -> np.ndarray:
  """Convert an arrow array to a numpy array.

  Args:
    where: for messages.
    values: numbers, texts, or lists of one length each.
    row: the number of the first row, for messages.
    each: how many of the values, in lists, belong to one row.
  """
  types = library("pyarrow.types", "parquet")
  kind = values.type

  def place(i: int) -> str:
    told = f"{where}: row {row + i // each}"
    return told if each == 1 else f"{told}, entry {i % each} of its lists,"

  if values.null_count:
    raise ValueError(
      f"{place(values.is_null().to_pylist().index(True))} has no value; fill it"
      " in, or leave the row out."
    )
  if types.is_list(kind) or types.is_large_list(kind):
    lengths = values.value_lengths().to_numpy()
    length = int(lengths[0]) if len(lengths) else 0
    if (lengths != length).any():
      first = int(np.argmax(lengths != length))
      raise ValueError(
        f"{place(first)} has {lengths[first]} entries, others {length}; give"
        " all the same number, padded perhaps."
      )
  elif types.is_fixed_size_list(kind):
    length = kind.list_size
  elif types.is_dictionary(kind):
    return _array(where, values.dictionary_decode(), row, each)
  elif types.is_decimal(kind):
    return _array(where, values.cast("float64"), row, each)
  elif any(
    is_number(kind)
    for is_number in (types.is_integer, types.is_floating, types.is_boolean)
  ):
    return np.asarray(values.to_numpy(zero_copy_only=False))
  elif any(is_text(kind) for is_text in _texts(types)):
    return np.array(values.to_pylist(), object)
  else:
    raise ValueError(f"{where}: expected numbers or text, found {kind}.")
  flat = _array(where, values.flatten(), row, each * max(length, 1))
  return flat.reshape(len(values), length, *flat.shape[1:])


def _texts(types: Any) -> Iterator[Callable[[Any], bool]]:
  """Yield tests for text of an arrow type; Polars writes views of strings."""
  for name in ("is_string", "is_large_string", "is_string_view"):
    if hasattr(types, name):  # old releases know no views
      yield getattr(types, name)


@source
def json_lines(
  path: str | os.PathLike[str],
  *,
  client: str,
  fields: Mapping[str, str] | None = None,
  raw: bool = False,
) -> Iterator[Block]:
  """Read lines of JSON objects, an example each, of a file or a folder.

  Args:
    path: `.jsonl`, `.jsonl.gz`, or their folder.
    client: the entry that names a line's client: a text or a whole number.
    fields: field -> entry; see `parquet`.
    raw: whether entries that are neither numbers of one shape nor texts stay as
      they are, of dtype object, for a map to convert.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: a file is damaged, an entry is missing, or is no number or text;
      names file, line and entry.
  """
  for file in files_of(path, ".jsonl", ".jsonl.gz"):
    with reading(file, "JSON lines"), opened(file) as stream:
      rows: dict[int, dict[str, Any]] = {}
      size = 0
      for number, line in enumerate(stream, 1):
        if line.strip():
          rows[number] = _row(f"{file}: line {number}", line, client)
        size += len(line)
        if size >= blocks.BLOCK:
          yield from _of_rows(str(file), rows, client, fields, raw)
          rows, size = {}, 0
      yield from _of_rows(str(file), rows, client, fields, raw)


def _row(where: str, line: bytes, client: str) -> dict[str, Any]:
  try:
    row = json.loads(line)
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{where} is no JSON: {error}.") from error
  if not isinstance(row, dict):
    raise ValueError(
      f"{where}: expected an object, found a {type(row).__name__}."
    )
  columns_of(where, list(row), client, None)  # the client's is there
  client_names(where, client, [row[client]], row=None)
  return row


def _of_rows(
  where: str,
  rows: Mapping[int, Mapping[str, Any]],
  client: str,
  fields: Mapping[str, str] | None,
  raw: bool,
) -> Iterator[Block]:
  if not rows:
    return
  first, row = next(iter(rows.items()))
  wanted = columns_of(f"{where}: line {first}", list(row), client, fields)
  known = set(row)
  for number, row in rows.items():
    if fields is None and set(row) - known:
      raise ValueError(
        f"{where}: line {number} has {min(set(row) - known)!r}, line {first}"
        " has not; give all lines the same, or name fields."
      )
    for entry in wanted:
      if row.get(entry) is None:
        raise ValueError(
          f"{where}: line {number}: {entry} is missing; fill it in, or leave"
          " the line out."
        )
  where = f"{where}: from line {first} on"
  names = [str(row[client]) for row in rows.values()]
  arrays = {
    k: column(where, k, [row[k] for row in rows.values()], raw)
    for k in wanted
    if k != client
  }
  yield grouped(where, names, arrays, fields)
