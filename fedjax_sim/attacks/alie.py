"""A little is enough: attackers hide within the spread of the honest.

Baruch, Baruch and Goldberg 2019, "A little is enough: circumventing defenses
for distributed learning" (NeurIPS; arXiv 1902.06156). With n clients of which m
attack, s = floor(n / 2 + 1) - m honest ones have to be further out than the
attackers for these to have a majority on their side, so all attackers send

    mean - z * std,    z = max{z: Phi(z) < (n - m - s) / (n - m)}

with the mean and the standard deviation of each coordinate over the honest.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax.scipy.special import ndtri

from fedjax_sim.attacks.attack import Attack, Honest
from fedjax_sim.attacks.collusion import plus, scaled, standard_deviation
from fedjax_sim.core import Array, HParams, PyTree, validate


def alie(z: float | None = None) -> Attack:
  """Send the honest mean less z standard deviations, coordinate by coordinate.

  Attackers know all honest updates, where the paper's estimate them from their
  own. With few attackers, such as 2 of 10, the paper's z is 0 and does nothing.

  Args:
    z: how many standard deviations; None: what the paper takes, from the
      numbers of the round's clients and attackers, but at least 0.

  Raises:
    TypeError, ValueError: z is not a number.

  Example:
    alie(z=1.5)
  """
  hparams = {} if z is None else {"z": validate.number("z", z)}

  def collude(honest: Honest, hparams: HParams) -> PyTree:
    many = hparams.get("z", deviations_of(honest))
    std = standard_deviation(honest)
    return plus(honest.mean, scaled(std, -jnp.asarray(many)))

  return Attack(hparams=hparams, collude=collude, by_shares=True)


def deviations_of(honest: Honest) -> Array:
  """Return the paper's z, at least 0; shape=(), float32."""
  others, m = honest.clients, honest.attackers
  supporters = jnp.maximum((others + m) // 2 + 1 - m, 1)
  within = (others - supporters) / others
  return jnp.maximum(ndtri(jnp.clip(within, 0.5, 1 - 1e-6)), 0)
