"""Weights files: named arrays and a few texts, in one of three formats.

A name is the path of a leaf in its tree, joined by slashes, such as
`layers/0/kernel`. The suffix says the format: `.safetensors` is the library's,
`.npz` numpy's, and `.msgpack` is what `flax.serialization` writes. None of
them runs code when it is read. Every array comes back bit for bit.
"""

from __future__ import annotations

import collections
import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sim.core.digests import digest
from fedjax_sim.core.errors import FedjaxSimError, one_line
from fedjax_sim.core.files import PathLike, write_atomically
from fedjax_sim.core.optional import library
from fedjax_sim.core.task import Variables
from fedjax_sim.core.tree import paths_of
from fedjax_sim.core.types import PyTree

_METADATA = "__metadata__"  # the name that safetensors reserves for it
_DIGEST = "sha256"  # of all names and arrays, in the metadata
_DTYPES = {  # numpy's name -> that of safetensors
  "bool": "BOOL",
  "int8": "I8",
  "int16": "I16",
  "int32": "I32",
  "int64": "I64",
  "uint8": "U8",
  "uint16": "U16",
  "uint32": "U32",
  "uint64": "U64",
  "float16": "F16",
  "bfloat16": "BF16",
  "float32": "F32",
  "float64": "F64",
}
_PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt")


class WeightsError(FedjaxSimError, ValueError):
  """A weights file is damaged, or not of a format that is read here."""


class Weights(NamedTuple):
  """What a weights file holds.

  Attributes:
    arrays: name -> array, in the order of the names.
    metadata: texts by name, such as `config`; empty in others' files.
  """

  arrays: dict[str, np.ndarray]
  metadata: dict[str, str]


class _Format(NamedTuple):
  """How a format becomes bytes, and bytes the format."""

  encode: Callable[[dict[str, np.ndarray], dict[str, str]], bytes]
  decode: Callable[[bytes], tuple[PyTree, Mapping[str, str]]]


def write_weights(
  path: PathLike, tree: PyTree, metadata: Mapping[str, str] | None = None
) -> None:
  """Write arrays and their names to a file, atomically.

  Args:
    path: the file; its suffix is one of `FORMATS`.
    tree: arrays; a tree, or a dictionary from names to arrays. Of the
      variables of a task it is `named_variables(variables)`.
    metadata: texts by name. `sha256`, the digest of the arrays, is added.

  Raises:
    WeightsError: the suffix names none of the formats, two arrays have the
      same name, or there is none.
    TypeError: arrays have no names; a leaf is no array of bools, integers or
      floats; or the metadata hold something else than texts.
    ModuleNotFoundError: the format's library is not installed.
    OSError: the file cannot be written.

  Example:
    write_weights("model.npz", {"kernel": np.zeros((3, 2), np.float32)})
  """
  chosen = check_format(path)
  _check_names(tree)
  arrays = named_arrays(tree)
  texts = dict(metadata or {})
  for name, text in texts.items():
    if not isinstance(text, str):
      raise TypeError(
        f"metadata[{name!r}]={text!r} is a {type(text).__name__}; give a text."
      )
  texts[_DIGEST] = _digest_of(arrays)
  write_atomically(path, chosen.encode(arrays, texts))


def read_weights(path: PathLike) -> Weights:
  """Return the arrays of a weights file, by name, and its metadata.

  Trees of others' `.msgpack` files become names with slashes.

  Args:
    path: the file; its suffix is one of `FORMATS`.

  Raises:
    WeightsError: the suffix names none of the formats, or the file is damaged,
      or holds pickled objects.
    ModuleNotFoundError: the format's library is not installed.
    OSError: the file cannot be read.

  Example:
    read_weights("model.npz").arrays["kernel"].shape  # (3, 2)
  """
  chosen = check_format(path)
  content = Path(path).read_bytes()
  try:
    tree, metadata = chosen.decode(content)
    texts = {str(name): str(text) for name, text in metadata.items()}
  except _PickledError as error:
    raise WeightsError(f"{path} {error}") from error
  except _ContentError as error:
    raise _damaged(path, str(error)) from error
  except MemoryError:
    raise
  except Exception as error:  # whatever a library raises for torn bytes
    kind = Path(path).suffix[1:]
    raise _damaged(path, f"it is no {kind} file, or truncated") from error
  try:
    arrays = named_arrays(tree)
  except (TypeError, ValueError) as error:
    raise _damaged(path, one_line(error)) from error
  if texts.get(_DIGEST, (found := _digest_of(arrays))) != found:
    raise _damaged(path, "its SHA-256 differs from the one that it names")
  return Weights(arrays, texts)


def check_format(path: PathLike, others: Sequence[str] = ()) -> _Format:
  """Return the format of a file; its library is there.

  Args:
    path: the file.
    others: suffixes that the caller takes, too, for messages.

  Raises:
    WeightsError: its suffix names none of the formats.
    ModuleNotFoundError: the format's library is not installed.
  """
  suffix = Path(path).suffix
  known = ", ".join((*FORMATS, *others))
  if suffix in _PICKLES:
    raise WeightsError(
      f"{path}: a {suffix} file is a pickle, which runs code when it is read;"
      " convert it where you trust it, as docs/weights.md shows, to one of"
      f" {known}."
    )
  if suffix not in FORMATS:
    raise WeightsError(
      f"{path}: {suffix or 'no suffix'} names no format of weights; take one of"
      f" {known}."
    )
  if suffix == ".safetensors":
    library("safetensors", "safetensors", f"{path}: the format")
  return FORMATS[suffix]


def named_arrays(tree: PyTree) -> dict[str, np.ndarray]:
  """Return a tree's arrays on the host by their names, which are sorted.

  Args:
    tree: arrays; a tree, or a dictionary from names to arrays.

  Raises:
    WeightsError: two leaves have the same name.
    TypeError: a leaf is no array of bools, integers or floats.
  """
  names = paths_of(tree)
  for name, count in collections.Counter(names).items():
    if count > 1:
      raise WeightsError(f"Two arrays are called {name!r}; rename one.")
  leaves = zip(names, jax.tree.leaves(tree), strict=True)
  return {name: _array(name, leaf) for name, leaf in sorted(leaves, key=_first)}


def file_digest(path: PathLike) -> str:
  """Return the SHA-256 of a file's bytes.

  Raises:
    OSError: the file cannot be read.
  """
  with Path(path).open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _check_names(tree: PyTree) -> None:
  """Refuse what would be written without its names, or not at all.

  Raises:
    WeightsError: there is no array.
    TypeError: the names are missing.
  """
  if isinstance(tree, Variables):
    raise TypeError(
      "write_weights: the tree is a Variables, whose names say what it is; give"
      " named_variables(variables)."
    )
  if tree is None or jax.tree_util.all_leaves([tree]):
    raise TypeError(
      f"write_weights: the tree is a {type(tree).__name__} without a name; give"
      ' name -> array, such as {"kernel": x}.'
    )
  if not jax.tree.leaves(tree):  # None is an empty tree, too
    raise WeightsError("write_weights: there is no array; give one at least.")


def _first(pair: tuple[str, Any]) -> str:
  return pair[0]


def _array(name: str, leaf: Any) -> np.ndarray:
  """Return a leaf as an array in C order, in this machine's byte order."""
  try:
    array = np.asarray(leaf, order="C")
  except TypeError:  # such as a typed random key
    array = np.asarray(None)
  if array.dtype.name not in _DTYPES:
    kind = getattr(leaf, "dtype", type(leaf).__name__)
    raise TypeError(
      f"{name!r} holds {kind}; a weights file holds arrays of"
      f" {', '.join(_DTYPES)}."
    )
  return array.astype(array.dtype.newbyteorder("="), copy=False)


def _digest_of(arrays: Mapping[str, np.ndarray]) -> str:
  total = hashlib.sha256()
  for name, array in arrays.items():
    total.update(f"{len(name)} {name} {digest(array)}".encode())
  return total.hexdigest()


def _damaged(path: PathLike, why: str) -> WeightsError:
  return WeightsError(f"{path} is damaged ({why}); get or write it again.")


class _ContentError(Exception):
  """A file of the right format holds what no model has."""


class _PickledError(Exception):
  """A file holds what only pickle reads."""


# --- the formats --------------------------------------------------------------


def _to_safetensors(
  arrays: dict[str, np.ndarray], metadata: dict[str, str]
) -> bytes:
  content = library("safetensors.numpy", "safetensors").save(arrays, metadata)
  # The library writes the metadata in another order every time; in one order
  # the same model is the same file.
  header, data = _header(content)
  text = json.dumps(header, sort_keys=True).encode()
  text += b" " * (-len(text) % 8)
  return len(text).to_bytes(8, "little") + text + data


def _header(content: bytes) -> tuple[dict[str, Any], bytes]:
  """Return the header of a safetensors file, and what follows it."""
  size = int.from_bytes(content[:8], "little")
  return json.loads(content[8 : 8 + size]), content[8 + size :]


def _from_safetensors(content: bytes) -> tuple[PyTree, Mapping[str, str]]:
  found = library("safetensors", "safetensors").deserialize(content)
  names = {theirs: ours for ours, theirs in _DTYPES.items()}
  arrays = {}
  for name, part in found:
    if part["dtype"] not in names:
      raise _ContentError(f"{name!r} has the unknown dtype {part['dtype']}")
    dtype = jnp.dtype(names[part["dtype"]])
    array = np.frombuffer(bytes(part["data"]), dtype)
    arrays[name] = array.reshape(part["shape"])
  # The library has checked the header; its metadata are in no other call that
  # takes bytes.
  return arrays, _header(content)[0].get(_METADATA, {})


def _to_npz(arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> bytes:
  # numpy has no bfloat16: its bits are kept, and its name beside them.
  odd = {k: x.dtype.name for k, x in arrays.items() if _is_bfloat16(x)}
  text = json.dumps({"metadata": metadata, "dtypes": odd})
  entries = {
    **{k: x.view(np.uint16) if k in odd else x for k, x in arrays.items()},
    _METADATA: np.frombuffer(text.encode(), np.uint8),
  }
  file = io.BytesIO()
  with zipfile.ZipFile(file, "w") as archive:
    for name, array in entries.items():
      # By hand, as `np.savez` takes its names for its own parameters, and
      # stamps every entry with the time.
      info = zipfile.ZipInfo(f"{name}.npy")
      with archive.open(info, "w", force_zip64=True) as entry:
        np.lib.format.write_array(entry, array, allow_pickle=False)
  return file.getvalue()


def _is_bfloat16(array: np.ndarray) -> bool:
  return array.dtype.name == "bfloat16"


def _from_npz(content: bytes) -> tuple[PyTree, Mapping[str, str]]:
  arrays: dict[str, np.ndarray] = {}
  with zipfile.ZipFile(io.BytesIO(content)) as archive:
    for info in archive.infolist():
      name = info.filename.removesuffix(".npy")
      try:
        with archive.open(info) as entry:
          arrays[name] = np.lib.format.read_array(entry, allow_pickle=False)
      except ValueError as error:
        if "Object arrays" not in str(error):
          raise
        raise _PickledError(
          f"holds {name!r} as pickled objects, which run code when they are"
          f" read; write it as numbers, by np.asarray({name}, np.float32)."
        ) from error
  if _METADATA not in arrays:
    return arrays, {}
  text = json.loads(arrays.pop(_METADATA).tobytes())
  for name, dtype in text["dtypes"].items():
    arrays[name] = arrays[name].view(jnp.dtype(dtype))
  return arrays, text["metadata"]


def _to_msgpack(
  arrays: dict[str, np.ndarray], metadata: dict[str, str]
) -> bytes:
  from flax import serialization

  content: bytes = serialization.msgpack_serialize(
    {**arrays, _METADATA: metadata}
  )
  return content


def _from_msgpack(content: bytes) -> tuple[PyTree, Mapping[str, str]]:
  from flax import serialization

  tree = serialization.msgpack_restore(content)
  if not isinstance(tree, dict):
    raise _ContentError(f"it holds a {type(tree).__name__}, no names")
  metadata = tree.pop(_METADATA, {})
  return tree, metadata


FORMATS: Mapping[str, _Format] = {
  ".safetensors": _Format(_to_safetensors, _from_safetensors),
  ".npz": _Format(_to_npz, _from_npz),
  ".msgpack": _Format(_to_msgpack, _from_msgpack),
}
