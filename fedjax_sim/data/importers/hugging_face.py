"""Data sets of the Hugging Face hub, or of its library's files, streamed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedjax_sim.core.optional import library
from fedjax_sim.data.importers.blocks import (
  Block,
  client_names,
  column,
  grouped,
  reading,
  source,
)
from fedjax_sim.data.importers.fields import columns_of

_ROWS = 1000  # read at once; there is no telling how large they are


@source
def datasets(
  path: str | os.PathLike[str],
  *,
  client: str,
  split: str = "train",
  fields: Mapping[str, str] | None = None,
) -> Iterator[Block]:
  """Read the rows of a data set with a column that names the client.

  Args:
    path: the data set's name on the hub, "flwrlabs/femnist"; or a folder, with
      its files or as `save_to_disk` writes it.
    client: the column that names a row's client: texts or whole numbers.
    split: of the data set.
    fields: field -> column; see `tables.parquet`. Images become uint8,
      (height, width) or (height, width, channels).

  Raises:
    ModuleNotFoundError: `datasets` is not installed.
    ValueError: there is no such data set or split, or a column is missing or
      holds what is no number, text or image; names column and row.
  """
  where = f"{path}:{split}"
  for first, rows in _batches(where, path, split):
    wanted = columns_of(where, list(rows), client, fields)
    names = client_names(where, client, rows[client], first)
    arrays = {
      k: _array(where, k, rows[k], first) for k in wanted if k != client
    }
    yield grouped(where, names, arrays, fields, first)


def _batches(
  where: str, path: str | os.PathLike[str], split: str
) -> Iterator[tuple[int, dict[str, list[Any]]]]:
  """Yield the number of the first row, and column -> values, of each batch."""
  hub = library("datasets", "datasets")
  first = 0
  folder = Path(path)
  with reading(where, "a data set"):
    saved = ("state.json", "dataset_dict.json")
    if any((folder / name).is_file() for name in saved):
      held = hub.load_from_disk(str(path))
      if isinstance(held, hub.DatasetDict):
        held = held[split]
      elif split != (known := str(held.split or "train")):
        raise ValueError(
          f"{where}: the folder is of one split, {known!r}; give that one."
        )
    elif folder.is_file():
      raise ValueError(
        f"{where}: that is a file; give its folder, or the format of the file."
      )
    else:
      held = hub.load_dataset(str(path), split=split, streaming=True)
    for rows in held.iter(batch_size=_ROWS):
      yield first, rows
      first += len(next(iter(rows.values())))


def _array(where: str, field: str, values: list[Any], row: int) -> np.ndarray:
  for i, value in enumerate(values):
    if value is None:
      raise ValueError(
        f"{where}: row {row + i}: {field} is missing; fill it in, or leave the"
        " row out."
      )
  if hasattr(values[0], "getbands"):  # an image of PIL
    values = [
      np.asarray(value.convert("RGB") if value.mode == "P" else value)
      for value in values
    ]
  return column(f"{where}: from row {row}", field, values)
