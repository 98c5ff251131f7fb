"""What `fedjax-sim check` does with a part: it needs JAX."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from fedjax_sim import distributed, sampling
from fedjax_sim.config import build, components, default_config, flags
from fedjax_sim.config.build.server import build_sampler, build_transforms
from fedjax_sim.config.completion import complete
from fedjax_sim.config.components import Slot
from fedjax_sim.config.flags import UsageError
from fedjax_sim.contract import KINDS, examine
from fedjax_sim.contract.outcome import counted, shown
from fedjax_sim.contract.setting import (
  COHORT,
  DRAWN,
  POPULATION,
  SIZES,
  Setting,
  annotated_kind,
  counts_like,
  cut,
  federation,
  fitted,
  kind_of,
  stated_kind,
)
from fedjax_sim.core import Algorithm, Task, errors, references, validate

_DEVICES = 2


def check_part(
  part: str, given_kind: str, arguments: Sequence[str], *, own_data: bool
) -> int:
  """Print a line for each check; return 0 if none failed, else 1.

  Args:
    part: a reference, a file with one part, or the name of one of ours.
    given_kind: the value of --kind; "" without one.
    arguments: the flags of the command, for the config that they name.
    own_data: whether they name one.

  Raises:
    UsageError, TypeError, ValueError, OSError, ImportError: as `check.run`.
  """
  if not os.environ.get("JAX_PLATFORMS"):
    jax.config.update("jax_platforms", "cpu")  # where there are two devices
  distributed.setup(_DEVICES)
  # Programs run a few times, so compiling them takes most of the time.
  jax.config.update("jax_disable_most_optimizations", True)
  distributed.devices()  # what is wrong with JAX shows now
  part = _whole(part)
  kind = _kind(part, given_kind)
  field = _slot(part, kind).field
  _, overrides = flags.split(arguments)
  if own_data:
    named = [*arguments, f"--config.{field}={part}"]
    config = flags.parse(named, "config", kind="").config
  else:
    config = flags.overridden(default_config(), {**overrides, field: part})
  setting = setting_of_config(config, part, kind, own_data=own_data)
  model = "" if kind == "model" else f", {config.model.name}"
  _say(f"{part}: {kind}, in {setting.data.name}{model}")
  lines = []
  for line in examine(setting):
    _say(shown(line))
    lines.append(line)
  _say(counted(lines))
  return int(any(line.failed for line in lines))


def _whole(part: str) -> str:
  """Return the part with its name, if it is a file that has one part alone.

  Raises:
    UsageError: it has several, or none that shows.
    BadReferenceError: there is no such file, or it raises an error.
  """
  if references.is_reference(part) or not part.endswith(".py"):
    return part
  functions = references.functions_of("check", part)
  kinds = {name: stated_kind(found) for name, found in functions.items()}
  parts = {name: kind for name, kind in kinds.items() if kind}
  if len(parts) == 1:
    return f"{part}:{next(iter(parts))}"
  if not parts:
    raise UsageError(
      f"check {part}: what its functions make does not show; give"
      f" {part}:NAME --kind={'|'.join(KINDS)}, or annotate what they return, as"
      " in `-> Aggregator`."
    )
  told = ", ".join(f"{part}:{name} ({kind})" for name, kind in parts.items())
  raise UsageError(f"check {part}: it has {len(parts)} parts; give {told}.")


def _say(text: str) -> None:
  print(text, flush=True)  # noqa: T201


def _slot(part: str, kind: str) -> Slot:
  """Return the slot of a config that names the part."""
  if kind == "transform":
    return components.labeled_slot("transforms", part.rpartition(":")[2])
  return components.slots_of(kind)[0]


def _kind(part: str, given: str) -> str:
  """Return which kind of part it is.

  Args:
    part: a reference, or the name of one of ours.
    given: the value of --kind; "" without one.

  Raises:
    UsageError: it does not show.
    UnknownNameError, BadReferenceError, TypeError: there is no such part.
  """
  if given:
    validate.one_of("--kind", given, KINDS)
    if references.is_reference(part):
      stated = annotated_kind(references.load("check", part))
      if stated not in (None, given):
        raise UsageError(
          f"check {part} --kind={given}: it is annotated to return what makes"
          f" it the kind {stated}; leave --kind out, or correct one of them."
        )
    return given
  if not references.is_reference(part):
    registries = {kind: _slot(part, kind).registry for kind in KINDS}
    found = [kind for kind, known in registries.items() if part in known]
    if not found:
      every = {name: kind for kind, x in registries.items() for name in x}
      validate.lookup("check", part, every)
    return found[0]
  function = references.load("check", part)
  kind = kind_of(function)
  if kind is None:
    raise UsageError(
      f"check {part}: what it makes does not show; give --kind="
      f"{'|'.join(KINDS)}, or annotate what it returns, as in `-> Aggregator`."
    )
  return kind


def setting_of_config(
  config: ConfigDict, part: str, kind: str, *, own_data: bool
) -> Setting:
  """Return the part in a tiny federation, with all else as a config says.

  Args:
    config: names the part.
    part: its name.
    kind: which it is.
    own_data: whether its data are the config's, cut to a few clients.

  Raises:
    TypeError, ValueError, OSError, ImportError: the config is wrong.
  """
  config = complete(config)
  data, population, drawn = federation(), POPULATION, DRAWN
  sizes = np.resize(SIZES, population)
  if own_data:
    whole = build.build_data(config)
    data, sizes = cut(whole), whole.train.sizes
    population, drawn = len(sizes), config.server.clients_per_round
  task = build.build_task(config, data)
  algorithm = build.build_algorithm(config, task, data.train.sizes)
  count = min(COHORT, data.train.num_clients)
  cohort = sampling.uniform(data.train.num_clients, count)
  code = inspect.unwrap(_slot(part, kind).factory(part))
  return fitted(
    Setting(
      kind=kind,
      file=errors.code_file(code),
      data=data,
      task=task,
      algorithm=algorithm,
      aggregator=build.build_aggregator(config, cohort, data),
      transforms=tuple(build_transforms(config)),
      private_algorithm=_private(config, task, data.train.sizes, algorithm),
      draw=build_sampler(config, sizes, lambda: counts_like(sizes)),
      population=population,
      drawn=drawn,
    )
  )


def _private(
  config: ConfigDict, task: Task, sizes: np.ndarray, algorithm: Algorithm
) -> Callable[[], Algorithm]:
  """Return what makes the algorithm with uniform weights, if it has them."""
  if "weighting" not in config.algorithm:
    return lambda: algorithm
  uniform = config.copy_and_resolve_references()
  uniform.algorithm.weighting = "uniform"
  return lambda: build.build_algorithm(uniform, task, sizes)
