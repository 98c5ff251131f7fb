"""Parts that divide by 0 where nothing has changed."""

import jax

from fedjax_sim.aggregators import mean
from fedjax_sim.core import Aggregator, Transform, TransformResult
from fedjax_sim.core.tree import tree_norm


def _unit(update):
  length = tree_norm(update)
  return jax.tree.map(lambda u: u / length, update)


def unit() -> Transform:
  """Scale an update to length 1."""
  return Transform(
    name="unit",
    hparams={},
    apply=lambda update, *given: TransformResult(_unit(update)),
  )


def unit_mean() -> Aggregator:
  """Scale the mean to length 1."""
  base = mean()
  return base._replace(finish=lambda *given: _unit(base.finish(*given)))
