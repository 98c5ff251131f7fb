"""`fedjax-sim data`: writes client stores, and says what is in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedjax_sim import flags, reporting, validate
from fedjax_sim.data import (
  FederatedData,
  FederatedDataset,
  StoredData,
  StoreWriter,
  open_store,
  verify,
)
from fedjax_sim.data.store_writer import PREPARE

BLOCK = 2**24  # bytes that are written at once
_PIECE = 2**20  # labels that are counted at once
_PERCENTILES = (0, 10, 50, 90, 100)


def run(arguments: Sequence[str]) -> str:
  """Does what follows `fedjax-sim data`.

  Returns:
    What there is, some lines.

  Raises:
    UsageError: a flag is unknown, missing or has a wrong value.
    TypeError, ValueError, OSError: the data, or the store, are refused.
  """
  if not arguments or arguments[0].startswith("-"):
    raise flags.UsageError(
      f"data: say what to do first, one of {', '.join(sorted(_ACTIONS))}"
    )
  return validate.lookup("data", arguments[0], _ACTIONS)(arguments[1:])


def _import(arguments: Sequence[str]) -> str:
  values = flags.parse(arguments, "config", "store")
  from fedjax_sim.build import build_data, preprocessing
  from fedjax_sim.config import check_fields

  check_fields(values.config)
  for key, value in preprocessing(values.config).items():
    raise ValueError(
      f"data.{key}={value!r}: a store holds examples as they are before"
      " anything is done to a batch; unset it here, and set it for runs on the"
      " store."
    )
  path = Path(values["store"].value)
  data = build_data(values.config)
  write(path, data)
  return described(path)


def write(path: Path, data: FederatedDataset) -> None:
  """Writes a data set with all of its splits.

  Raises:
    FileExistsError: there is something at `path`.
    ValueError: the data set has what a store cannot hold.
  """
  named = {function: name for name, function in PREPARE.items()}
  if data.prepare not in named or data.augment is not None:
    raise ValueError(
      f"The data set {data.name!r} prepares its batches in a way of its own,"
      f" which a store does not know; it knows {', '.join(PREPARE)}. Write it"
      " with StoreWriter."
    )
  if data.splits:
    raise ValueError(
      f"The data set {data.name!r} has the splits {', '.join(data.splits)},"
      " which a store does not hold; unset data.labelled_fraction, and set it"
      " when the store is read."
    )
  with StoreWriter(
    path,
    name=data.name,
    num_classes=data.num_classes,
    prepare=named[data.prepare],
  ) as store:
    for name in ("train", "seen", "unseen"):
      part: FederatedData | None = getattr(data, name)
      if part is not None:
        split = store.split(name)
        for first, last in _blocks(part):
          begin, end = part.offsets[first], part.offsets[last]
          split.append(
            [part.client_name(i) for i in range(first, last)],
            part.sizes[first:last],
            {k: np.asarray(x[begin:end]) for k, x in part.examples.items()},
          )
    for name in ("test", "server"):
      examples = getattr(data, name)
      if examples is not None:
        size = len(next(iter(examples.values())))
        store.split(name).append([name], [size], examples)


def _blocks(part: FederatedData) -> Iterator[tuple[int, int]]:
  """Clients in a row, first and one past the last, of about `BLOCK` bytes."""
  each = sum(x.nbytes for x in part.examples.values()) / part.num_examples
  rows = max(1, int(BLOCK / max(each, 1)))
  first = 0
  while first < part.num_clients:
    end = part.offsets[first] + rows
    last = int(np.searchsorted(part.offsets, end, side="right")) - 1
    last = min(max(last, first + 1), part.num_clients)
    yield first, last
    first = last


def _info(arguments: Sequence[str]) -> str:
  values = flags.parse(arguments, "store", switches=("verify",), out="")
  path = Path(values["store"].value)
  told = described(path)
  if values.verify:
    verify(path)
    told += "\nchecksums  all as written"
  if picture := values["out"].value:
    draw(path, Path(picture))
    told += f"\n{picture}"
  return told


def described(path: Path) -> str:
  """What a store holds, some lines."""
  data = open_store(path)
  train = data.train
  facts: dict[str, Any] = {"name": data.name, "store": str(path)}
  for name in ("train", "seen", "unseen"):
    part = getattr(data, name)
    if part is not None:
      facts[name] = _sizes(part)
  for name in ("test", "server"):
    examples = getattr(data, name)
    if examples is not None:
      facts[name] = f"{len(next(iter(examples.values()))):,} examples"
  for field, values in train.examples.items():
    facts[f"field {field}"] = f"{values.dtype} of shape {values.shape[1:]}"
  size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
  facts["bytes"] = f"{size:,}"
  if data.num_classes and "y" in train.examples:
    counts = _classes(train, data.num_classes)
    shares = 100 * counts / max(counts.sum(), 1)
    told = [f"{i}: {share:.1f} %" for i, share in enumerate(shares.tolist())]
    facts["classes"] = f"{data.num_classes}"
    shown = told if len(told) <= 20 else [*told[:20], "..."]
    facts["labels of train"] = ", ".join(shown)
  return reporting.final_text({}, facts).rstrip()


def _sizes(part: FederatedData) -> str:
  least, tenth, half, most_of, most = np.percentile(
    part.sizes, _PERCENTILES
  ).astype(int)
  return (
    f"{part.num_clients:,} clients, {part.num_examples:,} examples ({least} to"
    f" {most} a client; 10 %: {tenth}, median {half}, 90 %: {most_of})"
  )


def _classes(part: FederatedData, num_classes: int) -> np.ndarray:
  """Examples of each class, shape=(num_classes,); a piece at a time."""
  labels = part.examples["y"]
  counts = np.zeros(num_classes, np.int64)
  for first in range(0, len(labels), _PIECE):
    piece = np.asarray(labels[first : first + _PIECE]).ravel()
    counts += np.bincount(piece, minlength=num_classes)
  return counts


def draw(path: Path, picture: Path) -> None:
  """Draws sizes and classes of a store's training clients.

  Raises:
    OSError: the picture cannot be written.
  """
  data = open_store(path)
  train = data.train
  assert isinstance(train, StoredData)
  most = reporting.MOST_BARS
  shown = np.unique(
    np.linspace(0, train.num_clients - 1, most).round().astype(int)
  )
  counts = None
  if data.num_classes and "y" in train.examples:
    labels = [np.asarray(train.client(int(i))["y"]).ravel() for i in shown]
    counts = np.stack(
      [np.bincount(y, minlength=data.num_classes) for y in labels]
    )
  title = f"{data.name}: {train.num_clients:,} training clients"
  reporting.draw_clients(train.sizes, shown, counts, picture, title)


_ACTIONS: dict[str, Callable[[Sequence[str]], str]] = {
  "import": _import,
  "info": _info,
}
