"""What an epsilon was proven for: an algorithm as it was made private.

Whoever changes what clients send, or what the server does with their sum, after
the noise was fitted to it, releases something else than what is accounted for.
"""

from __future__ import annotations

from fedjax_sim.core import Algorithm, PrivacySpec

_FREE = ("hparams", "privacy")  # looked at by themselves


def sealed(algorithm: Algorithm, privacy: PrivacySpec) -> Algorithm:
  """Return the algorithm with a specification that holds for it alone.

  Args:
    algorithm: complete.
    privacy: what accountants must know of it.
  """
  proven = algorithm._replace(privacy=privacy)
  return algorithm._replace(privacy=privacy._replace(proven=proven))


def check(algorithm: Algorithm) -> None:
  """Refuse a private algorithm that was changed after it was made private.

  Raises:
    ValueError: names what was changed.
  """
  privacy = algorithm.privacy
  if privacy is None:
    return
  proven = privacy.proven
  if proven is None:
    raise ValueError(
      "Algorithm.privacy describes noise that nobody has proven to be there;"
      " let privacy.central make the algorithm private, and describe it."
    )
  changed = [
    field
    for field in Algorithm._fields
    if field not in _FREE
    and getattr(algorithm, field) is not getattr(proven, field)
  ]
  if privacy._replace(proven=None) != proven.privacy:
    changed.append("privacy")
  if changed:
    raise ValueError(
      f"Algorithm.{', Algorithm.'.join(changed)}: not what privacy.central"
      " made, for which alone its epsilon holds; change the algorithm first,"
      " and make it private then: central(changed(algorithm), settings)."
    )


def check_open(algorithm: Algorithm, wrapper: str) -> None:
  """Refuse to wrap an algorithm that is private already.

  Args:
    algorithm: to be wrapped.
    wrapper: the name of the function that does it.

  Raises:
    ValueError: it is private.
  """
  if algorithm.privacy is not None:
    raise ValueError(
      f"{wrapper}(central(...)) would change what is released, and the epsilon"
      " would no longer hold; wrap first, and make it private then:"
      f" central({wrapper}(algorithm, ...), settings)."
    )
