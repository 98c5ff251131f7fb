"""Writes a client store of what importers read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fedjax_sim.core import validate
from fedjax_sim.data.importers.blocks import Block, column
from fedjax_sim.data.importers.fields import (
  assigned,
  check_dtypes,
  chosen,
  converted,
)
from fedjax_sim.data.importers.text import (
  TEXTS,
  Characters,
  Text,
  TffCharacters,
  Words,
  characters_in,
  words_in,
)
from fedjax_sim.data.importers.tokens import KINDS
from fedjax_sim.data.store.format import SPLITS
from fedjax_sim.data.store.rewrite import Told
from fedjax_sim.data.store.split_writer import SplitWriter
from fedjax_sim.data.store.writer import StoreWriter

Examples = Mapping[str, np.ndarray]
Map = Callable[[str, Examples], Examples]
_CENTRAL = ("test", "server")  # splits of one client


def import_store(
  path: str | os.PathLike[str],
  sources: Mapping[str, Iterable[Block]],
  *,
  fields: Mapping[str, str] | None = None,
  map: Map | None = None,
  text: str | Text | None = None,
  vocabulary_size: int = 10_000,
  sequence_length: int | None = None,
  word_options: Mapping[str, Any] | None = None,
  dtypes: Mapping[str, str] | None = None,
  name: str | None = None,
  num_classes: int | None = None,
  prepare: str | None = None,
  progress: Told | None = None,
) -> dict[str, Sequence[str]]:
  """Write the examples of some sources as a store, while they are read.

  Whole numbers are stored as they are, but int64 and unsigned ones beyond 16
  bits as int32, float64 as float32; `dtypes` says otherwise. A field of whole
  numbers and of fractions is float32: where fractions come late, the sources
  are read again.

  Args:
    path: the store's folder, which must not be there yet.
    sources: split, of `SPLITS` -> what an importer returns. Clients of "test"
      and "server" are put together.
    fields: field of the store -> field of the sources, or several that become
      one array, see `fields.assigned`; None: all, as they are called. A store's
      models want "x", and most "y".
    map: what happens to examples of one client that are read together: its name
      and field -> (n, ...) to field -> (m, ...); text is of dtype object.
    text: how "x" becomes ids where it is text: "characters", "words",
      "tff_characters", or a `Text` with its vocabulary, such as `Tokens`; the
      first two read the sources twice, and the vocabulary is what they have.
    vocabulary_size: of words, at most.
    sequence_length: ids of an example; None: 80 characters or 20 words.
    word_options: further arguments of `Words`, for text="words".
    dtypes: field -> dtype, by name.
    name: see `StoreWriter`.
    num_classes: see `StoreWriter`; None with text whose labels are ids: as many
      as there are.
    prepare: see `StoreWriter`; None: "ids" for text, else "numbers".
    progress: a function that is called with the split and how many clients and
      examples it has so far; None: none.

  Returns:
    field -> the training source's fields that it is made of, where `fields` was
    given, here or to the importer; with a map, those that the map is given.

  Raises:
    FileExistsError: there is something at `path`.
    TypeError, ValueError, OSError: a source is damaged, fields do not fit, or
      the disk is full; then no store is there.
  """
  for split in sources:
    validate.one_of("split", split, SPLITS)
  if "train" not in sources:
    raise ValueError("There is no source of the split 'train'; give one.")
  dtypes = dict(dtypes or {})
  check_dtypes(dtypes)
  blocks = {
    split: _Selected(sources[split], fields, map)
    for split in SPLITS
    if split in sources
  }
  texts = _text(
    text, blocks, vocabulary_size, sequence_length, word_options or {}
  )
  while True:
    try:
      _write(
        StoreWriter(
          path,
          name=name,
          num_classes=num_classes,
          prepare=prepare or ("ids" if texts else "numbers"),
          vocabulary=texts.vocabulary if texts else None,
        ),
        blocks,
        texts,
        dtypes,
        progress,
      )
    except _Fractions as late:
      dtypes[late.field] = late.dtype
    else:
      return blocks["train"].columns


class _Fractions(Exception):
  """A field that held only whole numbers so far holds fractions, too."""

  def __init__(self, field: str, dtype: str):
    super().__init__(field)
    self.field, self.dtype = field, dtype


def _write(
  writer: StoreWriter,
  blocks: Mapping[str, _Selected],
  texts: Text | None,
  dtypes: Mapping[str, str],
  progress: Told | None,
) -> None:
  """Write all splits; see `import_store`.

  Raises:
    _Fractions: fractions follow whole numbers in a field whose dtype is not
      given, and the sources can be read again.
  """
  again = all(selected.again for selected in blocks.values())
  own_classes = writer.num_classes is None
  with writer as store:
    kinds: dict[str, np.dtype[Any]] = {}
    for split, selected in blocks.items():
      to = store.split(split)
      checked = _alike(selected, kinds)
      for block in texts.blocks(checked) if texts else checked:
        if texts and own_classes and _ids_as_labels(kinds):
          store.num_classes = texts.num_classes
        if split == "unseen":
          _check_unseen(store.split("train"), block)
        _append(to, split, block, dtypes, again)
        if progress:
          progress(split, to.num_clients, to.num_examples)


def _check_unseen(train: SplitWriter, block: Block) -> None:
  for name in block.names:
    if train.has(name):
      raise ValueError(
        f"{block.where}: client {name!r} is among those that train, and clients"
        " of 'unseen' never do; leave it out of one."
      )


def _ids_as_labels(kinds: Mapping[str, np.dtype[Any]]) -> bool:
  """Return whether the labels of text are ids: they are text, or missing."""
  return "y" not in kinds or kinds["y"].hasobject


def _alike(
  blocks: Iterable[Block], kinds: dict[str, np.dtype[Any]]
) -> Iterator[Block]:
  """Yield the blocks; refuse a field that is text in some, not in others."""
  for block in blocks:
    for field, values in block.examples.items():
      known = kinds.setdefault(field, values.dtype)
      if known.hasobject != values.dtype.hasobject:
        one, other = (
          "text" if dtype.hasobject else "numbers"
          for dtype in (values.dtype, known)
        )
        raise ValueError(
          f"{_where(block)}: field {field!r} holds {one}, and {other} before;"
          " give all of one kind."
        )
    yield block


def _where(block: Block) -> str:
  """Return the block's source, and its client if it has only one."""
  one = len(block.names) == 1
  return f"{block.where}: client {block.names[0]!r}" if one else block.where


class _Selected(Iterable[Block]):
  """A source's blocks with the wanted fields, after the map if there is one."""

  def __init__(
    self,
    source: Iterable[Block],
    fields: Mapping[str, str] | None,
    map: Map | None,
  ):
    self._source, self._fields, self._map = source, fields, map
    self.again = iter(source) is not source
    self.columns: dict[str, Sequence[str]] = {}  # of what was read last

  def __iter__(self) -> Iterator[Block]:
    for block in self._source:
      if not np.sum(block.sizes):
        continue  # of clients without examples
      held = chosen(block.where, block.examples, self._fields)
      if "x" not in held:
        raise ValueError(
          f"{_where(block)}: the fields are {', '.join(held)}; name the model's"
          " input x, and the label y: fields=x:...,y:..."
        )
      self.columns = dict(block.columns or {})
      if self._fields is not None:
        made_of = assigned(block.where, list(block.examples), self._fields)
        self.columns = {
          field: [n for name in names for n in self.columns.get(name, [name])]
          for field, names in made_of.items()
        }
      block = block._replace(examples=held, columns=self.columns)
      yield _mapped(block, self._map) if self._map else block


def _mapped(block: Block, function: Map) -> Block:
  """Apply a user's map to every client of a block."""
  ends = np.cumsum(np.asarray(block.sizes, np.int64)).tolist()
  parts: list[Examples] = []
  sizes = []
  for name, begin, end in zip(block.names, [0, *ends[:-1]], ends, strict=True):
    given = {k: v[begin:end] for k, v in block.examples.items()}
    where = f"{block.where}: client {name!r}: what map returns"
    try:
      made = function(name, given)
    except Exception as error:
      raise ValueError(
        f"{block.where}: client {name!r}: map raised {type(error).__name__}:"
        f" {error}"
      ) from error
    validate.instance(where, made, Mapping, "{'x': x, 'y': y}")
    held = {k: _as_array(where, k, v) for k, v in made.items()}
    lengths = {len(v) if v.ndim else -1 for v in held.values()}
    if len(lengths) != 1 or -1 in lengths:
      raise ValueError(
        f"{where} has fields of shape {[v.shape for v in held.values()]}; give"
        " each one entry an example."
      )
    if parts and set(held) != set(parts[0]):
      raise ValueError(
        f"{where} has fields {sorted(held)}, of others {sorted(parts[0])}; give"
        " all clients the same."
      )
    parts.append(held)
    sizes.append(lengths.pop())
  for name, part in zip(block.names, parts, strict=True):
    for k, values in part.items():
      if values.shape[1:] != parts[0][k].shape[1:]:
        raise ValueError(
          f"{block.where}: client {name!r}: what map returns has {k} of shape"
          f" {values.shape[1:]} an example, others {parts[0][k].shape[1:]};"
          " give all one shape."
        )
  fields = list(parts[0]) if parts else []
  examples = {k: np.concatenate([part[k] for part in parts]) for k in fields}
  return block._replace(sizes=sizes, examples=examples, rows=None)


def _as_array(where: str, field: str, values: Any) -> np.ndarray:
  """Return a map's values as numbers, or as text of dtype object.

  Raises:
    ValueError: the values are neither, or of several shapes.
  """
  if not isinstance(values, np.ndarray):
    values = (
      list(values) if isinstance(values, Sequence) else np.asarray(values)
    )
  if isinstance(values, list) or (values.dtype.kind in "OU" and values.ndim):
    return column(where, field, list(values))
  return values


def _text(
  text: str | Text | None,
  blocks: Mapping[str, _Selected],
  vocabulary_size: int,
  length: int | None,
  word_options: Mapping[str, Any],
) -> Text | None:
  if text is None or isinstance(text, Text):
    return text
  if text in KINDS:
    raise ValueError(
      f"text={text!r} needs a tokenizer; give Tokens('tokenizer.json')."
    )
  validate.one_of("text", text, TEXTS)
  if text == "tff_characters":
    return TffCharacters(length=length)
  for split, source in blocks.items():
    if not source.again:
      raise ValueError(
        f"text={text!r} reads sources twice, and that of {split!r} can be read"
        " once only; give Characters(vocabulary) or Words(vocabulary)."
      )
  if text == "characters":
    found = {c for source in blocks.values() for c in characters_in(source)}
    return Characters(sorted(found), length)
  most = validate.integer("vocabulary_size", vocabulary_size)
  words = words_in(blocks["train"], most)
  return Words(words, length, **word_options)


def _append(
  to: SplitWriter,
  split: str,
  block: Block,
  dtypes: Mapping[str, str],
  again: bool,
) -> None:
  where = _where(block)
  for field in dtypes:
    validate.one_of(f"{where}: dtypes: field", field, block.examples)
  examples: dict[str, Any] = {}
  for field, values in block.examples.items():
    told, column_of = where, (block.columns or {}).get(field, [])
    if len(column_of) == 1 and column_of != [field]:
      told = f"{where}: column {column_of[0]!r}"
    made = converted(told, field, values, dtypes.get(field), block.place)
    known = to.dtype_of(field)
    if known not in (None, made.dtype):
      real = [d.name for d in (known, made.dtype) if d.kind == "f"]
      if again and len(real) == 1 and field not in dtypes:
        raise _Fractions(field, real[0])
      raise ValueError(
        f"{where}: field {field!r} is {made.dtype}, and {known} before; give it"
        f" one, such as dtypes={field}:float32."
      )
    examples[field] = made
  names, sizes = list(block.names), np.asarray(block.sizes)
  if split in _CENTRAL:
    names, sizes = [split], np.array([sizes.sum()])
  to.append(
    names,
    sizes,
    examples,
    where=where,
    repeats=not block.whole or split in _CENTRAL,
  )
