"""`fedjax-sim privacy`: what noise, cohorts and rounds cost.

Before a run, and after several on the same clients.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedjax_sim.config import flags
from fedjax_sim.core import validate

_QUESTIONS = ("calibrate", "compose", "curve", "epsilon")


def run(arguments: Sequence[str]) -> int:
  """Answer a question on the standard output; return the exit code.

  Args:
    arguments: what follows `fedjax-sim privacy`.

  Raises:
    UsageError: there is no such question, or a flag is wrong.
    TypeError, ValueError: numbers that do not go with each other.
    OSError: a file cannot be written.
  """
  if not arguments or arguments[0].startswith("-"):
    raise flags.UsageError(
      f"privacy: say what to do first, one of {', '.join(_QUESTIONS)}"
    )
  question = validate.one_of("privacy", arguments[0], _QUESTIONS)
  # Accountants import JAX, which takes a while.
  from fedjax_sim.cli import privacy_questions

  answer = getattr(privacy_questions, question)
  print(answer(arguments[1:]))  # noqa: T201
  return 0
