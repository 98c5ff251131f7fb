"""Grids of which the default tier runs a part."""

from collections.abc import Container, Iterable
from typing import Any

import pytest


def slow_but(quick: Container[Any], cases: Iterable[Any]) -> list[Any]:
  """All cases, those marked `slow` that are not among `quick`."""
  return [
    case
    if case in quick
    else pytest.param(
      *(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow
    )
    for case in cases
  ]
