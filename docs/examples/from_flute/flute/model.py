"""What `experiments/gestures/model.py` is in FLUTE: a module of PyTorch."""

import torch
from core.model import BaseModel  # FLUTE's
from torch.nn import functional


class GestureNet(BaseModel):
  """A convolution over time, pooling, a linear layer."""

  def __init__(self, model_config):
    super().__init__()
    width = model_config["width"]
    self.conv = torch.nn.Conv1d(3, width, 5, padding=2)
    self.linear = torch.nn.Linear(12 * width, 6)

  def forward(self, x):  # (batch, 3, 24)
    x = functional.max_pool1d(torch.relu(self.conv(x)), 2)
    return self.linear(x.flatten(1))

  def loss(self, batch):
    return functional.cross_entropy(self(batch["x"]), batch["y"])

  def inference(self, batch):
    scores, y = self(batch["x"]), batch["y"]
    best = scores.topk(2).indices
    return {
      "output": scores,
      "acc": (best[:, 0] == y).float().mean().item(),
      "batch_size": len(y),
      "top_2": {
        "value": (best == y[:, None]).any(1).float().mean().item(),
        "higher_is_better": True,
      },
    }
