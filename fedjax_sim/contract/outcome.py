"""What a check says: passed, failed with an example, or not applicable."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import NamedTuple


class Passed(NamedTuple):
  """The part keeps to this rule.

  Attributes:
    text: what was seen, in a few words.
  """

  text: str = ""

  @property
  def label(self) -> str:
    """What a line begins with."""
    return "passed"


class Failed(NamedTuple):
  """The part breaks this rule.

  Attributes:
    text: the smallest case in which it does, and how to mend it.
  """

  text: str

  @property
  def label(self) -> str:
    """What a line begins with."""
    return "FAILED"


class NotApplicable(NamedTuple):
  """The rule says nothing about the part.

  Attributes:
    text: why not.
  """

  text: str

  @property
  def label(self) -> str:
    """What a line begins with."""
    return "not applicable"


Outcome = Passed | Failed | NotApplicable


class Line(NamedTuple):
  """A check and what became of it.

  Attributes:
    name: of the check, such as "lanes".
    outcome: what it found.
  """

  name: str
  outcome: Outcome

  @property
  def failed(self) -> bool:
    """Whether the part breaks the rule."""
    return isinstance(self.outcome, Failed)


def shown(line: Line, width: int = 80) -> str:
  """Return a line as text; what is too long goes on below.

  Args:
    line: of a check.
    width: columns at most.
  """
  first = len("not applicable")
  head = f"{line.outcome.label:<{first}}  {line.name}"
  text = f"{head}: {line.outcome.text}" if line.outcome.text else head
  return textwrap.fill(
    text,
    width,
    subsequent_indent=" " * (first + 4),
    break_long_words=False,
    break_on_hyphens=False,
  )


def counted(lines: Sequence[Line]) -> str:
  """Return how many lines passed, failed, and are not applicable."""
  labels = [line.outcome.label for line in lines]
  return ", ".join(
    f"{labels.count(label)} {label.lower()}"
    for label in ("passed", "FAILED", "not applicable")
  )


def table(lines: Sequence[Line], width: int = 80) -> str:
  """Return lines as text, and how many there are of each kind.

  Args:
    lines: as `check` returns them.
    width: columns at most.
  """
  return "\n".join([*(shown(line, width) for line in lines), counted(lines)])
