"""`fedjax-sim data`: writes client stores, and says what is in them."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedjax_sim import reporting
from fedjax_sim.cli.interrupts import Stopped, signals_as_exceptions
from fedjax_sim.config import flags
from fedjax_sim.core import references, validate
from fedjax_sim.data import (
  FederatedData,
  StoredData,
  StoreError,
  copy_store,
  is_url,
  local,
  locate,
  open_store,
  partition_store,
  profile,
  verify,
  vocabulary_of,
  write_store,
)
from fedjax_sim.data.exporters import export
from fedjax_sim.data.importers import IMPORTERS, Source, import_store
from fedjax_sim.data.importers.fields import few
from fedjax_sim.data.importers.text import TEXTS, Text
from fedjax_sim.data.importers.tokens import KINDS, Tokens
from fedjax_sim.data.store.format import FURTHER, PREPARE, SPLITS

_PIECE = 2**20  # labels that are counted at once
_MOST_CLASSES = 2**20  # whose shares are told
_PERCENTILES = (0, 10, 50, 90, 100)
_OF_WORDS = ("vocabulary", "vocabulary-size")
_OF_TOKENS = ("tokenizer", "padding-token")
_OPTIONS = (
  "client",
  "delimiter",
  "decimal",
  "fields",
  "dtypes",
  "map",
  "text",
  *_OF_WORDS,
  "sequence-length",
  *_OF_TOKENS,
  "name",
  "num-classes",
  "prepare",
)


def _int(flag: str, text: str) -> int:
  return flags.number(flag, text, int)


def _real(flag: str, text: str) -> float:
  return flags.number(flag, text, float)


def _clients(flag: str, text: str) -> float | list[str]:
  """Return a number or share of clients, a float, or a list of their names."""
  try:
    return float(text)
  except ValueError:
    return [name for name in text.split(",") if name]


_DEAL: dict[str, Callable[[str, str], Any]] = {
  "partition": lambda flag, text: text,
  "num-clients": _int,
  "alpha": _real,
  "exponent": _real,
  "shards-per-client": _int,
}
_SPLIT: dict[str, Callable[[str, str], Any]] = {
  "heldout-fraction": _real,
  "unseen-clients": _clients,
  "min-examples": _int,
  "seed": _int,
}


def run(arguments: Sequence[str]) -> int:
  """Run an action, such as `import`, and print its text; return the exit code.

  Args:
    arguments: what follows `fedjax-sim data`.

  Raises:
    UsageError: a flag is unknown, missing or has a wrong value.
    TypeError, ValueError, OSError: the data, or the store, are refused.
  """
  if not arguments or arguments[0].startswith("-"):
    raise flags.UsageError(
      f"data: say what to do first, one of {', '.join(sorted(_ACTIONS))}"
    )
  act = validate.lookup("data", arguments[0], _ACTIONS)
  try:
    with signals_as_exceptions():
      print(act(arguments[1:]))  # noqa: T201
  except Stopped as stop:
    print("fedjax-sim: interrupted", file=sys.stderr)  # noqa: T201
    return 128 + stop.number
  return 0


def _import(arguments: Sequence[str]) -> str:
  if any(a.partition("=")[0].lstrip("-") == "config" for a in arguments):
    return _import_config(arguments)
  sources: dict[str, str] = dict.fromkeys(SPLITS, "")
  values = flags.parse(
    arguments, "store", "format", **sources, **dict.fromkeys(_OPTIONS, "")
  )
  format = values["format"].value
  importer = validate.lookup("--format", format, IMPORTERS)
  text = {name: values[name].value for name in _OPTIONS}
  fields, dtypes = (_pairs(f"--{k}", text[k]) for k in ("fields", "dtypes"))
  given: dict[str, Any] = {}
  takes = inspect.signature(importer).parameters
  if "fields" in takes:  # it reads no others, and names them
    given["fields"], fields = fields, None
  if "dtypes" in takes:
    given["dtypes"] = {
      **(dtypes or {}),
      **({"x": "text"} if text["text"] else {}),
    }
    dtypes = {k: v for k, v in (dtypes or {}).items() if v != "text"}
  if "raw" in takes:  # what is odd is the map's affair
    given["raw"] = bool(text["map"])
  if "client" in takes:
    given["client"] = text["client"] or "client"
  elif text["client"]:
    raise flags.UsageError(
      f"--client={text['client']} is for tables; --format={format} says itself"
      " whose examples are whose."
    )
  for name in ("delimiter", "decimal"):
    if text[name] and name not in takes:
      raise flags.UsageError(
        f"--{name}={text[name]} is for csv, and not for {format}; leave it out."
      )
    if text[name]:
      given[name] = "\t" if text[name] in ("tab", r"\t") else text[name]
  for split in SPLITS:
    sources[split] = values[split].value
  if not sources["train"]:
    raise flags.UsageError("--train=... is missing: the source of the clients")
  options: dict[str, Any] = {
    "fields": fields,
    "dtypes": dtypes,
    "text": _text(text),
    "vocabulary_size": _whole(text, "vocabulary-size"),
    "sequence_length": _whole(text, "sequence-length"),
    "num_classes": _whole(text, "num-classes", least=0),
    "name": text["name"] or None,
    "prepare": text["prepare"] or None,
    "map": references.load("--map", text["map"]) if text["map"] else None,
  }
  read = {
    split: _source(importer, source, f"--{split}", given)
    for split, source in sources.items()
    if source
  }
  path = local(values["store"].value)
  with reporting.written() as told:
    given = {k: v for k, v in options.items() if v is not None}
    columns = import_store(path, read, progress=told, **given)
  return described(path, columns)


def _source(
  importer: Callable[..., Source],
  source: str,
  flag: str,
  given: Mapping[str, Any],
) -> Source:
  if importer is IMPORTERS["datasets"]:
    name, colon, split = source.rpartition(":")
    if colon and not Path(source).exists():
      return importer(name, split=split, **given)
    return importer(source, **given)
  return importer(locate(source, flag), **given)


def _pairs(flag: str, text: str) -> dict[str, str] | None:
  """Return `a:b,c:d` as a dict; None for an empty text."""
  if not text:
    return None
  found: dict[str, str] = {}
  for pair in text.split(","):
    name, colon, value = pair.partition(":")
    if not (name and colon and value) or name in found:
      raise flags.UsageError(
        f"{flag}={text}: {pair!r} is no pair, or is there twice; give"
        " field:value,field:value."
      )
    found[name] = value
  return found


def _whole(text: Mapping[str, str], name: str, least: int = 1) -> int | None:
  if not text[name]:
    return None
  value = flags.number(f"--{name}", text[name], int)
  return validate.integer(f"--{name}", value, ge=least)


def _text(text: Mapping[str, str]) -> str | Text | None:
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
  return TEXTS[kind](entries, _whole(text, "sequence-length"))


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
      _whole(text, "sequence-length"),
      joined=text["text"] == KINDS[0],
      padding_token=text["padding-token"] or None,
    )
  except (ValueError, OSError) as error:
    flag = str(error).replace("padding_token", "--padding-token")
    prefix = "--" if flag.startswith("tokenizer=") else ""
    raise type(error)(prefix + flag) from error


def _vocabulary(path: Path) -> Sequence[str]:
  """Return the vocabulary of a store, or of a JSON list of texts."""
  if path.is_dir():
    known = vocabulary_of(path)
    if known is None:
      raise ValueError(f"--vocabulary={path}: that store is of no text.")
    return known
  try:
    held: Any = json.loads(path.read_bytes())
  except ValueError as error:
    raise ValueError(f"--vocabulary={path} is no JSON: {error}.") from error
  if not isinstance(held, list) or not all(isinstance(w, str) for w in held):
    raise ValueError(f"--vocabulary={path}: expected a JSON list of texts.")
  return held


def _import_config(arguments: Sequence[str]) -> str:
  values = flags.parse(arguments, "config", "store")
  from fedjax_sim.config.build import build_data, preprocessing
  from fedjax_sim.config.completion import complete

  config = complete(values.config)
  for key, value in preprocessing(config).items():
    raise ValueError(
      f"data.{key}={value!r}: a store holds examples as they are before"
      " anything is done to a batch; unset it here, and set it for runs on the"
      " store."
    )
  path = local(values["store"].value)
  data = build_data(config)
  given = config.data
  words = vocabulary_of(locate(given.path)) if given.name == "store" else None
  with reporting.written() as told:
    write_store(path, data, vocabulary=words, progress=told)
  return described(path)


def _partition(arguments: Sequence[str]) -> str:
  values = flags.parse(
    arguments, "store", "to", **dict.fromkeys((*_DEAL, *_SPLIT), "")
  )
  given = {
    name.replace("-", "_"): kind(f"--{name}", values[name].value)
    for name, kind in (_DEAL | _SPLIT).items()
    if values[name].value
  }
  source, path = local(values["store"].value), local(values["to"].value)
  if not set(given) - {"seed"}:
    raise flags.UsageError(
      "data partition: say what is to be other; give --partition=... with"
      " --num-clients=..., or a split such as --heldout-fraction=..."
    )
  _check_outside(source, path)
  given["name"] = given.pop("partition", None)
  with reporting.written() as told:
    partition_store(
      path,
      open_store(source),
      vocabulary=vocabulary_of(source),
      progress=told,
      **given,
    )
  return described(path)


def _check_outside(store: Path, path: Path) -> None:
  if path.resolve().is_relative_to(store.resolve()):
    raise ValueError(f"--to={path} is inside of {store}; give another place.")


def _copy(arguments: Sequence[str]) -> str:
  values = flags.parse(arguments, "store", "to")
  source, to = values["store"].value, values["to"].value
  with reporting.written() as told:
    copy_store(source, to, told)
  return f"{to}  is a store" if is_url(to) else described(Path(to))


def _export(arguments: Sequence[str]) -> str:
  values = flags.parse(arguments, "store", "format", "to", split="train")
  store, path = local(values["store"].value), local(values["to"].value)
  data, split = open_store(store), values["split"].value
  _check_outside(store, path)
  validate.one_of("--split", split, SPLITS)
  further = data.splits.get(split)
  held = further if split in FURTHER else getattr(data, split)
  if held is None:
    raise ValueError(f"--split={split}: {store} has no such split.")
  part = _part(split, held)
  with reporting.written() as told:
    export(part, path, values["format"].value, told)
  return f"{path}  {_sizes(part)}"


def _part(
  name: str, held: FederatedData | Mapping[str, np.ndarray]
) -> FederatedData:
  """Return a split; central examples become one client of the split's name."""
  if isinstance(held, FederatedData):
    return held
  offsets = np.array([0, len(next(iter(held.values())))], np.int64)
  return FederatedData(examples=held, offsets=offsets, names=[name])


def _info(arguments: Sequence[str]) -> str:
  values = flags.parse(arguments, "store", switches=("verify",), out="")
  path = local(values["store"].value)
  if values.verify:
    verify(path)
  told = described(path)
  if values.verify:
    told += "\nchecksums  all as written"
  if picture := values["out"].value:
    draw(path, Path(picture))
    told += f"\n{picture}"
  return told


def described(
  path: Path, columns: Mapping[str, Sequence[str]] | None = None
) -> str:
  """Return lines that describe what a store holds.

  Args:
    path: the store's folder.
    columns: field -> the fields of the source that it was made of, where
      they were named.
  """
  data = open_store(path)
  train = data.train
  facts: dict[str, Any] = {"name": data.name, "store": str(path)}
  parts = {"train": train, "seen": data.seen, "unseen": data.unseen}
  for name, part in (parts | dict(data.splits)).items():
    if part is not None:
      facts[name] = _sizes(part)
      if part.num_clients <= reporting.MOST_NAMES:
        facts[f"clients of {name}"] = _listed(part)
  for name in ("test", "server"):
    examples = getattr(data, name)
    if examples is not None:
      facts[name] = f"{len(next(iter(examples.values()))):,} examples"
  for field, values in train.examples.items():
    facts[f"field {field}"] = f"{values.dtype} of shape {values.shape[1:]}"
  for field, names in (columns or {}).items():
    count = f"{len(names)}: " if len(names) > 1 else ""
    facts[f"made {field} of"] = f"{count}{few(names)}"
  if words := vocabulary_of(path):
    facts["vocabulary"] = f"{len(words):,} entries"
  size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
  facts["bytes"] = f"{size:,}"
  facts["prepare"] = next(k for k, f in PREPARE.items() if f is data.prepare)
  if data.num_classes and "y" in train.examples:
    facts["classes"] = f"{data.num_classes}"
    if data.num_classes <= _MOST_CLASSES:
      counts = _classes(train, data.num_classes)
      shares = (100 * counts / max(counts.sum(), 1))[:20].tolist()
      shown = [f"{i}: {share:.1f} %" for i, share in enumerate(shares)]
      more = ["..."] if data.num_classes > len(shown) else []
      facts["labels of train"] = ", ".join([*shown, *more])
  return reporting.final_text({}, facts).rstrip()


def _listed(part: FederatedData) -> str:
  """Return the name and the number of examples of every client."""
  names = map(part.client_name, range(part.num_clients))
  sizes = zip(names, part.sizes.tolist(), strict=True)
  return ", ".join(f"{name or repr(name)}: {size:,}" for name, size in sizes)


def _sizes(part: FederatedData) -> str:
  least, tenth, half, most_of, most = np.percentile(
    part.sizes, _PERCENTILES
  ).astype(int)
  return (
    f"{part.num_clients:,} clients, {part.num_examples:,} examples ({least} to"
    f" {most} a client; 10 %: {tenth}, median {half}, 90 %: {most_of})"
  )


def _classes(part: FederatedData, num_classes: int) -> np.ndarray:
  """Count the examples of each class, shape=(num_classes,), piece by piece."""
  labels = part.examples["y"]
  counts = np.zeros(num_classes, np.int64)
  for first in range(0, len(labels), _PIECE):
    piece = np.asarray(labels[first : first + _PIECE]).ravel()
    if piece.max(initial=0) >= num_classes or piece.min(initial=0) < 0:
      raise StoreError(
        f"field 'y' holds labels from {piece.min()} to {piece.max()}, and there"
        f" are {num_classes} classes; it is damaged, --verify tells where."
      )
    counts += np.bincount(piece, minlength=num_classes)
  return counts


def draw(path: Path, picture: Path) -> None:
  """Draw the sizes and classes of a store's training clients.

  Raises:
    OSError: the picture cannot be written.
  """
  data = open_store(path)
  train = data.train
  assert isinstance(train, StoredData)
  shown = profile.spread(train.num_clients, reporting.MOST_BARS)
  counts = None
  if 0 < data.num_classes <= _MOST_CLASSES and "y" in train.examples:
    counts = profile.class_counts(train, shown, data.num_classes)
  title = f"{data.name}: {train.num_clients:,} training clients"
  few = train.num_clients <= reporting.MOST_NAMES
  names = [train.client_name(int(i)) for i in shown] if few else None
  reporting.draw_clients(train.sizes, shown, counts, picture, title, names)


_ACTIONS: dict[str, Callable[[Sequence[str]], str]] = {
  "copy": _copy,
  "export": _export,
  "import": _import,
  "info": _info,
  "partition": _partition,
}
