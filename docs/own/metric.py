"""Metrics of one's own: right among three; ones that are found; a median.

fedjax-sim run --config=docs/own/metric.py --workdir=runs/metric
"""

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from fedjax_sim.config import default_config
from fedjax_sim.core import Metric


def top_3(logits, examples):
  """Whether the right class is among the three likeliest, shape=(batch,)."""
  _, best = jax.lax.top_k(logits, 3)
  return jnp.any(best == examples["y"][:, None], axis=1)


top_3.higher_is_better = True


def recall_of_ones(logits, examples):
  """Return the share of the digit 1 that is found; others weigh nothing."""
  ones = (examples["y"] == 1).astype(logits.dtype)
  found = jnp.argmax(logits, axis=1) == 1
  return Metric(total=found * ones, weight=ones)


recall_of_ones.higher_is_better = True


def median_margin(logits, examples):
  """Return how far the right class's logit is above all others, (batch,)."""
  right = jax.nn.one_hot(examples["y"], logits.shape[1], dtype=bool)
  of = lambda chosen: jnp.max(jnp.where(chosen, logits, -jnp.inf), axis=1)
  return of(right) - of(~right)


median_margin.number = np.median  # on the host; of a client's examples, of all
median_margin.higher_is_better = True


def get_config(arg: str = "") -> ConfigDict:
  """Return the config; `arg` "smoke" is a run of two rounds."""
  config = default_config()
  names = ("top_3", "recall_of_ones", "median_margin")
  config.model.metrics = tuple(f"{__file__}:{name}" for name in names)
  config.data.unseen_clients = 10
  config.server.rounds = 2 if arg == "smoke" else 50
  return config
