"""Files as others write them: each by the library of its format."""

import csv
import gzip
import json
import sqlite3
import zlib
from contextlib import closing

import datasets
import h5py
import msgpack
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fedjax_sim.data import importers

COLUMNS = {"x": "x", "y": "y"}


def per_client(x, y, owner):
  names = dict.fromkeys(owner.tolist())
  return {u: (x[owner == u], y[owner == u]) for u in names}


def leaf(file, x, y, owner):
  users = per_client(x, y, owner)
  held = {
    "users": list(users),
    "num_samples": [len(v) for _, v in users.values()],
    "user_data": {
      u: {"x": a.tolist(), "y": b.tolist()} for u, (a, b) in users.items()
    },
  }
  file.write_text(json.dumps(held))
  return importers.leaf_json(file)


def flute(file, x, y, owner):
  users = per_client(x, y, owner)
  held = {
    "users": list(users),
    "num_samples": [len(v) for _, v in users.values()],
    "user_data": {u: {"x": a.tolist()} for u, (a, _) in users.items()},
    "user_data_label": {u: b.tolist() for u, (_, b) in reversed(users.items())},
  }
  with gzip.open(file, "wt") as out:
    json.dump(held, out)
  return importers.leaf_json(file)


def flute_hdf5(file, x, y, owner):
  users = per_client(x, y, owner)
  with h5py.File(file, "w") as out:
    out["users"] = list(users)
    out["num_samples"] = [len(v) for _, v in users.values()]
    for u, (a, b) in users.items():
      out[f"user_data/{u}/x"] = a
      out[f"user_data_label/{u}"] = b
  return importers.flute_hdf5(file)


def tff_hdf5(file, x, y, owner):
  with h5py.File(file, "w") as out:
    for u, (a, b) in per_client(x, y, owner).items():
      out[f"examples/{u}/x"] = a
      out.create_dataset(f"examples/{u}/y", data=b, compression="gzip")
  return importers.tff_hdf5(file)


def fedjax_sqlite(file, x, y, owner):
  def packed(array):
    held = (array.shape, array.dtype.name, array.tobytes("C"))
    return msgpack.ExtType(1, msgpack.packb(held, use_bin_type=True))

  with closing(sqlite3.connect(file)) as out, out:
    out.execute(
      "CREATE TABLE federated_data (client_id BLOB NOT NULL PRIMARY KEY, data"
      " BLOB NOT NULL, num_examples INTEGER NOT NULL);"
    )
    for u, (a, b) in per_client(x, y, owner).items():
      data = zlib.compress(msgpack.packb({"x": packed(a), "y": packed(b)}))
      row = (u.encode(), data, len(b))
      out.execute("INSERT INTO federated_data VALUES (?, ?, ?)", row)
  return importers.fedjax_sqlite(file)


def table(x, y, owner):
  rows = pa.array(x.reshape(-1))
  for size in reversed(x.shape[1:]):
    rows = pa.FixedSizeListArray.from_arrays(rows, size)
  return pa.table({"x": rows, "y": y, "user": owner.tolist()})


def parquet(file, x, y, owner):
  pq.write_table(table(x, y, owner), file)
  return importers.parquet(file, client="user")


def csv_table(file, x, y, owner):
  flat = x.reshape(len(x), -1)
  with file.open("w", newline="") as out:
    write = csv.writer(out)
    write.writerow(["user", *(f"p{i}" for i in range(flat.shape[1])), "label"])
    for row, label, user in zip(flat.tolist(), y.tolist(), owner, strict=True):
      write.writerow([user, *row, label])
  fields = {"x": "p*", "y": "label"}
  return importers.csv(file, client="user", fields=fields)


def json_lines(file, x, y, owner):
  with file.open("w") as out:
    for row, label, user in zip(x.tolist(), y.tolist(), owner, strict=True):
      out.write(json.dumps({"user": user, "x": row, "y": label}) + "\n")
  return importers.json_lines(file, client="user")


def npz(file, x, y, owner):
  np.savez_compressed(file, x=x, y=y, user=np.array(list(owner)))
  return importers.npz(file, client="user")


def saved_dataset(file, x, y, owner):
  held = datasets.Dataset(table(x, y, owner))
  held.save_to_disk(file)
  return importers.datasets(file, client="user")


def hub_dataset(file, x, y, owner):
  file.mkdir()
  pq.write_table(table(x, y, owner), file / "train.parquet")
  return importers.datasets(file, client="user")


def examples(file, x, y, owner):
  pairs = [
    (user, {"x": row, "y": label})
    for row, label, user in zip(x, y, owner, strict=True)
  ]
  return importers.examples(pairs)


# format -> file, library that writes it, function; True where rows of a client
# may lie apart.
WRITERS = {
  "leaf_json": ("a.json", "json", leaf, False),
  "leaf_json (FLUTE)": ("a.json.gz", "json, gzip", flute, False),
  "flute_hdf5": ("a.hdf5", "h5py", flute_hdf5, False),
  "tff_hdf5": ("a.h5", "h5py", tff_hdf5, False),
  "fedjax_sqlite": ("a.sqlite", "sqlite3, msgpack", fedjax_sqlite, False),
  "parquet": ("a.parquet", "pyarrow", parquet, True),
  "csv": ("a.csv", "csv", csv_table, True),
  "json_lines": ("a.jsonl", "json", json_lines, True),
  "npz": ("a.npz", "numpy", npz, True),
  "datasets (save_to_disk)": ("saved", "datasets", saved_dataset, True),
  "datasets (streamed)": ("hub", "pyarrow", hub_dataset, True),
  "examples": ("none", "Python", examples, True),
}
