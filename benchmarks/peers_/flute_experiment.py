"""The experiment that FLUTE runs: its three classes, in FLUTE's own form.

FLUTE loads each from a file of its own, so `run_flute.py` links this one under
three names: `model.py`, `dataloaders/dataset.py`, `dataloaders/dataloader.py`.
"""

import torch
from core.dataloader import BaseDataLoader  # FLUTE's, as the next two
from core.dataset import BaseDataset
from core.model import BaseModel
from torch_models import build, loss_of, read


class PeerModel(BaseModel):
  """The model of the other peers that train with PyTorch."""

  def __init__(self, model_config):
    super().__init__()
    self.net = build(model_config["work"])

  def loss(self, batch):
    """Return the mean cross-entropy of a batch."""
    return loss_of(self.net(batch["x"]), batch["y"])

  @torch.no_grad()
  def inference(self, batch):
    """Return scores and their accuracy, which FLUTE's evaluation asks for."""
    scores, y = self.net(batch["x"]), batch["y"]
    right = (scores.argmax(-1) == y).float().mean().item()
    return {"output": scores, "acc": right, "batch_size": len(y)}


class Dataset(BaseDataset):
  """Examples of one client, or a list of all clients.

  Args:
    data: a file of clients, or one client in a dict, which FLUTE cuts out of
      the attributes of such a list.
  """

  def __init__(self, data, **kwargs):
    super().__init__()
    self.load_data(data)
    first = self.user_list[0]  # the only one, where examples are asked for
    self.x, self.y = self.user_data[first], self.user_data_label[first]

  def load_data(self, data):
    """Set the attributes that FLUTE reads."""
    if isinstance(data, str):
      x, y = read(data)
      users = [f"f_{i:05d}" for i in range(len(x))]
      data = {
        "users": users,
        "num_samples": [len(inputs) for inputs in x],
        "user_data": dict(zip(users, x, strict=True)),
        "user_data_label": dict(zip(users, y, strict=True)),
      }
    self.user_list, self.num_samples = data["users"], data["num_samples"]
    self.user_data = data["user_data"]
    self.user_data_label = data["user_data_label"]

  def __getitem__(self, i):
    return {"x": self.x[i], "y": self.y[i]}

  def __len__(self):
    return len(self.y)


class DataLoader(BaseDataLoader):
  """Batches of a client's examples, shuffled where it trains."""

  def __init__(self, mode, data, args, **kwargs):
    super().__init__(
      Dataset(data), batch_size=args["batch_size"], shuffle=mode == "train"
    )
