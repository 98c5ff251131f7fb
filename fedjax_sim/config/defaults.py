"""The default config: names of components, and the fields that always apply.

A config file changes what `default_config()` returns. The fields of the
components that it names are added by `complete`; a file sets those that shall
differ from their defaults.
"""

from __future__ import annotations

from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import placeholder

LABELED_SECTIONS = (
  "transforms",
  "downlink",
  "trackers",
)  # of which every entry is a section


def default_config() -> ConfigDict:
  """Return the config of a run with every component at its default.

  A field that is None is off, or follows from others, as docs/config.md says.

  Returns:
    An unlocked ConfigDict; a config file may set any field of the components
    that it names.

  Example:
    config = default_config()
    config.algorithm.name = "fedprox"
    config.algorithm.mu = 0.1
  """
  config = ConfigDict()
  config.seed = 0

  config.data = ConfigDict()
  config.data.name = "digits"
  config.data.seed = 0  # of partition and splits, whatever the run's seed
  config.data.server_clients = placeholder(object)  # number, share, or names
  config.data.random_label_clients = placeholder(float)
  config.data.labelled_fraction = placeholder(float)
  config.data.reshape = placeholder(tuple)  # what is done to a batch, in order
  config.data.lookup = placeholder(str)  # an .npy file
  config.data.label_lookup = placeholder(str)
  config.data.normalize = placeholder(tuple)  # (mean, standard deviation)
  config.data.pad = placeholder(object)  # a length, or (height, width)
  config.data.crop = placeholder(int)  # pixels; from here on in training alone
  config.data.crop_fill = placeholder(str)
  config.data.flip = False

  config.model = ConfigDict()
  config.model.name = "logistic_regression"
  config.model.initial = placeholder(str)  # a weights file to begin from
  config.model.initial_only = placeholder(tuple)  # patterns
  config.model.frozen = placeholder(tuple)  # patterns
  config.model.send_buffers = True  # such as batch statistics
  config.model.scheduled_sampling = placeholder(float)
  config.model.schedule = placeholder(str)  # of scheduled_sampling
  config.model.mixture = placeholder(int)  # components
  config.model.metrics = placeholder(tuple)  # names or references

  config.adapter = ConfigDict()  # what trains beside a frozen model
  config.adapter.name = placeholder(str)  # None: the model itself trains

  config.algorithm = ConfigDict()
  config.algorithm.name = "fedavg"

  config.client = ConfigDict()
  config.client.batch_size = 32
  config.client.epochs = 1
  config.client.steps = placeholder(int)  # instead of epochs
  config.client.max_examples = placeholder(int)
  config.client.max_tokens = placeholder(int)
  config.client.drop_remainder = False
  config.client.shuffle = True
  config.client.optimizer = "sgd"
  config.client.schedule = placeholder(str)  # of the learning rate
  config.client.layer_rates = placeholder(tuple)  # (pattern, factor) pairs
  config.client.max_grad_norm = placeholder(float)
  config.client.finetune_epochs = placeholder(int)  # before evaluations
  config.client.finetune_steps = placeholder(int)  # instead of epochs

  config.server = ConfigDict()
  config.server.rounds = 100
  config.server.clients_per_round = 10
  config.server.leave_out = placeholder(tuple)  # numbers and names of clients
  config.server.optimizer = "sgd"
  config.server.schedule = placeholder(str)
  config.server.layer_rates = placeholder(tuple)
  config.server.max_grad_norm = placeholder(float)
  config.server.stale_probability = placeholder(float)
  config.server.eval_every = 1
  config.server.test_every = placeholder(int)  # None: eval_every
  config.server.initial_eval = False
  config.server.best_metrics = placeholder(tuple)
  config.server.revert_to_best = False
  config.server.snapshot_every = placeholder(int)
  config.server.client_log = False  # needs pyarrow

  config.sampler = ConfigDict()
  config.sampler.name = "uniform"

  config.aggregator = ConfigDict()
  config.aggregator.name = "weighted_mean"

  config.transforms = ConfigDict()  # a section each, such as transforms.clip
  config.transforms.order = placeholder(tuple)  # None: by the alphabet

  config.downlink = ConfigDict()  # likewise, of what the server sends
  config.downlink.order = placeholder(tuple)

  config.trackers = ConfigDict()  # a section each, such as trackers.mlflow
  config.trackers.tensorboard = ConfigDict()
  config.trackers.tensorboard.name = "tensorboard"

  config.replay = ConfigDict()  # after each round, on the server's examples
  config.replay.steps = placeholder(int)  # None: no replay
  config.replay.batch_size = 32
  config.replay.optimizer = "sgd"
  config.replay.max_grad_norm = placeholder(float)

  config.privacy = ConfigDict()  # of clients, by a trusted server's noise
  config.privacy.mechanism = placeholder(str)  # None: no privacy
  config.privacy.noise_seed = placeholder(int)  # None: fresh entropy

  config.local_privacy = ConfigDict()  # of what a client sends, at its end
  config.local_privacy.mechanism = placeholder(str)  # None: none

  config.attack = ConfigDict()  # what Byzantine clients do
  config.attack.name = placeholder(str)  # None: nobody attacks

  config.leakage = ConfigDict()  # what clients' updates give away
  config.leakage.statistic = placeholder(str)  # None: it is not measured

  config.runtime = ConfigDict()
  config.runtime.lanes = FieldReference("auto", object)  # or a number
  config.runtime.devices = placeholder(int)
  config.runtime.model_devices = placeholder(int)
  config.runtime.deterministic_reduction = placeholder(int)
  config.runtime.residency = "auto"
  config.runtime.state_residency = "auto"
  config.runtime.rounds_per_dispatch = placeholder(int)
  config.runtime.eval_batch_size = 256
  config.runtime.checkpoint_every = 10
  config.runtime.keep_checkpoints = 3
  config.runtime.compute_dtype = "float32"
  config.runtime.frozen_dtype = "float32"
  config.runtime.remat = False
  config.runtime.peer_timeout = 30.0
  config.runtime.start_timeout = 300.0
  return config
