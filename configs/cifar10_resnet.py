"""FedAvg with ResNet-18, group norm, on CIFAR-10.

fedjax-sim run --config=configs/cifar10_resnet.py --workdir=runs/cifar10

Minutes on two CPU cores, with 4,000 images and a narrow network; test accuracy
0.152 after 10 rounds, which was measured no further. Its files: docs/data.md.
"""

from ml_collections import ConfigDict

from fedjax_sim.config import default_config
from fedjax_sim.core import validate


def get_config(arg: str = "") -> ConfigDict:
  """Return the config; `arg` "smoke" is a run of two rounds."""
  config = default_config()
  config.data.name = "cifar10"
  config.data.num_clients = 20
  config.data.alpha = 1.0
  config.model.name = "resnet"
  config.model.width = 16  # 64 is the paper's, sixteen times the work
  config.client.learning_rate = 0.05
  config.client.batch_size = 20
  config.client.epochs = 1
  config.server.rounds = 40
  config.server.clients_per_round = 8
  config.server.eval_every = 10
  config.runtime.lanes = 1
  config.runtime.checkpoint_every = 10
  if validate.one_of("argument", arg, ("", "smoke")) == "smoke":
    config.server.rounds = 2
    config.server.clients_per_round = 2
    config.model.width = 4
  return config
