"""Tables with a row an example and a column that names its client.

Parquet and CSV are read by pyarrow, JSON lines by Python.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import IO, Any

import numpy as np

from fedjax_sim.importers import blocks
from fedjax_sim.importers.blocks import (
  Block,
  client_names,
  column,
  files_of,
  grouped,
  library,
  opened,
  reading,
  source,
)
from fedjax_sim.importers.fields import assigned, columns_of


@source
def parquet(
  path: str | os.PathLike[str],
  *,
  client: str,
  fields: Mapping[str, str] | None = None,
) -> Iterator[Block]:
  """Rows of a Parquet file, or of a folder of them.

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
      yield from _of_batches(str(file), batches, client, fields)


@source
def csv(
  path: str | os.PathLike[str],
  *,
  client: str,
  fields: Mapping[str, str] | None = None,
  dtypes: Mapping[str, str] | None = None,
) -> Iterator[Block]:
  """Rows of a CSV file with a header, plain or gzipped, or of a folder.

  Args:
    path: `.csv`, `.csv.gz`, or their folder.
    client: see `parquet`.
    fields: see `parquet`.
    dtypes: field -> "text" or a dtype, by name: what has columns that are text
      or fractions, though their first rows look like whole numbers.

  Raises:
    FileNotFoundError, ModuleNotFoundError, ValueError: as `parquet`.
  """
  invalid = library("pyarrow", "parquet").ArrowInvalid
  for file in files_of(path, ".csv", ".csv.gz"):
    where = str(file)
    with reading(file, "CSV"):
      with opened(file) as stream:
        schema = _rows_of_csv(stream, client, {}).schema
      _, *columns = columns_of(where, schema.names, client, fields)
      if fields is None:
        made_of = {column: [column] for column in columns}
      else:
        made_of = assigned(where, columns, fields)
      kinds: dict[str, str] = {}
      for field, dtype in (dtypes or {}).items():
        kinds |= dict.fromkeys(made_of.get(field, ()), dtype)
      kinds = {k: v for k, v in kinds.items() if _misleads(schema, k, v)}
      with opened(file) as stream:
        try:
          batches = _rows_of_csv(stream, client, kinds)
          exact = _exact(where, batches, kinds)
          yield from _of_batches(where, exact, client, fields)
        except invalid as error:
          found = re.search(
            r"column #(\d+): (.*conversion error.*)", str(error)
          )
          if not found:
            raise
          name = schema.names[int(found[1])]
          raise ValueError(
            f"{file}: column {name!r}: {found[2]}. What a column holds is"
            " taken from its first rows, unless its field is named in dtypes as"
            " float32, say, or text."
          ) from error


def _misleads(schema: Any, name: str, dtype: str) -> bool:
  """Whether a column's first rows look like another kind than its dtype."""
  types, kind = library("pyarrow.types", "parquet"), schema.field(name).type
  if dtype == "text":
    return not types.is_string(kind)
  whole = types.is_integer(kind) or types.is_null(kind)
  return whole and dtype.startswith("float")


def _rows_of_csv(
  stream: IO[bytes], client: str, kinds: Mapping[str, str]
) -> Any:
  """What reads batches of rows.

  Args:
    stream: the file.
    client: its column, which is text.
    kinds: column -> "text", or a dtype of fractions; of others the first rows
      decide.
  """
  arrow, read = library("pyarrow", "parquet"), library("pyarrow.csv", "parquet")
  text, real = arrow.string(), arrow.float64()
  types = {k: text if v == "text" else real for k, v in kinds.items()}
  return read.open_csv(
    stream,
    read_options=read.ReadOptions(block_size=blocks.BLOCK),
    parse_options=read.ParseOptions(newlines_in_values=True),
    convert_options=read.ConvertOptions(
      column_types=types | {client: text}, strings_can_be_null=False
    ),
  )


def _exact(
  where: str, batches: Iterable[Any], kinds: Mapping[str, str]
) -> Iterator[Any]:
  """The batches, unless reading whole numbers as fractions changes some."""
  for batch in batches:
    for name in kinds:
      if kinds[name] != "text":
        values = batch.column(name).to_numpy(zero_copy_only=False)
        large = np.abs(values) >= 2.0**53
        if large.any():
          raise ValueError(
            f"{where}: column {name!r} holds {values[large][0]:.0f}, and from"
            " 2**53 on float64 has not every whole number; give it as int64, or"
            " write its first row with a decimal point."
          )
    yield batch


def _of_batches(
  where: str, batches: Any, client: str, fields: Mapping[str, str] | None
) -> Iterator[Block]:
  row = 0
  for batch in batches:
    held = dict(zip(batch.schema.names, batch.columns, strict=True))
    wanted = columns_of(where, list(held), client, fields)
    names = client_names(where, client, held[client].to_pylist(), row)
    arrays = {
      k: _array(f"{where}: column {k!r}", held[k], row)
      for k in wanted
      if k != client
    }
    yield grouped(where, names, arrays, fields, row)
    row += len(names)


def _array(where: str, values: Any, row: int, unit: str = "row") -> np.ndarray:
  """An arrow array as numpy's.

  Args:
    where: for messages.
    values: numbers, texts, or lists of one length each.
    row: the number of the first, for messages.
    unit: what is counted.
  """
  types = library("pyarrow.types", "parquet")
  kind = values.type
  if values.null_count:
    first = row + values.is_null().to_pylist().index(True)
    raise ValueError(
      f"{where}: {unit} {first} has no value; fill it in, or leave the row out."
    )
  if types.is_fixed_size_list(kind):
    flat = _array(where, values.flatten(), 0, "in its lists, entry")
    return flat.reshape(len(values), kind.list_size, *flat.shape[1:])
  if types.is_list(kind) or types.is_large_list(kind):
    lengths = values.value_lengths().to_numpy()
    length = int(lengths[0]) if len(lengths) else 0
    if (lengths != length).any():
      first = int(np.argmax(lengths != length))
      raise ValueError(
        f"{where}: row {row + first} has {lengths[first]} entries, others"
        f" {length}; give all the same number, padded perhaps."
      )
    flat = _array(where, values.flatten(), 0, "in its lists, entry")
    return flat.reshape(len(values), length, *flat.shape[1:])
  if types.is_dictionary(kind):
    return _array(where, values.dictionary_decode(), row)
  if (
    types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)
  ):
    array: np.ndarray = values.to_numpy(zero_copy_only=False)
    return array
  if types.is_string(kind) or types.is_large_string(kind):
    return np.array(values.to_pylist(), object)
  raise ValueError(f"{where}: expected numbers or text, found {kind}.")


@source
def json_lines(
  path: str | os.PathLike[str],
  *,
  client: str,
  fields: Mapping[str, str] | None = None,
) -> Iterator[Block]:
  """Lines of JSON objects, an example each, plain or gzipped, or of a folder.

  Args:
    path: `.jsonl`, `.jsonl.gz`, or their folder.
    client: the entry that names a line's client: a text or a whole number.
    fields: field -> entry; see `parquet`.

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
          yield from _of_rows(str(file), rows, client, fields)
          rows, size = {}, 0
      yield from _of_rows(str(file), rows, client, fields)


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
    k: column(where, k, [row[k] for row in rows.values()])
    for k in wanted
    if k != client
  }
  yield grouped(where, names, arrays, fields)
