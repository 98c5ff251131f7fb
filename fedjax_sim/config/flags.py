"""The command line's flags: absl parses them, ml_collections loads the config.

`--config=FILE` or `FILE:ARG` loads a config, a Python file or the `config.json`
of a run; `--config.SECTION.FIELD=VALUE`
changes a field, and the value None unsets one. Every error is one line.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from absl import flags
from ml_collections import ConfigDict, config_flags

from fedjax_sim.config.defaults import LABELED_SECTIONS
from fedjax_sim.config.fields import Text, fields_of
from fedjax_sim.core import errors, validate
from fedjax_sim.core.errors import FedjaxSimError

T = TypeVar("T", int, float)


class UsageError(FedjaxSimError, ValueError):
  """The command line is wrong."""


def parse(
  arguments: Sequence[str],
  *required: str,
  switches: Sequence[str] = (),
  repeated: Sequence[str] = (),
  **optional: str | None,
) -> Any:
  """Return the flags of a command, as attributes.

  Args:
    arguments: what follows the command's name.
    *required: "config", and other flags that take a text; all must be there.
    switches: flags without a value, which are there or not.
    repeated: those of `required` that may be given several times; their value
      is a list.
    **optional: more flags that take a text, with their defaults.

  Raises:
    UsageError: a flag or a field is unknown, missing or has a wrong value.
    OSError: the config file cannot be read.
    ValueError: the config file raises, or returns no ConfigDict.
  """
  arguments, overrides = split(arguments)
  path = config_path(arguments)
  if path is not None and not Path(path).exists():
    raise FileNotFoundError(f"--config={path}: there is no such file")
  if path and Path(path).is_dir():
    raise IsADirectoryError(f"--config={path}: Is a directory")
  values = flags.FlagValues()
  stored = path is not None and path.endswith(".json")
  for name in required:
    if name == "config" and stored:
      flags.DEFINE_string("config", None, "The config.", flag_values=values)
    elif name == "config":
      config_flags.DEFINE_config_file(
        "config", None, "The config.", flag_values=values, lock_config=False
      )
    elif name in repeated:
      flags.DEFINE_multi_string(name, None, name, flag_values=values)
    else:
      flags.DEFINE_string(name, None, name, flag_values=values)
  for name in switches:
    flags.DEFINE_boolean(name, False, name, flag_values=values)
    valued = [a for a in arguments if re.match(rf"--?(no)?{name}=", a)]
    if valued:
      raise UsageError(f"{valued[0]}: --{name} takes no value; give it alone.")
  for name, default in optional.items():
    flags.DEFINE_string(name, default, name, flag_values=values)
  with _as_argv(arguments):
    try:
      rest = values(["", *arguments])
    except (Exception, SystemExit) as error:
      if text := _of_file(path, error):
        raise ValueError(text) from error
      text, flag = errors.one_line(error), getattr(error, "flagname", "")
      if "." in flag and "config" in required:
        text += f"; a field of the config is set by --config.{flag}=..."
      raise UsageError(text) from error
  if len(rest) > 1:
    raise UsageError(f"unexpected argument {rest[1]!r}")
  for name in required:
    if not values[name].value and not (name == "config" and path):
      raise UsageError(f"--{name}=... is missing")
  if "config" in required:
    if path is not None and stored:
      values["config"].value = _stored_config(path)
    if not isinstance(values.config, ConfigDict):
      raise ValueError(_no_config(path, values.config))
    values.config = overridden(values.config, overrides)
  elif overrides:
    raise UsageError(f"--config.{next(iter(overrides))}: there is no --config.")
  return values


def _stored_config(path: str) -> ConfigDict:
  """Return the config that a run has left in its `config.json`.

  Raises:
    ValueError: the file holds no config.
  """
  try:
    tree = json.loads(Path(path).read_bytes())
    _ = tree["server"]["rounds"]
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(
      f"--config={path} holds no config of a run ({error}); give a Python file"
      " that defines get_config(), or a run's config.json."
    ) from error
  return ConfigDict({k: v for k, v in tree.items() if k != "origin"})


def number(flag: str, text: str, kind: type[T], other: str = "") -> T:
  """Return a flag's text as a number.

  Args:
    flag: its name, with the dashes.
    text: its value.
    kind: int or float.
    other: what else it may be, for the message.

  Raises:
    UsageError: it is no such number.
  """
  try:
    return kind(text)
  except ValueError:
    wanted = "a whole number" if kind is int else "a number"
    raise UsageError(f"{flag}={text} is wrong; give {wanted}{other}.") from None


def load(spec: str, fields: Mapping[str, str] | None = None) -> ConfigDict:
  """Return the config of a file, for notebooks and scripts.

  Args:
    spec: the file, or `file:arg` for `get_config(arg)`.
    fields: "section.field" -> its value as text, as on the command line.

  Raises:
    UsageError, OSError, ValueError: as `parse`.
  """
  changes = [f"--config.{k}={v}" for k, v in (fields or {}).items()]
  config: ConfigDict = parse([f"--config={spec}", *changes], "config").config
  return config


def overridden(config: ConfigDict, texts: Mapping[str, str]) -> ConfigDict:
  """Return the config with fields changed as on the command line.

  A text is read as the type of its field, which follows from the components
  that are named. The text "None" unsets a field.

  Args:
    config: as a config file returns it.
    texts: "section.field" -> its value as text.

  Raises:
    UsageError: a text that is no value of its field.
    UnknownNameError: a field that there is not.
    TypeError, ValueError: the config is wrong without them.
  """
  tree = config.to_dict()
  for field, text in texts.items():
    _set(tree, field, None if text == "None" else Text(text))
  # What follows takes all components, and so JAX; a wrong section is said now.
  from fedjax_sim.config.completion import complete

  try:
    completed = complete(ConfigDict(tree))
  except ValueError as error:
    if any(str(error).startswith(f"{field}=") for field in texts):
      raise UsageError(f"--config.{error}") from error
    raise
  known = dict(fields_of(completed))
  for field, text in texts.items():
    if field in known:
      _set(config, field, known[field])
    elif text == "None":
      _remove(config, field)
  return config


def _set(tree: Any, field: str, value: Any) -> None:
  """Set a field of a config, or of one as nested dicts."""
  *sections, key = field.split(".")
  where: list[str] = []
  for name in sections:
    if name not in tree and len(where) == 1 and where[0] in LABELED_SECTIONS:
      tree[name] = {}
    where.append(name)
    validate.one_of(f"--config.{field}: section", name, tree)
    tree = tree[name]
    if not isinstance(tree, dict | ConfigDict):
      path = ".".join(where)
      raise UsageError(f"--config.{field}: {path}={tree!r} is no section.")
  if isinstance(tree, ConfigDict):  # what a file gives may be of another type
    with tree.ignore_type():
      tree[key] = value
  else:
    tree[key] = value


def _remove(config: ConfigDict, field: str) -> None:
  """Remove a field that no component takes, or a section, if it is there."""
  *sections, key = field.split(".")
  for name in sections:
    if name not in config:
      return
    config = config[name]
  if key in config:
    del config[key]


def split(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
  """Split the arguments into flags, and "section.field" -> text.

  Args:
    arguments: what follows the command's name.

  Raises:
    UsageError: a field has no value.
  """
  rest: list[str] = []
  overrides: dict[str, str] = {}
  left = list(arguments)
  while left:
    argument = left.pop(0)
    found = re.match(r"--?config\.([^=]+)(=?)(.*)", argument, re.DOTALL)
    if off := re.fullmatch(r"--?noconfig\.([^=]+)", argument):
      overrides[off[1]] = "false"
      continue
    if not found:
      rest.append(argument)
      continue
    field, equals, text = found.groups()
    if not equals:
      if not left:
        raise UsageError(f"{argument} has no value; give {argument}=VALUE.")
      text = left.pop(0)
    overrides.pop(field, None)
    overrides[field] = text  # the last one wins
  return rest, overrides


def positional(
  arguments: Sequence[str], *, switches: Sequence[str] = ()
) -> tuple[list[str], list[str]]:
  """Return the arguments that are no flags, and the flags with their values.

  Args:
    arguments: what follows the command's name.
    switches: flags without a value; of any other one that has no "=" the next
      argument is the value.

  Example:
    positional(["a", "--to", "b", "c"])  # ["a", "c"], ["--to", "b"]
  """
  others: list[str] = []
  rest: list[str] = []
  left = list(arguments)
  while left:
    argument = left.pop(0)
    if not argument.startswith("-"):
      others.append(argument)
      continue
    rest.append(argument)
    if "=" not in argument and argument.lstrip("-") not in switches and left:
      rest.append(left.pop(0))
  return others, rest


def config_path(arguments: Sequence[str]) -> str | None:
  """Return the file of `--config FILE` or `--config=FILE`; None without.

  Args:
    arguments: what follows the command's name.
  """
  for i, argument in enumerate(arguments):
    if argument == "--config" and i + 1 < len(arguments):
      return arguments[i + 1].partition(":")[0]
    if argument.startswith("--config="):
      return argument.removeprefix("--config=").partition(":")[0]
  return None


@contextlib.contextmanager
def _as_argv(arguments: Sequence[str]) -> Iterator[None]:
  """Put the arguments into sys.argv, where ml_collections looks for fields."""
  before = sys.argv, sys.dont_write_bytecode
  sys.argv, sys.dont_write_bytecode = ["", *arguments], True
  sys.modules.pop("config_config", None)  # what it called the last config
  try:
    yield
  finally:
    sys.argv, sys.dont_write_bytecode = before


def _of_file(path: str | None, error: BaseException | None) -> str:
  """Return what is wrong with the config file; "" if it is not to blame."""
  while error is not None:
    text, told = errors.one_line(error), errors.raised(path, error)
    if told.startswith("line "):
      return f"--config={path}, {told}"
    if "has no attribute 'get_config'" in text:
      return f"--config={path}: it defines no get_config()"
    if "get_config() takes" in text and "Traceback" not in text:
      return f"--config={path}: {text}"
    error = error.__cause__ or error.__context__
  return ""


def _no_config(path: str | None, given: Any) -> str:
  """Return why the config file gives no ConfigDict."""
  try:
    _ = given.seed  # ml_collections keeps an OSError for later
  except OSError as error:
    return f"--config={path}: {errors.one_line(error)}"
  except AttributeError:
    pass
  return (
    f"--config={path}: get_config() returned a {type(given).__name__}; return"
    " what default_config() gives, with changes"
  )
