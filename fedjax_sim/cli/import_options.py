"""Options of `fedjax-sim data import` that only some formats take."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from fedjax_sim.config import flags
from fedjax_sim.data import local, locate
from fedjax_sim.data.importers import IMPORTERS
from fedjax_sim.data.importers.mind import Catalogue, catalogue

OF_FORMATS = {  # name -> its type
  "delimiter": str,
  "decimal": str,
  "clicked": int,
  "candidates": int,
  "negatives": int,
  "seed": int,
}


def of_format(format: str, texts: Mapping[str, str]) -> dict[str, Any]:
  """Return the options of a format's importer that are given.

  Args:
    format: of `IMPORTERS`.
    texts: name, of `OF_FORMATS` -> what was given for it, or "".

  Raises:
    UsageError: the importer takes no such option, or it is no number.
  """
  found: dict[str, Any] = {}
  takes = {k: inspect.signature(f).parameters for k, f in IMPORTERS.items()}
  for name, text in texts.items():
    if text and name not in takes[format]:
      others = " or ".join(k for k in takes if name in takes[k])
      raise flags.UsageError(
        f"--{name}={text} is for {others}, and not for {format}; leave it out."
      )
    if text and OF_FORMATS[name] is int:
      found[name] = flags.number(f"--{name}", text, int)
    elif text:
      found[name] = "\t" if text in ("tab", r"\t") else text
  return found


def news_of(
  takes: Mapping[str, Any], to: str, sources: Mapping[str, str]
) -> Catalogue | None:
  """Return the news of all sources, if the importer takes them.

  Args:
    takes: the importer's parameters.
    to: the file to write them to.
    sources: split -> path, or "".

  Raises:
    UsageError: `to` is missing, or is for another importer.
    OSError, ValueError: the news cannot be read.
  """
  if "news" not in takes:
    if to:
      raise flags.UsageError(f"--news={to} is for mind; leave it out.")
    return None
  if not to.endswith(".npz") or not local(to).absolute().parent.is_dir():
    raise flags.UsageError(
      f"--news={to}: name an .npz file for the titles, in a folder that is"
      " there; the model reads it."
    )
  given = {k: v for k, v in sources.items() if v}
  return catalogue(locate(v, f"--{k}") for k, v in given.items())
