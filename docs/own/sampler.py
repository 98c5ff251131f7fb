"""A sampler of one's own: clients with more examples take part more often.

fedjax-sim run --config=docs/own/sampler.py --workdir=runs/sampler
"""

import numpy as np
from ml_collections import ConfigDict

from fedjax_sim.config import default_config
from fedjax_sim.sampling import Sampler


def by_size(num_clients, clients_per_round, sizes) -> Sampler:
  """Without replacement, a client's chance in proportion to its examples."""

  def sample(seed, round_):  # of these two alone, so that a run can go on
    rng = np.random.default_rng((seed, round_))
    share = sizes / sizes.sum()
    return rng.choice(num_clients, clients_per_round, replace=False, p=share)

  return Sampler(sample, sizes=(clients_per_round,), expected=clients_per_round)


def get_config(arg: str = "") -> ConfigDict:
  """Return the config; `arg` "smoke" is a run of two rounds."""
  config = default_config()
  config.sampler.name = f"{__file__}:by_size"
  config.data.partition = "power_law"  # a few clients have most examples
  config.server.rounds = 2 if arg == "smoke" else 50
  return config
