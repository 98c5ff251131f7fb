"""FedLabels on MNIST by writer, with the labels of every tenth image.

fedjax-sim run --config=configs/mnist_fedlabels.py --workdir=runs/fedlabels

Half a minute on two CPU cores; after 400 rounds accuracy 0.9692 on the 297
writers that never train. With `--config.algorithm.burn_in=400` the labelled
images train alone: 0.9474. `python -m benchmarks.few_labels` compares over five
seeds: 0.9702 +- 0.0003 and 0.9472 +- 0.0006; the labelled images alone, but
augmented, 0.9645 +- 0.0007; FedAvg with all labels 0.9752 +- 0.0005. Files:
docs/data.md.
"""

from ml_collections import ConfigDict

from fedjax_sim.config import default_config
from fedjax_sim.core import validate


def get_config(arg: str = "") -> ConfigDict:
  """Return the config; `arg` "smoke" is a run of two rounds."""
  config = default_config()
  config.data.name = "mnist_writers"
  config.data.labelled_fraction = 0.1
  config.model.name = "mlp"
  config.model.hidden_sizes = (100,)
  config.algorithm.name = "fedlabels"
  config.algorithm.burn_in = 20
  config.algorithm.threshold = 0.8
  config.algorithm.magnitude = 0.5
  config.client.learning_rate = 0.3
  config.client.batch_size = 20
  config.client.epochs = 2
  config.server.learning_rate = 0.5
  config.server.momentum = 0.9
  config.server.rounds = 400
  config.server.clients_per_round = 20
  config.server.eval_every = 50
  config.runtime.lanes = 1
  config.runtime.checkpoint_every = 100
  if validate.one_of("argument", arg, ("", "smoke")) == "smoke":
    config.server.rounds = 2
    config.server.clients_per_round = 2
    config.algorithm.burn_in = 1
  return config
