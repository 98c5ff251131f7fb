"""DGA with LeNet on CIFAR-10, clients in the order of the files.

fedjax-sim run --config=configs/cifar10_lenet.py --workdir=runs/lenet

The setting of FLUTE's experiment classif_cnn: with all 50,000 images 1,000
clients have 50 each; 62,006 parameters. FLUTE's loss of a client is the sum
over batches, divided by the examples, with batches of 4 a fourth of the mean:
its beta of 1 is 0.25 here. Pixels are normalized; FLUTE's go from 0 to 255. Its
files: docs/data.md.
"""

from ml_collections import ConfigDict

from fedjax_sim.config import default_config
from fedjax_sim.core import validate


def get_config(arg: str = "") -> ConfigDict:
  """Return the config; `arg` "smoke" is a run of two rounds."""
  config = default_config()
  config.data.name = "cifar10"
  config.data.num_clients = 1000
  config.data.partition = "stored_order"
  config.model.name = "lenet"
  config.algorithm.name = "dga"
  config.algorithm.beta = 0.25
  config.client.learning_rate = 0.001
  config.client.momentum = 0.9
  config.client.batch_size = 4
  config.client.epochs = 1
  config.server.rounds = 2000
  config.server.clients_per_round = 10
  config.server.eval_every = 50
  config.server.best_metrics = ("test/accuracy",)
  config.runtime.checkpoint_every = 50
  if validate.one_of("argument", arg, ("", "smoke")) == "smoke":
    config.server.rounds = 2
    config.server.clients_per_round = 2
    config.runtime.lanes = 1
  return config
