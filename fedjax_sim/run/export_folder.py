"""Export a transformer to a folder that PyTorch's libraries load.

`hugging_face` is the whole model, for `from_pretrained` of `transformers`;
`peft` its adapters, for `PeftModel.from_pretrained`. Nothing is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fedjax_sim.core import Variables
from fedjax_sim.core.files import write_json
from fedjax_sim.core.optional import library
from fedjax_sim.core.weights import write_weights
from fedjax_sim.models.transformer.describing import made_config, with_head
from fedjax_sim.models.transformer.folder import CONFIG, WEIGHTS, read_config
from fedjax_sim.models.transformer.hugging_face import held_arrays
from fedjax_sim.models.transformer.layouts import as_files
from fedjax_sim.models.transformer.objectives import CLASSIFICATION
from fedjax_sim.models.transformer.peft import (
  ADAPTER,
  ADAPTER_CONFIG,
  peft_files,
)
from fedjax_sim.run.export import (
  ExportError,
  as_texts,
  check_beside,
  facts_file,
  facts_of,
  whole_model,
)
from fedjax_sim.run.opened import OpenedRun
from fedjax_sim.tasks.freezing import named_variables
from fedjax_sim.tasks.lora import adapters_of, unadapted

HUGGING_FACE, PEFT = "hugging_face", "peft"
LAYOUTS = (HUGGING_FACE, PEFT)
BASE = "base"  # the folder of the model that adapters are for
_MADE = ("bert", "gpt2", "llama")  # models that begin from random weights
_LAYOUT = "layout"


class _Family(NamedTuple):
  """What a run's model is to Hugging Face.

  Attributes:
    kind: its `model_type`.
    classes: whether its head names a class.
    folder: that it began from; None: from random weights, or a file.
  """

  kind: str
  classes: bool
  folder: Path | None


def check_folder(path: Path, layout: str) -> None:
  """Refuse a folder that no model could be exported to.

  Raises:
    ValueError: it is called like a file.
    FileExistsError: there is a file, or a folder with other content than an
      export's of this layout.
    FileNotFoundError: the folder that it is in is missing.
    ModuleNotFoundError: safetensors is not installed.
  """
  library("safetensors", "safetensors", f"--layout={layout}")
  check_beside(path)
  if not path.exists():
    return
  beside = facts_file(path)
  if path.is_dir():
    if not any(path.iterdir()):
      return
    if (
      beside.exists() and json.loads(beside.read_bytes()).get(_LAYOUT) == layout
    ):
      return
  raise FileExistsError(
    f"{path} is there, and no export with --layout={layout} wrote it; give a"
    " new folder."
  )


def export_folder(run: OpenedRun, path: Path, layout: str) -> str:
  """Write a run's model to a folder, and a JSON file about it beside it.

  Args:
    run: whose model, one of `bert`, `gpt2`, `llama` and `hugging_face`.
    path: the folder.
    layout: one of `LAYOUTS`. With "peft", `path / "base"` is the model that the
      adapters are for, unless that is the folder that the run began from.

  Returns:
    What was written, in words.

  Raises:
    ExportError: it is another model, or has no adapters.
    ValueError, OSError, ModuleNotFoundError: see `check_folder`.
  """
  check_folder(path, layout)
  family = _family(run)
  adapters = adapters_of(run.variables)
  if layout == PEFT or run.config.adapter.name is not None:
    model = whole_model(run)
  else:
    model = run.variables
  arrays = _arrays(model)
  beside = facts_file(path)
  if layout == HUGGING_FACE:
    beside.unlink(missing_ok=True)
    _write_model(run, family, arrays, path)
    said = f"{len(arrays)} arrays"
  else:
    trained = [name for name in run.params if name in arrays]
    trained = [name for name in trained if name not in adapters]
    try:
      files = peft_files(
        family.kind, adapters, trained, arrays, classes=family.classes
      )
    except ValueError as error:
      raise ExportError(f"{error}") from error
    base = _arrays(unadapted(run.variables))
    beside.unlink(missing_ok=True)
    path.mkdir(exist_ok=True)
    same = _is_the_folders(family, base, files.whole)
    if not same:
      _write_model(run, family, base, path / BASE)
    config = dict(files.config)
    config["base_model_name_or_path"] = (
      family.folder.name if same and family.folder else None
    )
    write_weights(path / ADAPTER, files.arrays, _metadata(run))
    write_json(path / ADAPTER_CONFIG, config)
    of = "the folder it began from" if same else str(path / BASE)
    said = f"{len(adapters)} adapters of {of}"
  write_json(beside, {**facts_of(run), _LAYOUT: layout})
  return f"{path}: {said}, of round {run.round}"


def _family(run: OpenedRun) -> _Family:
  """Return what the run's model is to Hugging Face.

  Raises:
    ExportError: nothing.
  """
  section = run.config.model
  classes = section.get("objective") == CLASSIFICATION
  if section.name == HUGGING_FACE:
    folder = Path(section.folder).expanduser()
    return _Family(str(read_config(folder)["model_type"]), classes, folder)
  if section.name in _MADE:
    return _Family(section.name, classes, None)
  raise ExportError(
    f"model.name={section.name!r} has no layout of Hugging Face, only"
    f" {', '.join((*_MADE, HUGGING_FACE))}; leave out --layout, and give a"
    " file."
  )


def _arrays(variables: Variables) -> dict[str, np.ndarray]:
  """Return a model's parameters by name, float32."""
  named = named_variables(variables)
  return {name: np.asarray(x, np.float32) for name, x in named.items()}


def _is_the_folders(
  family: _Family, base: Mapping[str, np.ndarray], whole: frozenset[str]
) -> bool:
  """Return whether a model is that of the folder, but for `whole` of it."""
  if family.folder is None:
    return False
  shapes = {name: x.shape for name, x in base.items()}
  held = held_arrays(family.folder, family.kind, shapes, family.classes).arrays
  return all(
    name in whole or (name in held and np.array_equal(held[name], x))
    for name, x in base.items()
  )


def _write_model(
  run: OpenedRun,
  family: _Family,
  arrays: Mapping[str, np.ndarray],
  path: Path,
) -> None:
  """Write a whole model and its config to a folder."""
  section = run.config.model
  if family.folder is None:
    (length,) = run.simulator.data.example_shape
    config = made_config(family.kind, section, arrays, length)
  else:
    config = read_config(family.folder)
  config = with_head(config, section.objective, section.padding_id, arrays)
  path.mkdir(exist_ok=True)
  files = as_files(family.kind, arrays, family.classes)
  write_weights(path / WEIGHTS, files, _metadata(run))
  write_json(path / CONFIG, config)


def _metadata(run: OpenedRun) -> dict[str, str]:
  """Return the metadata of a file; `transformers` asks for its format."""
  return {**as_texts(facts_of(run)), "format": "pt"}
