"""FedAvg through pfl, in an environment of its own.

`python run_pfl.py DATA OUT ROUNDS WORK`, as `benchmarks/peers.py` calls it. As
in pfl's tutorials: a `PyTorchModel`, a `FederatedDataset`, a
`SimulatedBackend` and `FederatedAveraging.run`, in one process. pfl draws each
client of a round by itself, so one may be drawn twice, and it does not shuffle
a client's examples.
"""

import json
import sys
import time

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch_models import arrays, begin, loss_of, read


class PflModel(torch.nn.Module):
  """The model, with the two methods that pfl asks for."""

  def __init__(self, model):
    super().__init__()
    self.model = model

  def loss(self, x, y, eval=False):
    """Return the mean cross-entropy of a batch."""
    return loss_of(self.model(x), y)

  @torch.no_grad()
  def metrics(self, x, y, eval=False):
    """Return the mean cross-entropy, weighted by labels."""
    total = loss_of(self.model(x), y, reduction="sum")
    return {"loss": Weighted(total.item(), y.numel())}


class Clock(TrainingProcessCallback):
  """Notes when each round ends."""

  def __init__(self):
    self.times = []

  def on_train_begin(self, *, model):
    """Note when the first round begins."""
    self.times.append(time.perf_counter())
    return Metrics()

  def after_central_iteration(
    self, aggregate_metrics, model, *, central_iteration
  ):
    """Note when a round ends."""
    self.times.append(time.perf_counter())
    return False, Metrics()


def main(data: str, out: str, rounds: int, work: dict) -> None:
  """Train, and write seconds, examples and the model to `out`."""
  np.random.seed(0)  # noqa: NPY002 - pfl draws from the global state
  torch.manual_seed(0)
  torch.set_num_threads(work["threads"])
  x, y = read(data)
  drawn = []

  def make_dataset(user):
    drawn.append(len(x[user]))
    return PyTorchTensorDataset([x[user], y[user]], user_id=user)

  users = FederatedDataset(
    make_dataset, get_user_sampler("random", list(range(len(x))))
  )
  module = PflModel(begin(work))
  model = PyTorchModel(
    model=module,
    local_optimizer_create=torch.optim.SGD,
    central_optimizer=torch.optim.SGD(module.parameters(), lr=1.0),
  )
  clock = Clock()
  FederatedAveraging().run(
    algorithm_params=NNAlgorithmParams(
      central_num_iterations=rounds,
      evaluation_frequency=rounds,  # in the first round alone
      train_cohort_size=work["cohort"],
      val_cohort_size=0,
    ),
    backend=SimulatedBackend(
      training_data=users,
      val_data=users,
      postprocessors=[WeightByDatapoints()],
    ),
    model=model,
    model_train_params=NNTrainHyperParams(
      local_batch_size=work["batch_size"],
      local_num_epochs=work["epochs"],
      local_learning_rate=work["learning_rate"],
    ),
    model_eval_params=NNEvalHyperParams(local_batch_size=256),
    callbacks=[clock],
  )
  np.savez(
    out,
    seconds=np.diff(clock.times),
    examples=np.reshape(drawn, (rounds, work["cohort"])).sum(axis=1),
    **arrays(module.model.state_dict()),
  )


if __name__ == "__main__":
  main(sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4]))
