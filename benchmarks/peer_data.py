"""What other simulators and this one train on: clients in a file.

A file is as `fedjax_sim.data.load_npz` reads it, one client after the other.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import cases
from benchmarks.cases import Case
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


def find_data(case: str, folder: Path, mnist: str | None) -> Path:
  """Return the file of a case's clients; write it, but lr's if it is missing.

  Args:
    case: of `benchmarks.peer_cases`.
    folder: for files.
    mnist: as in `load_mnist_power_law`.

  Raises:
    FileNotFoundError, ValueError: MNIST is missing, or damaged.
  """
  path = folder / (data_name() if case == "lr" else f"{case}.npz")
  if case == "mnist":
    write_mnist(path, mnist)
  elif case in WRITERS:
    write_case(path, cases.CASES[case], WRITERS[case])
  elif not path.exists():
    write_data(path)
  return path


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
  _write(path, x, y, client)


Examples = tuple[np.ndarray, np.ndarray]  # inputs and labels


def images(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> Examples:
  """Return noise on a faint picture of each class; some classes are frequent.

  So a loss falls evenly: first by the frequencies, then by the pictures.
  """
  classes = y.max() + 1
  frequencies = np.exp(1.5 * rng.standard_normal(classes))
  drawn = rng.choice(classes, len(y), p=frequencies / frequencies.sum())
  pictures = rng.standard_normal((classes, *x.shape[1:]), dtype=np.float32)
  return x + np.float32(0.3) * pictures[drawn], drawn.astype(np.int32)


def texts(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> Examples:
  """Return texts in which some characters, and some pairs, are frequent.

  A label is the next character; 0 is none.
  """
  tokens = max(x.max(), y.max())
  scores = 2 * rng.standard_normal(tokens)[None]
  scores = scores + rng.standard_normal((tokens, tokens))
  now, text = x[:, 0] - 1, [x[:, 0]]
  for _ in range(x.shape[1]):
    noise = rng.gumbel(size=(len(x), tokens))
    now = np.argmax(scores[now] + noise, axis=1)
    text.append(now + 1)
  written = np.stack(text, axis=1).astype(np.int32)
  return written[:, :-1], written[:, 1:]


Writer = Callable[[np.ndarray, np.ndarray, np.random.Generator], Examples]
WRITERS: Mapping[str, Writer] = {"cnn": images, "lstm": texts}


def write_case(path: Path, case: Case, writer: Writer) -> None:
  """Write the clients of a case, with examples from which one can learn.

  Args:
    path: where.
    case: of `benchmarks.cases`.
    writer: its random inputs and labels, and a generator -> new ones.
  """
  train = cases.dataset(case).train
  x, y = (np.asarray(train.examples[name]) for name in ("x", "y"))
  x, y = writer(x, y, np.random.default_rng(1))
  _write(path, x, y, np.repeat(np.arange(train.num_clients), train.sizes))


def _write(
  path: Path, x: np.ndarray, y: np.ndarray, client: np.ndarray
) -> None:
  """Write a file whole, or not at all."""
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
  _write(path, x, y, client)
