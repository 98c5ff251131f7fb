"""What a GPU is given to run, read from a program as XLA prints it.

Two texts tell it: the optimized program (`Compiled.as_text()`), whose
instructions are kernels, and the list of its thunks that XLA writes with
`xla_dump_to`, which says what is captured in graphs (command buffers).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple


class Instruction(NamedTuple):
  """A line of a computation.

  Attributes:
    name: its own.
    result: type and shape; of several results in parentheses.
    opcode: as XLA calls it.
    operands: names.
    attributes: what follows the operands.
    root: whether it is its computation's result.
  """

  name: str
  result: str
  opcode: str
  operands: tuple[str, ...]
  attributes: str
  root: bool


class Launch(NamedTuple):
  """How a loop is launched.

  Attributes:
    graphed: whether the loop itself is in a graph, and so no host is asked
      whether it goes on.
    graphs: graphs that an iteration launches, 0 if `graphed`.
    loose: kernels of an iteration that are in no graph; those of the loop's
      condition and of loops inside it aside.
  """

  graphed: bool
  graphs: int
  loose: int


class Loop(NamedTuple):
  """A loop of the program.

  Attributes:
    trips: how often it runs; None if that depends on what is computed.
    condition: kernels of the condition.
    work: what one iteration does beside the condition.
    launch: how it is launched; None if that is not known.
  """

  trips: int | None
  condition: int
  work: Work
  launch: Launch | None = None


class Work(NamedTuple):
  """What a computation launches, its loops aside.

  Attributes:
    kernels: kernels and copies; a library call counts as one.
    copies: those of them that copy an array.
    calls: target of a library call -> how many of them.
    moved_bytes: that its kernels read and write. Of what a kernel gathers or
      slices, the part that it takes counts.
    flops: operations of its products and convolutions.
    loops: in the order in which they run.
  """

  kernels: int
  copies: int
  calls: Counter[str]
  moved_bytes: int
  flops: int
  loops: tuple[Loop, ...]

  @property
  def total(self) -> Work:
    """With all iterations of the loops whose trip count is known."""
    whole = self._replace(loops=())
    for loop in self.loops:
      whole = whole.plus(loop.work.total, loop.trips or 0)
    return whole

  def plus(self, other: Work, times: int = 1) -> Work:
    """Return this and as many times the other work, this work's loops only."""
    calls = Counter({name: times * n for name, n in other.calls.items()})
    return Work(
      self.kernels + times * other.kernels,
      self.copies + times * other.copies,
      self.calls + calls,
      self.moved_bytes + times * other.moved_bytes,
      self.flops + times * other.flops,
      self.loops,
    )


Computations = Mapping[str, list[Instruction]]

_HEAD = re.compile(r"^(?P<entry>ENTRY )?%(?P<name>\S+) \(.*\{$")
_LINE = re.compile(
  r"^\s*(?P<root>ROOT )?%(?P<name>\S+) = (?P<result>\S.*?) "
  r"(?P<opcode>[a-z][a-z0-9-]*)\((?P<operands>[^)]*)\)(?P<attributes>.*)$"
)
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+)[^\[\s]*\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply)=%([^\s,}]+)")
_BODY = re.compile(r"\bcondition=%([^\s,}]+), body=%([^\s,}]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONTRACTED = re.compile(
  r'lhs_contracting_dim(?:s=\{|ension_numbers":\[|ensions":\[)([^\]}]*)'
)
_WORKSPACE = re.compile(r", [su]8\[\d*\](\{0\})?\)$")  # beside the results
_LABELS = re.compile(r"\bdim_labels=\w+_(\w+)->")

# They launch nothing themselves.
_FREE = {
  *("parameter", "constant", "tuple", "get-tuple-element", "bitcast"),
  *("after-all", "add-dependency", "opt-barrier", "while", "call"),
  *("conditional", "async-start", "async-update", "async-done", "copy-done"),
  *("partition-id", "replica-id"),
}
_TAKING = ("gather", "dynamic-slice", "slice")


def parse(text: str) -> tuple[str, Computations]:
  """Return the entry's name, and every computation of the program.

  Args:
    text: an optimized and scheduled program.
  """
  entry, name = "", ""
  computations: dict[str, list[Instruction]] = {}
  for line in text.splitlines():
    head, found = _HEAD.match(line), _LINE.match(line)
    if head:
      name = head["name"]
      computations[name] = []
      entry = name if head["entry"] else entry
    elif found and name:
      computations[name].append(
        Instruction(
          found["name"],
          found["result"],
          found["opcode"],
          tuple(re.findall(r"%([^\s,)]+)", found["operands"])),
          found["attributes"],
          bool(found["root"]),
        )
      )
  return entry, computations


def nbytes(shape: str) -> int:
  """Return the bytes of an array's type and shape, or of several."""
  total = 0
  for kind, sides in _ARRAY.findall(shape):
    bits = 8 if kind == "pred" else int(re.sub(r"\D", "", kind)[:2])
    total += bits * _size(sides) // 8
  return total


def _size(sides: str) -> int:
  return math.prod(int(n) for n in sides.split(",") if n)


def work(computations: Computations, name: str) -> Work:
  """Return what a computation launches.

  Args:
    computations: of the program.
    name: of the computation.
  """
  lines = {line.name: line for line in computations[name]}
  whole, loops = Work(0, 0, Counter(), 0, 0, ()), []
  for line in lines.values():
    if line.opcode == "while":
      loops.append(_loop(computations, line.attributes))
    elif inside := _inside(line):
      # Of a conditional one branch runs: the one that launches the most counts.
      branches = [work(computations, branch) for branch in inside]
      inner = max(branches, key=lambda branch: branch.total.kernels)
      whole, loops = whole.plus(inner), [*loops, *inner.loops]
    elif line.opcode not in _FREE:
      whole = whole.plus(_kernel(computations, lines, line))
  return whole._replace(loops=tuple(loops))


def _loop(computations: Computations, attributes: str) -> Loop:
  """Return the loop of a while instruction."""
  found = _BODY.search(attributes)
  assert found is not None, attributes
  trips = _TRIPS.search(attributes)
  return Loop(
    int(trips[1]) if trips else None,
    work(computations, found[1]).kernels,
    work(computations, found[2]),
  )


def _inside(line: Instruction) -> list[str]:
  """Return computations of which a line runs one; none if it is a kernel."""
  if line.opcode in ("call", "async-start"):
    return _CALLED.findall(line.attributes)
  if line.opcode != "conditional":
    return []
  several = re.search(r"branch_computations=\{([^}]*)\}", line.attributes)
  if several:
    return re.findall(r"%([^\s,}]+)", several[1])
  return re.findall(r"(?:true|false)_computation=%([^\s,}]+)", line.attributes)


def _kernel(
  computations: Computations,
  lines: Mapping[str, Instruction],
  line: Instruction,
) -> Work:
  """Return the work of one kernel, copy or library call."""
  calls: Counter[str] = Counter()
  if line.opcode == "custom-call":
    target = re.search(r'custom_call_target="([^"]*)"', line.attributes)
    calls[target[1] if target else "unknown"] = 1
  return Work(
    1,
    int(line.opcode in ("copy", "copy-start")),
    calls,
    _moved(computations, lines, line),
    _flops(computations, lines, line),
    (),
  )


def _moved(
  computations: Computations,
  lines: Mapping[str, Instruction],
  line: Instruction,
) -> int:
  """Return the bytes that a kernel reads and writes."""
  called = _CALLED.search(line.attributes)
  if line.opcode == "fusion" and called:
    body = computations[called[1]]
    shapes = {x.name: x.result for x in body}
    inputs = [x.name for x in body if x.opcode == "parameter"]
  else:
    body = [line._replace(root=True)]
    shapes = {name: x.result for name, x in lines.items()}
    inputs = list(dict.fromkeys(line.operands))
  read = sum(_taken(body, name, shapes[name]) for name in inputs)
  return read + _written(body, shapes)


def _taken(body: list[Instruction], name: str, shape: str) -> int:
  """Return how many bytes of an input the instructions of a kernel read."""
  total = 0
  for user in body:
    if name not in user.operands:
      continue
    if user.opcode == "bitcast":
      total += _taken(body, user.name, shape)
    elif user.opcode in _TAKING and user.operands[0] == name:
      total += nbytes(user.result)
    elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
      continue  # it is written in place
    else:
      return nbytes(shape)
  return min(total, nbytes(shape))


def _written(body: list[Instruction], shapes: Mapping[str, str]) -> int:
  """Return how many bytes a kernel writes; in place, only what it changes.

  A library's workspace is left out.
  """
  named = {x.name: x for x in body}
  (end,) = (x for x in body if x.root)
  ends = end.operands if end.opcode == "tuple" else (end.name,)
  total = 0
  for name in ends:
    while name in named and named[name].opcode == "bitcast":
      (name,) = named[name].operands
    end = named[name]
    changed = end.opcode == "dynamic-update-slice"
    result = shapes[end.operands[1]] if changed else end.result
    if end.opcode == "custom-call":
      result = _WORKSPACE.sub(")", result)
    total += nbytes(result)
  return total


def _flops(
  computations: Computations,
  lines: Mapping[str, Instruction],
  line: Instruction,
) -> int:
  """Return the operations of a kernel's products and convolutions.

  For each number of the result, a multiplication and an addition for all that
  are summed up.
  """
  called = _CALLED.search(line.attributes)
  if line.opcode == "fusion" and called:
    inner = {x.name: x for x in computations[called[1]]}
    return sum(_flops(computations, inner, x) for x in inner.values())
  sides = lambda result: [int(n) for n in re.findall(r"\d+", result)]
  shapes = [
    sides(_ARRAY.findall(result)[0][1])
    for result in (line.result, *(lines[x].result for x in line.operands))
    if _ARRAY.search(result)
  ]
  if over := _CONTRACTED.search(line.attributes):
    contracted = math.prod(shapes[1][i] for i in sides(over[1]))
    return 2 * math.prod(shapes[0]) * contracted
  if labels := _LABELS.search(line.attributes):
    # Which of result, left and right are outputs and kernel of the forward
    # form, which costs as much as its two gradients each.
    form = (0, 2)
    if "convBackwardInput" in line.attributes:
      form = (1, 2)
    elif "convBackwardFilter" in line.attributes:
      form = (2, 0)
    outputs, kernel = (shapes[i] for i in form)
    places = math.prod(kernel) // kernel[labels[1].index("o")]
    return 2 * math.prod(outputs) * places
  return 0


# --- graphs -------------------------------------------------------------------

_THUNK = re.compile(r"^(?P<indent> *)\d+: (?P<kind>k[A-Z]\w*)")


_GROUPS = ("kSequential", "kConditional", "kAsyncStart")


def launches(text: str) -> list[Launch]:
  """Return how each loop is launched, in the order of the text.

  An outer loop comes before those inside it.

  Args:
    text: the thunks after XLA's passes over them, as `xla_dump_to` has them.
  """
  found: list[Launch] = []
  above: list[tuple[int, str, int]] = []  # indentation, kind, loop or -1
  in_condition = False
  for line in text.splitlines():
    if line.strip() in ("condition:", "body:"):
      in_condition = line.strip() == "condition:"
    thunk = _THUNK.match(line)
    if thunk is None:
      continue
    indent, kind = len(thunk["indent"]), thunk["kind"]
    above = [x for x in above if x[0] < indent]
    graphed = any(x[1] == "kCommandBuffer" for x in above)
    inner = max((x[2] for x in above), default=-1)
    if kind == "kWhile":
      above.append((indent, kind, len(found)))
      found.append(Launch(graphed, 0, 0))
    elif kind == "kCommandBuffer":
      above.append((indent, kind, -1))
      if inner >= 0:
        found[inner] = found[inner]._replace(graphs=found[inner].graphs + 1)
    elif kind in _GROUPS:
      above.append((indent, kind, -1))
    elif inner >= 0 and not graphed and not in_condition:
      found[inner] = found[inner]._replace(loose=found[inner].loose + 1)
  return found


def with_launches(whole: Work, found: Iterator[Launch]) -> Work:
  """Return the work with each loop's launch, taken in turn."""
  loops = []
  for loop in whole.loops:
    launch = next(found)
    inner = with_launches(loop.work, found)
    loops.append(loop._replace(launch=launch, work=inner))
  return whole._replace(loops=tuple(loops))
