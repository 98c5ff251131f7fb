"""Data of one's own: a loader that a config names.

fedjax-sim run --config=docs/own/data.py --workdir=runs/data
"""

import numpy as np
from ml_collections import ConfigDict

from fedjax_sim import FederatedData, FederatedDataset, make_dataset
from fedjax_sim.config import default_config


def rings(*, seed, num_clients=20, heldout_fraction=0.2) -> FederatedDataset:
  """Points in the plane; their class is which of three rings they lie in.

  Each client sees a sector of its own.
  """
  rng = np.random.default_rng(seed)
  clients = {}
  for i in range(num_clients):
    y = rng.integers(0, 3, 60)
    angle = 2 * np.pi * (i + rng.random(60)) / num_clients
    radius = y + rng.random(60)
    x = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    clients[f"sector {i}"] = {
      "x": x.astype(np.float32),
      "y": y.astype(np.int32),
    }
  return make_dataset(
    "rings",
    FederatedData.from_clients(clients),
    num_classes=3,
    heldout_fraction=heldout_fraction,
    seed=seed,
  )


def get_config(arg: str = "") -> ConfigDict:
  """Return the config; `arg` "smoke" is a run of two rounds."""
  config = default_config()
  config.data.name = f"{__file__}:rings"
  config.data.num_clients = 30
  config.model.name = "mlp"
  config.server.rounds = 2 if arg == "smoke" else 50
  return config
