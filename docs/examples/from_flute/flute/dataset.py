"""What `experiments/gestures/dataloaders/dataset.py` is in FLUTE.

Beside it is a `dataloader.py`, which cuts batches out of this. Here none of the
two is needed: `fedjax-sim data import` reads the same files.
"""

import json

import numpy as np
from core.dataset import BaseDataset  # FLUTE's


class Dataset(BaseDataset):
  """Examples of one user, or of all."""

  def __init__(self, data, user_idx=0, test_only=False, **kwargs):
    super().__init__()
    self.load_data(data)
    users = self.user_list if test_only else [self.user_list[user_idx]]
    of = lambda table: [row for u in users for row in table[u]]
    x = of({u: self.user_data[u]["x"] for u in users})
    self.x = np.asarray(x, np.float32).transpose(0, 2, 1)  # channels first
    self.y = np.asarray(of(self.user_data_label))

  def load_data(self, data):
    if isinstance(data, str):
      with open(data) as file:
        data = json.load(file)
    self.user_list, self.num_samples = data["users"], data["num_samples"]
    self.user_data = data["user_data"]
    self.user_data_label = data["user_data_label"]

  def __getitem__(self, i):
    return self.x[i], self.y[i]

  def __len__(self):
    return len(self.y)
