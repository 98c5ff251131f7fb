"""FedAvg through FLUTE, in an environment of its own.

`python run_flute.py DATA OUT ROUNDS WORK`, as `benchmarks/peers.py` calls it;
WORK also says where a checkout of FLUTE is, and how many processes to start.
FLUTE runs by its own command line with the backend gloo, on the config of its
experiment `cv_lr_mnist` with the numbers of WORK. The experiment is
`flute_experiment.py`: the model, the data and the first weights, as FLUTE's
`pretrained_model_path`, are those of the other peers. The working folder is a
temporary one of links into the checkout, in which nothing is written.

One process is the server; the others train clients, with one thread each. With
gloo the server hands a client to every worker and waits for all of them, so a
worker whose client is small waits for the others. Beside training, a worker
computes statistics of every batch's gradients, which FedAvg does not use, and
their norm, since FLUTE clips it: by default to 5, which the CNN's exceeds, so
the limit is infinite here. The server saves the model after every round. A
round's seconds are those that FLUTE reports, which include all this; nothing is
evaluated. Examples are counted from the lines that name a client. FLUTE's draws
have no seed.
"""

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import yaml

TASK = "peers"
SCRIPTS = Path(__file__).resolve().parent
# of FLUTE, whose config is used; that of its CNN and that of its LSTM differ
# from it only in what `make_config` sets
EXPERIMENT = "cv_lr_mnist"
LOADED = ("model.py", "dataloaders/dataset.py", "dataloaders/dataloader.py")
CLIENT = re.compile(r"Loading : \d+-th client with name: \S+, (\d+) samples")
FAILURE = re.compile(r"^(?:\[rank\d+\]: )?(\w+Error\b.*)", re.MULTILINE)
SECONDS = re.compile(r"scalar metric secsPerRoundTotal:\s*([\d.e+-]+)")


def link(folder: Path, checkout: Path) -> None:
  """Link the checkout into a folder, with our experiment for its own."""
  for file in checkout.iterdir():
    if not file.name.startswith(".") and file.name != "experiments":
      (folder / file.name).symlink_to(file)
  for name in LOADED:
    path = folder / "experiments" / TASK / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(SCRIPTS / "flute_experiment.py")


def make_config(
  checkout: Path, data: str, first: str, rounds: int, work: dict
) -> dict:
  """Return the config of FLUTE's own experiment, with the numbers of `work`.

  Args:
    checkout: of FLUTE.
    data: the name of the file of clients, in FLUTE's `-dataPath`.
    first: the whole path of a file of the first weights.
    rounds: of training.
    work: as `benchmarks/peers.py` gives it.
  """
  if work["epochs"] != 1:
    raise ValueError("clients of FLUTE make one epoch")
  own = checkout / "experiments" / EXPERIMENT / "config.yaml"
  config = yaml.safe_load(own.read_text())
  config["model_config"] = {
    "model_type": "PeerModel",
    "model_folder": f"experiments/{TASK}/model.py",
    "pretrained_model_path": first,
    "work": work,
  }
  server, client = config["server_config"], config["client_config"]
  server |= {
    "max_iteration": rounds,
    "num_clients_per_iteration": work["cohort"],
    "initial_lr_client": work["learning_rate"],
    "val_freq": rounds + 1,
    "rec_freq": rounds + 1,
  }
  server["data_config"]["val"]["val_data"] = data
  server["data_config"]["test"]["test_data"] = data
  client["data_config"]["train"] |= {
    "batch_size": work["batch_size"],
    "list_of_train_data": data,
    "max_grad_norm": math.inf,  # FLUTE's default clips to a norm of 5
  }
  return config


def run(folder: Path, data: Path, processes: int) -> str:
  """Run FLUTE in a folder; return what it prints."""
  command = [
    *(sys.executable, "-m", "torch.distributed.run"),
    *(f"--nproc_per_node={processes}", "e2e_trainer.py"),
    *("-dataPath", str(data), "-outputPath", "out", "-config", "config.yaml"),
    *("-task", TASK, "-backend", "gloo"),
  ]
  done = subprocess.run(
    command,
    cwd=folder,
    env={
      **os.environ,
      "OMP_NUM_THREADS": "1",
      "PYTHONDONTWRITEBYTECODE": "1",
      "PYTHONPATH": str(SCRIPTS),
    },
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
  from torch_models import arrays, begin

  checkout, path = Path(work["flute"]), Path(data).resolve()
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    link(folder, checkout)
    state, first = begin(work).state_dict(), folder / "first.pt"
    torch.save({f"net.{k}": v for k, v in state.items()}, first)
    config = make_config(checkout, path.name, str(first), rounds, work)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    printed = run(folder, path.parent, work["processes"])
    (model,) = (folder / "out").glob("*/models/latest_model.tar")
    state = torch.load(model, map_location="cpu", weights_only=False)
  params = arrays(state["model_state_dict"])
  sizes = np.array([int(size) for size in CLIENT.findall(printed)])
  np.savez(
    out,
    seconds=[float(seconds) for seconds in SECONDS.findall(printed)],
    examples=sizes.reshape(rounds, work["cohort"]).sum(axis=1),
    **{k.removeprefix("net."): array for k, array in params.items()},
  )


if __name__ == "__main__":
  main(sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4]))
