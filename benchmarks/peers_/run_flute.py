"""FedAvg on a linear model through FLUTE, in an environment of its own.

`python run_flute.py DATA OUT ROUNDS WORK`, as `benchmarks/peers.py` calls it;
WORK also says where a checkout of FLUTE is, and how many processes to start.
FLUTE's experiment `cv_lr_mnist` runs by its own command line with the backend
gloo, on its own config with the numbers of WORK, and without evaluation. The
data take the place of the archive that the experiment would download: LEAF's
JSON in a folder `data` of the working folder, which is a temporary one of links
into the checkout. One process is the server; the others train
clients.

A round's seconds are those that FLUTE reports, its own saving of the model
included; its examples are counted from the lines that name a client. FLUTE
draws its first weights, where the other simulators begin with zeros. Numbers
of the data have four decimals, so that the JSON stays short.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import yaml

TASK = "cv_lr_mnist"
TEST_CLIENTS = 10  # FLUTE reads a test set, though nothing is evaluated
CLIENT = re.compile(r"Loading : \d+-th client with name: \S+, (\d+) samples")
FAILURE = re.compile(r"^(?:\[rank\d+\]: )?(\w+Error\b.*)", re.MULTILINE)
SECONDS = re.compile(r"scalar metric secsPerRoundTotal:\s*([\d.e+-]+)")


def leaf(x: np.ndarray, y: np.ndarray, client: np.ndarray) -> str:
  """Return clients' examples as LEAF's JSON."""
  sizes = np.bincount(client)
  users = [f"f_{i:05d}" for i in range(len(sizes))]
  cuts = np.cumsum(sizes)[:-1]
  parts = zip(users, np.split(x, cuts), np.split(y, cuts), strict=True)
  data = {
    user: {"x": a.round(4).tolist(), "y": b.tolist()} for user, a, b in parts
  }
  return json.dumps(
    {"users": users, "num_samples": sizes.tolist(), "user_data": data}
  )


def write_data(folder: Path, data: str) -> None:
  """Write what the experiment would download, unpacked, and no archive.

  Each of FLUTE's processes unpacks the archive, so that one could read what
  another is about to write; there is nothing in ours.
  """
  with np.load(data) as file:
    x, y, client = file["x"].astype(np.float64), file["y"], file["client"]
  few = client < TEST_CLIENTS
  splits = {
    "train": leaf(x, y, client),
    "test": leaf(x[few], y[few], client[few]),
  }
  for split, text in splits.items():
    path = folder / "MNIST" / split
    path.mkdir(parents=True)
    (path / "all_data.json").write_text(text)
  zipfile.ZipFile(folder / "MNIST.zip", "w").close()


def make_config(checkout: Path, rounds: int, work: dict) -> dict:
  """Return the experiment's own config, with the numbers of `work`."""
  if work["epochs"] != 1:
    raise ValueError("clients of FLUTE make one epoch")
  config = yaml.safe_load(
    (checkout / "experiments" / TASK / "config.yaml").read_text()
  )
  config["server_config"] |= {
    "max_iteration": rounds,
    "num_clients_per_iteration": work["cohort"],
    "initial_lr_client": work["learning_rate"],
    "val_freq": rounds + 1,
    "rec_freq": rounds + 1,
  }
  training = config["client_config"]["data_config"]["train"]
  training["batch_size"] = work["batch_size"]
  return config


def run(folder: Path, processes: int) -> str:
  """Run FLUTE in a folder; return what it prints."""
  command = [
    *(sys.executable, "-m", "torch.distributed.run"),
    *(f"--nproc_per_node={processes}", "e2e_trainer.py"),
    *("-dataPath", "data", "-outputPath", "out", "-config", "config.yaml"),
    *("-task", TASK, "-backend", "gloo"),
  ]
  done = subprocess.run(
    command,
    cwd=folder,
    env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    errors="replace",
    check=False,
  )
  if done.returncode:  # after the reason, torch tells at length that it failed
    reason = FAILURE.search(done.stdout)
    raise SystemExit(f"{done.stdout}\n{reason[1] if reason else 'error'}")
  return done.stdout


def main(data: str, out: str, rounds: int, work: dict) -> None:
  """Train, and write seconds, examples and the model to `out`."""
  import torch

  checkout = Path(work["flute"])
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    for file in checkout.iterdir():
      if not file.name.startswith("."):
        (folder / file.name).symlink_to(file)
    write_data(folder / "data", data)
    config = yaml.safe_dump(make_config(checkout, rounds, work))
    (folder / "config.yaml").write_text(config)
    printed = run(folder, work["processes"])
    (model,) = (folder / "out").glob("*/models/latest_model.tar")
    state = torch.load(model, map_location="cpu", weights_only=False)
  params = state["model_state_dict"]
  sizes = np.array([int(size) for size in CLIENT.findall(printed)])
  np.savez(
    out,
    seconds=[float(seconds) for seconds in SECONDS.findall(printed)],
    examples=sizes.reshape(rounds, work["cohort"]).sum(axis=1),
    **{k.removeprefix("net."): array.numpy() for k, array in params.items()},
  )


if __name__ == "__main__":
  main(sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4]))
