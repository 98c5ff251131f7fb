"""FedAvg through BlazeFL, in an environment of its own.

`python run_blazefl.py DATA OUT ROUNDS WORK`, as `benchmarks/peers.py` calls it.
As in BlazeFL's quickstart: its own server and client of FedAvg, a model
selector, a partitioned dataset, here in memory, and the quickstart's loop over
rounds, without its evaluation after each. Clients train one after another in
one process: BlazeFL's threads want a Python without the global lock, and its
pool of processes is made anew in every round.
"""

import json
import sys
import time

import numpy as np
import torch
from blazefl.contrib import FedAvgBaseClientTrainer, FedAvgBaseServerHandler
from blazefl.core import ModelSelector, PartitionedDataset
from torch.utils.data import DataLoader, TensorDataset
from torch_models import arrays, begin, loss_of, read


class Selector(ModelSelector):
  """Makes the one model that there is."""

  def __init__(self, work):
    self.work = work

  def select_model(self, model_name):
    """Return it."""
    return begin(self.work)


class Clients(PartitionedDataset):
  """Every client's examples."""

  def __init__(self, data):
    pairs = zip(*read(data), strict=True)
    self.datasets = [TensorDataset(x, y) for x, y in pairs]

  def get_dataset(self, type_, cid):
    """Return those of a client."""
    return self.datasets[cid]

  def set_dataset(self, type_, cid, dataset):
    """Change nothing: no client's examples change."""

  def get_dataloader(self, type_, cid, batch_size, generator):
    """Return a client's batches, in a new order for every epoch."""
    return DataLoader(
      self.get_dataset(type_, cid),
      batch_size=batch_size,
      shuffle=True,
      generator=generator,
    )


def main(data: str, out: str, rounds: int, work: dict) -> None:
  """Train, and write seconds, examples and the model to `out`."""
  torch.set_num_threads(work["threads"])
  clients = Clients(data)
  num_clients = len(clients.datasets)
  common = {
    "model_selector": Selector(work),
    "model_name": work["model"],
    "dataset": clients,
    "num_clients": num_clients,
    "device": "cpu",
    "batch_size": work["batch_size"],
    "seed": 0,
  }
  handler = FedAvgBaseServerHandler(
    global_round=rounds, sample_ratio=work["cohort"] / num_clients, **common
  )
  trainer = FedAvgBaseClientTrainer(
    epochs=work["epochs"], lr=work["learning_rate"], **common
  )
  trainer.criterion = loss_of  # its own wants a text's classes before its time
  seconds, examples = [], []
  while not handler.if_stop():
    began = time.perf_counter()
    cohort = handler.sample_clients()
    trainer.local_process(handler.downlink_package(), cohort)
    packages = trainer.uplink_package()
    for package in packages:
      handler.load(package)
    seconds.append(time.perf_counter() - began)
    examples.append(sum(package.data_size for package in packages))
  np.savez(
    out,
    seconds=seconds,
    examples=np.array(examples) // work["epochs"],
    **arrays(handler.model.state_dict()),
  )


if __name__ == "__main__":
  main(sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4]))
