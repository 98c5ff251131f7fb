"""Client states on the host's disk, of which a round reads what it needs.

The file only grows, or takes up again what nobody needs: a record is not
written again while a table that is alive, or one in a kept checkpoint, says
that a client's row is there. So every table is a value that stays as it is, a
run can be killed at any moment, and older checkpoints stay whole. In memory is
a number and a CRC32 for each client, 12 bytes.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Collection
from concurrent import futures
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from fedjax_sim import distributed
from fedjax_sim.core import PyTree
from fedjax_sim.engine.client_rows import NOBODY, ClientRows, StoredRows
from fedjax_sim.simulation.row_file import (
  BUFFER,
  Layout,
  RowFile,
  RowsError,
  sums_of,
)

# Records are looked through for those that nobody needs after so many were
# written, or an eighth of the file; it takes time in proportion to the clients.
_FEW, _OF_FILE, _OF_CLIENTS = 256, 8, 256
_THREADS = 4  # that read, write and compare sums
_EVALUATED = 2**25  # bytes of rows that are evaluated at once


class RowStore:
  """The rows of a run's clients, in a file.

  Args:
    shapes: of a row; leaves with a shape and a dtype.
    num_clients: how many clients there are.
    folder: of the file; None for a temporary one. It is opened when the first
      row is read or written.

  Attributes:
    row_bytes: of a row.
    num_clients: how many clients there are.
  """

  def __init__(self, shapes: PyTree, num_clients: int, folder: Path | None):
    self._layout = Layout(shapes)
    self._shapes = shapes
    self._folder = folder
    self.row_bytes = self._layout.nbytes
    self.num_clients = num_clients
    self._opened: RowFile | None = None
    self._count = 0  # records of the file
    self._free = np.zeros(0, np.int64)  # increasing
    self._since: int | None = None  # written since they were looked for
    self._live: dict[int, weakref.ref[np.ndarray]] = {}
    self._pinned: dict[int, np.ndarray] = {}  # round -> bits of its records
    self._lock = threading.Lock()  # checkpoints are committed by a thread

  @property
  def host_shapes(self) -> StoredRows:
    """Shapes and dtypes of a table."""
    each = lambda dtype: jax.ShapeDtypeStruct((self.num_clients,), dtype)
    return StoredRows(each(np.int64), each(np.uint32), self._shapes)

  def call_shapes(self, count: int) -> ClientRows:
    """Return shapes and dtypes of the rows that a call is sent."""
    many = lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype)
    ids = jax.ShapeDtypeStruct((count,), np.int32)
    return ClientRows(ids, jax.tree.map(many, self._shapes))

  def most_rows(self, clients: int, devices: int) -> int:
    """Return how many rows a call is sent, as many on every device.

    Args:
      clients: that it trains at most, each as often as it takes part.
      devices: how many there are.
    """
    return -(-min(clients, self.num_clients) // devices) * devices

  def first(self, initial: PyTree) -> StoredRows:
    """Return the table before the first round.

    Args:
      initial: the row that all clients begin with, numpy.
    """
    count = self.num_clients
    records = np.full(count, -1, np.int64)
    return self._kept(StoredRows(records, np.zeros(count, np.uint32), initial))

  def adopt(self, table: StoredRows) -> StoredRows:
    """Return a table of a checkpoint, whose rows are in the file.

    Raises:
      RowsError: the file is missing, or shorter than it was.
    """
    last = int(table.records.max(initial=-1))
    if last >= 0 and last >= self._file.count():
      raise RowsError(
        f"{self._file.name} lacks rows that a checkpoint counts on; restore the"
        " file from a copy, or begin anew in another --workdir."
      )
    initial = jax.tree.map(np.asarray, table.initial)
    return self._kept(table._replace(initial=initial))

  def gather(
    self, table: StoredRows, clients: np.ndarray, count: int
  ) -> ClientRows:
    """Return the rows of clients, numpy, by increasing id.

    Args:
      table: the table.
      clients: ids; those below 0 are nobody's.
      count: how many rows to return; the last ones may be nobody's.

    Raises:
      RowsError: a row is damaged.
    """
    ids = np.unique(clients[clients >= 0])
    assert len(ids) <= count, (len(ids), count)
    rows = self._layout.blank(count)
    _read(self._layout, self._file, table, ids, rows)
    padded = np.full(count, NOBODY, np.int32)
    padded[: len(ids)] = ids
    return ClientRows(padded, rows)

  def scatter(self, table: StoredRows, some: ClientRows) -> StoredRows:
    """Return the table with other rows of some clients.

    Args:
      table: the table.
      some: their rows, numpy, in the order in which `gather` returned them.

    Raises:
      OSError: the disk is full; the table is as it was.
    """
    ids = some.ids[some.ids != NOBODY]
    rows = lambda part: jax.tree.map(lambda x: x[part], some.rows)
    return self._written(table, ids, rows)

  def imported(
    self,
    folder: Path,
    table: StoredRows,
    change: Callable[[PyTree, int], PyTree] = lambda rows, count: rows,
  ) -> StoredRows:
    """Return a table whose rows are copied here out of another run's file.

    Args:
      folder: of the other file; a run may write to it at the same time.
      table: of a checkpoint of the other run.
      change: leaves (count, ...) of the other run's rows, count -> the same of
        rows here.

    Raises:
      OSError: it is missing, or the disk is full.
      RowsError: a row of it is damaged, or was given up by its run.
    """
    layout = Layout(table.initial)
    one = jax.tree.map(lambda x: np.asarray(x)[None], table.initial)
    new = self.first(jax.tree.map(lambda x: x[0], change(one, 1)))
    ids = np.flatnonzero(table.records >= 0).astype(np.int32)
    if not len(ids):
      return new
    source = RowFile(folder, layout.nbytes, write=False)

    def rows(part: slice) -> PyTree:
      count = part.stop - part.start
      found = layout.blank(count)
      _read(layout, source, table, ids[part], found)
      return change(found, count)

    with contextlib.closing(source):
      return self._written(new, ids, rows)

  def pin(self, round_: int, table: StoredRows) -> None:
    """Keep what a table refers to for as long as its checkpoint is kept.

    Args:
      round_: of the checkpoint.
      table: its table.
    """
    used = np.zeros(int(table.records.max(initial=-1)) + 1, bool)
    bits = np.packbits(_marked(used, table.records))
    with self._lock:
      self._pinned[round_] = bits

  def unpin(self, committed: int, kept: Collection[int]) -> None:
    """Give up what only checkpoints that are gone refer to.

    Args:
      committed: round of the newest checkpoint. That of a later one may be on
        its way.
      kept: rounds of the checkpoints that are there.
    """
    with self._lock:
      for round_ in [*self._pinned]:
        if round_ <= committed and round_ not in kept:
          del self._pinned[round_]

  def sync(self) -> None:
    """Return when all rows that were written are on the disk.

    The file is there then, even if no row was written: it tells whoever opens
    the workdir where its client states are.
    """
    self._file.sync()

  def close(self) -> None:
    """Close the file, until it is needed again."""
    if self._opened is not None:
      self._opened.close()
      self._opened = None

  @property
  def _file(self) -> RowFile:
    if self._opened is None:
      self._opened = RowFile(self._folder, max(1, self.row_bytes))
      self._count = self._opened.count()
      weakref.finalize(self, self._opened.close)
    return self._opened

  def _kept(self, table: StoredRows) -> StoredRows:
    """Return the table; what it refers to stays for as long as it lives."""
    for x in (table.records, table.sums):
      x.flags.writeable = False
    key = id(table.records)
    forget = lambda _, live=self._live, key=key: live.pop(key, None)
    self._live[key] = weakref.ref(table.records, forget)
    return table

  def _take(self, count: int) -> np.ndarray:
    """Return numbers of records that nobody needs, increasing, int64."""
    _ = self._file
    often = max(_FEW, self._count // _OF_FILE, self.num_clients // _OF_CLIENTS)
    looked = self._since is not None and self._since < often
    if len(self._free) < count and not looked:
      self._free, self._since = self._unused(), 0
    taken, self._free = self._free[:count], self._free[count:]
    more = self._count + np.arange(count - len(taken), dtype=np.int64)
    self._count += len(more)
    self._since = (self._since or 0) + count
    return np.concatenate([taken, more])

  def _unused(self) -> np.ndarray:
    used = np.zeros(self._count, bool)
    for reference in [*self._live.values()]:
      if (records := reference()) is not None:
        _marked(used, records)
    with self._lock:
      for bits in self._pinned.values():
        pinned = np.unpackbits(bits)[: len(used)].view(bool)
        used[: len(pinned)] |= pinned
    return np.flatnonzero(~used)

  def _written(
    self,
    table: StoredRows,
    ids: np.ndarray,
    rows: Callable[[slice], PyTree],
  ) -> StoredRows:
    """Return the table with other rows of clients, which are got by parts."""
    records, sums = table.records.copy(), table.sums.copy()
    taken = self._take(len(ids))

    def write(part: slice) -> None:
      content = self._layout.pack(rows(part))
      self._file.write(taken[part], content)
      sums[ids[part]] = sums_of(content)

    _each_part(write, len(ids), self._layout)
    records[ids] = taken
    return self._kept(table._replace(records=records, sums=sums))


def read_row(folder: Path, table: StoredRows, client: int) -> PyTree:
  """Return the row of one client out of the file of a run, numpy.

  Args:
    folder: of the file; its run may write to it at the same time.
    table: of a checkpoint of the run.
    client: the client.

  Raises:
    OSError: the file is missing.
    RowsError: the row is damaged, or was given up by a run that went on.
  """
  if table.records[client] < 0:
    return jax.tree.map(np.asarray, table.initial)
  layout = Layout(table.initial)
  into = layout.blank(1)
  file = RowFile(folder, layout.nbytes, write=False)
  with contextlib.closing(file):
    _read(layout, file, table, np.array([client]), into)
  return jax.tree.map(lambda x: x[0], into)


class OwnRows:
  """Reads what an algorithm keeps of clients, for `EvaluationSet`.

  Args:
    store: the rows, with what transforms keep.
    mesh: the devices, each of which gets all that are read.
  """

  def __init__(self, store: RowStore, mesh: Mesh):
    self._store, self._mesh = store, mesh
    self.most = max(1, _EVALUATED // max(1, store.row_bytes))

  def __call__(
    self, table: StoredRows, clients: np.ndarray, count: int
  ) -> ClientRows:
    """Return rows on the devices, as `ReadRows` says."""
    ids, (own, _) = self._store.gather(table, clients, count)
    placed: ClientRows = distributed.put(ClientRows(ids, own), self._mesh, P())
    return placed


def _each_part(
  work: Callable[[slice], None], count: int, layout: Layout
) -> None:
  """Work on slices of so many rows, each of which fits a buffer, in threads."""
  most = max(1, BUFFER // max(1, layout.nbytes))
  parts = [slice(i, min(i + most, count)) for i in range(0, count, most)]
  if len(parts) <= 1:
    for part in parts:
      work(part)
    return
  with futures.ThreadPoolExecutor(_THREADS, "client states") as pool:
    for _ in pool.map(work, parts):
      pass


def _marked(used: np.ndarray, records: np.ndarray) -> np.ndarray:
  """Return the array, True where there are records."""
  used[records[records >= 0]] = True
  return used


def _read(
  layout: Layout,
  file: RowFile,
  table: StoredRows,
  ids: np.ndarray,
  into: PyTree,
) -> None:
  """Read the rows of clients, verified.

  Args:
    layout: of the rows.
    file: where they are.
    table: says where in it.
    ids: of the clients.
    into: leaves (count, ...), of which the first rows are written to.
  """
  records = table.records[ids]
  new = np.flatnonzero(records < 0)
  for leaf, one in zip(
    jax.tree.leaves(into), jax.tree.leaves(table.initial), strict=True
  ):
    leaf[new] = one
  order = np.argsort(records, kind="stable")[len(new) :]  # as on the disk

  def read(part: slice) -> None:
    where = order[part]
    content = file.read(records[where])
    wrong = np.flatnonzero(sums_of(content) != table.sums[ids[where]])
    if len(wrong):
      raise RowsError(
        f"{file.name}: the row of client {ids[where[wrong[0]]]} is not the one"
        " that was written there (its CRC32 differs); restore the file from a"
        " copy, or begin anew in another --workdir."
      )
    layout.unpack(content, into, where)

  _each_part(read, len(order), layout)
