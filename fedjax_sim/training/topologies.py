"""Who exchanges models with whom, where there is no server: mixing matrices.

A mixing matrix W says how much of node j's model node i takes: W_ij > 0 where
they are neighbors, and on the diagonal. It is symmetric and its rows sum to 1,
so that mixing keeps the nodes' mean, and where the graph is connected repeated
mixing takes all nodes to it: the distance to the mean falls at least by the
second largest modulus of the eigenvalues in every step (Boyd et al. 2004,
"Fastest mixing Markov chain on a graph").
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fedjax_sim.core import optional, validate

_TOLERANCE = 1e-6  # of sums, and of what counts as no edge


def ring(nodes: int) -> np.ndarray:
  """Return the adjacency of a cycle, shape=(nodes, nodes), bool."""
  one = np.roll(np.eye(nodes, dtype=bool), 1, axis=1)
  return one | one.T


def complete(nodes: int) -> np.ndarray:
  """Return the adjacency of all pairs, shape=(nodes, nodes), bool."""
  return np.ones((nodes, nodes), bool)


def torus(nodes: int) -> np.ndarray:
  """Return the adjacency of a grid whose borders meet, as square as it can be.

  Raises:
    ValueError: the number of nodes is a prime, so that there is no grid.
  """
  rows = next(r for r in range(int(nodes**0.5), 0, -1) if nodes % r == 0)
  if rows == 1:
    raise ValueError(
      f"topology='torus': {nodes} nodes make no grid but a ring; take another"
      " number of clients, or topology='ring'."
    )
  columns = nodes // rows
  across = np.kron(np.eye(rows, dtype=bool), ring(columns))
  down = np.kron(ring(rows), np.eye(columns, dtype=bool))
  return across | down


def random_regular(nodes: int, degree: int, seed: int) -> np.ndarray:
  """Return the adjacency of a random graph where all have `degree` neighbors.

  Raises:
    ValueError: there is no such graph.
    ModuleNotFoundError: networkx, which draws it, is not installed.
  """
  validate.integer("degree", degree, ge=1)
  if degree >= nodes or nodes * degree % 2:
    raise ValueError(
      f"degree={degree}: no graph of {nodes} nodes has as many neighbors"
      " everywhere; give an even number, below the number of clients."
    )
  networkx = optional.library(
    "networkx", "topology", "topology='random_regular'"
  )
  graph = networkx.random_regular_graph(degree, nodes, seed=seed)
  return np.asarray(networkx.to_numpy_array(graph, range(nodes)) > 0)


def metropolis(adjacency: np.ndarray) -> np.ndarray:
  """Return Metropolis-Hastings weights on a graph, shape=(nodes, nodes).

  W_ij = 1 / (1 + max(d_i, d_j)) for neighbors of degrees d_i and d_j; the
  diagonal is the rest to 1 (Xiao and Boyd 2004, "Fast linear iterations for
  distributed averaging").

  Args:
    adjacency: shape=(nodes, nodes), bool; symmetric, whatever its diagonal is.
  """
  edges = adjacency & ~np.eye(len(adjacency), dtype=bool)
  degrees = edges.sum(1)
  weights = edges / (1.0 + np.maximum(degrees[:, None], degrees[None]))
  return weights + np.diag(1.0 - weights.sum(1))


def read(path: str | os.PathLike[str], nodes: int) -> np.ndarray:
  """Return the mixing matrix of a file, shape=(nodes, nodes), float64.

  Args:
    path: a matrix as `.npy`, or as text that `numpy.loadtxt` reads, `.csv` with
      commas; or an edge list `.edges`, two node numbers from 0 on a line, which
      gets Metropolis weights.
    nodes: how many there are.

  Raises:
    ValueError: it is no such matrix.
    OSError: there is no such file, or it cannot be read.
  """
  path = Path(path)
  name = f"topology={str(path)!r}"
  if not path.is_file():
    raise FileNotFoundError(
      f"{name}: there is no such file; correct the path, which begins at the"
      " working folder."
    )
  if path.suffix == ".edges":
    want = f"an edge is two numbers from 0 to {nodes - 1}, those of clients"
    pairs = _loaded(path, f"{name}: {want}; correct the file", int)
    if pairs.shape[1] != 2 or pairs.min() < 0 or pairs.max() >= nodes:
      raise ValueError(f"{name}: {want}; correct the file.")
    edges = np.zeros((nodes, nodes), bool)
    edges[pairs[:, 0], pairs[:, 1]] = edges[pairs[:, 1], pairs[:, 0]] = True
    return metropolis(edges)
  between = "commas" if path.suffix == ".csv" else "spaces"
  form = "an array of numbers, as numpy.save writes it"
  if path.suffix != ".npy":
    form = f"a row on each line, numbers with {between} between them"
  return _loaded(path, f"{name} holds no matrix; give {form}", float)


def _loaded(path: Path, message: str, dtype: type) -> np.ndarray:
  """Return the numbers of a file, at least two-dimensional, of this dtype.

  Raises:
    ValueError: it holds something else; begins with the message.
    OSError: there is no such file, or it cannot be read.
  """
  try:
    if path.suffix == ".npy":
      read = np.load(path, allow_pickle=False)
      return read.astype(dtype, casting="same_kind")
    with warnings.catch_warnings(action="ignore"):  # of an empty file
      comma = "," if path.suffix == ".csv" else None
      read = np.loadtxt(path, dtype=dtype, delimiter=comma, ndmin=2)
  except (TypeError, ValueError, EOFError) as error:
    why = str(error).rstrip(".")  # NumPy's about pickles is misleading here
    why = "" if path.suffix == ".npy" else f" ({why})"
    raise ValueError(f"{message}{why}.") from error
  if not read.size:
    raise ValueError(f"{message} (it is empty).")
  return read


GRAPHS: dict[str, Callable[[int], np.ndarray]] = {
  "complete": complete,
  "ring": ring,
  "torus": torus,
}


def mixing_matrix(
  topology: str, nodes: int, *, degree: int = 4, seed: int = 0
) -> np.ndarray:
  """Return a checked mixing matrix, shape=(nodes, nodes), float64.

  Example:
    >>> mixing_matrix("ring", 4)[0].round(2).tolist()
    [0.33, 0.33, 0.0, 0.33]

  Args:
    topology: `ring`, `torus`, `complete`, `random_regular` or the path of a
      file, see `read`.
    nodes: number of clients.
    degree: number of neighbors in `random_regular`.
    seed: draws `random_regular`.

  Raises:
    ValueError: it is not symmetric, its rows do not sum to 1, or some nodes
      never hear of others.
    OSError: there is no such file.
  """
  if topology == "random_regular":
    weights = metropolis(random_regular(nodes, degree, seed))
  elif topology in GRAPHS:
    weights = metropolis(GRAPHS[topology](nodes))
  elif os.sep in topology or Path(topology).suffix:
    weights = read(topology, nodes)
  else:
    known = sorted([*GRAPHS, "random_regular"])
    raise validate.UnknownNameError(
      f"topology={topology!r} is unknown; give {', '.join(known)}, or the path"
      " of a file that ends in .edges, .npy, .csv or .txt."
    )
  check(weights, nodes, topology)
  return weights


def check(weights: np.ndarray, nodes: int, topology: str) -> None:
  """Refuse a matrix whose repeated mixing does not lead to the mean.

  Args:
    weights: the matrix.
    nodes: number of clients.
    topology: how messages name it.

  Raises:
    ValueError: says what is wrong with it.
  """
  name = f"topology={topology!r}"
  if weights.shape != (nodes, nodes):
    raise ValueError(
      f"{name}: its shape is {weights.shape}, and there are {nodes} clients;"
      f" give ({nodes}, {nodes})."
    )
  if not np.isfinite(weights).all() or weights.min() < -_TOLERANCE:
    fine = np.isfinite(weights) & (weights >= -_TOLERANCE)
    i, j = np.unravel_index(np.argmin(fine), weights.shape)
    raise ValueError(
      f"{name}: row {i} has {weights[i, j]:.6g} in column {j}; let weights be"
      " finite and >= 0."
    )
  worst = int(np.argmax(np.abs(weights.sum(1) - 1)))
  if abs(weights[worst].sum() - 1) > _TOLERANCE:
    raise ValueError(
      f"{name}: row {worst} sums to {weights[worst].sum():.6g}; let all rows"
      " sum to 1, so that mixing takes means."
    )
  if np.abs(weights - weights.T).max() > _TOLERANCE:
    i, j = np.unravel_index(np.abs(weights - weights.T).argmax(), weights.shape)
    raise ValueError(
      f"{name}: the weights of {i} and {j} for each other differ,"
      f" {weights[i, j]:.6g} and {weights[j, i]:.6g}; let the matrix be"
      " symmetric, so that mixing keeps the mean."
    )
  if nodes > 1 and spectral_gap(weights) < _TOLERANCE:
    raise ValueError(
      f"{name}: its spectral gap is 0: some clients never hear of others, or"
      " mixing swings forever; connect them, and let each keep a part of its"
      " own model."
    )


def spectral_gap(weights: np.ndarray) -> float:
  """Return 1 - the second largest modulus of a symmetric matrix's eigenvalues.

  Args:
    weights: shape=(nodes, nodes).
  """
  moduli = np.sort(np.abs(np.linalg.eigvalsh(weights)))
  return float(1 - moduli[-2]) if len(moduli) > 1 else 1.0


def mean_degree(weights: np.ndarray) -> float:
  """Return how many neighbors nodes have, on average."""
  edges = np.abs(weights) > _TOLERANCE
  return float((edges.sum() - np.diag(edges).sum()) / len(weights))
