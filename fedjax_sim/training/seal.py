"""What an epsilon was proven for: an algorithm as it was made private.

Whoever changes what clients send, or what the server does with their sum, after
the noise was fitted to it, releases something else than what is accounted for.
"""

from __future__ import annotations

from fedjax_sim.core import Algorithm, Release

_FREE = ("hparams", "release")  # looked at by themselves


def sealed(algorithm: Algorithm, release: Release) -> Algorithm:
  """The algorithm, with a release that holds for it as it is alone.

  Args:
    algorithm: complete.
    release: what accountants have to know of it.
  """
  proven = algorithm._replace(release=release)
  return algorithm._replace(release=release._replace(proven=proven))


def check(algorithm: Algorithm) -> None:
  """Refuses a private algorithm that is not as it was made private.

  Raises:
    ValueError: names what was changed.
  """
  release = algorithm.release
  if release is None:
    return
  proven = release.proven
  if proven is None:
    raise ValueError(
      "Algorithm.release tells of noise that nobody has proven to be there; let"
      " privacy.central make the algorithm private, and tell it."
    )
  changed = [
    field
    for field in Algorithm._fields
    if field not in _FREE
    and getattr(algorithm, field) is not getattr(proven, field)
  ]
  if release._replace(proven=None) != proven.release:
    changed.append("release")
  if changed:
    raise ValueError(
      f"Algorithm.{', Algorithm.'.join(changed)}: not what privacy.central"
      " made, for which alone its epsilon holds; change the algorithm first,"
      " and make it private then: central(changed(algorithm), settings)."
    )


def check_open(algorithm: Algorithm, wrapper: str) -> None:
  """Refuses to wrap an algorithm that is private already.

  Args:
    algorithm: to be wrapped.
    wrapper: the name of the function that does it.

  Raises:
    ValueError: it is private.
  """
  if algorithm.release is not None:
    raise ValueError(
      f"{wrapper}(central(...)) would change what is released, and the epsilon"
      " would no longer hold; wrap first, and make it private then:"
      f" central({wrapper}(algorithm, ...), settings)."
    )
