"""A user's own federated data from one `.npz` file, without unpickling.

It holds `x`, (examples, ...), `y`, (examples, ...), and `client`, (examples,),
an integer or string that names each example's client; and, both or neither,
the central test set `test_x`, `test_y`:

  np.savez("mine.npz", x=x, y=y, client=user_of_each_example)
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from fedjax_sim.core import validate
from fedjax_sim.data.array_files import read_npz
from fedjax_sim.data.dataset import FederatedDataset
from fedjax_sim.data.federated import FederatedData
from fedjax_sim.data.location import locate
from fedjax_sim.data.partition import by_key
from fedjax_sim.data.splits import Clients, make_dataset

_REQUIRED = ("x", "y", "client")
_TEST = ("test_x", "test_y")


def load_npz(
  *,
  path: str | os.PathLike[str] | None = None,
  num_classes: int | None = None,
  heldout_fraction: float = 0.0,
  unseen_clients: Clients = 0,
  min_examples: int = 1,
  seed: int = 0,
) -> FederatedDataset:
  """Load clients from an `.npz` file, named and sorted by its `client`.

  Args:
    path: the file; relative to
      the working folder, or else to the folder that FEDJAX_SIM_DATA names.
    num_classes: None: the largest integer label + 1, or 0 if `y` is no
      integer; 0: `y` is no class.
    heldout_fraction: the fraction of each training client's examples that is
      held out, for the metrics `seen/...`.
    unseen_clients: clients that never train, for the metrics `unseen/...`: a
      number, a fraction below 1, or names.
    min_examples: clients with fewer are left out.
    seed: of the splits.

  Raises:
    FileNotFoundError: there is no such file.
    TypeError, ValueError: it is damaged, lacks arrays or holds wrong ones.
  """
  file = locate(path)
  arrays = read_npz(file)
  present = ", ".join(sorted(arrays)) or "nothing"
  needed = _REQUIRED + (_TEST if set(_TEST) & set(arrays) else ())
  missing = [name for name in needed if name not in arrays]
  if missing:
    raise ValueError(
      f"{file} lacks {', '.join(missing)}; it holds {present}. Write it with "
      "np.savez(file, x=..., y=..., client=...)."
    )
  for name in arrays:
    validate.one_of(f"{file}: array", name, _REQUIRED + _TEST)
  examples = {"x": arrays["x"], "y": arrays["y"]}
  if not validate.arrays(str(file), examples):
    raise ValueError(f"{file}: x has no examples; give at least one.")
  _check_labels(file, arrays["y"])
  test = None
  if "test_x" in arrays:
    test = {"x": arrays["test_x"], "y": arrays["test_y"]}
  if num_classes is None:
    num_classes = _count_classes(arrays["y"], arrays.get("test_y"))
  client_of, names = by_key(arrays["client"])
  return make_dataset(
    file.stem,
    FederatedData.from_assignment(examples, client_of, names=names),
    num_classes=num_classes,
    test=test,
    heldout_fraction=heldout_fraction,
    unseen_clients=unseen_clients,
    min_examples=min_examples,
    seed=seed,
  )


def _count_classes(*labels: np.ndarray | None) -> int:
  given = [array for array in labels if array is not None and array.size]
  if any(array.dtype.kind not in "iu" for array in given):
    return 0
  return 1 + max((int(array.max()) for array in given), default=-1)


def _check_labels(file: Path, y: np.ndarray) -> None:
  """Refuse labels as columns: one number a row, or one-hot rows."""
  if y.ndim != 2 or y.dtype.kind not in "iub":
    return
  if y.shape[1] == 1:
    raise ValueError(f"{file}: y has shape {y.shape}; write y=y[:, 0].")
  if y.min() >= 0 and y.max() == 1 and (y.sum(axis=1) == 1).all():
    raise ValueError(
      f"{file}: y, of shape {y.shape}, is one-hot; write y=y.argmax(axis=1)."
    )
