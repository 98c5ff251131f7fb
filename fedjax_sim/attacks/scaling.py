"""Scaling: attackers send their own update, but longer.

The model replacement of Bagdasaryan et al. 2020 (arXiv 1807.00459) without a
backdoor.
"""

from __future__ import annotations

import jax

from fedjax_sim.attacks.attack import Attack
from fedjax_sim.core import HParams, Key, PyTree, validate


def scaling(factor: float = 10.0) -> Attack:
  """Send the own update times `factor`.

  Args:
    factor: any number.

  Raises:
    TypeError, ValueError: factor is not a number.
  """
  hparams = {"factor": validate.number("factor", factor)}

  def report(update: PyTree, key: Key, hparams: HParams) -> PyTree:
    del key
    times = lambda u: u * hparams["factor"].astype(u.dtype)
    return jax.tree.map(times, update)

  return Attack(hparams=hparams, report=report)
