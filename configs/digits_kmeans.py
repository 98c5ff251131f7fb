"""k-means on handwritten digits of 100 clients: ten centroids, no labels.

fedjax-sim run --config=configs/digits_kmeans.py --workdir=runs/kmeans

Seconds on two CPU cores. With differential privacy for clients
(docs/privacy_kmeans.md):

fedjax-sim run --config=configs/digits_kmeans.py:private --workdir=runs/dp
"""

from ml_collections import ConfigDict

from fedjax_sim.config import default_config
from fedjax_sim.core import validate


def get_config(arg: str = "") -> ConfigDict:
  """Return the config; `arg` "private" adds noise, "smoke" makes two rounds."""
  config = default_config()
  config.data.name = "digits"
  config.data.num_clients = 100
  config.data.alpha = 1.0
  config.model.name = "kmeans"
  config.model.clusters = 10
  config.model.low = 0.0  # of a pixel
  config.model.high = 1.0
  config.model.init = "uniform"
  config.algorithm.name = "kmeans"
  config.algorithm.count_weight = 0.3
  config.algorithm.least_share = 0.02
  config.algorithm.empty = "split"
  config.client.batch_size = 64
  config.server.rounds = 30
  config.server.clients_per_round = 100
  config.runtime.lanes = 1
  validate.one_of("argument", arg, ("", "private", "smoke"))
  if arg == "private":
    config.algorithm.weighting = "uniform"
    config.server.rounds = 10
    config.sampler.name = "poisson"
    config.server.learning_rate = 0.5
    config.privacy.mechanism = "gaussian"
    config.privacy.clip_norm = 0.5
    config.privacy.target_epsilon = 8.0
    config.privacy.delta = 1e-3
  if arg == "smoke":
    config.server.rounds = 2
  return config
