"""Export a run's model: its weights, or its prediction as a program.

Beside the model a JSON file says which model of which config it is.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from fedjax_sim import config as configs
from fedjax_sim.config.build.privacy import draws_noise
from fedjax_sim.core import Variables, in_float32, urls
from fedjax_sim.core.digests import tree_digest
from fedjax_sim.core.errors import FedjaxSimError, one_line
from fedjax_sim.core.files import write_atomically, write_json
from fedjax_sim.core.optional import library
from fedjax_sim.core.weights import FORMATS, check_format, write_weights
from fedjax_sim.run.changes import decisive
from fedjax_sim.run.opened import OpenedRun
from fedjax_sim.tasks.freezing import named_variables
from fedjax_sim.tasks.lora import adapters_of, merged

STABLEHLO = ".stablehlo"
_FACTS = ("round", "params_digest", "config")
_PLATFORMS = ("cpu", "cuda", "tpu")
_LOCATIONS = {  # of code in a program: with all of their 0 frames
  "jax_include_full_tracebacks_in_locations": True,
  "jax_traceback_in_locations_limit": 0,
}


class ExportError(FedjaxSimError, ValueError):
  """A run's model cannot be exported in the form that is asked for."""


def check_target(path: Path) -> None:
  """Refuse a file that no model could be exported to.

  Raises:
    ValueError: its suffix names no format.
    FileExistsError: the JSON file beside it holds something else, such as the
      config of a workdir.
    FileNotFoundError: its folder is missing.
    ModuleNotFoundError: the format's library is not installed.
  """
  if path.suffix == STABLEHLO:
    library("flatbuffers", "stablehlo", f"{path}: the format")
  else:
    check_format(path, (STABLEHLO,))
  check_beside(path)


def check_beside(path: Path) -> None:
  """Refuse a place beside which no JSON file can be.

  Raises:
    FileExistsError: it holds something else, such as the config of a workdir.
    FileNotFoundError: its folder is missing.
  """
  if not path.parent.is_dir():
    raise FileNotFoundError(
      f"{path}: there is no folder {path.parent}; make it first."
    )
  beside = facts_file(path)
  if beside.exists() and not _is_ours(beside):
    raise FileExistsError(
      f"{path}: {beside} would be replaced, which no export wrote; give the"
      " file another name."
    )


def facts_file(path: Path) -> Path:
  """Return the JSON file beside a model, such as `model.npz.json`."""
  return path.with_name(f"{path.name}.json")


def _is_ours(path: Path) -> bool:
  """Return whether a JSON file is one that an export wrote."""
  try:
    return {*_FACTS} <= json.loads(path.read_bytes()).keys()
  except (ValueError, AttributeError):
    return False


def export(run: OpenedRun, path: Path, merge: bool = False) -> str:
  """Write a run's model, and a JSON file about it beside it.

  The suffix says what: `.safetensors`, `.npz` and `.msgpack` hold the
  variables of the global model by the names of `named_variables`, `.stablehlo`
  the function from examples to the model's outputs, for `jax.export`.

  Args:
    run: whose model.
    path: the file.
    merge: multiply the adapters into their kernels, and write the variables of
      the model itself.

  Returns:
    What was written, in words.

  Raises:
    ExportError: the model's code does not allow any number of examples, or
      there is no adapter to merge.
    ValueError, OSError, ModuleNotFoundError: see `check_target`.
  """
  check_target(path)
  facts = facts_of(run)
  # A kill leaves a model without its JSON file, never with another one's.
  beside = facts_file(path)
  if path.suffix in FORMATS:
    named = named_variables(whole_model(run) if merge else run.variables)
    beside.unlink(missing_ok=True)
    write_weights(path, named, as_texts(facts))
    said = f"{len(named)} arrays"
  else:
    content, inputs, platforms = _program(run)
    beside.unlink(missing_ok=True)
    write_atomically(path, content)
    facts["inputs"] = inputs
    facts["platforms"] = platforms
    said = f"a program for {', '.join(platforms)}"
  write_json(beside, facts)
  return f"{path}: {said}, of round {run.round}"


def facts_of(run: OpenedRun) -> dict[str, Any]:
  """Return what the JSON file beside a model says of every run."""
  values = run.round, tree_digest(run.params), _shared_config(run.config)
  return dict(zip(_FACTS, values, strict=True))


def as_texts(facts: Mapping[str, Any]) -> dict[str, str]:
  """Return what the JSON file says, as the metadata of a weights file."""
  return {key: json.dumps(value) for key, value in facts.items()}


def whole_model(run: OpenedRun) -> Variables:
  """Return the variables of the model itself, its adapters multiplied in.

  Raises:
    ExportError: it has none.
  """
  if not adapters_of(run.variables):
    raise ExportError(
      f"The run has no adapters to merge (adapter.name="
      f"{run.config.adapter.name!r}, and only 'lora' is known); leave out what"
      " asks for them."
    )
  exact = run.variables  # the product is not rounded as what is frozen was
  if run.config.runtime.frozen_dtype != "float32":
    exact = exact._replace(frozen=jax.tree.map(in_float32, exact.frozen))
  variables: Variables = jax.device_get(merged(exact))
  return variables


def _shared_config(config: ConfigDict) -> dict[str, Any]:
  """Return the config that goes with a model, as JSON holds it.

  That of a private run lacks the seeds, which its account takes for secret, and
  the folders of the machine. No config has passwords of URLs, which workdirs of
  earlier versions may hold.

  Args:
    config: of the run, complete.
  """
  shared: dict[str, Any] = urls.without_secrets(
    decisive(configs.resolved(config))
  )
  if not draws_noise(config):
    return shared
  shared.pop("seed")
  shared["privacy"].pop("noise_seed")
  shared["data"].pop("path", None)
  for field in ("initial", "folder"):
    if shared["model"].get(field) is not None:
      shared["model"][field] = Path(shared["model"][field]).name
  without: dict[str, Any] = _without_folders(shared)
  return without


def _without_folders(value: Any) -> Any:
  """Return what JSON holds, with names alone for absolute paths."""
  if isinstance(value, dict):
    return {key: _without_folders(item) for key, item in value.items()}
  if isinstance(value, list):
    return [_without_folders(item) for item in value]
  if isinstance(value, str) and (value[:1] == "~" or Path(value).is_absolute()):
    return Path(value).name
  return value


def _program(run: OpenedRun) -> tuple[bytes, dict[str, Any], list[str]]:
  """Return the exported prediction, its inputs in words, and its platforms.

  It takes a dictionary of the fields that the model reads, as the data set
  stores them, of any number of examples.
  """
  outputs, variables = run.predictor.outputs, run.variables
  predict = lambda examples: outputs(variables, examples)
  stored = dict(run.simulator.data.train.examples)
  # Of a fixed number of examples, JAX leaves out the inputs that are not read.
  fixed = _exported(predict, _specs(stored, 1), _PLATFORMS[:1])
  fields = sorted(stored)  # as JAX sorts them
  read = {fields[i]: stored[fields[i]] for i in fixed.module_kept_var_idx}
  (batch,) = jax.export.symbolic_shape("b")
  specs = _specs(read, batch)
  try:
    program = _exported(predict, specs, _PLATFORMS[:1])
  except Exception as error:  # whatever a model's code raises
    raise ExportError(
      f"model.name={run.config.model.name!r} cannot be exported for any number"
      f" of examples ({one_line(error)[:200]}); let its code take x.shape[0],"
      " not len(x)."
    ) from error
  platforms = [*_PLATFORMS[:1]]
  for platform in _PLATFORMS[1:]:
    with contextlib.suppress(Exception):  # a layer that the platform lacks
      program = _exported(predict, specs, [*platforms, platform])
      platforms.append(platform)
  inputs = {
    field: {"dtype": x.dtype.name, "shape": ["b", *x.shape[1:]]}
    for field, x in specs.items()
  }
  return bytes(program.serialize()), inputs, platforms


def _exported(
  predict: Callable[..., Any],
  specs: Mapping[str, jax.ShapeDtypeStruct],
  platforms: Sequence[str],
) -> jax.export.Exported:
  """Return the exported prediction.

  Of the code that it was made of it names no files: its debug information would
  tell whose machine exported it.
  """
  before = {name: getattr(jax.config, name) for name in _LOCATIONS}
  try:
    for name, value in _LOCATIONS.items():
      jax.config.update(name, value)
    return jax.export.export(jax.jit(predict), platforms=platforms)(specs)
  finally:
    for name, value in before.items():
      jax.config.update(name, value)


def _specs(
  stored: Mapping[str, np.ndarray], batch: Any
) -> dict[str, jax.ShapeDtypeStruct]:
  """Return the shapes and dtypes of batches of stored examples."""
  return {
    field: jax.ShapeDtypeStruct(
      (batch, *x.shape[1:]), jax.dtypes.canonicalize_dtype(x.dtype)
    )
    for field, x in stored.items()
  }
