"""The files that W&B's client keeps of a run: which rows they hold.

A `.wandb` file is a log in LevelDB's format of protocol buffers: blocks of 32
KiB of chunks, each with a checksum (4 bytes), a length (2) and a kind (1); a
record is one whole chunk, or a first one, middle ones and a last one.
https://github.com/google/leveldb/blob/main/doc/log_format.md
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

_BLOCK = 2**15
_FILE_HEADER = 7  # bytes: ":W&B", a number, the version
_CHUNK = struct.Struct("<IHB")
_WHOLE, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def newest_step(folder: Path, run_id: str) -> int:
  """Return the newest step in any file of a run; -1 if there is none.

  Args:
    folder: `wandb` in the workdir.
    run_id: of the run.
  """
  files = folder.glob(f"*run-*-{run_id}/run-{run_id}.wandb")
  return max((step for f in files for step in rows(f)), default=-1)


def rows(file: Path) -> dict[int, dict[str, float]]:
  """Return step -> metrics, of the whole rows in a file."""
  from wandb.proto import wandb_internal_pb2

  record_of = wandb_internal_pb2.Record.FromString
  found: dict[int, dict[str, float]] = {}
  for data in _records(file.read_bytes()):
    record = record_of(data)
    if record.WhichOneof("record_type") != "history":
      continue
    row = {
      item.key or "/".join(item.nested_key): json.loads(item.value_json)
      for item in record.history.item
    }
    step = int(row.pop("_step"))
    found[step] = {k: v for k, v in row.items() if k[0] != "_"}
  return found


def _records(data: bytes) -> Iterator[bytes]:
  """Yield the whole records of a log; a torn end is left out."""
  at, parts = _FILE_HEADER, b""
  while at + _CHUNK.size <= len(data):
    room = _BLOCK - at % _BLOCK
    if room < _CHUNK.size:  # the rest of a block that no chunk fits in
      at += room
      continue
    _, length, kind = _CHUNK.unpack_from(data, at)
    at += _CHUNK.size
    chunk = data[at : at + length]
    if len(chunk) < length or kind not in (_WHOLE, _FIRST, _MIDDLE, _LAST):
      return
    at += length
    parts = chunk if kind in (_WHOLE, _FIRST) else parts + chunk
    if kind in (_WHOLE, _LAST):
      yield parts
