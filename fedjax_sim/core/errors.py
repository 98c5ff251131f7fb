"""The package's errors, and one-line texts of errors in users' code.

Imports no JAX, so that the command line reports a wrong call at once.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


class FedjaxSimError(Exception):
  """Base class of the package's own errors.

  Each is also the built-in error that it specializes, such as `ValueError`.

  Attributes:
    exit_code: exit code of the command line: 2 if the user's input is at fault,
      1 if a run failed.
  """

  exit_code = 2


class BadReferenceError(FedjaxSimError, ValueError):
  """A reference leads nowhere, or its code raises."""


def code_file(function: Callable[..., Any]) -> str | None:
  """Return the file of a function's code; None without code."""
  code = getattr(function, "__code__", None)
  return None if code is None else code.co_filename


def raised(path: str | None, error: BaseException) -> str:
  """Return an error's type and text on one line, with the line in a file.

  Args:
    path: the file, as tracebacks name it; None to name no line.
    error: the error.
  """
  frames = traceback.extract_tb(error.__traceback__)
  lines = [frame.lineno for frame in frames if frame.filename == path]
  text = one_line(error)
  if isinstance(error, SyntaxError) and error.filename == path:
    lines, text = [error.lineno], error.msg
  where = f"line {lines[-1]}: " if lines else ""
  hint = "" if path is None else _neighbor(Path(path).parent, error)
  return f"{where}{type(error).__name__}: {text}{hint}"


def _neighbor(folder: Path, error: BaseException) -> str:
  """Return how to import a file beside this one, if that failed; else ""."""
  if not isinstance(error, ImportError):
    return ""
  relative = "no known parent package" in str(error)
  name = (error.name or "").partition(".")[0]
  if relative:
    found = "Such a file belongs to no package; leave out the dot, and"
  elif name and ((folder / f"{name}.py").exists() or (folder / name).is_dir()):
    found = f"{name} lies beside the file, where Python does not look;"
  else:
    return ""
  return (
    f". {found} set PYTHONPATH={folder} in the environment, or write before the"
    " import: import pathlib, sys; sys.path.insert(0,"
    " str(pathlib.Path(__file__).parent))."
  )


def one_line(error: BaseException) -> str:
  """Return an error's text without line breaks."""
  while error.args and isinstance(error.args[0], BaseException):
    error = error.args[0]
  if isinstance(error, OSError) and error.strerror:  # args begin with a number
    where = f"{error.filename}: " if error.filename else ""
    return " ".join(f"{where}{error.strerror}".split())
  return " ".join(str(error.args[0] if error.args else error).split())
