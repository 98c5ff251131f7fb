"""Weights & Biases, online or offline.

Its client hands rows to a process of its own, which keeps them in the workdir
and uploads them. So a row is sent when that process has it; after a kill, what
it brought to the server, or offline to its files, is what counts.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedjax_sim.core import optional, urls, validate
from fedjax_sim.reporting.trackers import wandb_files
from fedjax_sim.reporting.trackers.protocol import (
  Opened,
  Row,
  RunFacts,
  Status,
  Tracker,
)

if TYPE_CHECKING:
  from wandb import Run

_EXIT = {"finished": 0, "failed": 1, "killed": 130}


def wandb(
  project: str | None = None,
  entity: str | None = None,
  group: str | None = None,
  run_name: str | None = None,
  run_id: str | None = None,
  mode: str | None = None,
  timeout: float = 30.0,
) -> Tracker:
  """Send metrics, config and results to Weights & Biases.

  Args:
    project: None: `WANDB_PROJECT`, or fedjax_sim.
    entity: a user or a team; None: `WANDB_ENTITY`, or the user's default.
    group: of runs that belong together; None: `WANDB_RUN_GROUP`, or none.
    run_name: None: the workdir's name.
    run_id: a run to join; None: `WANDB_RUN_ID`, or a run of its own.
    mode: "online" or "offline", for `wandb sync` later; None: `WANDB_MODE`, or
      online.
    timeout: seconds that the server has to answer the start of a run, and, at
      the end, that uploads may take.

  Raises:
    ModuleNotFoundError: wandb is not installed.
    TypeError, ValueError: the mode is unknown, or timeout no number > 0.
  """
  optional.require("wandb", "wandb", "The tracker wandb")
  if mode not in (None, "online", "offline"):
    raise ValueError(f"mode={mode!r} is unknown; give online or offline.")
  validate.number("timeout", timeout, gt=0)
  return _WandB(project, entity, group, run_name, run_id, mode, timeout)


class _WandB(Tracker):
  _run: Run
  _overdue = ""

  def __init__(
    self,
    project: str | None,
    entity: str | None,
    group: str | None,
    run_name: str | None,
    run_id: str | None,
    mode: str | None,
    timeout: float,
  ):
    self._project = project or os.environ.get("WANDB_PROJECT", "fedjax_sim")
    self._entity, self._group = entity, group
    self._run_name, self._joined = run_name, run_id
    self._mode, self._timeout = mode, timeout
    server = urls.redacted_url(os.environ.get("WANDB_BASE_URL", ""))
    team = entity or os.environ.get("WANDB_ENTITY")
    self.place = " ".join(filter(None, (server, team, self._project)))

  def open(self, run: RunFacts) -> Opened:
    # Its reports of itself would hold up the end of a process without network.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    try:
      self._run = self._init(run)
    except Exception:
      wandb.teardown()  # or the next try finds the run's id in use
      raise
    tags = {"versions": dict(run.tags)}
    self._run.config.update(tags, allow_val_change=True)
    if self._run.offline:
      sent = wandb_files.newest_step(run.folder / "wandb", self._run.id)
    else:
      sent = self._run.step - 1  # the server's last one, if it is resumed
    warning = ""
    if sent >= 0 and self._run.id not in (run.run_id, run.key):
      warning = (
        f"the run {self._run.id} has rows through step {sent} that this workdir"
        " did not send, and W&B takes no earlier ones; give each workdir a run"
        " of its own: unset run_id and WANDB_RUN_ID."
      )
    return Opened(self._run.id, sent, warning=warning)

  def _init(self, run: RunFacts) -> Run:
    import wandb

    given = self._joined or os.environ.get("WANDB_RUN_ID")
    return wandb.init(
      project=self._project,
      entity=self._entity,
      group=self._group,
      name=self._run_name or run.name,
      id=given or run.run_id or run.key,
      resume="allow",
      mode=self._mode,  # type: ignore[arg-type]  # checked by `wandb`
      dir=str(run.folder),
      config=dict(run.params),
      allow_val_change=True,
      reinit="create_new",
      settings=wandb.Settings(
        console="off",  # the run's output is its own
        silent=True,
        init_timeout=self._timeout,
        finish_timeout=self._timeout,
        finish_timeout_raises=True,
      ),
    )

  def send(self, rows: Sequence[Row]) -> None:
    for row in rows:
      metrics = {k: v for k, v in row.items() if k != "round"}
      self._run.log(metrics, step=int(row["round"]), commit=True)

  def close(self, status: Status, files: Sequence[Path]) -> None:
    if self._overdue:
      raise TimeoutError(self._overdue)
    if files:
      self._send_files(files)
    try:
      self._run.finish(exit_code=_EXIT[status])
    except TimeoutError:
      self._overdue = (
        f"uploads took longer than {self._timeout:g} s; `wandb sync` of the"
        " folder wandb in the workdir goes on with them"
      )
      raise TimeoutError(self._overdue) from None

  def _send_files(self, files: Sequence[Path]) -> None:
    import wandb

    results = wandb.Artifact(f"results-{self._run.id}", type="results")
    for file in files:  # which nobody changes any more: no copy is needed
      results.add_file(str(file), policy="immutable")
    self._run.log_artifact(results)
