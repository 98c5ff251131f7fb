"""Options of `fedjax-sim data import` that say how text becomes ids."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedjax_sim.config import flags
from fedjax_sim.core import validate
from fedjax_sim.data import vocabulary_of
from fedjax_sim.data.importers.text import TEXTS, Text, Words, lines_of
from fedjax_sim.data.importers.tokens import KINDS, Tokens

_OF_WORDS = ("vocabulary", "vocabulary-size")
_OF_TOKENS = ("tokenizer", "padding-token")
SWITCHES = ("unmarked", "case-backoff")
TEXT_OPTIONS = (
  "text",
  *_OF_WORDS,
  "sequence-length",
  "min-characters",
  *_OF_TOKENS,
)


def whole(text: Mapping[str, Any], name: str, least: int = 1) -> int | None:
  """Return the option `name` as a whole number; None where it is not given."""
  if not text[name]:
    return None
  value = flags.number(f"--{name}", text[name], int)
  return validate.integer(f"--{name}", value, ge=least)


def text_of(text: Mapping[str, Any]) -> str | Text | None:
  """Return how texts become ids; None where there is none."""
  kind, vocabulary = text["text"], text["vocabulary"]
  if not kind:
    for name in (*_OF_WORDS, "sequence-length", *_OF_TOKENS):
      if text[name]:
        raise flags.UsageError(f"--{name} is for text; give --text=..., too.")
    return None
  validate.one_of("--text", kind, (*TEXTS, *KINDS))
  for name in _OF_WORDS if kind in KINDS else _OF_TOKENS:
    if text[name]:
      raise flags.UsageError(
        f"--{name}={text[name]} is of no use with --text={kind}; leave it out."
      )
  if kind in KINDS:
    return _tokens(text)
  if not vocabulary:
    return kind
  if text["vocabulary-size"]:
    raise flags.UsageError(
      "--vocabulary has its size, so --vocabulary-size is of no use; leave one"
      " out."
    )
  entries = _vocabulary(Path(vocabulary))
  length = whole(text, "sequence-length")
  if TEXTS[kind] is Words:
    return Words(entries, length, **word_options(text))
  return TEXTS[kind](entries, length)


def word_options(text: Mapping[str, Any]) -> dict[str, Any]:
  """Return the options of `Words`, as far as they are given."""
  options = {
    "marked": not text["unmarked"],
    "case_backoff": text["case-backoff"],
    "min_characters": whole(text, "min-characters"),
  }
  if text["text"] != "words":
    for name in (*SWITCHES, "min-characters"):
      if text[name]:
        raise flags.UsageError(f"--{name} is for --text=words; leave it out.")
  return {k: v for k, v in options.items() if v is not None}


def _tokens(text: Mapping[str, str]) -> Tokens:
  """Return the conversion of text by a tokenizer."""
  if not text["tokenizer"]:
    raise flags.UsageError(
      f"--tokenizer=... is missing: --text={text['text']} needs a model's"
      " tokenizer.json"
    )
  try:
    return Tokens(
      text["tokenizer"],
      whole(text, "sequence-length"),
      joined=text["text"] == KINDS[0],
      padding_token=text["padding-token"] or None,
    )
  except (ValueError, OSError) as error:
    flag = str(error).replace("padding_token", "--padding-token")
    prefix = "--" if flag.startswith("tokenizer=") else ""
    raise type(error)(prefix + flag) from error


def _vocabulary(path: Path) -> Sequence[str]:
  """Return the vocabulary of a store, a JSON list of texts, or lines."""
  if path.is_dir():
    known = vocabulary_of(path)
    if known is None:
      raise ValueError(f"--vocabulary={path}: that store is of no text.")
    return known
  if path.suffix in (".txt", ".vocab"):
    return lines_of(path.read_bytes(), f"--vocabulary={path}")
  try:
    held: Any = json.loads(path.read_bytes())
  except ValueError as error:
    raise ValueError(f"--vocabulary={path} is no JSON: {error}.") from error
  if not isinstance(held, list) or not all(isinstance(w, str) for w in held):
    raise ValueError(f"--vocabulary={path}: expected a JSON list of texts.")
  return held
