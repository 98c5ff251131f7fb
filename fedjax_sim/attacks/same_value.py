"""The same value: attackers send one number in every coordinate.

Li et al. 2019, "RSA: Byzantine-robust stochastic aggregation methods" (AAAI;
arXiv 1811.03761).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fedjax_sim.attacks.attack import Attack
from fedjax_sim.core import HParams, Key, PyTree, validate


def same_value(value: float = 0.0) -> Attack:
  """Send one number in every coordinate of the update.

  Args:
    value: the number; with 0, attackers hold the model back.

  Raises:
    TypeError, ValueError: value is not a number.
  """
  hparams = {"value": validate.number("value", value)}

  def report(update: PyTree, key: Key, hparams: HParams) -> PyTree:
    del key
    fill = lambda u: jnp.full(u.shape, hparams["value"], u.dtype)
    return jax.tree.map(fill, update)

  return Attack(hparams=hparams, report=report)
