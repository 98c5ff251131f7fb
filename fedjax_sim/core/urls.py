"""Users and passwords in URLs, which no message and no file may show."""

from __future__ import annotations

import re

# Up to the last @ of a word, as a password may itself hold one, or a slash.
_USER = re.compile(r"(?<=://)(?!/)[^\s'\"<>]*@")
_ARGUMENT = re.compile(
  r"(?<=[?&])([\w.-]*(?:passw|pwd|token|secret|api_?key)[\w.-]*=)[^&\s'\"<>]+",
  re.IGNORECASE,
)


def redacted(text: str) -> str:
  """Return a text with `***` for what names a user, or is secret, in URLs.

  Args:
    text: any, with URLs or without.

  Example:
    redacted("to http://me:hunter2@host:5000")  # "to http://***@host:5000"
  """
  return _ARGUMENT.sub(r"\1***", _USER.sub("***@", text))
