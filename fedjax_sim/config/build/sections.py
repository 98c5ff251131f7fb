"""Sections of a config as keyword arguments."""

from __future__ import annotations

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from fedjax_sim.engine.batching import LocalWork


def given_fields(section: ConfigDict, *without: str) -> dict[str, Any]:
  """A section's fields that are not None, but for those named."""
  return {
    key: value
    for key, value in section.items()
    if value is not None and key not in without
  }


WORK_FIELDS = [field.name for field in dataclasses.fields(LocalWork)]
