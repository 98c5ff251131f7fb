"""Small files of made-up examples, laid out as those that others publish."""

import json
import struct

import h5py
import numpy as np


def kaggle_heartbeats(folder, train=40, test=20):
  """`mitbih_train.csv` and `mitbih_test.csv`, sorted by class as Kaggle's."""
  rng = np.random.default_rng(0)
  for part, rows in (("train", train), ("test", test)):
    x = rng.uniform(size=(rows, 187))
    y = np.sort(rng.integers(0, 5, rows))
    np.savetxt(
      folder / f"mitbih_{part}.csv", np.column_stack([x, y]), "%.18e", ","
    )


def fed_emnist(folder, clients=3):
  """`fed_emnist_train.h5` and `fed_emnist_test.h5`, as TFF publishes them."""

  def write(group, rng, size):
    group["pixels"] = rng.uniform(size=(size, 28, 28)).astype(np.float32)
    group["label"] = rng.integers(0, 62, size).astype(np.int32)

  names = [f"f{i:04d}_{i:02d}" for i in range(clients)]
  _tff(folder, "fed_emnist", names, write)


def fed_cifar100(folder, clients=3):
  """`fed_cifar100_train.h5` and `fed_cifar100_test.h5`, likewise."""

  def write(group, rng, size):
    group["coarse_label"] = rng.integers(0, 20, size).astype(np.int64)
    group["image"] = rng.integers(0, 256, (size, 32, 32, 3)).astype(np.uint8)
    group["label"] = rng.integers(0, 100, size).astype(np.int64)

  _tff(folder, "fed_cifar100", [str(i) for i in range(clients)], write)


def tff_shakespeare(folder):
  """`shakespeare_train.h5` and `shakespeare_test.h5`, likewise."""

  def write(group, rng, size):
    group["snippets"] = ["To be, or not to be."] * (size // 2)

  _tff(folder, "shakespeare", ["A_B", "C_D", "E_F"], write)


def _tff(folder, name, clients, write):
  """Write `examples/<client>/<field>` into a file for each of two splits."""
  rng = np.random.default_rng(0)
  for part, size in (("train", 6), ("test", 2)):
    with h5py.File(folder / f"{name}_{part}.h5", "w") as file:
      for client in clients:
        write(file.create_group(f"examples/{client}"), rng, size)


def _blobs(folder, name, write, sizes=(("train", 4), ("test", 2)), users=3):
  """LEAF's and FLUTE's JSON for each of two splits, by `write(rng, size)`."""
  rng = np.random.default_rng(0)
  for part, size in sizes:
    users_ = [f"f_{i:05d}" for i in range(users)]
    held = {
      "users": users_,
      "num_samples": [size] * users,
      "user_data": {user: write(rng, size) for user in users_},
    }
    file = folder / name.format(part)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(held))


def leaf_digits(folder):
  """FedML's MNIST: `train/` and `test/` with a file of LEAF's JSON each."""

  def write(rng, size):
    x = rng.uniform(size=(size, 784)).round(3).tolist()
    return {"x": x, "y": rng.integers(0, 10, size).tolist()}

  _blobs(folder, "{0}/all_data_0_niid_0_keep_10_{0}_9.json", write)


def flute_sentences(folder):
  """Sentences of users as FLUTE's nlg_gru reads them, with a vocabulary."""
  _blobs(
    folder,
    "data/nlg_gru/{}_data.json",
    lambda rng, size: {"x": ["the beer is good"] * size},
  )
  (folder / "models").mkdir()
  words = "<OOV>\nthe\nbeer\nis\n"
  (folder / "models" / "vocab_reddit.vocab").write_text(words)


def flute_heartbeats(folder):
  """FLUTE's `train_data.hdf5` and `test_data.hdf5`: numbers as texts."""
  rng = np.random.default_rng(0)
  users = [f"{i:04d}" for i in range(3)]
  for part, size in (("train", 4), ("test", 2)):
    with h5py.File(folder / f"{part}_data.hdf5", "w") as file:
      file["users"] = users
      file["num_samples"] = [size] * len(users)
      for user in users:
        x = rng.uniform(size=(size, 187)).round(3)
        file[f"user_data/{user}/x"] = x.astype(str).astype("S")
        file[f"user_data_label/{user}"] = rng.integers(0, 5, size)


def python2_pickle(held):
  """Bytes, whole numbers, lists, dictionaries and arrays, as Python 2 did."""
  return b"\x80\x02" + _opcodes(held) + b"."


def _opcodes(held):
  text = lambda x: b"T" + struct.pack("<i", len(x)) + x
  number = lambda x: b"J" + struct.pack("<i", x)
  if isinstance(held, bytes):
    return text(held)
  if isinstance(held, int):
    return number(held)
  if isinstance(held, list):
    return b"](" + b"".join(map(_opcodes, held)) + b"e"
  if isinstance(held, dict):
    pairs = (_opcodes(k) + _opcodes(v) for k, v in held.items())
    return b"}(" + b"".join(pairs) + b"u"
  kind = held.dtype.str[1:].encode()  # an array: its class, then its state
  order = b"|" if held.dtype.itemsize == 1 else b"<"
  empty = b"cnumpy\nndarray\n" + number(0) + b"\x85" + text(b"b") + b"\x87R"
  dtype = b"cnumpy\ndtype\n" + text(kind) + number(0) + number(1) + b"\x87R"
  dtype += b"(" + number(3) + text(order) + b"NNN" + 2 * number(-1)
  dtype += number(0) + b"tb"
  shape = b"(" + b"".join(map(number, held.shape)) + b"t"
  state = b"(" + number(1) + shape + dtype + b"\x89" + text(held.tobytes())
  return b"cnumpy.core.multiarray\n_reconstruct\n" + empty + state + b"tb"


def cifar_batch(file, count, classes, labels="labels", seed=0):
  """A file of CIFAR-10's or CIFAR-100's page; returns its images and labels."""
  rng = np.random.default_rng(seed)
  x = rng.integers(0, 256, (count, 3072)).astype(np.uint8)
  y = rng.integers(0, classes, count).tolist()
  held = {b"batch_label": b"a batch", labels.encode(): y, b"data": x}
  file.parent.mkdir(exist_ok=True)
  file.write_bytes(python2_pickle(held))
  return x, y


def cifar10_batches(folder, count=6):
  """`cifar-10-batches-py/`: five files to train, and one to test."""
  here = folder / "cifar-10-batches-py"
  names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
  return [cifar_batch(here / n, count, 10, seed=i) for i, n in enumerate(names)]


def cifar100_batches(folder, count=500):
  """`cifar-100-python/`: `train` and `test`."""
  here, labels = folder / "cifar-100-python", "fine_labels"
  return [
    cifar_batch(here / "train", count, 100, labels),
    cifar_batch(here / "test", 20, 100, labels, 1),
  ]
