"""Inner-product manipulation: the aggregate points away from the honest mean.

Xie, Koyejo and Gupta 2019, "Fall of empires: breaking Byzantine-tolerant SGD by
inner product manipulation" (UAI; arXiv 1903.03936).
"""

from __future__ import annotations

import jax.numpy as jnp

from fedjax_sim.attacks.attack import Attack, Honest
from fedjax_sim.attacks.collusion import scaled
from fedjax_sim.core import HParams, PyTree, validate


def ipm(epsilon: float = 0.5) -> Attack:
  """Send the honest mean times -`epsilon`.

  Args:
    epsilon: how far the other way, > 0; small against aggregators that choose
      updates near others, large against those that average.

  Raises:
    TypeError, ValueError: epsilon is not such a number.
  """
  hparams = {"epsilon": validate.number("epsilon", epsilon, gt=0)}

  def collude(honest: Honest, hparams: HParams) -> PyTree:
    return scaled(honest.mean, -jnp.asarray(hparams["epsilon"]))

  return Attack(hparams=hparams, collude=collude, by_shares=True)
