"""Sign flipping: attackers send the opposite of their update.

Li et al. 2019, "RSA: Byzantine-robust stochastic aggregation methods" (AAAI;
arXiv 1811.03761).
"""

from __future__ import annotations

import jax

from fedjax_sim.attacks.attack import Attack
from fedjax_sim.core import HParams, Key, PyTree, validate


def sign_flip(scale: float = 1.0) -> Attack:
  """Send the own update times -`scale`.

  Args:
    scale: how far the other way, > 0.

  Raises:
    TypeError, ValueError: scale is not such a number.
  """
  hparams = {"scale": validate.number("scale", scale, gt=0)}

  def report(update: PyTree, key: Key, hparams: HParams) -> PyTree:
    del key
    flip = lambda u: -u * hparams["scale"].astype(u.dtype)
    return jax.tree.map(flip, update)

  return Attack(hparams=hparams, report=report)
