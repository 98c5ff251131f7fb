"""FedLabels with ResNet-50 on CIFAR-100, with the labels of a fifth of it.

fedjax-sim run --config=configs/cifar100_fedlabels.py --workdir=runs/cifar100

The setting of FLUTE's experiment semisupervision: 100 clients, each with a mix
of classes from Dirichlet(0.1), 10 a round; 30 steps on labelled images, and
after round 50 10 on the others; 23,705,252 parameters. Both means are evaluated
by themselves, too: `test/supervised/accuracy`, `test/unsupervised/accuracy`.
FLUTE reports no result. Images are augmented anew in every step, by other
operations than FLUTE's RandAugment, and normalized by CIFAR-100's own mean and
deviation. Not run on those files here. They are
`cifar-100-python/`: docs/data.md. configs/mnist_fedlabels.py has a result.
"""

from ml_collections import ConfigDict

from fedjax_sim.config import default_config
from fedjax_sim.core import validate


def get_config(arg: str = "") -> ConfigDict:
  """Return the config.

  Args:
    arg: "smoke" is a run of two rounds of a narrow VGG-11, which compiles
      sooner than a ResNet.
  """
  config = default_config()
  config.data.name = "cifar100"
  config.data.num_clients = 100
  config.data.alpha = 10.0  # 0.1 a class
  config.data.labelled_fraction = 0.2
  config.model.name = "resnet"
  config.model.depth = 50
  config.model.norm = "batch"
  config.algorithm.name = "fedlabels"
  config.algorithm.burn_in = 50
  config.algorithm.labelled_steps = 30
  config.algorithm.unlabelled_steps = 10
  config.algorithm.unlabelled_rate = 0.003
  config.algorithm.flip = True
  config.algorithm.evaluate_means = True
  config.client.learning_rate = 0.003
  config.client.batch_size = 64
  config.server.rounds = 2000
  config.server.clients_per_round = 10
  config.server.eval_every = 1
  config.runtime.checkpoint_every = 50
  if validate.one_of("argument", arg, ("", "smoke")) == "smoke":
    config.data.num_clients = 20
    config.model.name = "vgg"
    config.model.depth = 11
    config.model.width = 2
    config.algorithm.burn_in = 1
    config.algorithm.labelled_steps = 2
    config.algorithm.unlabelled_steps = 1
    config.client.batch_size = 8
    config.server.rounds = 2
    config.server.clients_per_round = 2
    config.runtime.lanes = 1
  return config
