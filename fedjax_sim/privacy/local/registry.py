"""All mechanisms of local privacy by name."""

from __future__ import annotations

from collections.abc import Callable

from fedjax_sim.privacy.local.additive import clip_only, gaussian, laplace
from fedjax_sim.privacy.local.mechanism import Randomizer
from fedjax_sim.privacy.local.privunit import privunit

RANDOMIZERS: dict[str, Callable[..., Randomizer]] = {
  "clip": clip_only,
  "gaussian": gaussian,
  "laplace": laplace,
  "privunit": privunit,
}
