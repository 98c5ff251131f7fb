"""`fedjax-sim list`: list components by name, and the fields of each."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import docstring_parser

from fedjax_sim.config.components import LABELED, SLOTS, Slot, meanings_of
from fedjax_sim.config.field import Field
from fedjax_sim.core import metric_names, validate
from fedjax_sim.tasks.measures import MEASURES, named_measure, top_k
from fedjax_sim.training import schedules
from fedjax_sim.training.optimizers import OPTIMIZERS

_WIDTH = 80


def kinds() -> dict[str, Slot]:
  """Return the slots by the name that `fedjax-sim list` has for each kind."""
  found = {}
  for slot in SLOTS:
    others = [s for s in SLOTS if s.section == slot.section]
    plain = slot is others[0]
    found[slot.section if plain else slot.key] = slot
  return found | {slot.section: slot for slot in LABELED}


def run(names: Sequence[str]) -> str:
  """Return what `fedjax-sim list [KIND [NAME]]` prints.

  Args:
    names: nothing for all components, a kind such as "algorithm", or a kind
      and one component of it, which may be a reference.

  Raises:
    UnknownNameError: no such kind or component.
  """
  if not names:
    return _everything()
  if names[0] == "schedule":
    return "\n".join(_schedules())
  if names[0] == "metric":
    return "\n".join(_metrics() if len(names) == 1 else _metric(names[1]))
  known = kinds()
  validate.one_of("list: kind", names[0], [*known, "metric", "schedule"])
  slot = known[names[0]]
  if len(names) == 1:
    return "\n".join(_names(slot))
  return component(slot, names[1])


def _everything() -> str:
  """Return all kinds of components, one line a component."""
  lines = textwrap.wrap(
    "A config names one of these or, but for privacy, leakage and schedules,"
    " one of yours: path/to/file.py:name. `fedjax-sim list KIND NAME` has the"
    " fields of one.",
    _WIDTH,
  )
  seen: list[Mapping[str, Any]] = []
  for kind, slot in kinds().items():
    if slot.registry not in seen:
      seen.append(slot.registry)
      lines += ["", *_names(slot, kind)]
  return "\n".join([*lines, "", *_metrics(), "", *_schedules()])


def _names(slot: Slot, kind: str = "") -> list[str]:
  """Return the components of a slot, one a line."""
  sections = [s.field for s in SLOTS if s.registry is slot.registry]
  named = ", ".join(sections) or f"{slot.section}.LABEL"
  title = f"{kind or slot.section}: {slot.title} ({named})"
  if len(sections) > 1:
    title = f"{kind or slot.section}: optimizers of optax ({named})"
    return [
      title,
      *textwrap.wrap(
        ", ".join(slot.registry),
        _WIDTH,
        initial_indent="  ",
        subsequent_indent="  ",
      ),
    ]
  return [title, *_summaries(slot.registry)]


def _schedules() -> list[str]:
  """Return the schedules, one a line."""
  title = "schedule: of client.schedule, server.schedule and model.schedule"
  return [title, *_summaries(schedules.SCHEDULES)]


def _metrics() -> list[str]:
  """Return the metrics that a config can name, one a line."""
  title = "metric: further metrics (model.metrics), beside loss and accuracy"
  return [title, *_summaries(MEASURES)]


def _metric(name: str) -> list[str]:
  """Return what a metric is."""
  function = named_measure("list: metric", name)
  what = MEASURES.get(name, top_k)
  known = metric_names.known(name)
  better = {True: "Higher is better.", False: "Lower is better."}
  lines = [f"model.metrics=('{function.__name__}',)", ""]
  lines += (inspect.getdoc(what) or "").splitlines()
  if known is not None:
    told = better.get(known.higher_is_better, "")  # type: ignore[arg-type]
    lines += ["", f"Shown as {known.title}. {told}".rstrip()]
  return lines


def _summaries(registry: Mapping[str, Callable[..., Any]]) -> list[str]:
  """Return the name and the first line of the docstring of each entry."""
  width = max(map(len, registry))
  return [
    f"  {name:<{width}}  {_summary(entry)}".rstrip()
    for name, entry in registry.items()
  ]


def _summary(function: Callable[..., Any]) -> str:
  """Return the first line of a docstring."""
  lines = (inspect.getdoc(function) or "").splitlines()
  return lines[0] if lines else ""


def component(slot: Slot, name: str) -> str:
  """Return what a component is, and its fields with defaults and meanings.

  Args:
    slot: what names it.
    name: of the component, or a reference to a user's own.

  Raises:
    UnknownNameError, BadReferenceError: there is none of that name.
  """
  function = slot.factory(name)
  label = name.rpartition(":")[2]  # of a reference
  section = f"{slot.section}.{label}" if slot in LABELED else slot.section
  parsed = docstring_parser.parse(inspect.getdoc(function) or "")
  meanings = meanings_of(function)
  own = not any(f is function for f in OPTIMIZERS.values())
  text = [parsed.short_description, parsed.long_description if own else None]
  named = f"{section}.{slot.key}"
  lines = [f"{named}={name}", ""]
  lines += "\n\n".join(part for part in text if part).splitlines()
  fields = slot.fields(name)
  lines += ["", "Fields:" if fields else "It takes no fields."]
  for key, field in fields.items():
    lines.append(f"  {section}.{key}: {_type(field)}, {_default(field)}")
    lines += textwrap.wrap(
      field.meaning or meanings.get(key, ""),
      _WIDTH,
      initial_indent="    ",
      subsequent_indent="    ",
    )
  return "\n".join(lines)


def markdown() -> str:
  """Return docs/components.md: the fields of all components as tables."""
  lines = [
    "# Components",
    "",
    "The fields of every component that a config can name, as `fedjax-sim list"
    " KIND",
    "NAME` has them. Optimizers are optax's: `fedjax-sim list client adam`."
    " This file",
    "is made by `python -m fedjax_sim.cli.listing > docs/components.md`.",
  ]
  seen: dict[int, Slot] = {}
  for slot in kinds().values():
    if slot.registry is OPTIMIZERS:
      continue
    lines += ["", f"## {slot.title.capitalize()}"]
    other = seen.setdefault(id(slot.registry), slot)
    if other is not slot:
      lines += ["", _as_in(slot, other)]
      continue
    for name, function in slot.registry.items():
      labeled = slot in LABELED
      section = f"{slot.section}.{name}" if labeled else slot.section
      own = section if labeled else f"{slot.field}={name}"
      lines += ["", f"### `{own}`", "", _summary(function)]
      fields = slot.fields(name)
      if fields:
        meanings = meanings_of(function)
        lines += ["", "| field | type | default | meaning |"]
        lines += ["| --- | --- | --- | --- |"]
      for key, field in fields.items():
        default = "required" if field.required else f"`{field.default!r}`"
        lines.append(
          f"| `{section}.{key}` | {_type(field)} | {default} |"
          f" {field.meaning or meanings.get(key, '')} |"
        )
  return "\n".join(lines)


def _as_in(slot: Slot, other: Slot) -> str:
  """Return that a slot has the components of another one, in words."""
  text = f"`{slot.section}.NAME` takes what `{other.section}.NAME` does"
  missing = [f"`{key}`" for key in other.common if key not in slot.common]
  return f"{text}, but for {' and '.join(missing)}." if missing else f"{text}."


def _type(field: Field) -> str:
  """Return the type of a field in words."""
  names = {
    bool: "bool",
    int: "int",
    float: "float",
    str: "text",
    tuple: "tuple",
    object: "any",
  }
  return names[field.kind] + (" or None" if field.optional else "")


def _default(field: Field) -> str:
  """Return the default of a field in words."""
  return "required" if field.required else f"default {field.default!r}"


if __name__ == "__main__":
  print(markdown())  # noqa: T201
