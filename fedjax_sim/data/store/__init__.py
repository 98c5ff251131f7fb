"""Client stores: federated data on disk."""

from fedjax_sim.data.store.reader import (
  StoredNames,
  StoreError,
  facts_of,
  load_store,
  open_store,
  verify,
  vocabulary_of,
)

__all__ = [
  "StoreError",
  "StoredNames",
  "facts_of",
  "load_store",
  "open_store",
  "verify",
  "vocabulary_of",
]
