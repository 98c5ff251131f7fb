"""Gaussian noise: attackers send random numbers.

Blanchard et al. 2017, "Machine learning with adversaries: Byzantine tolerant
gradient descent" (NeurIPS; arXiv 1703.02757), section 5.
"""

from __future__ import annotations

import jax

from fedjax_sim.attacks.attack import Attack
from fedjax_sim.core import HParams, Key, PyTree, validate


def gaussian(stddev: float = 1.0) -> Attack:
  """Send independent Gaussian numbers in the place of the update.

  Args:
    stddev: their standard deviation, >= 0; the paper's is 200.

  Raises:
    TypeError, ValueError: stddev is not such a number.
  """
  hparams = {"stddev": validate.number("stddev", stddev, ge=0)}

  def report(update: PyTree, key: Key, hparams: HParams) -> PyTree:
    leaves, treedef = jax.tree.flatten(update)
    drawn = [
      hparams["stddev"].astype(x.dtype)
      * jax.random.normal(jax.random.fold_in(key, i), x.shape, x.dtype)
      for i, x in enumerate(leaves)
    ]
    return jax.tree.unflatten(treedef, drawn)

  return Attack(hparams=hparams, report=report)
