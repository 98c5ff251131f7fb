"""FedAvg with ResNet-18, batch norm, on CIFAR-100 by TensorFlow Federated.

fedjax-sim data import --format=tff_hdf5 --fields=x:image,y:label \
  --dtypes=y:uint8 --num-classes=100 --train=fed_cifar100_train.h5 \
  --test=fed_cifar100_test.h5 --store=fed_cifar100
fedjax-sim run --config=configs/cifar100_resnet.py --workdir=runs/cifar100

The setting that FLUTE and FedML benchmark: 500 clients of 100 images,
torchvision's network with its 7 x 7 stem. FLUTE's README gives an accuracy of
about 0.33 after 4,000 rounds. Pixels are normalized here; FLUTE's go from 0 to
255. FLUTE's network has 1,000 outputs, 11,689,512 parameters
(--num-classes=1000 in the import), and its running statistics stay with the
clients (--config.model.send_buffers=False). Not run on those files here.
"""

from ml_collections import ConfigDict

from fedjax_sim.config import default_config
from fedjax_sim.core import validate


def get_config(arg: str = "") -> ConfigDict:
  """Return the config; `arg` "smoke" is a run of two rounds."""
  config = default_config()
  config.data.name = "store"
  config.data.path = "fed_cifar100"
  config.data.normalize = (  # of the 50,000 training images
    (129.3, 124.1, 112.4),
    (68.2, 65.4, 70.4),
  )
  config.model.name = "resnet"
  config.model.depth = 18
  config.model.stem = "7x7"
  config.model.norm = "batch"
  config.model.zero_scale = True
  config.client.learning_rate = 0.1
  config.client.batch_size = 20
  config.client.epochs = 1
  config.server.rounds = 4000
  config.server.clients_per_round = 10
  config.server.eval_every = 50
  config.runtime.checkpoint_every = 50
  if validate.one_of("argument", arg, ("", "smoke")) == "smoke":
    config.server.rounds = 2
    config.server.clients_per_round = 2
    config.client.batch_size = 4
    config.model.width = 1
    config.runtime.lanes = 1
  return config
