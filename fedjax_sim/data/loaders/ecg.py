"""Heartbeats of the MIT-BIH arrhythmia database; a client is a patient record.

Moody and Mark (2001, "The impact of the MIT-BIH arrhythmia database"), from
PhysioNet. A beat is 187 samples, scaled to a byte, in one of the five classes
of ANSI/AAMI EC57: N, S, V, F, Q.
"""

from __future__ import annotations

import os

import numpy as np

from fedjax_sim.data.array_files import read_fields
from fedjax_sim.data.batch_steps import from_bytes
from fedjax_sim.data.dataset import FederatedDataset
from fedjax_sim.data.federated import FederatedData
from fedjax_sim.data.location import find, locate
from fedjax_sim.data.partition import by_key
from fedjax_sim.data.splits import Clients, make_dataset

SAMPLES = 187  # of a beat
CLASSES = 5


def load_ecg(
  *,
  path: str | os.PathLike[str] | None = None,
  heldout_fraction: float = 0.2,
  unseen_clients: Clients = 0,
  min_examples: int = 1,
  seed: int = 0,
) -> FederatedDataset:
  """Load heartbeats; a client is a patient record, named by its number.

  Fields: x, (187, 1), uint8; y, (), int8.

  Args:
    path: the folder that holds `ecg_mitbih/`; relative to
      the working folder, or else to the folder that FEDJAX_SIM_DATA names.
    heldout_fraction: the fraction of each training client's examples that is
      held out, for the metrics `seen/...`.
    unseen_clients: clients that never train, for the metrics `unseen/...`: a
      number, a fraction below 1, or names.
    min_examples: records with fewer beats are left out.
    seed: of the splits.

  Raises:
    FileNotFoundError: the file is missing.
    TypeError, ValueError: it is damaged, or an option is refused.
  """
  file = find(locate(path) / "ecg_mitbih", "mitbih_beats_by_patient.npz")
  shapes = {"x": (None, SAMPLES), "y": (None,), "record": (None,)}
  arrays = read_fields(file, shapes)
  beats = (len(arrays["x"]),)
  arrays |= read_fields(file, {"y": beats, "record": beats})
  if arrays["x"].dtype != np.uint8:
    raise ValueError(
      f"{file}: dtype of x: expected uint8, found {arrays['x'].dtype}. Scale"
      " the samples to 0..255."
    )
  client_of, names = by_key(arrays["record"])
  examples = {"x": arrays["x"][..., np.newaxis], "y": arrays["y"]}
  return make_dataset(
    "ecg",
    FederatedData.from_assignment(examples, client_of, names=names),
    num_classes=CLASSES,
    heldout_fraction=heldout_fraction,
    unseen_clients=unseen_clients,
    min_examples=min_examples,
    seed=seed,
    prepare=from_bytes,
  )
