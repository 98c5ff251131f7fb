"""A local folder of a Hugging Face model: its settings, weights and tokens.

`config.json`, `*.safetensors` in one file or several, and, where it is there,
`tokenizer.json`. Nothing of it is run, and nothing is downloaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedjax_sim.core.weights import WeightsError, read_weights

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_MASKS = ("[MASK]", "<mask>")  # BERT's and RoBERTa's


class Tokens(NamedTuple):
  """What a tokenizer keeps ids for.

  Attributes:
    special: ids of its special tokens.
    mask: the one that hides a token; None: there is none.
  """

  special: tuple[int, ...]
  mask: int | None


def _json(path: Path) -> dict[str, Any]:
  """Return the object in a JSON file.

  Raises:
    ValueError: it is no JSON, or no object.
    OSError: it cannot be read.
  """
  try:
    held = json.loads(path.read_bytes())
  except ValueError as error:
    raise ValueError(f"{path} is no JSON: {error}; get it again.") from error
  if not isinstance(held, dict):
    raise ValueError(
      f"{path} holds a {type(held).__name__}, no object; get it again."
    )
  return held


def read_config(folder: Path) -> dict[str, Any]:
  """Return what `config.json` holds.

  Raises:
    ValueError: there is none, or it is damaged.
  """
  path = folder / CONFIG
  if not path.is_file():
    what = "holds no config.json" if folder.is_dir() else "is no folder"
    raise ValueError(
      f"folder={str(folder)!r} {what}; give the folder of a Hugging Face model,"
      " as `model.save_pretrained(folder)` writes it."
    )
  return _json(path)


def read_tokens(folder: Path) -> Tokens:
  """Return the special tokens of `tokenizer.json`; none without that file.

  Raises:
    ValueError: the file is damaged.
  """
  path = folder / TOKENIZER
  if not path.is_file():
    return Tokens((), None)
  try:
    added = {
      token["content"]: int(token["id"])
      for token in _json(path).get("added_tokens", [])
      if token.get("special", False)
    }
  except (KeyError, TypeError, AttributeError) as error:
    raise ValueError(
      f"{path}: its added_tokens are no tokens with ids; get it again."
    ) from error
  masks = [added[name] for name in _MASKS if name in added]
  return Tokens(tuple(sorted(added.values())), masks[0] if masks else None)


def weight_files(folder: Path) -> list[Path]:
  """Return the files that hold the weights.

  Raises:
    ValueError: there is none, an index names one that is not there, or all are
      pickles.
  """
  if (folder / WEIGHTS).is_file():
    return [folder / WEIGHTS]
  index = folder / _INDEX
  if index.is_file():
    parts = _json(index).get("weight_map", {})
    if not isinstance(parts, Mapping) or not parts:
      raise ValueError(f"{index} has no weight_map; get it again.")
    files = [folder / name for name in sorted(set(parts.values()))]
    for file in files:
      if file.parent != folder or not file.is_file():
        raise ValueError(
          f"{index} names {file.name}, which is not there; get it, too."
        )
    return files
  if files := sorted(folder.glob("*.safetensors")):
    return files
  pickles = [f.name for kind in _PICKLES for f in sorted(folder.glob(kind))]
  if pickles:
    raise ValueError(
      f"folder={str(folder)!r} has its weights in {pickles[0]}, a pickle, which"
      " runs code when it is read; where you trust it, convert it by"
      " AutoModel.from_pretrained(folder).save_pretrained(new_folder) of"
      " transformers, which writes safetensors."
    )
  raise ValueError(
    f"folder={str(folder)!r} holds no *.safetensors; put the model's weights"
    " beside config.json."
  )


def model_files(folder: Path) -> list[Path]:
  """Return the files that make a model: its settings, weights and tokens.

  Raises:
    ValueError: see `weight_files`.
  """
  found = [folder / CONFIG, *weight_files(folder), folder / TOKENIZER]
  return [file for file in found if file.is_file()]


def read_arrays(folder: Path) -> dict[str, np.ndarray]:
  """Return the weights by their names, of all files.

  Raises:
    ValueError: there are none, or a file is damaged, or two have an array of
      the same name.
    ModuleNotFoundError: safetensors is not installed.
  """
  found: dict[str, np.ndarray] = {}
  for file in weight_files(folder):
    try:
      arrays = read_weights(file).arrays
    except WeightsError as error:
      raise ValueError(f"folder: {error}") from error
    if twice := found.keys() & arrays.keys():
      raise ValueError(
        f"folder={str(folder)!r}: {min(twice)!r} is in {file.name} and in"
        " another file; leave one model's files in the folder."
      )
    found.update(arrays)
  return found
