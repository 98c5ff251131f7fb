"""What does it cost to import a file?

    python -m benchmarks.importing --folder=DIR

Exports stores of 3,000 and 30,000 clients, of 1 to 39 examples of 64 bytes,
in every format, and imports the files again. Every import runs in a process of
its own, whose peak of resident memory is printed, and must give the same
examples as the store has. Times are ratios to that of `npz`.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from benchmarks.apart import apart, build

SUFFIXES = {
  "npz": "npz",
  "parquet": "parquet",
  "csv": "csv",
  "json_lines": "jsonl",
  "leaf_json": "json",
  "fedjax_sqlite": "sqlite",
  "flute_hdf5": "hdf5",
  "tff_hdf5": "h5",
}
DTYPES = {"x": "uint8", "y": "uint8"}


def write(store: Path, file: Path, format: str) -> dict[str, float]:
  """Export a store; CSV and JSON lines are written here."""
  from fedjax_sim.data import open_store
  from fedjax_sim.data.exporters import EXPORTERS, export

  data = open_store(store).train
  if format in EXPORTERS:
    export(data, file, format)
    return {}
  with file.open("w") as out:
    if format == "csv":
      fields = data.examples["x"].shape[1]
      out.write(f"client,y,{','.join(f'x{i}' for i in range(fields))}\n")
    for i in range(data.num_clients):
      name, held = data.client_name(i), data.client(i)
      for x, y in zip(held["x"].tolist(), held["y"].tolist(), strict=True):
        out.write(
          f"{name},{y},{','.join(map(str, x))}\n"
          if format == "csv"
          else f'{{"client": "{name}", "x": {x}, "y": {y}}}\n'
        )
  return {}


def read(file: Path, store: Path, format: str) -> dict[str, float]:
  """Import a file; return the seconds that this took."""
  from fedjax_sim.data.importers import IMPORTERS, import_store

  options: Any = {}
  if format in ("npz", "parquet", "csv", "json_lines"):
    options["client"] = "client"
  if format == "csv":
    options["fields"] = {"x": "x*", "y": "y"}
  began = time.perf_counter()
  import_store(
    store, {"train": IMPORTERS[format](file, **options)}, dtypes=DTYPES
  )
  return {"seconds": time.perf_counter() - began}


def same(one: Path, other: Path) -> bool:
  """Return whether two stores have the same clients, in any order."""
  from fedjax_sim.data import open_store

  a, b = (open_store(path).train for path in (one, other))
  names = list(b.names or ())
  place = {name: i for i, name in enumerate(names)}
  if a.num_clients != b.num_clients:
    return False
  return all(
    np.array_equal(values, b.client(place[a.client_name(i)])[field])
    for i in range(a.num_clients)
    for field, values in a.client(i).items()
  )


FOLDER = flags.DEFINE_string("folder", None, "Where files are written.")
CLIENTS = flags.DEFINE_integer("clients", 30_000, "Of the larger store.")


def main(argv: list[str]) -> None:
  """Print a table."""
  del argv
  folder = Path(FOLDER.value or ".") / "benchmark_importing"
  folder.mkdir(parents=True)
  sizes = [CLIENTS.value // 10, CLIENTS.value]
  seconds = {}
  try:
    for clients in sizes:
      apart(build, folder / f"of {clients}", clients)
    print("| format | bytes | peak, 1/10 of it | peak | time |")
    print("| --- | --- | --- | --- | --- |")
    for format, suffix in SUFFIXES.items():
      peaks = []
      for clients in sizes:
        store, file = folder / f"of {clients}", folder / f"{clients}.{suffix}"
        apart(write, store, file, format)
        bytes_ = file.stat().st_size
        told = apart(read, file, folder / "read", format)
        if not same(store, folder / "read"):
          raise ValueError(f"{format}: the examples differ")
        shutil.rmtree(folder / "read")
        file.unlink()
        peaks.append(told["peak"] / 1e6)
        seconds[format] = told["seconds"]
      ratio = seconds[format] / seconds["npz"]
      cells = (
        f"{bytes_ / 1e6:,.0f} MB | {peaks[0]:,.0f} MB | {peaks[1]:,.0f} MB"
      )
      print(f"| `{format}` | {cells} | {ratio:.1f} |", flush=True)
  finally:
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
  app.run(main)
