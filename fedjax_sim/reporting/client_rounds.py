"""`client_rounds.parquet`: a line for every client of every round.

While the run goes the lines lie in parts below `client_rounds/`, one for each
checkpoint, so no more than those since the last one are in memory. A run that
goes on from a checkpoint drops the parts beyond it, and ends up with the same
file as if nothing had happened.
"""

from __future__ import annotations

import collections
import io
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedjax_sim.core.files import replace_atomically, write_atomically
from fedjax_sim.reporting.figures.png import write_png

_GROUP = 2**16  # lines of a row group
_QUANTILES = (10, 50, 90)
_PANELS = {
  "update/norm": "L2 norm of the update",
  "update/cosine": "Cosine with the mean update",
  "loss": "Training loss",
}


class ClientRounds:
  """Collects the lines and writes them part by part.

  A part's name holds its first and its last round, since a round may have no
  client.
  """

  def __init__(
    self,
    folder: str | os.PathLike[str],
    table: str | os.PathLike[str],
    *,
    keep_through: int,
  ):
    """Drop what the folder has of rounds > `keep_through`.

    Args:
      folder: of the parts; made if missing.
      table: the joined file, from which the lines are read again where a
        finished run has removed its parts.
      keep_through: the round of the checkpoint to go on from; 0 starts anew.

    Raises:
      ValueError: a part that is to be kept is missing.
      OSError: the folder cannot be written.
    """
    self._folder = Path(folder)
    self._folder.mkdir(exist_ok=True)
    last = _kept(self._folder, keep_through)
    if last != keep_through and Path(table).exists():
      path = self._folder / _name(1, keep_through)
      replace_atomically(
        path, lambda temporary: _copy([table], temporary, keep_through)
      )
      for other, _ in _parts(self._folder):
        if other != path:
          other.unlink()
      last = keep_through
    if last != keep_through:
      raise ValueError(
        f"{self._folder} has the clients of rounds up to {last}, but the"
        f" checkpoint is of round {keep_through}; restore its files or start in"
        " a new folder."
      )
    self._written = self._last = last
    self._waiting: list[Mapping[str, np.ndarray]] = []

  def append(self, last: int, columns: Mapping[str, np.ndarray]) -> None:
    """Add the lines of some rounds; they are kept in memory until `sync`.

    Args:
      last: the last round that they are of; they begin after those before.
      columns: name -> as many values as there are lines.
    """
    self._waiting.append(columns)
    self._last = last

  def sync(self) -> None:
    """Write all lines to the disk; call it before a checkpoint commits."""
    if self._last == self._written:
      return
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.concat_tables([pa.table(dict(c)) for c in self._waiting])
    content = io.BytesIO()
    parquet.write_table(table, content)
    name = _name(self._written + 1, self._last)
    write_atomically(self._folder / name, content.getvalue())
    self._written, self._waiting = self._last, []

  def close(self) -> None:
    """Write what is left; the last rounds may explain a failure."""
    self.sync()


def join_client_rounds(
  folder: str | os.PathLike[str], path: str | os.PathLike[str]
) -> None:
  """Join all parts to one file; it is the same however they were cut.

  Args:
    folder: of the parts, which stay.
    path: the file; replaced atomically.

  Raises:
    OSError: the file cannot be written.
  """
  parts = [part for part, _ in _parts(Path(folder))]
  replace_atomically(path, lambda temporary: _copy(parts, temporary))


def _copy(
  sources: Sequence[str | os.PathLike[str]],
  path: Path,
  through: int | None = None,
) -> None:
  """Copy the lines of rounds <= `through`, or all, in groups of one size.

  No more than a group is in memory.
  """
  import pyarrow as pa
  from pyarrow import compute, parquet

  schema = parquet.read_schema(sources[0])
  with parquet.ParquetWriter(path, schema) as writer:
    rest = schema.empty_table()
    for source in sources:
      with parquet.ParquetFile(source) as file:
        for batch in file.iter_batches(_GROUP):
          more = pa.Table.from_batches([batch])
          if through is not None:
            more = more.filter(compute.field("round") <= through)
          rest = pa.concat_tables([rest, more])
          if len(rest) >= _GROUP:
            writer.write_table(rest.slice(0, _GROUP))
            rest = rest.slice(_GROUP)
    if len(rest):
      writer.write_table(rest)


def remove_parts(folder: str | os.PathLike[str]) -> None:
  """Remove the parts of a run whose joined file is written."""
  shutil.rmtree(folder, ignore_errors=True)


def draw_client_rounds(
  table: str | os.PathLike[str], path: str | os.PathLike[str], title: str
) -> None:
  """Draw a PNG of how norms, cosines and losses spread over the clients.

  Args:
    table: `client_rounds.parquet`.
    path: the file; replaced atomically.
    title: stands above the panels.

  Raises:
    OSError: a file cannot be read or written.
  """
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure
  from matplotlib.ticker import MaxNLocator
  from pyarrow import parquet

  rounds, spread = [], []
  with parquet.ParquetFile(table) as file:
    names = [name for name in _PANELS if name in file.schema_arrow.names]
    for round_, values in _by_round(file, names):
      rounds.append(round_)
      spread.append([_percentiles(values[name]) for name in names])
  shape = (len(rounds), len(names), len(_QUANTILES))
  bands = np.asarray(spread, float).reshape(shape)
  figure = Figure(figsize=(1 + 5 * len(names), 4.2), dpi=120)
  figure.set_layout_engine("constrained", wspace=0.06)
  FigureCanvasAgg(figure)
  figure.suptitle(title, parse_math=False)
  axes = figure.subplots(1, len(names), sharex=True, squeeze=False)[0]
  for i, (ax, name) in enumerate(zip(axes, names, strict=True)):
    low, middle, high = bands[:, i].T
    ax.fill_between(
      rounds, low, high, alpha=0.25, linewidth=0, label="10 % to 90 %"
    )
    marker = "o" if len(rounds) == 1 else None
    ax.plot(rounds, middle, linewidth=1.6, marker=marker, label="median")
    ax.legend(frameon=False)
    ax.set_xlim(left=0)
    ax.set_xlabel("Round")
    ax.set_ylabel(_PANELS[name])
    ax.xaxis.set_major_locator(
      MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10], min_n_ticks=1)
    )
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
  write_png(figure, path)


def count_rounds(
  folder: str | os.PathLike[str], table: str | os.PathLike[str]
) -> tuple[dict[int, str], dict[int, int]] | None:
  """Count the rounds in which each client was in the aggregate.

  Args:
    folder: of the parts that an unfinished run has.
    table: the joined file of a finished one, which is read if it exists.

  Returns:
    Index -> name, and index -> rounds, of the clients with lines; None if there
    is no file.

  Raises:
    OSError, ValueError: a file cannot be read.
  """
  from pyarrow import parquet

  found = [part for part, _ in _parts(Path(folder))]
  sources = [Path(table)] if Path(table).exists() else found
  if not sources:
    return None
  names: dict[int, str] = {}
  counts: collections.Counter[int] = collections.Counter()
  for source in sources:
    with parquet.ParquetFile(source) as file:
      for batch in file.iter_batches(columns=["client", "name", "present"]):
        clients = batch.column("client").to_numpy(zero_copy_only=False)
        present = batch.column("present").to_numpy(zero_copy_only=False)
        indices, firsts = np.unique(clients, return_index=True)
        for i, first in zip(indices.tolist(), firsts.tolist(), strict=True):
          if i not in names:
            names[i] = batch.column("name")[first].as_py()
        taken, times = np.unique(
          clients[present.astype(bool)], return_counts=True
        )
        counts.update(dict(zip(taken.tolist(), times.tolist(), strict=True)))
  return names, {i: counts[i] for i in names}


def _by_round(
  file: Any, names: list[str]
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
  """Yield (round, column -> its values) of every round that has lines."""
  names = ["round", *names]
  rest = {name: np.zeros(0) for name in names}
  for batch in file.iter_batches(columns=names):
    for name in names:
      more = batch.column(name).to_numpy(zero_copy_only=False)
      rest[name] = np.concatenate([rest[name], more])
    while rest["round"].size and rest["round"][0] != rest["round"][-1]:
      yield from _first_round(rest)
  if rest["round"].size:
    yield from _first_round(rest)


def _first_round(
  rest: dict[str, np.ndarray],
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
  """Yield the first round of the lines, and remove it from them."""
  round_ = rest["round"][0]
  count = np.searchsorted(rest["round"], round_, side="right")
  yield int(round_), {name: x[:count] for name, x in rest.items()}
  for name in rest:
    rest[name] = rest[name][count:]


def _percentiles(values: np.ndarray) -> np.ndarray:
  """Return the percentiles of the values that are not NaN; NaN without any."""
  known = values[~np.isnan(values)]
  if not known.size:
    return np.full(len(_QUANTILES), np.nan)
  return np.percentile(known, _QUANTILES)


def _kept(folder: Path, through: int) -> int:
  """Remove parts beyond `through`; return the last round before a gap."""
  last = 0
  for path, (first, end) in _parts(folder):
    if end > through:
      path.unlink()
    elif first == last + 1:
      last = end
  return last


def _name(first: int, last: int) -> str:
  return f"{first:010d}-{last:010d}.parquet"


def _parts(folder: Path) -> list[tuple[Path, tuple[int, int]]]:
  """Return the parts and their first and last rounds, in order."""
  found = []
  for path in sorted(folder.glob("[0-9]*-*.parquet")):
    first, _, last = path.stem.partition("-")
    found.append((path, (int(first), int(last))))
  return found
