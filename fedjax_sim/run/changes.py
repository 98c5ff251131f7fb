"""Which fields a run may change when it goes on: none that its past rests on.

A run that is given more rounds goes on as one that had them from the start. So
what made the rounds done, and what follows the evaluations that were made, has
to stay.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from ml_collections import ConfigDict

from fedjax_sim import config as configs
from fedjax_sim.config.build.timetable import Timetable
from fedjax_sim.config.completion import complete
from fedjax_sim.core import validate
from fedjax_sim.run.checkpoint_files import rounds_in
from fedjax_sim.run.workdir import (
  ConfigChangedError,
  WorkdirError,
  finished_summary,
  rounds_done,
)
from fedjax_sim.simulation.simulator import Simulator

ORIGIN = "origin"  # in config.json, where a branch began
ROUNDS = "server.rounds"
_EVALUATION = ("server.eval_every", "server.test_every", "server.initial_eval")
FREE = (
  ROUNDS,
  *_EVALUATION,
  "server.snapshot_every",
  "runtime.checkpoint_every",
  "runtime.keep_checkpoints",
  "runtime.peer_timeout",
  "runtime.residency",
  "runtime.rounds_per_dispatch",
  "runtime.start_timeout",
)
_FREE_SECTIONS = ("trackers",)  # no number of a run follows them

# Field -> its value before and now.
Changes = Mapping[str, tuple[Any, Any]]


def changes_since(folder: Path, resolved: Mapping[str, Any]) -> Changes | None:
  """Return the fields that change where the run in a workdir goes on.

  Args:
    folder: the workdir.
    resolved: the config of the run to be, complete, as JSON holds it.

  Returns:
    The changed fields; None if the workdir holds no run.

  Raises:
    WorkdirError: `config.json` is missing, or checkpoints are; or a file is
      damaged.
    ConfigChangedError: a field differs that the rounds done rest on, or there
      are fewer rounds than were done.
  """
  stored = read_config(folder)
  if stored is None:
    return None
  stored.pop(ORIGIN, None)
  now = _fields(resolved)
  # As they stand, before anything that a stored config names is imported.
  before = _fields(stored)
  changed = {
    name: (before.get(name), now.get(name))
    for name in sorted(before.keys() | now.keys())
    if before.get(name) != now.get(name)
  }
  # What free sections name is compared as it stands: it may not be there.
  new = {
    name
    for name in changed
    if name not in before and not _in_free_section(name)
  }
  refused = {name for name in changed if not _is_free(name, now)}
  if refused - new:
    _refuse(folder, {name: changed[name] for name in sorted(refused)}, now)
  if new:  # fields that the run's version did not have yet
    completed = stored_config(folder)
    assert completed is not None
    defaults = _fields(configs.resolved(completed))
    for name in new:
      changed[name] = defaults.get(name), now[name]
      if changed[name][0] == changed[name][1]:
        del changed[name]
    if refused := refused & changed.keys():
      _refuse(folder, {name: changed[name] for name in sorted(refused)}, now)
  stays = ROUNDS not in changed and finished_summary(folder, now[ROUNDS])
  _refuse_without_checkpoints(folder, ends=bool(stays))
  done = rounds_done(folder)
  if now[ROUNDS] < done:
    raise ConfigChangedError(
      f"{ROUNDS}={now[ROUNDS]}: the run in {folder} has done {done} rounds;"
      " give as many at least, or take another --workdir."
    )
  return changed


def _refuse_without_checkpoints(folder: Path, *, ends: bool) -> None:
  """Refuse to begin anew where a run has lost its checkpoints.

  Args:
    folder: the workdir.
    ends: whether the run is finished, and stays as it is.

  Raises:
    WorkdirError: a run that was finished once has no checkpoint, or one that
      trained has no folder of them; a run that was killed before its first one
      has that.
  """
  saved = folder / "checkpoints"
  metrics = folder / "metrics.jsonl"
  if rounds_in(saved) or ends:
    return
  summed_up = (folder / "summary.json").exists()
  trained = metrics.exists() and metrics.stat().st_size > 0
  if summed_up or (trained and not saved.exists()):
    raise WorkdirError(
      f"{folder} holds a run without its checkpoints; restore them, or take"
      " another --workdir."
    )


def _refuse(folder: Path, changed: Changes, now: Mapping[str, Any]) -> NoReturn:
  """Refuse changed fields that rounds done rest on.

  Raises:
    ConfigChangedError: names the fields.
  """
  if not any(name in now for name in changed):
    raise ConfigChangedError(
      f"The run in {folder} was begun by another version of fedjax_sim, whose"
      f" configs have other fields ({', '.join(changed)}). Take another"
      " --workdir, or go on with that version."
    )
  pairs = [
    {name: values[i] for name, values in changed.items()} for i in (0, 1)
  ]
  raise ConfigChangedError(
    f"The run in {folder} has another config:"
    f" {'; '.join(validate.differences(*pairs))}. Take the config that it"
    f" began with; or another --workdir, with --branch-from={folder} if it"
    " shall begin with this run's model."
  )


def stored_config(folder: Path) -> ConfigDict | None:
  """Return the config of the run in a workdir, complete.

  Fields that this version has added since then have their defaults. The section
  `trackers` is empty: nothing that reads a run needs their packages and files.

  Args:
    folder: the workdir.

  Returns:
    The config, without the origin of a branch; None if there is no run.

  Raises:
    WorkdirError: `config.json` is missing or damaged.
    ConfigChangedError: it is of another version, which had other fields.
  """
  stored = read_config(folder)
  if stored is None:
    return None
  stored.pop(ORIGIN, None)
  tree = _merged(configs.default_config().to_dict(), with_tuples(stored))
  tree["trackers"] = {}
  try:
    return complete(ConfigDict(tree))
  except (ValueError, TypeError, OSError, ImportError) as error:
    raise ConfigChangedError(
      f"The run in {folder} was begun by another version of fedjax_sim, or with"
      f" files that have changed: {error} Take another --workdir, or go on with"
      " that version and those files."
    ) from error


def read_config(folder: Path) -> dict[str, Any] | None:
  """Return what `config.json` of a workdir holds; None if there is no run.

  Raises:
    WorkdirError: it is missing or damaged.
  """
  path = folder / "config.json"
  if not path.exists():
    if (folder / "summary.json").exists() or rounds_done(folder):
      raise WorkdirError(
        f"{folder} holds a run, but its config.json is missing; restore it, or"
        " take another --workdir."
      )
    return None
  try:
    stored = json.loads(path.read_bytes())
  except ValueError as error:
    raise WorkdirError(
      f"{path} is damaged ({error}); restore it, or take another --workdir."
    ) from error
  if not isinstance(stored, dict):
    raise WorkdirError(
      f"{path} is damaged (it holds no config); restore it, or take another"
      " --workdir."
    )
  return stored


def _merged(tree: Any, stored: Any) -> dict[str, Any]:
  """Return nested dictionaries, with the stored values where both have one."""
  result = dict(tree)
  for key, value in stored.items():
    both = isinstance(value, dict) and isinstance(tree.get(key), dict)
    result[key] = _merged(tree[key], value) if both else value
  return result


def with_tuples(value: Any) -> Any:
  """Return what JSON holds with tuples for its lists, as configs have them."""
  if isinstance(value, dict):
    return {key: with_tuples(item) for key, item in value.items()}
  if isinstance(value, list):
    return tuple(map(with_tuples, value))
  return value


def check_evaluations(
  changes: Changes, simulator: Simulator, timetable: Timetable, done: int
) -> None:
  """Refuse changes after which the run would have followed other evaluations.

  Args:
    changes: of the config.
    simulator: of the run.
    timetable: of the run, as changed.
    done: rounds of the newest checkpoint.

  Raises:
    ConfigChangedError: names the field and what follows evaluations.
  """
  followers = " and ".join(simulator.react.followers)
  if not followers or not done:
    return
  for name in _EVALUATION:
    if name in changes:
      before, now = changes[name]
      raise ConfigChangedError(
        f"{name}: {before} -> {now}: {followers} followed the evaluations of"
        " the rounds done; keep it, or take another --workdir."
      )
  # A run is evaluated at its end, whatever the rounds of evaluation are.
  every = timetable.eval_every, timetable.test_every
  if changes.get(ROUNDS, (None,))[0] == done and any(done % n for n in every):
    raise ConfigChangedError(
      f"{ROUNDS}: {done} -> {changes[ROUNDS][1]}: {followers} followed the"
      f" evaluation at the run's end, after round {done}, which a longer run"
      " would not have had. Take another --workdir, or branch from an earlier"
      " checkpoint by --branch-from=WORKDIR:ROUND."
    )


def decisive(resolved: Mapping[str, Any]) -> dict[str, Any]:
  """Return the sections of a config that numbers of the run follow."""
  return {k: v for k, v in resolved.items() if k not in _FREE_SECTIONS}


def _fields(resolved: Mapping[str, Any]) -> dict[str, Any]:
  return dict(configs.fields_of(ConfigDict(dict(resolved))))


def _is_free(name: str, config: Mapping[str, Any]) -> bool:
  """Return whether no number of the rounds done rests on a field."""
  same_bits = config["runtime.deterministic_reduction"] is not None
  return (
    name in FREE
    or _in_free_section(name)
    or (name == "runtime.devices" and same_bits)
  )


def _in_free_section(name: str) -> bool:
  return name.split(".")[0] in _FREE_SECTIONS
