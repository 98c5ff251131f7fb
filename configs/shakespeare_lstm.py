"""FedAvg with an LSTM on Shakespeare's roles: the next character.

fedjax-sim run --config=configs/shakespeare_lstm.py --workdir=runs/shakespeare

A quarter of an hour on two busy CPU cores; after 100 rounds a held-out loss of
1.69 nats a character (letters by their frequency alone: 3.16) and accuracy
0.490. Its files: docs/data.md.
"""

from ml_collections import ConfigDict

from fedjax_sim.config import default_config
from fedjax_sim.core import validate


def get_config(arg: str = "") -> ConfigDict:
  """Return the config; `arg` "smoke" is a run of two rounds."""
  config = default_config()
  config.data.name = "shakespeare"
  config.data.heldout_fraction = 0.2
  config.model.name = "char_lstm"
  config.client.learning_rate = 1.0
  config.client.batch_size = 4
  config.client.epochs = 1
  config.server.rounds = 100
  config.server.clients_per_round = 10
  config.server.eval_every = 25
  config.runtime.lanes = 1
  config.runtime.checkpoint_every = 25
  if validate.one_of("argument", arg, ("", "smoke")) == "smoke":
    config.server.rounds = 2
    config.server.clients_per_round = 2
    config.model.units = (8,)
  return config
