"""Texts of ids, as a data set that configs of tests name."""

import numpy as np

from fedjax_sim.data import FederatedData, FederatedDataset, make_dataset

TOKENS, TIME = 12, 6


def token_data(*, seed: int = 0, num_clients: int = 100) -> FederatedDataset:
  """Return clients with 3 texts each: ids that count up, and padding."""
  rng = np.random.default_rng(seed)
  clients = {}
  for i in range(num_clients):
    first = rng.integers(1, TOKENS, (3, 1))
    ids = (first + np.arange(TIME + 1)) % (TOKENS - 1) + 1
    ids[0, TIME - 2 :] = 0
    x, y = ids[:, :-1].astype(np.int32), ids[:, 1:].astype(np.int32)
    clients[f"writer {i}"] = {"x": x, "y": y}
  return make_dataset(
    "tokens",
    FederatedData.from_clients(clients),
    num_classes=TOKENS,
    heldout_fraction=0.3,
    seed=seed,
  )
