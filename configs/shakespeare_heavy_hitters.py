"""The most frequent characters of Shakespeare's roles.

fedjax-sim run --config=configs/shakespeare_heavy_hitters.py --workdir=runs/top

Seconds on two CPU cores. With differential privacy for roles
(docs/analytics.md):

fedjax-sim run --config=configs/shakespeare_heavy_hitters.py:private \
  --workdir=runs/dp

Its files: docs/data.md.
"""

from ml_collections import ConfigDict

from fedjax_sim.config import default_config
from fedjax_sim.core import validate


def get_config(arg: str = "") -> ConfigDict:
  """Return the config; `arg` "private" adds noise, "smoke" makes two rounds."""
  config = default_config()
  config.data.name = "shakespeare"
  config.data.heldout_fraction = 0.2
  config.model.name = "heavy_hitters"
  config.model.hitters = 10
  config.model.field = "x"  # each character of a text counts
  config.model.ignored = 0  # the end of a text
  config.algorithm.name = "heavy_hitters"
  config.algorithm.branching = 16  # two digits for each character's id
  config.algorithm.weighting = "uniform"  # of all roles
  config.client.batch_size = 64
  config.server.rounds = 4
  config.server.clients_per_round = 180
  config.runtime.lanes = 1
  validate.one_of("argument", arg, ("", "private", "smoke"))
  if arg == "private":
    config.algorithm.min_share = 0.03
    config.sampler.name = "poisson"
    config.privacy.mechanism = "gaussian"
    config.privacy.clip_norm = 1.0  # no votes are longer
    config.privacy.target_epsilon = 2.0
    config.privacy.delta = 1e-3
  if arg == "smoke":
    config.server.rounds = 2
  return config
