"""The rows of some clients, where the table of all of them is elsewhere.

A table of client states has a row for every client, and stays on the devices.
Where it lies on the host's disk, a call of the compiled round is sent the rows
of the clients that take part in its rounds, and their ids, by which it finds
them. A row is what one client keeps: of the algorithm, and of the transforms.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sim.core import Array, PyTree
from fedjax_sim.engine.aggregation import PerClient, write_rows

NOBODY = np.iinfo(np.int32).max  # the id of a row that is nobody's


class ClientRows(NamedTuple):
  """Rows of some clients.

  Attributes:
    ids: shape=(count,), int32, increasing; then `NOBODY`, as often as rows are
      left over.
    rows: leaves (count, ...).
  """

  ids: Any
  rows: PyTree


class StoredRows(NamedTuple):
  """A table of client states whose rows lie in a file, as one value.

  What is written makes a new value, and leaves this one as it was. A checkpoint
  holds it as it is: the rows themselves stay in the file.

  Attributes:
    records: shape=(clients,), int64; where in the file each client's row is;
      -1: it still has the initial one.
    sums: shape=(clients,), uint32; CRC32 of each row in the file; else 0.
    initial: the row that all clients begin with.
  """

  records: Any
  sums: Any
  initial: PyTree


def read(table: PyTree, client: Array) -> PyTree:
  """Return the rows of clients, leaves (*client.shape, ...).

  Args:
    table: leaves (clients, ...), or `ClientRows` with all of these clients.
    client: ids, int32; of -1, for nobody, it is anybody's row.
  """
  if isinstance(table, ClientRows):
    rows, where = table.rows, _positions(table, client)
  else:
    rows, where = table, jnp.maximum(client, 0)
  return jax.tree.map(lambda x: x[where], rows)


def write(table: PyTree, client: Array, kept: PerClient) -> PyTree:
  """Return the table with new rows of the clients that are present.

  Args:
    table: as in `read`.
    client: shape=(devices, waves, lanes), int32; ids.
    kept: leaves (devices, waves, lanes, ...).

  Raises:
    TypeError: a row has another dtype or shape.
  """
  if isinstance(table, ClientRows):
    written = write_rows(table.rows, _positions(table, client), kept)
    return table._replace(rows=written)
  return write_rows(table, client, kept)


def _positions(table: ClientRows, client: Array) -> Array:
  # Of an id that is not there it may be the first beyond the rows.
  return jnp.minimum(
    jnp.searchsorted(table.ids, client), len(table.ids) - 1
  ).astype(jnp.int32)
