"""Heartbeats as Kaggle's "ECG heartbeat categorization data set" has them.

Kachuee et al. (2018, "ECG heartbeat classification: a deep transferable
representation", arXiv 1805.00794) cut the MIT-BIH arrhythmia database into
beats of 187 samples from 0 to 1 in five classes. A row of the two CSV files is
a beat and its class. They do not say whose it is.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from fedjax_sim.data.batch_steps import prepare_numbers
from fedjax_sim.data.dataset import FederatedDataset
from fedjax_sim.data.loaders.ecg import CLASSES, SAMPLES
from fedjax_sim.data.location import find, locate
from fedjax_sim.data.partition import deal
from fedjax_sim.data.splits import Clients, make_dataset


def load_ecg_kaggle(
  *,
  path: str | os.PathLike[str] | None = None,
  num_clients: int = 1000,
  partition: str = "stored_order",
  heldout_fraction: float = 0.0,
  unseen_clients: Clients = 0,
  min_examples: int = 1,
  seed: int = 0,
  **options: Any,
) -> FederatedDataset:
  """Load Kaggle's heartbeats: training beats partitioned, and its test set.

  The files are sorted by class, so that in `stored_order`, which is FLUTE's
  partition, most clients have beats of one class alone.

  Fields: x, (187, 1), float32; y, (), uint8.

  Args:
    path: the folder that holds `mitbih_train.csv` and `mitbih_test.csv`, itself
      or in `ecg_kaggle/`; relative to
      the working folder, or else to the folder that FEDJAX_SIM_DATA names.
    num_clients: how many clients, unseen ones included.
    partition: how examples are dealt to clients: a name of `PARTITIONERS`, or
      a reference.
    heldout_fraction: the fraction of each training client's examples that is
      held out, for the metrics `seen/...`.
    unseen_clients: clients that never train, for the metrics `unseen/...`: a
      number, a fraction below 1, or names.
    min_examples: of each client.
    seed: of partition and splits.
    **options: of the partitioner, such as `alpha`.

  Raises:
    FileNotFoundError: a file is missing.
    TypeError, ValueError: a file is damaged, or an option is refused.
  """
  root = locate(path)
  train, test = (
    _beats(find(root, file, f"ecg_kaggle/{file}"))
    for file in ("mitbih_train.csv", "mitbih_test.csv")
  )
  dealt = deal(
    train, partition, num_clients, seed, min_examples=min_examples, **options
  )
  return make_dataset(
    "ecg_kaggle",
    dealt,
    num_classes=CLASSES,
    test=test,
    heldout_fraction=heldout_fraction,
    unseen_clients=unseen_clients,
    min_examples=min_examples,
    seed=seed,
    prepare=prepare_numbers,
  )


def _beats(file: Path) -> dict[str, np.ndarray]:
  """Read beats and classes; a row is 187 samples and a class, all fractions."""
  if not file.stat().st_size:
    raise ValueError(f"{file} is empty; get it again.")
  try:
    rows = np.loadtxt(file, np.float32, delimiter=",", ndmin=2)
  except ValueError as error:
    what = str(error).split("; use")[0].rstrip(".")
    raise ValueError(
      f"{file}: {what}. Give {SAMPLES} samples and a class in every row, and no"
      " header, as Kaggle does."
    ) from error
  if rows.shape[1] != SAMPLES + 1:
    raise ValueError(
      f"{file}: a row has {rows.shape[1]} numbers; give {SAMPLES} samples and a"
      " class."
    )
  x, y = rows[:, :-1, np.newaxis], rows[:, -1]
  odd = np.flatnonzero(~np.isin(y, range(CLASSES)))
  if odd.size:
    raise ValueError(
      f"{file}: row {odd[0] + 1} is of class {y[odd[0]]:g}; give one from 0 to"
      f" {CLASSES - 1}."
    )
  odd = np.flatnonzero(~np.isfinite(x).all((1, 2)))
  if odd.size:
    raise ValueError(
      f"{file}: row {odd[0] + 1} holds a sample that is NaN or infinite; leave"
      " it out."
    )
  return {"x": x, "y": y.astype(np.uint8)}
