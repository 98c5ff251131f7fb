"""What other simulators and this one train on: clients in a file.

A file is as `fedjax_sim.data.load_npz` reads it, one client after the other.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedjax_sim.data import load_mnist_power_law

DATA: Mapping[str, Any] = {
  "clients": 1000,
  "features": 784,
  "classes": 10,
  "median_size": 60,
  "sigma": 0.6,
  "least_size": 20,
  "greatest_size": 200,
  "seed": 0,
}


def data_name(of: Mapping[str, Any] = DATA) -> str:
  """Return the name of the data's file, which differs where its content would.

  Args:
    of: as `DATA`.
  """
  made = json.dumps(dict(of), sort_keys=True) + inspect.getsource(write_data)
  return f"lr-{hashlib.sha256(made.encode()).hexdigest()[:12]}.npz"


def write_data(path: Path, of: Mapping[str, Any] = DATA) -> None:
  """Write the clients' examples: of a random linear model, with noise.

  As `fedjax_sim.data.load_npz` reads it, one client after the other.

  Args:
    path: where.
    of: as `DATA`.
  """
  rng = np.random.default_rng(of["seed"])
  middle, num_clients = np.log(of["median_size"]), of["clients"]
  drawn = rng.lognormal(middle, of["sigma"], num_clients).round()
  sizes = np.clip(drawn, of["least_size"], of["greatest_size"]).astype(np.int64)
  shape = (of["features"], of["classes"])
  x = rng.standard_normal((sizes.sum(), shape[0]), dtype=np.float32) / 4
  true = rng.standard_normal(shape, dtype=np.float32)
  noise = rng.gumbel(size=(len(x), shape[1]))
  y = np.argmax(x @ true + noise, axis=1).astype(np.int32)
  client = np.repeat(np.arange(num_clients), sizes)
  part = path.with_name(f"part-{os.getpid()}.npz")
  np.savez(part, x=x, y=y, client=client)
  part.replace(path)


def write_mnist(path: Path, folder: str | None) -> None:
  """Write MNIST in clients by a power law, as `write_data` writes its own.

  Args:
    path: where.
    folder: as in `load_mnist_power_law`.

  Raises:
    FileNotFoundError, ValueError: MNIST is missing, or damaged.
  """
  data = load_mnist_power_law(path=folder, heldout_fraction=0.0)
  train = data.train
  x = np.asarray(train.examples["x"], np.float32).reshape(-1, 28 * 28) / 255
  y = np.asarray(train.examples["y"], np.int32)
  client = np.repeat(np.arange(train.num_clients), train.sizes)
  np.savez(path, x=x, y=y, client=client)
