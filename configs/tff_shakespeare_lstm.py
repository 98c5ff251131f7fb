"""FedAvg with an LSTM on TFF's Shakespeare, in the setting of FLUTE and FedML.

fedjax-sim data import --format=tff_hdf5 --fields=x:snippets
  --text=tff_characters --train=shakespeare_train.h5
  --test=shakespeare_test.h5 --store=runs/tff_shakespeare
fedjax-sim run --config=configs/tff_shakespeare_lstm.py
  --workdir=runs/tff_shakespeare_lstm

715 roles. The data are not here, so no result either: FLUTE reports an accuracy
of 0.57 after 1,200 rounds. `shakespeare_lstm.py` has other roles, and a result.
"""

from ml_collections import ConfigDict

from fedjax_sim.config import default_config
from fedjax_sim.core import validate


def get_config(arg: str = "") -> ConfigDict:
  """Return the config; `arg` "smoke" is a run of two rounds."""
  config = default_config()
  config.data.name = "store"
  config.data.path = "runs/tff_shakespeare"
  config.model.name = "char_lstm"
  config.model.recurrent_bias = True  # torch's, 822,570 parameters
  config.client.learning_rate = 0.8
  config.client.batch_size = 4
  config.client.epochs = 1
  config.server.rounds = 1200
  config.server.clients_per_round = 10
  config.server.eval_every = 50
  config.runtime.checkpoint_every = 50
  if validate.one_of("argument", arg, ("", "smoke")) == "smoke":
    config.server.rounds = 2
    config.server.clients_per_round = 2
    config.model.units = (8,)
  return config
