"""What becomes of a key of FLUTE: it is used, has no effect, or is refused.

A table of keys (`keys/`) holds for every key the kind of its value and a rule,
a function of the value and of the whole file. Most rules are made by `sets`,
`without` and `refuses`, so that the tables read as tables.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fedjax_sim.config.flute.tasks import FluteTask
from fedjax_sim.core import validate
from fedjax_sim.data.location import is_url

USED, IDLE, REFUSED = STATES = ("used", "without effect", "refused")
FLUTE, MEANT = COMPATS = ("flute", "meant")
DGA = ("dga", "dga_rl")
LENGTHS = ("max_num_words", "max_seq_length")  # of sequences, in data_config


class Outcome(NamedTuple):
  """What becomes of a key.

  Attributes:
    state: one of `STATES`.
    fields: "section.field" of our config -> its value.
    note: why, or how the value was converted.
  """

  state: str
  fields: Mapping[str, Any]
  note: str = ""


def used(fields: Mapping[str, Any] | None = None, note: str = "") -> Outcome:
  """Return the outcome of a key that sets these fields."""
  return Outcome(USED, fields or {}, note)


def idle(note: str) -> Outcome:
  """Return the outcome of a key without effect."""
  return Outcome(IDLE, {}, note)


def refused(note: str) -> Outcome:
  """Return the outcome of a key whose value nothing here does."""
  return Outcome(REFUSED, {}, note)


@dataclasses.dataclass(frozen=True)
class File:
  """A YAML file of FLUTE, with what FLUTE gives by default.

  Attributes:
    values: path, such as "server_config.max_iteration" -> its value; without
      those that are null or placeholders.
    task: which model and data it is about.
    compat: one of `COMPATS`: FLUTE's arithmetic, or the papers'.
    data: where the data lie; None: the task's own.
  """

  values: Mapping[str, Any]
  task: FluteTask
  compat: str = MEANT
  data: str | None = None

  def get(self, path: str, default: Any = None) -> Any:
    """Return a value; the default if there is none."""
    return self.values.get(path, default)

  def positive(
    self, path: str, default: float | None = None, lt: float | None = None
  ) -> float:
    """Return a number that has to be above 0, such as a divisor.

    Args:
      path: of the key.
      default: if there is none.
      lt: what it has to be below; None: anything.

    Raises:
      TypeError, ValueError: names the key.
    """
    return validate.number(path, self.get(path, default), gt=0, lt=lt)

  @property
  def strategy(self) -> str:
    """The algorithm here, from the strategy and what replaces it."""
    if self.get("server_config.type") == "personalization":
      return "apfl"
    strategy = str(self.get("strategy")).lower()
    rl = self.get("server_config.wantRL", False)
    return "dga_rl" if rl and strategy == "dga" else strategy

  @property
  def has_own_data(self) -> bool:
    """Whether the data are the task's own data set, not a store."""
    if self.data is None or not self.task.data:
      return bool(self.task.data)
    return not is_url(self.data) and not is_store(self.data)

  @property
  def has_buffers(self) -> bool:
    """Whether the model has running statistics, of batch norm."""
    kind = str(self.get("model_config.model_type"))
    plain = kind.startswith("vgg") and not kind.endswith("_bn")
    return self.task.buffers and not (self.task.by_type and plain)

  @property
  def as_flute(self) -> bool:
    """Whether FLUTE's arithmetic is wanted."""
    return self.compat == FLUTE

  @property
  def is_dga(self) -> bool:
    """Whether the algorithm is DGA, or DGA with an agent."""
    return self.strategy in DGA

  @property
  def is_softmax(self) -> bool:
    """Whether DGA weighs clients by a softmax."""
    softmax = self.get("server_config.aggregate_median") == "softmax"
    return self.is_dga and softmax

  @property
  def is_even(self) -> bool:
    """Whether the s of DGA's softmax is 0 for all clients, as FLUTE has it."""
    name = self.get("server_config.weight_train_loss", "train_loss")
    return self.as_flute and name == "mag_var_loss"


def is_store(path: str) -> bool:
  """Return whether a folder is a client store."""
  return (Path(path) / "store.json").is_file()


Rule = Callable[[Any, File], Outcome]


class Key(NamedTuple):
  """A key of FLUTE.

  Attributes:
    kind: bool, int, float, str, list, dict (of which the keys do not count), or
      object: anything.
    rule: what becomes of it.
  """

  kind: type
  rule: Rule


def sets(field: str, note: str = "") -> Rule:
  """Return the rule of a key whose value is that of a field here."""
  return lambda value, file: used({field: value}, note)


def counts(note: str) -> Rule:
  """Return the rule of a key that is used, but sets no field by itself."""
  return lambda value, file: used(note=note)


def without(note: str) -> Rule:
  """Return the rule of a key without effect."""
  return lambda value, file: idle(note)


def refuses(note: str, harmless: Sequence[Any] = ()) -> Rule:
  """Return the rule of a key that is refused, but for harmless values."""

  def rule(value: Any, file: File) -> Outcome:
    if value in harmless:
      return idle("as it is here")
    return refused(note)

  return rule


def only_if(condition: Callable[[File], Any], rule: Rule, note: str) -> Rule:
  """Return the rule, for files of which a condition holds.

  Args:
    condition: file -> whether the rule applies.
    rule: of those.
    note: why the key has no effect in others.
  """
  return lambda value, file: (
    rule(value, file) if condition(file) else idle(note)
  )


def only_for(names: Sequence[str], rule: Rule) -> Rule:
  """Return the rule, for files whose algorithm is one of these."""

  def limited(value: Any, file: File) -> Outcome:
    if file.strategy in names:
      return rule(value, file)
    return idle(f"algorithm.name={file.strategy!r} has no use for it")

  return limited


def of_task(name: str) -> Rule:
  """Return the rule of a key that sets a field of some tasks.

  Args:
    name: of the key in `FluteTask.keys`.
  """

  def rule(value: Any, file: File) -> Outcome:
    field = file.task.keys.get(name)
    if field is None:
      return idle(f"task {file.task.name} has no such option")
    if not field:
      return used(note="as the data says, which has to agree")
    if field.endswith("()"):  # a tuple, one entry a layer
      field, value = field[:-2], (value,) * file.task.layers
    return used({field: value})

  return rule


def by_line(value: bool, file: File) -> Outcome:
  """Read texts one by one, or joined and cut into blocks."""
  kind = "token_texts" if value else "tokens"
  return used(note=f"`data import --text={kind}`")


def gather(table: Mapping[str, Any], rule: Callable[[Rule], Rule]) -> Any:
  """Return the table with every rule changed.

  Args:
    table: name -> `Key`, or a table.
    rule: changes a rule.
  """
  return {
    name: entry._replace(rule=rule(entry.rule))
    if isinstance(entry, Key)
    else gather(entry, rule)
    for name, entry in table.items()
  }
