"""TensorBoard's records of scalars, byte by byte.

A record is an `Event` protocol buffer between its length and its checksum. The
few fields that scalars need are written here: a library that writes them
imports PyTorch wherever it is installed, 2 seconds of every run.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

# Numbers of fields and wire types, from TensorBoard's event.proto and
# summary.proto.
_WALL_TIME, _STEP, _FILE_VERSION, _SUMMARY, _SESSION_LOG = 1, 2, 3, 5, 7
_VALUE, _TAG, _SIMPLE_VALUE, _STATUS = 1, 1, 2, 1
_VARINT, _DOUBLE, _BYTES, _FLOAT = 0, 1, 2, 5
_START = 1  # of SessionLog.SessionStatus


def file_version(wall_time: float) -> bytes:
  """Return the record that begins every file."""
  version = _message(_FILE_VERSION, b"brain.Event:2")
  return _record(_wall_time(wall_time) + version)


def session_start(wall_time: float, step: int) -> bytes:
  """Return the record that makes TensorBoard forget this and later steps."""
  status = _message(_SESSION_LOG, _key(_STATUS, _VARINT) + _varint(_START))
  return _record(_wall_time(wall_time) + _step(step) + status)


def scalars(wall_time: float, step: int, values: Mapping[str, float]) -> bytes:
  """Return the record of a step's scalars.

  Args:
    wall_time: seconds of `time.time`.
    step: 0 or more.
    values: tag -> scalar, rounded to float32.
  """
  summary = b"".join(
    _message(
      _VALUE,
      _message(_TAG, tag.encode())
      + _key(_SIMPLE_VALUE, _FLOAT)
      + _float32(value),
    )
    for tag, value in values.items()
  )
  return _record(
    _wall_time(wall_time) + _step(step) + _message(_SUMMARY, summary)
  )


def _float32(value: float) -> bytes:
  try:
    return struct.pack("<f", value)
  except OverflowError:  # beyond float32
    return struct.pack("<f", float("inf") if value > 0 else float("-inf"))


def _wall_time(seconds: float) -> bytes:
  return _key(_WALL_TIME, _DOUBLE) + struct.pack("<d", seconds)


def _step(step: int) -> bytes:
  return _key(_STEP, _VARINT) + _varint(step)


def _key(field: int, kind: int) -> bytes:
  return _varint(field << 3 | kind)


def _message(field: int, content: bytes) -> bytes:
  return _key(field, _BYTES) + _varint(len(content)) + content


def _varint(number: int) -> bytes:
  """Return a number >= 0, seven bits a byte, the lowest first."""
  found = bytearray()
  while number > 0x7F:
    found.append(number & 0x7F | 0x80)
    number >>= 7
  found.append(number)
  return bytes(found)


def _record(content: bytes) -> bytes:
  """Return a record of TFRecord's format."""
  length = struct.pack("<Q", len(content))
  return length + _checksum(length) + content + _checksum(content)


def _checksum(content: bytes) -> bytes:
  """Return the CRC32C, rotated and shifted as TFRecord wants it."""
  crc = 0xFFFFFFFF
  for byte in content:
    crc = _TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
  crc ^= 0xFFFFFFFF
  masked = (crc >> 15 | crc << 17) + 0xA282EAD8
  return struct.pack("<I", masked & 0xFFFFFFFF)


def _table_entry(byte: int) -> int:
  """Return the remainder of a byte, by Castagnoli's polynomial, reflected."""
  for _ in range(8):
    byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
  return byte


_TABLE = [_table_entry(byte) for byte in range(256)]
