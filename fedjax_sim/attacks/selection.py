"""Which clients attack: a pure function of the seed, the round and the cohort.

Drawn on the host, by ids, so attackers are the same on any number of lanes and
devices, and after a run was resumed.
"""

from __future__ import annotations

import functools

import numpy as np

from fedjax_sim.core import Sampler, validate
from fedjax_sim.sampling.draws import generator, without_replacement

SELECTIONS = ("fixed", "round")
_FIXED, _ROUND = 4, 5  # the streams of the draws


def with_attackers(
  sampler: Sampler,
  num_clients: int,
  fraction: float = 0.2,
  selection: str = "fixed",
) -> Sampler:
  """Return the sampler with clients that attack; who takes part is the same.

  How many clients there are then counts as public for privacy accountants.

  Args:
    sampler: who takes part.
    num_clients: the population.
    fraction: of the clients attack, from 0 to 1.
    selection: "fixed": floor(fraction * num_clients) clients, drawn by the
      run's seed, whenever they take part; "round": floor(fraction * clients) of
      each cohort, drawn anew.

  Raises:
    TypeError, ValueError: no such fraction or selection, or a fraction above 0
      of which no client ever attacks.

  Example:
    with_attackers(uniform(100, 10), 100, fraction=0.1)
  """
  fraction = validate.number("fraction", fraction, ge=0, le=1)
  validate.one_of("selection", selection, SELECTIONS)
  part = lambda count: int(fraction * count + 1e-9)  # 0.29 * 100 is 28.99...
  of = num_clients if selection == "fixed" else max(sampler.sizes)
  if fraction > 0 and not part(of):
    where = "" if selection == "fixed" else " of a round"
    raise ValueError(
      f"fraction={fraction} of {of} clients{where} is less than one attacker;"
      f" give at least {np.ceil(1e4 / of) / 1e4:g}, or 0 for none."
    )

  @functools.lru_cache(maxsize=4)
  def fixed(seed: int) -> np.ndarray:
    rng = generator(seed, 0, stream=_FIXED)
    chosen = np.zeros(num_clients, bool)
    drawn = without_replacement(rng, num_clients, part(num_clients))
    chosen[drawn] = True
    return chosen

  def byzantine(seed: int, round_: int, ids: np.ndarray) -> np.ndarray:
    if selection == "fixed":
      return fixed(seed)[ids]
    rng = generator(seed, round_, stream=_ROUND)
    drawn = without_replacement(rng, len(ids), part(len(ids)))
    chosen = np.zeros(len(ids), bool)
    chosen[np.argsort(ids)[drawn]] = True
    return chosen

  promised = sampler.participation
  if promised is not None:  # one client more may change who else attacks
    promised = promised._replace(population=None)
  return sampler._replace(byzantine=byzantine, participation=promised)
