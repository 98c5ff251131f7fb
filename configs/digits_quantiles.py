"""Quantiles of a pixel of handwritten digits, over 100 clients.

fedjax-sim run --config=configs/digits_quantiles.py --workdir=runs/quantiles

Seconds on two CPU cores. With differential privacy for clients
(docs/analytics.md):

fedjax-sim run --config=configs/digits_quantiles.py:private --workdir=runs/dp
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
  config.model.name = "quantiles"
  config.model.probabilities = (0.25, 0.5, 0.75)
  config.model.feature = 28  # in the middle
  config.model.low = 0.0
  config.model.high = 1.0
  config.algorithm.name = "quantiles"
  config.algorithm.bins = 32
  config.client.batch_size = 64
  config.server.rounds = 4
  config.server.clients_per_round = 100
  config.runtime.lanes = 1
  validate.one_of("argument", arg, ("", "private", "smoke"))
  if arg == "private":
    config.algorithm.weighting = "uniform"
    config.sampler.name = "poisson"
    config.privacy.mechanism = "gaussian"
    config.privacy.clip_norm = 1.0  # no histogram is longer
    config.privacy.target_epsilon = 2.0
    config.privacy.delta = 1e-3
  if arg == "smoke":
    config.server.rounds = 2
  return config
