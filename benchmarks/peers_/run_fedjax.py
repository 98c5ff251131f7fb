"""FedAvg through FedJAX, in an environment of its own.

`python run_fedjax.py DATA OUT ROUNDS WORK`, as `benchmarks/peers.py` calls it.
As in FedJAX's examples: a Haiku model, clients in memory, a sampler, and
`federated_averaging` with the default backend of `for_each_client`, which jits
one step. `shuffle_repeat_batch` fills the last batch of an epoch with examples
drawn again, so all batches have one size; these are not counted.
"""

import json
import sys
import time

import fedjax
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from fedjax.algorithms import fed_avg
from haiku_models import MODELS, from_haiku, to_haiku


def main(data: str, out: str, rounds: int, work: dict) -> None:
  """Train, and write seconds, examples and the model to `out`."""
  with np.load(data) as file:
    x, y, client = file["x"], file["y"], file["client"]
  cuts = np.cumsum(np.bincount(client))[:-1]
  clients = {
    i: {"x": a, "y": b}
    for i, (a, b) in enumerate(
      zip(np.split(x, cuts), np.split(y, cuts), strict=True)
    )
  }
  federated = fedjax.InMemoryFederatedData(clients)

  def forward(batch):
    scores = MODELS[work["model"]](batch["x"], work["classes"])
    return jax.nn.sigmoid(scores) if work["sigmoid"] else scores

  def train_loss(batch, scores):
    losses = fedjax.metrics.unreduced_cross_entropy_loss(batch["y"], scores)
    return jnp.mean(losses.reshape(len(losses), -1), axis=1)  # over tokens

  model = fedjax.create_model_from_haiku(
    transformed_forward_pass=hk.transform(forward),
    sample_batch={"x": x[:1], "y": y[:1]},
    train_loss=train_loss,
  )
  algorithm = fed_avg.federated_averaging(
    fedjax.model_grad(model),
    client_optimizer=fedjax.optimizers.sgd(work["learning_rate"]),
    server_optimizer=fedjax.optimizers.sgd(1.0),
    client_batch_hparams=fedjax.ShuffleRepeatBatchHParams(
      batch_size=work["batch_size"], num_epochs=work["epochs"]
    ),
  )
  sampler = fedjax.client_samplers.UniformGetClientSampler(
    fd=federated, num_clients=work["cohort"], seed=0
  )
  with np.load(work["first"]) as file:
    first = {name: file[name] for name in file.files}
  state = algorithm.init(to_haiku(first))
  seconds, examples = [], []
  for _ in range(rounds):
    began = time.perf_counter()
    cohort = sampler.sample()
    state, _ = algorithm.apply(state, cohort)
    jax.block_until_ready(state.params)
    seconds.append(time.perf_counter() - began)
    examples.append(sum(len(dataset) for _, dataset, _ in cohort))
  weights = from_haiku(state.params, first)
  np.savez(out, seconds=seconds, examples=examples, **weights)


if __name__ == "__main__":
  main(sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4]))
