"""APFL with ResNet-50 or VGG-16 on CIFAR-10: each client has its own model.

fedjax-sim run --config=configs/cifar10_personal.py --workdir=runs/personal

With `:vgg` after the file's name VGG-16 with batch norm instead of ResNet-50
with a 7 x 7 stem, 23,528,522 parameters. The setting of FLUTE's experiment cv,
whose personalization does not start in its last version: 100 clients, a
concentration of 1 for each of ten classes, a border of 4 pixels, Adam on the
server. FLUTE's rate of clients is 1.0. Every client keeps a model: of ResNet-50
100 take 9.4 GB. Its files: docs/data.md.
"""

from ml_collections import ConfigDict

from fedjax_sim.config import default_config
from fedjax_sim.core import validate


def get_config(arg: str = "") -> ConfigDict:
  """Return the config.

  Args:
    arg: "vgg" is VGG-16; "smoke" is a run of two rounds of a narrow VGG-11,
      which compiles sooner than a ResNet.
  """
  validate.one_of("argument", arg, ("", "smoke", "vgg"))
  config = default_config()
  config.data.name = "cifar10"
  config.data.num_clients = 100
  config.data.alpha = 10.0
  config.data.min_examples = 10
  config.data.heldout_fraction = 0.2
  config.data.pad = (40, 40)
  if arg:
    config.model.name = "vgg"
    config.model.depth = 16
  else:
    config.model.name = "resnet"
    config.model.depth = 50
    config.model.stem = "7x7"
  config.model.norm = "batch"
  config.algorithm.name = "apfl"
  config.algorithm.alpha = 0.75
  config.client.learning_rate = 0.1
  config.client.batch_size = 128
  config.client.epochs = 1
  config.server.optimizer = "adam"
  config.server.learning_rate = 0.001
  config.server.rounds = 1000
  config.server.clients_per_round = 10
  config.server.eval_every = 5
  config.runtime.checkpoint_every = 50
  if arg == "smoke":
    config.data.num_clients = 20
    config.model.depth = 11
    config.model.width = 2
    config.client.batch_size = 16
    config.client.max_examples = 32
    config.server.rounds = 2
    config.server.clients_per_round = 2
    config.runtime.lanes = 1
  return config
