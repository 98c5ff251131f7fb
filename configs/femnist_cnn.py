"""FedAvg with the FEMNIST CNN on handwritten characters by writer.

fedjax-sim data import --format=tff_hdf5 --fields=x:pixels,y:label \
  --num-classes=62 --train=fed_emnist_train.h5 --test=fed_emnist_test.h5 \
  --store=fed_emnist
fedjax-sim run --config=configs/femnist_cnn.py --workdir=runs/femnist

The setting that FLUTE and FedML benchmark, on TensorFlow Federated's two files:
3,400 writers, 62 classes, 1,206,590 parameters. FLUTE's README gives an
accuracy of about 0.83 after 1,500 rounds. It was not run on those files here;
MNIST by writer is (configs/mnist_writers_cnn.py).
"""

from ml_collections import ConfigDict

from fedjax_sim.config import default_config
from fedjax_sim.core import validate


def get_config(arg: str = "") -> ConfigDict:
  """Return the config; `arg` "smoke" is a run of two rounds."""
  config = default_config()
  config.data.name = "store"
  config.data.path = "fed_emnist"
  config.data.reshape = (28, 28, 1)
  config.model.name = "femnist_cnn"
  config.client.learning_rate = 0.1
  config.client.batch_size = 20
  config.client.epochs = 1
  config.client.max_examples = 5000
  config.server.rounds = 1500
  config.server.clients_per_round = 10
  config.server.eval_every = 50
  config.runtime.checkpoint_every = 50
  if validate.one_of("argument", arg, ("", "smoke")) == "smoke":
    config.server.rounds = 2
    config.server.clients_per_round = 2
    config.runtime.lanes = 1
  return config
