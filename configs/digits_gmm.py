"""A Gaussian mixture on handwritten digits of 100 clients, without labels.

fedjax-sim run --config=configs/digits_gmm.py --workdir=runs/gmm

Seconds on two CPU cores. Online EM, with 10 clients a round, and with
differential privacy for clients (docs/analytics.md):

fedjax-sim run --config=configs/digits_gmm.py:online --workdir=runs/online
fedjax-sim run --config=configs/digits_gmm.py:private --workdir=runs/dp
"""

from ml_collections import ConfigDict

from fedjax_sim.config import default_config
from fedjax_sim.core import validate

ARGUMENTS = ("", "online", "private", "smoke")


def get_config(arg: str = "") -> ConfigDict:
  """Return the config.

  Args:
    arg: "online" draws few clients a round, "private" adds noise, "smoke" makes
      two rounds.
  """
  config = default_config()
  config.data.name = "digits"
  config.data.num_clients = 100
  config.data.alpha = 1.0
  config.model.name = "gmm"
  config.model.components = 10
  config.model.low = 0.0  # of a pixel
  config.model.high = 1.0
  config.algorithm.name = "gmm"
  config.algorithm.min_variance = 0.01
  config.client.batch_size = 64
  config.server.rounds = 40
  config.server.clients_per_round = 100
  config.runtime.lanes = 1
  validate.one_of("argument", arg, ARGUMENTS)
  if arg == "online":
    config.server.clients_per_round = 10
    config.server.rounds = 200
    config.server.schedule = "cosine(rounds=200)"
  if arg == "private":
    config.algorithm.weighting = "uniform"
    config.algorithm.learning_rate = 0.5
    config.algorithm.least_share = 0.02
    config.algorithm.count_weight = 0.3
    config.server.rounds = 15
    config.sampler.name = "poisson"
    config.privacy.mechanism = "gaussian"
    config.privacy.clip_norm = 1.0
    config.privacy.target_epsilon = 8.0
    config.privacy.delta = 1e-3
  if arg == "smoke":
    config.server.rounds = 2
  return config
