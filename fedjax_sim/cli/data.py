"""`fedjax-sim data`: writes client stores, and says what is in them."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedjax_sim import reporting
from fedjax_sim.cli.import_options import OF_FORMATS, news_of, of_format
from fedjax_sim.cli.interrupts import Stopped, signals_as_exceptions
from fedjax_sim.cli.text_options import (
  SWITCHES,
  TEXT_OPTIONS,
  text_of,
  whole,
  word_options,
)
from fedjax_sim.config import flags
from fedjax_sim.core import references, urls, validate
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
from fedjax_sim.data.news import write_news
from fedjax_sim.data.store.format import FURTHER, PREPARE, SPLITS

_PIECE = 2**20  # labels that are counted at once
_MOST_CLASSES = 2**20  # whose shares are told
_PERCENTILES = (0, 10, 50, 90, 100)
_OPTIONS = (
  "client",
  "fields",
  "dtypes",
  "map",
  *TEXT_OPTIONS,
  "name",
  "num-classes",
  "prepare",
)
_RANKED = ("seen", "unseen", "test")  # splits with an impression an example


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
    arguments,
    *("store", "format"),
    switches=SWITCHES,
    **sources,
    **dict.fromkeys((*_OPTIONS, *OF_FORMATS, "news"), ""),
  )
  format = values["format"].value
  importer = validate.lookup("--format", format, IMPORTERS)
  text = {name: values[name].value for name in (*_OPTIONS, *SWITCHES)}
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
  given |= of_format(format, {k: values[k].value for k in OF_FORMATS})
  for split in SPLITS:
    sources[split] = values[split].value
  if not sources["train"]:
    raise flags.UsageError("--train=... is missing: the source of the clients")
  options: dict[str, Any] = {
    "fields": fields,
    "dtypes": dtypes,
    "text": text_of(text),
    "word_options": word_options(text),
    "vocabulary_size": whole(text, "vocabulary-size"),
    "sequence_length": whole(text, "sequence-length"),
    "num_classes": whole(text, "num-classes", least=0),
    "name": text["name"] or None,
    "prepare": text["prepare"] or None,
    "map": references.load("--map", text["map"]) if text["map"] else None,
  }
  news = news_of(takes, values.news, sources)
  if news is not None:
    given["news"] = news
    options["prepare"], options["num_classes"] = "ids", 2
  read = {}
  for split, source in sources.items():
    if "sampled" in takes:
      given["sampled"] = split not in _RANKED
    if source:
      read[split] = _source(importer, source, f"--{split}", given)
  path = local(values["store"].value)
  with reporting.written() as told:
    given = {k: v for k, v in options.items() if v is not None}
    columns = import_store(path, read, progress=told, **given)
  if news is not None:
    write_news(values.news, news.news)
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
  return (
    f"{urls.redacted_url(to)}  is a store"
    if is_url(to)
    else described(Path(to))
  )


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
