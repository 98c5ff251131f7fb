"""Branch a run: begin at a checkpoint of another one, with other settings.

The branch goes on with the round after the checkpoint. It takes over the model,
and of the rest of the state whatever its own settings can go on with.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ml_collections import ConfigDict

from fedjax_sim import config as configs
from fedjax_sim.config.build import Experiment, privacy
from fedjax_sim.config.completion import complete
from fedjax_sim.core import validate
from fedjax_sim.data import workdir_on_disk
from fedjax_sim.distributed import processes
from fedjax_sim.engine.state import RunState
from fedjax_sim.reporting import read_metrics, write_atomically
from fedjax_sim.run.changes import (
  ORIGIN,
  decisive,
  read_config,
  stored_config,
  with_tuples,
)
from fedjax_sim.run.checkpoint_files import first_line, rounds_in
from fedjax_sim.run.checkpoint_reader import CheckpointReader
from fedjax_sim.run.graft import Side, after_end, fields_by_content, grafted
from fedjax_sim.run.opened import rebuild
from fedjax_sim.run.resume import has_ended
from fedjax_sim.run.workdir import ConfigChangedError, WorkdirError

FLAG = "--branch-from"
_OF_ACCOUNTS = (  # fields; leakage's metrics are copied, too
  r"privacy\.(?!noise_seed$).*"
  r"|(local_privacy|aggregator|sampler|transforms|leakage)\..*"
)
_FILES = ("path", "lookup", "label_lookup")  # of the section `data`
_DATA_GONE = (
  " That is the origin's data.path, and the branch has other data; restore"
  " those of the origin there."
)
T = TypeVar("T")


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

  def read_origin() -> tuple[dict[str, Any], str]:
    stored = stored_config(folder)
    if stored is None:
      raise WorkdirError(f"{FLAG}={folder}: it holds no run any more.")
    facts = _read(origin, lambda reader: reader.facts(origin.round))
    return configs.resolved(stored), facts["data"]

  then, trained_on = processes.from_first(read_origin)
  config = complete(ConfigDict(with_tuples(then)))
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
  same_data = trained_on == data_digest
  before = rebuild(
    folder,
    _finding_data(config, now) if same_data else config,
    runtime=now.runtime.to_dict(),
    hint=_DATA_GONE,
  )
  begun = Branch(fresh, [])

  def take() -> None:
    nonlocal begun
    like = before.states.host_shapes
    restored = _read(origin, lambda reader: reader.read(origin.round, like))
    # Of code by its content, where it is known of both.
    sources = restored.facts.get("sources", {})
    known = sources.keys() & experiment.sources.keys()
    source, ours = (
      Side(simulator, fields_by_content(tree, {k: own[k] for k in known}))
      for simulator, tree, own in (
        (before, then, sources),
        (experiment.simulator, configs.resolved(now), experiment.sources),
      )
    )
    source = source._replace(folder=folder)
    if privacy.draws_noise(config) or privacy.draws_noise(now):
      _check_account(source, ours, restored.facts, account, same_data)
    old, lines = restored.state, list(_lines(origin, config, now, same_data))
    if has_ended(restored.facts, origin.round):
      old = after_end(old, source)
      if old is not restored.state:
        best = int(old.watch.best[before.best_metrics[0]].round)
        lines.append(
          f"The origin ended after round {origin.round}, and"
          f" server.revert_to_best goes on with its model of round {best}."
        )
    taken, missing = grafted(old, fresh, source, ours, same_data)
    if missing:
      lines.append(
        "The model is taken over. These begin anew, as the new settings cannot"
        f" go on with them: {', '.join(missing)}."
      )
    begun = Branch(taken._replace(round=old.round), lines)

  processes.from_first(take)
  return begun


def _finding_data(config: ConfigDict, now: ConfigDict) -> ConfigDict:
  """Return the origin's config, with its data where the branch's lie.

  Args:
    config: of the origin, complete, whose files may have moved.
    now: of the branch, complete, on the same data.
  """
  tree = config.to_dict()
  if config.data.name == now.data.name:
    tree["data"] |= {k: now.data[k] for k in _FILES if k in now.data}
  return ConfigDict(tree)


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


def _read(origin: Origin, read: Callable[[CheckpointReader], T]) -> T:
  """Return what is read of the checkpoint that a branch begins at."""
  reader = CheckpointReader(Path(origin.workdir) / "checkpoints")
  with contextlib.closing(reader):
    try:
      return read(reader)
    except (MemoryError, PermissionError):
      raise
    except Exception as error:  # whatever a torn file makes orbax raise
      raise WorkdirError(
        f"{FLAG}={origin.workdir}:{origin.round}: the checkpoint cannot be read"
        f" ({first_line(error)}); name another round."
      ) from error


def _check_account(
  before: Side,
  now: Side,
  facts: Mapping[str, Any],
  account: Mapping[str, Any],
  same_data: bool,
) -> None:
  """Refuse a branch whose epsilon would not count the rounds before it."""
  counted = lambda facts: {k: v for k, v in facts.items() if k != "epsilon"}
  odd = validate.differences(
    counted(facts.get("privacy", {})), counted(account)
  )
  odd += _turns(before, now)
  odd += validate.differences(
    before.matching(_OF_ACCOUNTS), now.matching(_OF_ACCOUNTS)
  )
  odd += ["the data: other ones"] * (not same_data)
  if odd:
    raise ConfigChangedError(
      "A branch of a private run, or one that becomes private, has the same"
      f" account, and differs: {'; '.join(odd[:5])}. Keep what the origin has;"
      " or begin a run from the model alone, by model.initial, and what its"
      " epsilon then covers is yours to say."
    )


def _turns(before: Side, now: Side) -> list[str]:
  """Return how a client's turns differ, each of which is counted once.

  Who has which turn follows from the seed: with another one a client may come
  back sooner than in turn.
  """
  promised = [side.simulator.sampler.participation for side in (before, now)]
  was, period = (1 if part is None else part.period for part in promised)
  seeds = before.simulator.seed, now.simulator.seed
  if was != period:
    return [f"rounds from a client's turn to its next: {was} -> {period}"]
  if period > 1 and seeds[0] != seeds[1]:
    return [f"seed, by which clients take turns: {seeds[0]} -> {seeds[1]}"]
  return []


def _lines(
  origin: Origin,
  before: ConfigDict,
  now: ConfigDict,
  same_data: bool,
) -> Iterator[str]:
  """Yield what is said of a branch's settings before it starts."""
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
  if now.privacy.mechanism is not None:
    yield (
      "Both runs' rounds after that one are about the same clients: what they"
      " cost together is counted by `fedjax-sim privacy compose`."
    )
