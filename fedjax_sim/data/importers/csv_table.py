"""CSV: rows of text, read by pyarrow.

How columns and decimals are separated is found out from the first lines where
it is not given: by commas, or as spreadsheets of many countries write it, by
semicolons or tabs, and 1,5 for one and a half.
"""

from __future__ import annotations

import csv as python_csv
import io
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from fedjax_sim.core.optional import library
from fedjax_sim.data.importers import blocks
from fedjax_sim.data.importers.blocks import (
  Block,
  files_of,
  opened,
  reading,
  source,
)
from fedjax_sim.data.importers.fields import assigned, columns_of
from fedjax_sim.data.importers.tables import of_batches

_HEAD = 2**16  # bytes that show how a file is written
_DELIMITERS = (",", ";", "\t", "|")
_COMMA = re.compile(r"[+-]?\d+,\d+([eE][+-]?\d+)?")
_THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2}(,\d{3})+")
_POINT = re.compile(r"[+-]?\d*\.\d+([eE][+-]?\d+)?")


class _Layout(NamedTuple):
  """How a file is written.

  Attributes:
    delimiter: stands between columns.
    decimal: stands before a fraction.
  """

  delimiter: str
  decimal: str


@source
def csv(
  path: str | os.PathLike[str],
  *,
  client: str,
  fields: Mapping[str, str] | None = None,
  dtypes: Mapping[str, str] | None = None,
  delimiter: str | None = None,
  decimal: str | None = None,
) -> Iterator[Block]:
  """Read the rows of a CSV file with a header, or of a folder of them.

  Args:
    path: `.csv`, `.csv.gz`, or their folder.
    client: see `tables.parquet`.
    fields: see `tables.parquet`.
    dtypes: field -> "text" or a dtype, by name: what has columns that are text
      or fractions, though their first rows look like whole numbers.
    delimiter: one character, which stands between columns; None: the comma,
      semicolon, tab or bar that makes a column `client` of the header.
    decimal: "." or ","; None: a comma where columns are separated by something
      else and numbers of the first lines have commas and no points.

  Raises:
    FileNotFoundError, ModuleNotFoundError, ValueError: as `tables.parquet`; or
      it is not clear whether commas are decimal.
  """
  if delimiter is not None and (len(delimiter) != 1 or delimiter in '\r\n"\0'):
    raise ValueError(
      f"delimiter={delimiter!r} is no single character that may stand between"
      " columns; give ',' or ';', say."
    )
  if decimal not in (None, ".", ","):
    raise ValueError(
      f"decimal={decimal!r} is neither '.' nor ','; give the one that stands"
      " before a fraction, or leave it out."
    )
  invalid = library("pyarrow", "parquet").ArrowInvalid
  told: set[_Layout] = set()
  for file in files_of(path, ".csv", ".csv.gz"):
    where = str(file)
    with reading(file, "CSV"):
      layout = _layout(file, client, delimiter, decimal)
      guessed = layout != (delimiter or ",", decimal or ".")
      if guessed and layout not in told:
        told.add(layout)
        warnings.warn(
          f"{where}: columns are taken to be separated by {layout.delimiter!r},"
          f" and fractions to begin with {layout.decimal!r}, as its first lines"
          " look; delimiter and decimal say otherwise.",
          stacklevel=2,
        )
      with opened(file) as stream:
        schema = _rows(stream, client, {}, layout).schema
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
          batches = _rows(stream, client, kinds, layout)
          exact = _exact(where, batches, kinds)
          yield from of_batches(where, exact, client, fields, blank=False)
        except invalid as error:
          found = re.search(
            r"column #(\d+): (.*conversion error.*)", str(error)
          )
          if not found:
            raise
          name = schema.names[int(found[1])]
          row = _row_of(file, client, layout, name, str(error))
          raise ValueError(
            f"{file}: column {name!r}: row {row}: {found[2]}. Fill it in, or"
            " leave the row out. What a column holds is taken from its first"
            " rows, unless its field is named in dtypes as float32, say, or"
            " text."
          ) from error


def _row_of(
  file: Path, client: str, layout: _Layout, name: str, error: str
) -> str:
  """Return the number of the row that pyarrow could not convert."""
  value = re.search(r"invalid value '(.*)'", error, re.DOTALL)
  with opened(file) as stream:
    row = 0
    for batch in _rows(stream, client, {name: "text"}, layout, [name]):
      texts = [text.strip() for text in batch.column(0).to_pylist()]
      if value and value[1].strip() in texts:
        return str(row + texts.index(value[1].strip()))
      row += len(texts)
  return "?"


def _layout(
  file: Path, client: str, delimiter: str | None, decimal: str | None
) -> _Layout:
  """Return the layout: as given, the rest guessed from the file's beginning."""
  with opened(file) as stream:
    head = stream.read(_HEAD)
  end = head.rfind(b"\n") + 1 if len(head) == _HEAD else len(head)
  text = head[: end or len(head)].decode(errors="replace")

  def rows(delimiter: str) -> list[list[str]]:
    lines = io.StringIO(text, newline="")
    try:
      return list(python_csv.reader(lines, delimiter=delimiter))
    except python_csv.Error:  # it is told of when all is read
      return []

  if delimiter is None:
    good = (d for d in _DELIMITERS if client in (rows(d) or [[]])[0])
    delimiter = next(good, ",")
  if decimal is None:
    decimal = "."
    cells = [c.strip() for row in rows(delimiter)[1:] for c in row]
    commas = [c for c in cells if _COMMA.fullmatch(c)]
    points = any(_POINT.fullmatch(c) for c in cells)
    if commas and delimiter != "," and not points:
      if all(_THOUSANDS.fullmatch(c) for c in commas):
        raise ValueError(
          f"{file}: {commas[0]!r} may be a fraction or whole; say which by"
          " decimal=',' or decimal='.'."
        )
      decimal = ","
  return _Layout(delimiter, decimal)


def _misleads(schema: Any, name: str, dtype: str) -> bool:
  """Return whether a column's first rows look like another kind of data."""
  types, kind = library("pyarrow.types", "parquet"), schema.field(name).type
  if dtype == "text":
    return not types.is_string(kind)
  whole = types.is_integer(kind) or types.is_null(kind)
  return whole and dtype.startswith("float")


def _rows(
  stream: IO[bytes],
  client: str,
  kinds: Mapping[str, str],
  layout: _Layout,
  columns: Sequence[str] = (),
) -> Any:
  """Return pyarrow's reader of batches of rows.

  Args:
    stream: the file.
    client: the column of clients' names, which is text.
    kinds: column -> "text", or a dtype of fractions; of others the first rows
      decide.
    layout: how the file is written.
    columns: the columns that are read; none: all.
  """
  arrow, read = library("pyarrow", "parquet"), library("pyarrow.csv", "parquet")
  text, real = arrow.string(), arrow.float64()
  types = {k: text if v == "text" else real for k, v in kinds.items()}
  return read.open_csv(
    stream,
    read_options=read.ReadOptions(block_size=blocks.BLOCK),
    parse_options=read.ParseOptions(
      delimiter=layout.delimiter, newlines_in_values=True
    ),
    convert_options=read.ConvertOptions(
      column_types=types | {client: text},
      include_columns=columns,
      strings_can_be_null=False,
      decimal_point=layout.decimal,
    ),
  )


def _exact(
  where: str, batches: Iterable[Any], kinds: Mapping[str, str]
) -> Iterator[Any]:
  """Yield the batches; refuse whole numbers that float64 may round."""
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
