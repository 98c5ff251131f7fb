"""What devices send to each other, read from a compiled program."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

# Of a collective, how often each of n devices sends the bytes of its result: an
# all-reduce sends its array nearly twice, a piece at a time; all else sends
# what others get.
_SENDS: dict[str, Callable[[int], float]] = {
  "all-reduce": lambda n: 2 * (n - 1) / n,
  "all-reduce-start": lambda n: 2 * (n - 1) / n,
  "all-gather": lambda n: (n - 1) / n,
  "all-gather-start": lambda n: (n - 1) / (n + 1),  # with the operand, size/n
  "all-to-all": lambda n: (n - 1) / n,
  "reduce-scatter": lambda n: n - 1,
  "collective-permute": lambda n: 1,
}
_COLLECTIVE = re.compile(
  r" = (?P<result>\S.*?) (?P<name>(?:all|collective|ragged|reduce-scatter)"
  r"[a-z-]*)(?<!-done)\("
)
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+)[^\[\s]*\[([\d,]*)\]")


def sent_bytes(text: str, devices: int, rounds: int) -> float | None:
  """Return the bytes that a device sends to the others in a round.

  Args:
    text: the compiled program, as XLA prints it. A collective in a loop counts
      once; so no loop but that over rounds may have one.
    devices: how many there are.
    rounds: of a call, which share what is sent outside of the loop.

  Returns:
    The bytes; None if there is a collective that is not known here.
  """
  total, share = 0.0, 1.0
  for line in text.splitlines():
    if line.startswith(("%", "ENTRY")):
      share = 1 / rounds if line.startswith("ENTRY") else 1.0
    found = _COLLECTIVE.search(line)
    if found is None:
      continue
    if found["name"] not in _SENDS:
      return None
    size = sum(map(_nbytes, _ARRAY.findall(found["result"])))
    total += share * _SENDS[found["name"]](devices) * size
  return total


def _nbytes(array: tuple[str, str]) -> int:
  """Return the type and the shape of an array in XLA's text."""
  kind, sides = array
  bits = 8 if kind == "pred" else int(re.sub(r"\D", "", kind))
  return bits // 8 * math.prod(int(n) for n in sides.split(",") if n)
