"""When a run evaluates, saves checkpoints and ends."""

from __future__ import annotations

import dataclasses

from fedjax_sim.core import validate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timetable:
  """When a run evaluates, saves and ends.

  Attributes:
    rounds: the last round.
    eval_every: evaluate after every so many rounds, and after the last.
    test_every: the same for the central test set alone.
    initial_eval: evaluate before the first round, too.
    checkpoint_every: save after every so many rounds, and after the last.
    keep_checkpoints: how many of the newest to keep, >= 2.
    snapshot_every: save after every so many rounds, and keep all of these; None
      for no more than the newest.
    wanted: rounds that were asked for, of which a budget may leave fewer.

  Raises:
    TypeError, ValueError: a number is not whole or too small.
  """

  rounds: int
  eval_every: int
  test_every: int
  initial_eval: bool
  checkpoint_every: int
  keep_checkpoints: int
  snapshot_every: int | None
  wanted: int

  def __post_init__(self) -> None:
    validate.integer("server.rounds", self.rounds)
    validate.integer("server.eval_every", self.eval_every)
    validate.integer("server.test_every", self.test_every)
    validate.boolean("server.initial_eval", self.initial_eval)
    validate.integer("runtime.checkpoint_every", self.checkpoint_every)
    validate.integer("runtime.keep_checkpoints", self.keep_checkpoints, ge=2)
    if self.snapshot_every is not None:
      validate.integer("server.snapshot_every", self.snapshot_every)

  @property
  def longest_stretch(self) -> int:
    """The most rounds in a row after which there is nothing to do."""
    return min(self.rounds, *self.stops)

  @property
  def stops(self) -> tuple[int, ...]:
    """The numbers of rounds at whose multiples there is something to do."""
    return self.eval_every, self.test_every, *self._saving

  @property
  def _saving(self) -> list[int]:
    """The numbers of rounds at whose multiples the run is saved."""
    return [n for n in (self.checkpoint_every, self.snapshot_every) if n]

  def saved(self, done: int) -> bool:
    """Return whether a checkpoint is due after `done` rounds."""
    return done == self.rounds or any(done % n == 0 for n in self._saving)

  def evaluated(self, done: int) -> list[str]:
    """Return the evaluation sets that are due after `done` rounds."""
    due = lambda every: done % every == 0 or done == self.rounds
    if done == 0 and not self.initial_eval:
      return []
    clients = ["seen", "unseen"] if due(self.eval_every) else []
    return (["test"] if due(self.test_every) else []) + clients
