"""FedProx with a GRU on sentences of Reddit's users: every word.

FLUTE's nlg_gru: fedjax-sim data import --format=leaf_json --train=train.json
  --test=test.json --text=words --vocabulary=reddit.vocab --unmarked
  --case-backoff --sequence-length=25 --min-characters=3 --store=runs/reddit
fedjax-sim run --config=configs/reddit_gru.py --workdir=runs/reddit_gru

Its data are not here, so no result either.
"""

from ml_collections import ConfigDict

from fedjax_sim.config import default_config
from fedjax_sim.core import validate


def get_config(arg: str = "") -> ConfigDict:
  """Return the config; `arg` "smoke" is a run of two rounds."""
  config = default_config()
  config.data.name = "store"
  config.data.path = "runs/reddit"
  config.model.name = "word_gru"
  config.algorithm.name = "fedprox"
  config.algorithm.mu = 0.001
  config.algorithm.weighting = "tokens"
  config.client.learning_rate = 1.0
  config.client.batch_size = 64
  config.client.epochs = 1
  config.client.max_grad_norm = 20.0
  config.server.optimizer = "lamb"
  config.server.learning_rate = 0.1
  config.server.weight_decay = 0.005
  config.server.rounds = 11
  config.server.clients_per_round = 10
  config.server.eval_every = 5
  config.runtime.lanes = 1
  if validate.one_of("argument", arg, ("", "smoke")) == "smoke":
    config.server.rounds = 2
    config.server.clients_per_round = 2
    config.model.embedding = 4
    config.model.units = 8
  return config
