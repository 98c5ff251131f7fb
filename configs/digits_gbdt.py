"""Boosted trees on handwritten digits of 100 clients: which digit, as a number.

fedjax-sim run --config=configs/digits_gbdt.py --workdir=runs/trees

Seconds on two CPU cores: thirty trees, a level a round. The loss is half the
squared error (docs/analytics.md).
"""

from ml_collections import ConfigDict

from fedjax_sim.config import default_config
from fedjax_sim.core import validate


def get_config(arg: str = "") -> ConfigDict:
  """Return the config; `arg` "smoke" is a run of two rounds."""
  config = default_config()
  config.data.name = "digits"
  config.data.num_clients = 100
  config.data.alpha = 1.0
  config.model.name = "gbdt"
  config.model.trees = 30
  config.model.depth = 4
  config.model.objective = "squared"
  config.model.low = 0.0  # of a pixel
  config.model.high = 1.0625  # so that each of its 17 levels is a cell
  config.algorithm.name = "gbdt"
  config.algorithm.bins = 17
  config.client.batch_size = 64
  config.server.rounds = config.model.trees * config.model.depth
  config.server.eval_every = 40
  config.server.clients_per_round = 100
  config.runtime.lanes = 1
  if validate.one_of("argument", arg, ("", "smoke")) == "smoke":
    config.server.rounds = 2
  return config
