"""All mechanisms of local privacy by name, and those of a config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fedjax_sim.core import references, validate
from fedjax_sim.privacy.local.additive import clip_only, gaussian, laplace
from fedjax_sim.privacy.local.mechanism import Randomizer
from fedjax_sim.privacy.local.privunit import privunit

RANDOMIZERS: dict[str, Callable[..., Randomizer]] = {
  "clip": clip_only,
  "gaussian": gaussian,
  "laplace": laplace,
  "privunit": privunit,
}


def from_config(section: Mapping[str, Any]) -> Randomizer | None:
  """The mechanism of a config; None: it has none.

  Args:
    section: the field `mechanism`, and the mechanism's arguments; what is None
      is not given.

  Raises:
    UnknownNameError: no such mechanism, or it does not take an argument.
    TypeError, ValueError: an argument is missing or out of range, or there is
      no mechanism that would take it.
  """
  given = {key: x for key, x in section.items() if x is not None}
  name = given.pop("mechanism", None)
  if name is None:
    for field, value in given.items():
      raise ValueError(
        f"local_privacy.{field}={value}: there is no local privacy; set"
        " local_privacy.mechanism, or unset it by"
        f" --config.local_privacy.{field}=None."
      )
    return None
  make = references.lookup(
    "local_privacy.mechanism", name, RANDOMIZERS, Randomizer
  )
  owner = f"local_privacy.mechanism={name!r}"
  validate.arguments(owner, given, make, section="local_privacy")
  return make(**given)
