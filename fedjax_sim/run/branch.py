"""Branch a run: begin at a checkpoint of another one, with other settings.

The branch goes on with the round after the checkpoint. It takes over the model,
and of the rest of the state whatever its own settings can go on with.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from fedjax_sim import config as configs
from fedjax_sim.config.build import Experiment, privacy
from fedjax_sim.config.completion import complete
from fedjax_sim.core import PyTree, Variables, validate
from fedjax_sim.data import workdir_on_disk
from fedjax_sim.distributed import processes
from fedjax_sim.engine.state import RunState
from fedjax_sim.reporting import read_metrics, write_atomically
from fedjax_sim.run.changes import (
  ORIGIN,
  decisive,
  read_config,
  stored_config,
)
from fedjax_sim.run.checkpoint_files import first_line, rounds_in
from fedjax_sim.run.checkpoint_reader import CheckpointReader, Restored
from fedjax_sim.run.opened import rebuild
from fedjax_sim.run.workdir import ConfigChangedError, WorkdirError
from fedjax_sim.simulation.simulator import Simulator

FLAG = "--branch-from"
_PARTS = {  # of a state, besides the model
  "server": "the server's state",
  "clients": "the clients' states",
  "shared": "the states of transforms",
  "sampler": "the sampler's state",
}
_OF_ACCOUNTS = (
  *("privacy", "local_privacy", "aggregator", "sampler"),
  *("transforms", "leakage"),  # whose metrics are copied, too
)


class Origin(NamedTuple):
  """Where a branch begins; in the branch's `config.json`.

  Attributes:
    workdir: of the run that it branches from, absolute.
    round: of the checkpoint.
  """

  workdir: str
  round: int


def origin_of(folder: Path, text: str) -> Origin | None:
  """Return where the run in a workdir branches from; None: from nowhere.

  Args:
    folder: the workdir of the branch, which may hold it already.
    text: "WORKDIR" or "WORKDIR:ROUND"; "" where no branch is asked for.

  Raises:
    WorkdirError: there is no such checkpoint.
    ValueError: it is a URL.
    ConfigChangedError: the workdir holds a run that branched elsewhere.
  """
  stored = read_config(folder)
  begun = (stored or {}).get(ORIGIN)
  before = None if begun is None else Origin(**begun)
  if not text:
    return before
  workdir_on_disk(text, FLAG)
  place, _, number = text.rpartition(":")
  if not place or not number.isdecimal():
    place, number = text, ""
  other = Path(place).absolute()
  if stored is not None:
    same = before is not None and before.workdir == str(other)
    if not same or number not in ("", str(getattr(before, "round", ""))):
      where = "no other run" if before is None else ":".join(map(str, before))
      raise ConfigChangedError(
        f"{FLAG}={text}: the run in {folder} branched from {where}; take"
        " another --workdir."
      )
    return before
  rounds = rounds_in(other / "checkpoints")
  if not rounds:
    raise WorkdirError(
      f"{FLAG}={text}: {other} has no checkpoints; name the workdir of a run."
    )
  if number and int(number) not in rounds:
    raise WorkdirError(
      f"{FLAG}={text}: there is no checkpoint of round {number}; there are"
      f" those of {', '.join(map(str, rounds))}. A run keeps more with"
      " runtime.keep_checkpoints or server.snapshot_every."
    )
  return Origin(str(other), int(number) if number else rounds[-1])


class Branch(NamedTuple):
  """What a branch begins with.

  Attributes:
    state: on the host.
    lines: what was taken over and what begins anew, for the user.
  """

  state: RunState
  lines: list[str]


def take_over(
  origin: Origin,
  experiment: Experiment,
  fresh: RunState,
  data_digest: str,
  account: Mapping[str, Any],
) -> Branch:
  """Return the state that a branch begins with.

  All processes call it; the first one alone reads the checkpoint.

  Args:
    origin: where it begins.
    experiment: the branch's.
    fresh: the state before the branch's first round, on the host.
    data_digest: of the branch's data.
    account: the branch's account of the rounds that are done, as in
      checkpoints.

  Returns:
    What the branch begins with; `fresh` in all processes but the first one.

  Raises:
    ConfigChangedError: the model is another one, there is no round left, or a
      private run's account would not hold.
    WorkdirError: the checkpoint is damaged, or the origin cannot be rebuilt.
  """
  folder, now = Path(origin.workdir), experiment.config
  last = experiment.timetable.rounds
  if last <= origin.round:
    raise ConfigChangedError(
      f"server.rounds={last}: the branch begins after round {origin.round};"
      " give more."
    )

  def read_origin() -> dict[str, Any]:
    stored = stored_config(folder)
    if stored is None:
      raise WorkdirError(f"{FLAG}={folder}: it holds no run any more.")
    return configs.resolved(stored)

  config = complete(ConfigDict(processes.from_first(read_origin)))
  if experiment.simulator.log_clients and not config.server.client_log:
    raise ConfigChangedError(
      f"server.client_log=True: {folder} logged no clients, so the log would"
      " lack the rounds before the branch; set it to False."
    )
  if now.model.initial not in (None, config.model.initial):
    raise ConfigChangedError(
      f"model.initial={now.model.initial!r}: a branch begins with its origin's"
      f" model; leave out one of model.initial and {FLAG}."
    )
  before = rebuild(folder, config, runtime=now.runtime.to_dict())
  begun = Branch(fresh, [])

  def take() -> None:
    nonlocal begun
    restored = _restored(folder, origin.round, before)
    same_data = restored.facts["data"] == data_digest
    _check_account(config, now, restored, account, same_data)
    same_metrics = same_data and _measured(config) == _measured(now)
    taken, missing = _grafted(
      restored.state,
      fresh,
      before,
      experiment.simulator,
      same_data,
      same_metrics,
    )
    taken = taken._replace(round=restored.state.round)
    lines = _lines(origin, config, now, missing, same_data)
    begun = Branch(taken, list(lines))

  processes.from_first(take)
  return begun


def _measured(config: ConfigDict) -> dict[str, Any]:
  """Return the fields that the meaning of metrics rests on."""
  fields = dict(configs.fields_of(config))
  named = {k: v for k, v in fields.items() if k.startswith(("data.", "model."))}
  # The data are compared themselves, and the first weights are long gone.
  for field in ("data.path", "model.initial", "model.initial_only"):
    named.pop(field, None)
  return named


def copy_rows(origin: Origin, folder: Path, logged: bool) -> None:
  """Begin the branch's metrics with the origin's, and its log of clients.

  Args:
    origin: where the branch begins.
    folder: the branch's workdir.
    logged: whether the branch logs its clients.

  Raises:
    ValueError, OSError: the origin's metrics are damaged or missing.
  """
  source = Path(origin.workdir) / "metrics.jsonl"
  kept = [row for row in read_metrics(source) if row["round"] <= origin.round]
  lines = source.read_bytes().splitlines(keepends=True)[: len(kept)]
  write_atomically(folder / "metrics.jsonl", b"".join(lines))
  parts, table = "client_rounds", "client_rounds.parquet"
  # A process that was killed here may have left those of another origin.
  shutil.rmtree(folder / parts, ignore_errors=True)
  (folder / table).unlink(missing_ok=True)
  if logged and (source.parent / parts).exists():
    shutil.copytree(source.parent / parts, folder / parts)
  if logged and (source.parent / table).exists():
    shutil.copyfile(source.parent / table, folder / table)


def _restored(folder: Path, round_: int, simulator: Simulator) -> Restored:
  reader = CheckpointReader(folder / "checkpoints")
  with contextlib.closing(reader):
    try:
      return reader.read(round_, simulator.states.host_shapes)
    except (MemoryError, PermissionError):
      raise
    except Exception as error:  # whatever a torn file makes orbax raise
      raise WorkdirError(
        f"{FLAG}={folder}:{round_}: the checkpoint cannot be read"
        f" ({first_line(error)}); name another round."
      ) from error


def _check_account(
  before: ConfigDict,
  now: ConfigDict,
  restored: Restored,
  account: Mapping[str, Any],
  same_data: bool,
) -> None:
  """Refuse a branch whose epsilon would not count the rounds before it."""
  if not (privacy.draws_noise(before) or privacy.draws_noise(now)):
    return
  counted = lambda facts: {k: v for k, v in facts.items() if k != "epsilon"}
  odd = validate.differences(
    counted(restored.facts.get("privacy", {})), counted(account)
  )
  for section in _OF_ACCOUNTS:
    fields = [dict(configs.fields_of(c[section])) for c in (before, now)]
    for tree in fields:
      tree.pop("noise_seed", None)
    odd += validate.differences(*fields)
  odd += ["the data: other ones"] * (not same_data)
  if odd:
    raise ConfigChangedError(
      "A branch of a private run, or one that becomes private, has the same"
      f" account, and differs: {'; '.join(odd[:5])}. Begin a run from the model"
      " alone, by model.initial; what its epsilon then covers is yours to say."
    )


def _grafted(
  old: RunState,
  fresh: RunState,
  before: Simulator,
  now: Simulator,
  same_data: bool,
  same_metrics: bool,
) -> tuple[RunState, list[str]]:
  """Return the fresh state with what fits of the old one, and what did not.

  Args:
    old: of the origin.
    fresh: before the branch's first round.
    before: the origin's simulator.
    now: the branch's simulator.
    same_data: whether both train on the same data.
    same_metrics: whether evaluations measure the same, too.
  """
  missing: list[str] = []
  parts: dict[str, PyTree] = {}
  for name, words in _PARTS.items():
    a, b = getattr(old, name), getattr(fresh, name)
    follows_clients = name in ("clients", "sampler")
    if _alike(a, b) and (same_data or not follows_clients):
      parts[name] = a
    elif jax.tree.leaves(b) or jax.tree.leaves(a):
      missing.append(words)
  if "server" not in parts:
    parts["server"] = _with_model(old, fresh, before, now)
  watch = fresh.watch
  for name, words in (
    ("schedules", "what schedules have seen"),
    ("best", "the best model so far"),
  ):
    a, b = getattr(old.watch, name), getattr(watch, name)
    if _alike(a, b) and same_metrics:
      watch = watch._replace(**{name: a})
    elif jax.tree.leaves(b) or jax.tree.leaves(a):
      missing.append(words)
  return fresh._replace(**parts, watch=watch), missing


def _alike(a: PyTree, b: PyTree) -> bool:
  """Return whether two trees have the same structure, shapes and dtypes."""
  kinds = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
  structures = jax.tree.structure(a), jax.tree.structure(b)
  return len({*structures}) == 1 and kinds(a) == kinds(b)


def _with_model(
  old: RunState, fresh: RunState, before: Simulator, now: Simulator
) -> PyTree:
  """Return the fresh server state, with the model of the old one."""
  model: Variables = before.algorithm.variables(old.server)
  wanted = now.algorithm.variables(fresh.server)
  if not _alike(model._replace(frozen=()), wanted._replace(frozen=())):
    raise ConfigChangedError(
      f"{FLAG}: the model is another one than the branch's; begin from some of"
      " its weights, by model.initial of what `fedjax-sim export` writes."
    )
  if now.algorithm.with_model is None:
    raise ConfigChangedError(
      f"{FLAG}: the branch's algorithm cannot go on with another one's model;"
      " begin from its weights, by model.initial of what `fedjax-sim export`"
      " writes."
    )
  changed = now.algorithm.with_model(fresh.server, model)
  server: PyTree = jax.device_get(changed)
  return server


def _lines(
  origin: Origin,
  before: ConfigDict,
  now: ConfigDict,
  missing: list[str],
  same_data: bool,
) -> Iterator[str]:
  """Yield what is said of a branch before it starts."""
  fields = [decisive(configs.resolved(config)) for config in (before, now)]
  odd = configs.differences(*fields)
  yield (
    f"Branching from {origin.workdir} after round {origin.round}, with"
    f" {'; '.join(odd) if odd else 'the same settings'}."
  )
  if not same_data:
    yield (
      "The data are other ones than the origin's: what it trained on may be"
      " among what is held out now, and its metrics are those of its own data."
    )
  if missing:
    yield (
      "The model is taken over. These begin anew, as the new settings cannot go"
      f" on with them: {', '.join(missing)}."
    )
  if now.privacy.mechanism is not None:
    yield (
      "Both runs' rounds after that one are about the same clients: what they"
      " cost together is counted by `fedjax-sim privacy compose`."
    )
