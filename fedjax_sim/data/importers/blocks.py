"""What importers give: examples of some clients, a block at a time."""

from __future__ import annotations

import codecs
import contextlib
import functools
import gzip
import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, ParamSpec

import numpy as np
import numpy.typing as npt

from fedjax_sim.data.importers.fields import assigned, chosen
from fedjax_sim.data.leaf_format import numbers

P = ParamSpec("P")
BLOCK = 2**22  # bytes that are read at once, about
_GZIP = b"\x1f\x8b"


class Block(NamedTuple):
  """Examples of some clients, client after client.

  Attributes:
    where: the file, and perhaps more, for messages.
    names: the clients, each once.
    sizes: how many examples are whose.
    examples: field -> (examples, ...); text is of dtype object, `str` each.
    whole: whether no other block has examples of these clients.
    columns: field -> the source's fields that it is made of, where the importer
      was asked for some; None: they are called as in the source.
    rows: the number of each example in the source, for messages; None: there
      are no rows.
  """

  where: str
  names: Sequence[str]
  sizes: npt.ArrayLike
  examples: Mapping[str, np.ndarray]
  whole: bool = False
  columns: Mapping[str, Sequence[str]] | None = None
  rows: npt.NDArray[np.int64] | None = None

  def place(self, example: int) -> str:
    """Return an example's client, and its row if there is one, in words."""
    ends = np.cumsum(np.asarray(self.sizes, np.int64))
    i = int(np.searchsorted(ends, example, side="right"))
    first = 0 if i == 0 else int(ends[i - 1])
    told = f"client {self.names[i]!r}, example {example - first}"
    if self.rows is None:
      return told
    return f"row {self.rows[example]} ({told})"


class Source(Iterable[Block]):
  """Blocks that can be read again from the beginning."""

  def __init__(self, read: Callable[[], Iterator[Block]]):
    self._read = read

  def __iter__(self) -> Iterator[Block]:
    return self._read()


def source(read: Callable[P, Iterator[Block]]) -> Callable[P, Source]:
  """Decorate a generator function so that its result can be read again."""

  @functools.wraps(read)
  def made(*args: P.args, **options: P.kwargs) -> Source:
    return Source(functools.partial(read, *args, **options))

  return made


def files_of(path: str | os.PathLike[str], *suffixes: str) -> list[Path]:
  """Return the file, or a folder's files with these suffixes, sorted.

  Raises:
    FileNotFoundError: there is none.
  """
  place = Path(path)
  if place.is_file():
    return [place]
  if not place.is_dir():
    raise FileNotFoundError(f"There is no {place}; correct the path.")
  found = sorted(
    file
    for file in place.iterdir()
    if file.name.endswith(suffixes) and file.is_file() and file.name[0] != "."
  )
  if not found:
    raise FileNotFoundError(
      f"{place} holds no {' or '.join(suffixes)}; name the file, or its folder."
    )
  return found


@contextlib.contextmanager
def reading(file: Path | str, kind: str) -> Iterator[None]:
  """Make every error name the file, whatever a library raises.

  Args:
    file: what is read.
    kind: the format that it should have, for messages.

  Raises:
    MemoryError: memory ran out.
    ModuleNotFoundError: the library is missing.
    ValueError: anything else that does not name the file already.
  """
  try:
    yield
  except ModuleNotFoundError:
    raise
  except Exception as error:
    if isinstance(error, ValueError | MemoryError) and str(file) in str(error):
      raise
    if isinstance(error, MemoryError):
      raise MemoryError(
        f"{file}: memory ran out: {error}. Split its largest client, or use a"
        " machine with more."
      ) from error
    why = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    raise ValueError(
      f"{file} cannot be read as {kind}: {why}. It is damaged, or of another"
      " format; get it again, or name its format."
    ) from error


@contextlib.contextmanager
def opened(file: Path) -> Iterator[IO[bytes]]:
  """Open a text file as UTF-8 bytes, without a byte order mark.

  They are decompressed if the file is gzipped, whatever its name. A file in
  UTF-16, known by its byte order mark, is held in memory.
  """
  with contextlib.ExitStack() as stack:
    stream: Any = stack.enter_context(file.open("rb"))
    if stream.peek(2)[:2] == _GZIP:
      stream = stack.enter_context(gzip.GzipFile(fileobj=stream))
    mark = stream.peek(3)[:3]
    if mark[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
      stream = io.BytesIO(stream.read().decode("utf-16").encode())
    elif mark == codecs.BOM_UTF8:
      stream.read(3)
    yield stream


def column(
  where: str, field: str, values: Sequence[Any], raw: bool = False
) -> np.ndarray:
  """Make an array of Python values: numbers, or text of dtype object.

  Args:
    where: for messages.
    field: for messages.
    values: the values, one an example.
    raw: whether values that are neither stay as they are, of dtype object.

  Raises:
    ValueError: they are neither, or of several shapes, unless `raw`.
  """
  if raw:
    with contextlib.suppress(ValueError):
      return column(where, field, values)
    return np.fromiter(values, object, len(values))
  texts = sum(isinstance(value, str) for value in values)
  if not texts:
    return numbers(where, field, values)
  if texts < len(values):
    other = next(v for v in values if not isinstance(v, str))
    raise ValueError(
      f"{where}: {field}: expected text, as others are, found {other!r:.60}."
    )
  return np.array(values, object)


def grouped(
  where: str,
  clients: Sequence[str],
  examples: Mapping[str, np.ndarray],
  fields: Mapping[str, str] | None = None,
  row: int | None = None,
) -> Block:
  """Make a block of examples in any order.

  Args:
    where: for messages.
    clients: each example's client.
    examples: the source's field -> (examples, ...).
    fields: see `fields.assigned`; None: all of them.
    row: the number of the first, for messages.

  Raises:
    ValueError: fields are missing, or do not fit together.
  """
  held = chosen(where, examples, fields, row)
  first: dict[str, int] = {}
  codes = np.array([first.setdefault(c, len(first)) for c in clients], np.int64)
  order = np.argsort(codes, kind="stable")
  sizes = np.bincount(codes, minlength=len(first))
  return Block(
    where,
    list(first),
    sizes,
    {k: x[order] for k, x in held.items()},
    columns=fields and assigned(where, list(examples), fields),
    rows=None if row is None else order + row,
  )


def client_names(
  where: str,
  field: str,
  keys: Sequence[Any],
  row: int | None = 0,
  blank: bool = True,
) -> list[str]:
  """Return the clients' names from a table's column of keys.

  Args:
    where: for messages.
    field: the column.
    keys: whole numbers or texts.
    row: the number of the first, for messages; None: `where` says it.
    blank: whether "" is a name; where it is what is missing, it is not.

  Raises:
    ValueError: a key is missing, or something else; names its row.
  """
  for i, key in enumerate(keys):
    good = isinstance(key, (str, int, np.integer)) and (blank or key != "")
    if isinstance(key, bool) or not good:
      at = where if row is None else f"{where}: row {row + i}"
      raise ValueError(
        f"{at}: {field}, which names the client, is"
        f" {key!r:.60}; give a text or a whole number."
      )
  return [str(key) for key in keys]
