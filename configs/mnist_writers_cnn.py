"""FedAvg with the FEMNIST CNN on MNIST by writer, judged on other writers.

fedjax-sim run --config=configs/mnist_writers_cnn.py --workdir=runs/writers

Minutes on two CPU cores; after 60 rounds accuracy 0.9808 on the 297 writers
that never train. Its files: docs/data.md.
"""

from ml_collections import ConfigDict

from fedjax_sim.config import default_config
from fedjax_sim.core import validate


def get_config(arg: str = "") -> ConfigDict:
  """Return the config; `arg` "smoke" is a run of two rounds."""
  config = default_config()
  config.data.name = "mnist_writers"
  config.model.name = "femnist_cnn"
  config.client.learning_rate = 0.1
  config.client.batch_size = 20
  config.client.epochs = 2
  config.server.learning_rate = 0.5
  config.server.momentum = 0.9
  config.server.rounds = 60
  config.server.clients_per_round = 20
  config.server.eval_every = 10
  config.runtime.lanes = 1
  config.runtime.checkpoint_every = 20
  if validate.one_of("argument", arg, ("", "smoke")) == "smoke":
    config.server.rounds = 2
    config.server.clients_per_round = 2
  return config
