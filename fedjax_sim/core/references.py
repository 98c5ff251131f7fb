"""A user's own objects, which a config names as it names ours.

A reference is a text, `path/to/file.py:name` or `package.module:name`: the
object of that name. A relative path is one from the working folder.
docs/extend.md says what may be referred to.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import importlib
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from fedjax_sim.core import validate
from fedjax_sim.core.errors import (
  BadReferenceError,
  code_file,
  one_line,
  raised,
)

T = TypeVar("T")

_FORM = "give path/to/file.py:name or package.module:name"


def is_reference(value: Any) -> bool:
  """Return whether a field's value is a reference, not a name in a table."""
  return isinstance(value, str) and ":" in value


def lookup(
  field: str, value: str, registry: Mapping[str, Callable[..., T]], kind: type
) -> Callable[..., T]:
  """`registry[value]`, or the function that a reference leads to.

  Args:
    field: of the config; what messages call it.
    value: a name in the registry, or a reference.
    registry: what there is by name.
    kind: what the function has to return.

  Returns:
    The function. Of a user's own, an error says where it was raised, and
    something else than a `kind` is one.

  Raises:
    UnknownNameError: no such name.
    BadReferenceError, TypeError: as `load`.
  """
  if not is_reference(value):
    if isinstance(value, str) and value.endswith(".py"):
      raise BadReferenceError(
        f"{field}={value!r} names a file and nothing in it; give"
        f" {value + ':name'!r}."
      )
    return validate.lookup(field, value, registry)
  function = load(field, value)

  @functools.wraps(function)
  def checked(*args: Any, **options: Any) -> T:
    try:
      made: T = function(*args, **options)
    except Exception as error:
      text = raised(code_file(function), error)
      raise BadReferenceError(f"{field}={value!r}: {text}") from error
    if not isinstance(made, kind):
      raise TypeError(
        f"{field}={value!r} returned something of type {type(made).__name__};"
        f" let it return one of type {kind.__name__}."
      )
    return made

  return checked


def load(field: str, value: str) -> Callable[..., Any]:
  """Return the function that a reference names.

  A file runs once in a process as long as it is the same.

  Raises:
    BadReferenceError: no such file, module or name, or an error inside of it.
    TypeError: it is no reference, or leads to what cannot be called.
  """
  if not is_reference(value):
    raise TypeError(f"{field}={value!r} is no reference; {_FORM}.")
  name = value.rpartition(":")[2]
  module = _module(field, value)
  if not hasattr(module, name):
    names = [n for n in vars(module) if not n.startswith("_")]
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise BadReferenceError(
      f"{field}={value!r}: there is no {name!r} in it.{hint}"
    )
  found: Callable[..., Any] = getattr(module, name)
  if not callable(found):
    kind = type(found).__name__
    raise TypeError(
      f"{field}={value!r} is no function, but of type {kind}; give the name of"
      " a function."
    )
  return found


def functions_of(field: str, file: str) -> dict[str, Callable[..., Any]]:
  """Return the public functions that a file defines, by name.

  Args:
    field: what messages call the file.
    file: its path.

  Raises:
    BadReferenceError: there is no such file, or it raises an error.
  """
  module = _from_file(field, file, Path(file).resolve())
  return {
    name: found
    for name, found in vars(module).items()
    if isinstance(found, types.FunctionType)
    and found.__module__ == module.__name__
    and not name.startswith("_")
  }


@contextlib.contextmanager
def named(fields: Mapping[str, Any], others: Iterable[str]) -> Iterator[None]:
  """Begin errors with the references of a config, if there are any.

  What is traced is many parts at once, and an error of the user's own does not
  say whose it is.

  Args:
    fields: "section.field" -> value, of those that may be references.
    others: all fields; an error that names one stays as it is.

  Raises:
    BadReferenceError: instead of what was raised, where it names none.
  """
  try:
    yield
  except Exception as error:
    own = {}
    for field, value in fields.items():
      every = value if isinstance(value, (tuple, list)) else (value,)
      if any(is_reference(v) for v in every):
        own[field] = value
    if not own or names_one(str(error), others):
      raise
    names = ", ".join(f"{field}={value!r}" for field, value in own.items())
    kind = type(error).__name__
    raise BadReferenceError(f"{names}: {kind}: {one_line(error)}") from error


def names_one(text: str, fields: Iterable[str]) -> bool:
  """Return whether a message names one of a config's fields.

  Args:
    text: the message.
    fields: "section.field", which it names by itself, or "field", which it
      names by "field=value" alone: a word such as "seed" may be a word.
  """
  dotted = {re.escape(field) for field in fields if "." in field}
  values = {re.escape(field) + "=" for field in fields}
  names = "|".join(sorted(values | {rf"{name}(?!\w)" for name in dotted}))
  return re.search(rf"(?<![\w.])(?:{names})", text) is not None


def sources(fields: Mapping[str, Any]) -> dict[str, str]:
  """Return the objects that references name, by name and content digest.

  Args:
    fields: "section.field" -> value, of those that may be references.

  Returns:
    "section.field" -> text; the same wherever the file lies.

  Raises:
    BadReferenceError: as `load`.
  """
  found = {}
  for field, value in fields.items():
    every = value if isinstance(value, (tuple, list)) else (value,)
    texts = [_source(field, v) for v in every if is_reference(v)]
    if texts:
      found[field] = "; ".join(texts)
  return found


def _source(field: str, value: str) -> str:
  path = _module(field, value).__file__
  digest = _digest(Path(path).read_bytes()) if path else "no file"
  return f"{value.rpartition(':')[2]} (SHA-256 {digest})"


def _digest(content: bytes) -> str:
  return hashlib.sha256(content).hexdigest()[:16]


def _module(field: str, value: str) -> types.ModuleType:
  source, _, name = value.rpartition(":")
  if not name.isidentifier():
    raise BadReferenceError(f"{field}={value!r} names nothing; {_FORM}.")
  if source.endswith(".py"):
    return _from_file(field, value, Path(source).resolve())
  if not all(part.isidentifier() for part in source.split(".")):
    raise BadReferenceError(
      f"{field}={value!r}: {source!r} is neither a .py file nor a module;"
      f" {_FORM}."
    )
  try:
    return importlib.import_module(source)
  except Exception as error:
    text = raised(None, error)
    missing = (isinstance(error, ModuleNotFoundError) and error.name) or ""
    if missing and f"{source}.".startswith(f"{missing}."):
      text = (
        f"there is no module {missing!r}; install it, or give a file by its"
        " path, as path/to/file.py:name."
      )
    raise BadReferenceError(f"{field}={value!r}: {text}") from error


def _from_file(field: str, value: str, path: Path) -> types.ModuleType:
  """Return the module of a file, from `sys.modules` if it has run already."""
  try:
    content = path.read_bytes()
  except FileNotFoundError as error:
    raise BadReferenceError(
      f"{field}={value!r}: there is no file {path}; give its path, relative to"
      f" {Path.cwd()} or absolute."
    ) from error
  except OSError as error:
    raise BadReferenceError(
      f"{field}={value!r}: {path}: {error.strerror}."
    ) from error
  # No module that is imported has such a name. An edited file is another
  # module, so that a notebook does not go on with what it was.
  stem = re.sub(r"\W", "_", path.stem)
  key = f"{stem}@{_digest(bytes(path) + b'|' + content)}"
  if key in sys.modules:
    return sys.modules[key]
  module = types.ModuleType(key)
  module.__file__ = str(path)
  sys.modules[key] = module  # before it runs: dataclasses look there
  try:
    code = compile(content, path, "exec", dont_inherit=True)
    exec(code, vars(module))
  except BaseException as error:
    del sys.modules[key]
    if not isinstance(error, Exception | SystemExit):
      raise
    text = raised(str(path), error)
    raise BadReferenceError(f"{field}={value!r}: {text}") from error
  return module
