"""Importers: from the formats that people have to a client store.

An importer returns a `Source`, blocks of examples that can be read again;
`import_store` writes a store of them. What an importer holds in memory is a
block or a client, not the file.
"""

from collections.abc import Callable, Mapping

from fedjax_sim.data.importers.blocks import Block, Source, source
from fedjax_sim.data.importers.csv_table import csv
from fedjax_sim.data.importers.fedjax_sqlite import fedjax_sqlite
from fedjax_sim.data.importers.hdf5 import flute_hdf5, tff_hdf5
from fedjax_sim.data.importers.hugging_face import datasets
from fedjax_sim.data.importers.import_store import import_store
from fedjax_sim.data.importers.leaf_json import leaf_json
from fedjax_sim.data.importers.mind import mind
from fedjax_sim.data.importers.npz import npz
from fedjax_sim.data.importers.python_examples import examples
from fedjax_sim.data.importers.tables import json_lines, parquet
from fedjax_sim.data.importers.text import Characters, TffCharacters, Words
from fedjax_sim.data.importers.tokens import Tokens

IMPORTERS: Mapping[str, Callable[..., Source]] = {
  "csv": csv,
  "datasets": datasets,
  "fedjax_sqlite": fedjax_sqlite,
  "flute_hdf5": flute_hdf5,
  "json_lines": json_lines,
  "leaf_json": leaf_json,
  "mind": mind,
  "npz": npz,
  "parquet": parquet,
  "tff_hdf5": tff_hdf5,
}

__all__ = [
  "IMPORTERS",
  "Block",
  "Characters",
  "Source",
  "TffCharacters",
  "Tokens",
  "Words",
  "csv",
  "datasets",
  "examples",
  "fedjax_sqlite",
  "flute_hdf5",
  "import_store",
  "json_lines",
  "leaf_json",
  "mind",
  "npz",
  "parquet",
  "source",
  "tff_hdf5",
]
