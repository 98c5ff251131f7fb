"""FedAvg through Flower, in an environment of its own.

`python run_flower.py DATA OUT ROUNDS WORK`, as `benchmarks/peers.py` calls it.
As in Flower's PyTorch tutorial: a `ClientApp` that trains over a `DataLoader`,
a `ServerApp` with the strategy `FedAvg`, and `run_simulation`, which runs
clients in Ray's actors, one a core. Evaluation by clients is off. Its server
looks for replies every 0.1 s, so a short round takes a multiple of that.
"""

import functools
import json
import sys
import time

import numpy as np
import torch
from flwr.app import (
  ArrayRecord,
  ConfigRecord,
  Context,
  Message,
  MetricRecord,
  RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch.utils.data import DataLoader, TensorDataset
from torch_models import arrays, begin, build, loss_of, read

torch.set_num_threads(1)  # of an actor; there is one for every core
client_app = ClientApp()


@functools.cache
def load(data: str) -> list[TensorDataset]:
  """Return every client's examples; each process reads them once."""
  return [TensorDataset(x, y) for x, y in zip(*read(data), strict=True)]


@client_app.train()
def train(message: Message, context: Context) -> Message:
  """Train one client in a round; return its reply."""
  config = message.content["config"]
  dataset = load(config["data"])[context.node_config["partition-id"]]
  model = build(config)
  model.load_state_dict(message.content["arrays"].to_torch_state_dict())
  optimizer = torch.optim.SGD(model.parameters(), lr=config["learning_rate"])
  loader = DataLoader(dataset, batch_size=config["batch_size"], shuffle=True)
  for _ in range(config["epochs"]):
    for x, y in loader:
      optimizer.zero_grad()
      loss_of(model(x), y).backward()
      optimizer.step()
  content = RecordDict(
    {
      "arrays": ArrayRecord(model.state_dict()),
      "metrics": MetricRecord({"num-examples": len(dataset)}),
    }
  )
  return Message(content=content, reply_to=message)


def main(data: str, out: str, rounds: int, work: dict) -> None:
  """Train, and write seconds, examples and the model to `out`."""
  num_clients = len(load(data))
  server_app = ServerApp()
  times, examples, trained = [], [], {}

  def clock(server_round: int, arrays: ArrayRecord) -> None:
    times.append(time.perf_counter())  # before the first round, after each

  def count(replies: list[RecordDict], key: str) -> MetricRecord:
    if len(replies) != work["cohort"]:
      raise RuntimeError(f"{len(replies)} clients of {work['cohort']} replied")
    total = sum(int(reply["metrics"][key]) for reply in replies)
    examples.append(total)
    return MetricRecord({key: total})

  @server_app.main()
  def serve(grid: Grid, context: Context) -> None:
    strategy = FedAvg(
      fraction_train=work["cohort"] / num_clients,
      fraction_evaluate=0.0,
      min_train_nodes=work["cohort"],
      min_available_nodes=num_clients,
      train_metrics_aggr_fn=count,
    )
    result = strategy.start(
      grid=grid,
      initial_arrays=ArrayRecord(begin(work).state_dict()),
      num_rounds=rounds,
      train_config=ConfigRecord({**work, "data": data}),
      evaluate_fn=clock,
    )
    trained.update(result.arrays.to_torch_state_dict())

  run_simulation(
    server_app=server_app,
    client_app=client_app,
    num_supernodes=num_clients,
    backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
  )
  np.savez(
    out,
    seconds=np.diff(times),
    examples=examples,
    **arrays(trained),
  )


if __name__ == "__main__":
  # As a module, which actors import and keep, with the data that it loaded;
  # functions of a script they would get anew with every message.
  import run_flower

  run_flower.main(
    sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
  )
