"""The format of client stores: version, files and fields."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedjax_sim.data.batch_steps import (
  Prepare,
  as_stored,
  from_bytes,
  prepare_ids,
  prepare_numbers,
)

FORMAT, VERSION = "fedjax_sim store", 1
FURTHER = ("labelled", "unlabelled")  # of train's clients, for some algorithms
OF_TRAIN = ("seen", *FURTHER)  # splits whose clients are those of train
SPLITS = ("train", "seen", "unseen", *FURTHER, "test", "server")
PREPARE: Mapping[str, Prepare] = {
  "stored": as_stored,
  "bytes": from_bytes,
  "numbers": prepare_numbers,
  "ids": prepare_ids,
}
FIELD = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")  # it names a file
FILE = re.compile(rf"(fields/{FIELD.pattern}|offsets|names|name_ends)\.npy")


def seal(facts: Mapping[str, Any]) -> str:
  """Return the SHA-256 of what `store.json` holds, but for this checksum."""
  told = {k: v for k, v in facts.items() if k != "sha256"}
  return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def naming_store(path: Path) -> Any:
  """Make errors of the disk name the store."""
  try:
    yield
  except OSError as error:
    if error.errno is None:
      raise
    raise OSError(
      error.errno,
      f"cannot write {path}: {error.strerror}; give a writable folder with"
      " space left. Nothing was kept",
    ) from error
