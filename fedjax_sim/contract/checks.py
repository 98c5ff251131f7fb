"""The table of checks, and how a part is put through it.

Each check is a function that returns `Passed`, `Failed` or `NotApplicable`; the
table says what each kind of part goes through.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from fedjax_sim.contract import (
  part_checks,
  random_checks,
  round_checks,
  sampler_checks,
  task_checks,
)
from fedjax_sim.contract.blame import blamed
from fedjax_sim.contract.outcome import (
  Failed,
  Line,
  NotApplicable,
  Outcome,
)
from fedjax_sim.contract.rounds import Rounds
from fedjax_sim.contract.setting import Setting, setting_of

Run = Callable[[Rounds], Outcome]


class Check(NamedTuple):
  """A check, and what it is for each kind of part.

  Attributes:
    name: what its line is called.
    of: kind -> the check, or why it says nothing about that kind. The key ""
      holds for all other kinds; a kind that is not there has no such line.
  """

  name: str
  of: Mapping[str, Run | str]


@dataclasses.dataclass(frozen=True)
class _OfSetting:
  """A check of the part itself, without a compiled round around it."""

  function: Callable[[Setting], Outcome]

  def __call__(self, rounds: Rounds) -> Outcome:
    """Return what the check says of the part."""
    return self.function(rounds.setting)


_HOST = "who takes part is drawn on the host"
_ROUND = "a sampler trains nobody"


def _in_rounds(function: Run, reason: str = _ROUND) -> dict[str, Run | str]:
  return {"": function, "sampler": reason}


SHAPES, RECOMPILATION = "dtypes and shapes", "no recompilation"
PLAIN = "plain round"  # without which others would compare nothing
CHECKS = (
  Check(
    SHAPES,
    {
      "": round_checks.shapes,
      "sampler": _OfSetting(sampler_checks.state),
    },
  ),
  Check(
    RECOMPILATION,
    {
      "": round_checks.recompilation,
      "sampler": _OfSetting(sampler_checks.sizes),
    },
  ),
  Check("draws", {"sampler": _OfSetting(sampler_checks.draws)}),
  Check("random keys", _in_rounds(random_checks.keys)),
  Check(PLAIN, _in_rounds(round_checks.plain)),
  Check("init", {"model": _OfSetting(task_checks.init)}),
  Check("lanes", _in_rounds(round_checks.lanes, _HOST)),
  Check("devices", _in_rounds(round_checks.devices, _HOST)),
  Check("order of clients", _in_rounds(round_checks.order, _HOST)),
  Check("empty cohort", _in_rounds(round_checks.empty)),
  Check("absent clients", _in_rounds(round_checks.absent)),
  Check(
    "padding",
    {
      **_in_rounds(round_checks.padding),
      "model": _OfSetting(task_checks.padding),
    },
  ),
  Check(
    "all-padding batch",
    {
      **_in_rounds(round_checks.all_padding),
      "model": _OfSetting(task_checks.all_padding),
    },
  ),
  Check("NaN in one client", _in_rounds(round_checks.not_finite)),
  Check(
    "zero updates",
    {
      "aggregator": _OfSetting(part_checks.zeros),
      "transform": _OfSetting(part_checks.zeros),
    },
  ),
  Check("metrics", {"model": _OfSetting(task_checks.metrics)}),
  Check(
    "resume",
    {
      "": round_checks.resume,
      "sampler": _OfSetting(sampler_checks.resume),
    },
  ),
  Check(
    "promises",
    {
      "aggregator": _OfSetting(part_checks.promises),
      "algorithm": random_checks.draws_noise,
      "transform": _OfSetting(random_checks.adds_noise),
      "sampler": _OfSetting(sampler_checks.promise),
    },
  ),
  Check(
    "weights under privacy",
    {
      "algorithm": part_checks.private_weights,
      "aggregator": "a private run takes a plain sum in its place",
      "": "clients' weights are the algorithm's",
    },
  ),
)


def check(part: Any, kind: str | None = None) -> list[Line]:
  """Put a part of your own through the contract tests.

  It trains a tiny federation of five clients, on the CPU within seconds, with
  logistic regression, FedAvg and a weighted mean around it. Call `setup(2)`
  first for two devices on a CPU.

  Args:
    part: the function that makes an algorithm, aggregator, transform, sampler
      or model, as a config names it; 'path/to/file.py:name'; or, but for an
      algorithm, the part itself.
    kind: "algorithm", "aggregator", "transform", "sampler" or "model"; None: it
      follows from what the function is annotated to return, or takes.

  Returns:
    A line for each check.

  Raises:
    TypeError, ValueError: it is no such part.

  Example:
    lines = fs.check(my_aggregator)
    assert not [line for line in lines if line.failed]
  """
  return list(examine(setting_of(part, kind)))


def examine(
  setting: Setting, checks: Sequence[Check] = CHECKS
) -> Iterator[Line]:
  """Yield a line for each check, as soon as it is done.

  Args:
    setting: the part, and all that runs with it.
    checks: some of `CHECKS`, in their order.
  """
  rounds = Rounds(setting)
  broken = ""
  for name, of in checks:
    function = of.get(setting.kind, of.get(""))
    if function is None:
      continue
    if isinstance(function, str):
      outcome: Outcome = NotApplicable(function)
    elif broken and _blocked(broken, function):
      outcome = NotApplicable(f"no round to look at: see {broken}")
    else:
      outcome = _outcome(function, rounds)
    if isinstance(outcome, Failed) and setting.kind != "sampler":
      broken = broken or name * (name in (SHAPES, RECOMPILATION, PLAIN))
    yield Line(name, outcome)


def _blocked(broken: str, function: Run) -> bool:
  """Return whether a check says nothing after another one failed."""
  itself = isinstance(function, _OfSetting)  # the part, without a round
  return not (broken == PLAIN and itself)


def _outcome(function: Run, rounds: Rounds) -> Outcome:
  """Return what a check finds; an error that it raises is a failure."""
  try:
    return function(rounds)
  except Exception as error:
    return Failed(blamed(error, rounds.setting.file))
