"""Users and passwords in URLs, which no message and no file may show.

What is secret is decided here alone, and where a URL leaves it open, it is
secret: a password may hold what URLs would want encoded, and a text around a
URL may look like a part of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any
from urllib.parse import unquote

_HIDDEN = "***"
_SCHEME = r"[A-Za-z][\w+.-]*:"
# Where a URL begins in a text, or a chain of them as fsspec's filecache::s3://x;
# `a://` within a password is none.
_BEGIN = re.compile(rf"(?<![^\s'\"<>()\[{{,=|;])(?=(?:[\w+.-]+::?)*{_SCHEME}/)")
# A path made of a URL has one slash.
_URL = re.compile(rf"({_SCHEME})(/+)(.*)", re.DOTALL)
# A host, and a port; what may follow is the text's.
_PLAIN = re.compile(r"(\[[^\]]*\]|[^:\[\]]*)(:\d*)?[)\]}>'\",.:;]*")
# A value ends where the next one begins; else with the word, whose last quotes
# and punctuation are the text's.
_KEY, _END = r"([^=&;#?\s'\"<>]+)=", r"[)\]}>'\",.:;]*(?:\s|\Z)"
_ARGUMENTS = (
  re.compile(rf"([?&#]){_KEY}(.*?)(?=&|{_END})"),
  re.compile(rf"(;){_KEY}(.*?)(?=[&;]|{_END})"),
)
_SECRET = re.compile(
  r"pass|pwd|token|secret|(?<!ssl)(?<!ssl_)key|cred|auth(?!or(?!i))|session|user|uid|login"
  r"|(?<![a-z])(?:sig(?![a-z])|signature|code(?![a-z]))"
)
_DATABASES = ("postgres", "mysql", "mariadb", "mssql", "oracle", "sqlite")
# Arguments of a database's URI that hold no secret; each may have others that
# do, such as all of a connection in odbc_connect.
_HARMLESS = (
  *("application_name", "autocommit", "cache", "charset", "check_same_thread"),
  *("connect_timeout", "driver", "encrypt", "host", "isolation_level", "mode"),
  *("options", "pool_size", "port", "read_timeout", "ssl", "ssl_ca"),
  *("ssl_cert", "ssl_key", "sslcert", "sslcrl", "sslkey", "sslmode"),
  *("sslrootcert", "timeout", "trusted_connection", "trustservercertificate"),
  *("unix_socket", "uri", "write_timeout"),
)
# Azure's schemes, whose URLs are container@account; a secret is not in them.
_CONTAINERS = ("abfs:", "abfss:", "wasb:", "wasbs:", "az:")


def redacted(text: str) -> str:
  """Return a text with `***` for what names a user, or is secret, in URLs.

  Args:
    text: any, with URLs or without.

  Example:
    redacted("to http://me:hunter2@host:5000")  # "to http://***@host:5000"
  """
  return "".join(map(_chunk, _BEGIN.split(_without_arguments(text))))


def redacted_url(url: str) -> str:
  """Return a URL as `redacted` does, though it may hold white space.

  Args:
    url: alone, with no text around it; another text is taken as such.

  Example:
    redacted_url("ftp://me:hunter 2@host/run")  # "ftp://***@host/run"
  """
  if not _BEGIN.match(url):
    return redacted(url)
  whole = re.sub(r"\s", "%20", url)
  without = redacted(whole)
  return url if without == whole else without


def without_secrets(
  value: Any, redact: Callable[[str], str] = redacted_url
) -> Any:
  """Return a value without what is secret in any text within it.

  Args:
    value: any, as JSON or a config holds it; texts in mappings, their keys too,
      lists and tuples count.
    redact: what becomes of a text.

  Example:
    without_secrets(("http://a", "http://me@b"))  # ("http://a", "http://***@b")
  """
  if isinstance(value, str):
    return redact(value)
  if isinstance(value, Mapping):
    return {redact(k): without_secrets(v, redact) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return type(value)(without_secrets(item, redact) for item in value)
  return value


def _chunk(text: str) -> str:
  """Return a text with at most one URL, without what is secret in it."""
  found = _URL.search(text)
  if found is None:
    return text
  scheme, slashes, rest = found.groups()
  database = scheme.lower().startswith(_DATABASES)
  local = len(slashes) > 2 or len(scheme) == 2 or scheme.lower() == "file:"
  end = _end_of_user(scheme.lower(), local, rest, database)
  if end >= 0:
    rest = _HIDDEN + rest[end:]
  if database:
    rest = _without_arguments(rest, _HARMLESS)
  return text[: found.start()] + scheme + slashes + rest


def _end_of_user(scheme: str, local: bool, rest: str, database: bool) -> int:
  """Return where the @ after user and password is; -1 without them.

  Args:
    scheme: in lower case, with its colon.
    local: whether a path follows the scheme, and no host.
    rest: what follows.
    database: whether SQLAlchemy reads it: its passwords may hold a slash.
  """
  word = re.split(r"\s", rest, maxsplit=1)[0]
  host = re.split(r"[/?#]", word, maxsplit=1)[0]
  user, at, _ = host.partition("@")
  if at:
    is_user = ":" in user or not (local or scheme in _CONTAINERS)
    return word.rindex("@") if is_user else -1
  if local or not host:
    return -1
  if not _PLAIN.fullmatch(host):
    return rest.rfind("@")  # no port: a password that goes on
  return word.rfind("@") if database and ":" in host else -1


def _without_arguments(
  text: str, harmless: Collection[str] | None = None
) -> str:
  """Return a text without the secret ones of its `?key=value`.

  Args:
    text: with URLs.
    harmless: the keys of what may be shown; None: all that do not look secret.
  """

  def hide(match: re.Match[str]) -> str:
    mark, name, value = match.groups()
    key = unquote(name).lower()
    if harmless is None:
      secret = _SECRET.search(key) is not None
    else:
      secret = key not in harmless
    inner = unquote(value)
    if inner != value:  # a URL, or a connection, of its own
      secret = secret or redacted(f";{inner}") != f";{inner}"
    shown = _HIDDEN if secret and value else hidden_within(value)
    return f"{mark}{name}={shown}"

  def hidden_within(value: str) -> str:
    return _without_arguments(value, harmless)

  for pattern in _ARGUMENTS:
    text = pattern.sub(hide, text)
  return text
