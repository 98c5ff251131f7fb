"""FedAvg through fedjax_sim, in the current environment.

`python run_fedjax_sim.py DATA OUT ROUNDS WORK`, as `benchmarks/peers.py` calls
it; WORK also says how many CPU devices. One round a call of the compiled
program, though several are faster, so that each round has its own time, as the
peers' rounds have.
"""

import json
import sys
import time

import jax
import numpy as np

from benchmarks.peer_cases import task_of
from fedjax_sim import (
  LocalBatching,
  Runtime,
  Simulator,
  named_variables,
  optimizer,
  sampling,
  setup,
)
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.data import load_npz
from fedjax_sim.tasks.initial import with_initial


def main(data: str, out: str, rounds: int, work: dict) -> None:
  """Train, and write seconds, examples and the model to `out`."""
  if work["devices"] > 1:
    setup(work["devices"])
  dataset = load_npz(path=data, num_classes=work["classes"])
  with np.load(work["first"]) as file:
    task = with_initial(task_of(work), dict(file))
  algorithm = fedavg(
    task,
    client_optimizer=optimizer("sgd", learning_rate=work["learning_rate"]),
    server_optimizer=optimizer("sgd", learning_rate=1.0),
  )
  sampler = sampling.uniform(dataset.train.num_clients, work["cohort"])
  simulator = Simulator(
    task=task,
    algorithm=algorithm,
    data=dataset,
    sampler=sampler,
    batching=LocalBatching(
      batch_size=work["batch_size"], epochs=work["epochs"]
    ),
    runtime=Runtime(rounds_per_dispatch=1),
  )
  state = simulator.init()
  times = [time.perf_counter()]
  for dispatch in simulator.run(state, rounds):
    state = jax.block_until_ready(dispatch.state)
    times.append(time.perf_counter())
  examples = [
    int(dataset.train.sizes[sampler.sample(simulator.seed, i)].sum())
    for i in range(rounds)
  ]
  weights = named_variables(algorithm.variables(state.server))
  np.savez(out, seconds=np.diff(times), examples=examples, **weights)


if __name__ == "__main__":
  main(sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4]))
