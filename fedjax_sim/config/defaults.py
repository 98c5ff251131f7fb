"""The default config.

A config file changes what `default_config()` returns; every key is there, and
None means that the default of whatever reads it holds.
"""

from __future__ import annotations

from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import placeholder


def default_config() -> ConfigDict:
  """Every field of a run, at its default.

  Returns:
    An unlocked ConfigDict; a config file may add what its data set, model,
    algorithm or optimizers take.
  """
  config = ConfigDict()
  config.seed = 0

  config.data = ConfigDict()
  config.data.name = "digits"
  config.data.path = placeholder(str)  # None: FEDJAX_SIM_DATA
  config.data.seed = 0  # of partition and splits, whatever the run's seed
  config.data.num_clients = placeholder(int)
  config.data.partition = placeholder(str)
  config.data.alpha = placeholder(float)
  config.data.shards_per_client = placeholder(int)
  config.data.exponent = placeholder(float)
  config.data.min_examples = placeholder(int)
  config.data.heldout_fraction = placeholder(float)
  config.data.unseen_clients = placeholder(object)  # number, share, or names
  config.data.server_clients = placeholder(object)  # the same
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
  config.model.hidden_sizes = placeholder(tuple)
  config.model.frozen = placeholder(tuple)  # patterns
  config.model.scheduled_sampling = placeholder(float)
  config.model.schedule = placeholder(str)  # of scheduled_sampling
  config.model.metrics = placeholder(tuple)  # references

  config.algorithm = ConfigDict()
  config.algorithm.name = "fedavg"
  config.algorithm.weighting = placeholder(str)
  config.algorithm.mu = placeholder(float)
  config.algorithm.alpha = placeholder(float)
  config.algorithm.alpha_rate = placeholder(float)
  config.algorithm.inner_rate = placeholder(float)
  config.algorithm.lam = placeholder(float)
  config.algorithm.option = placeholder(str)
  config.algorithm.versions = placeholder(int)
  config.algorithm.statistic = placeholder(str)
  config.algorithm.beta = placeholder(float)
  config.algorithm.reference = placeholder(float)
  config.algorithm.metric = placeholder(str)
  config.algorithm.weight_steps = placeholder(int)
  config.algorithm.weight_rate = placeholder(float)
  config.algorithm.kl_weight = placeholder(float)
  config.algorithm.server_batch_size = placeholder(int)
  config.algorithm.epsilon = placeholder(float)
  config.algorithm.epsilon_decay = placeholder(float)
  config.algorithm.epsilon_least = placeholder(float)
  config.algorithm.memory_rounds = placeholder(int)
  config.algorithm.ridge = placeholder(float)
  config.algorithm.burn_in = placeholder(int)
  config.algorithm.threshold = placeholder(float)
  config.algorithm.temperature = placeholder(float)
  config.algorithm.unsup_weight = placeholder(float)
  config.algorithm.consistency_weight = placeholder(float)
  config.algorithm.l2 = placeholder(float)
  config.algorithm.magnitude = placeholder(float)
  config.algorithm.comparison = placeholder(str)
  config.algorithm.flip = placeholder(bool)
  config.algorithm.count_weight = placeholder(float)
  config.algorithm.least_share = placeholder(float)
  config.algorithm.empty = placeholder(str)

  config.client = ConfigDict()
  config.client.optimizer = "sgd"
  config.client.learning_rate = 0.1
  config.client.momentum = placeholder(float)
  config.client.weight_decay = placeholder(float)
  config.client.b1 = placeholder(float)
  config.client.b2 = placeholder(float)
  config.client.eps = placeholder(float)
  config.client.schedule = placeholder(str)  # of the learning rate
  config.client.layer_rates = placeholder(tuple)  # (pattern, factor) pairs
  config.client.max_grad_norm = placeholder(float)
  config.client.batch_size = 32
  config.client.epochs = 1
  config.client.steps = placeholder(int)  # instead of epochs
  config.client.max_examples = placeholder(int)
  config.client.max_tokens = placeholder(int)
  config.client.drop_remainder = False
  config.client.shuffle = True

  config.server = ConfigDict()
  config.server.optimizer = "sgd"
  config.server.learning_rate = 1.0
  config.server.momentum = placeholder(float)
  config.server.weight_decay = placeholder(float)
  config.server.b1 = placeholder(float)
  config.server.b2 = placeholder(float)
  config.server.eps = placeholder(float)
  config.server.schedule = placeholder(str)
  config.server.layer_rates = placeholder(tuple)
  config.server.max_grad_norm = placeholder(float)
  config.server.rounds = 100
  config.server.clients_per_round = 10
  config.server.least_clients_per_round = placeholder(int)
  config.server.sampling = "uniform"
  config.server.sampling_groups = placeholder(int)  # of cyclic_poisson
  config.server.sampling_population = placeholder(int)  # of poisson
  config.server.trace = placeholder(str)  # of available
  config.server.round_seconds = placeholder(float)
  config.server.aggregator = "weighted_mean"
  config.server.stale_probability = placeholder(float)
  config.server.eval_every = 1
  config.server.test_every = placeholder(int)  # None: eval_every
  config.server.initial_eval = False
  config.server.best_metric = placeholder(str)
  config.server.fall_back = False
  config.server.client_log = False  # needs pyarrow

  config.replay = ConfigDict()  # after each round, on the server's examples
  config.replay.steps = placeholder(int)  # None: no replay
  config.replay.optimizer = "sgd"
  config.replay.learning_rate = 0.01
  config.replay.momentum = placeholder(float)
  config.replay.weight_decay = placeholder(float)
  config.replay.max_grad_norm = placeholder(float)
  config.replay.batch_size = 32

  config.privacy = ConfigDict()  # of clients, by a trusted server's noise
  config.privacy.mechanism = placeholder(str)  # None: no privacy
  config.privacy.clip_norm = placeholder(float)
  config.privacy.per_layer = placeholder(bool)
  config.privacy.noise_multiplier = placeholder(float)
  config.privacy.target_epsilon = placeholder(float)
  config.privacy.delta = placeholder(float)
  config.privacy.accountant = placeholder(str)
  config.privacy.denominator = placeholder(float)
  config.privacy.max_weight = placeholder(float)
  config.privacy.noised_weight = placeholder(bool)
  config.privacy.statistics_norm = placeholder(float)
  config.privacy.quantile = placeholder(float)
  config.privacy.quantile_rate = placeholder(float)
  config.privacy.share = placeholder(float)
  config.privacy.bands = placeholder(int)
  config.privacy.buffers = placeholder(int)
  config.privacy.noise_cohort_size = placeholder(int)
  config.privacy.population = placeholder(int)
  config.privacy.canaries = placeholder(int)
  config.privacy.noise_seed = placeholder(int)  # None: fresh entropy

  config.leakage = ConfigDict()  # what clients' updates give away
  config.leakage.statistic = placeholder(str)  # None: it is not measured
  config.leakage.threshold = placeholder(float)
  config.leakage.quantile = placeholder(float)
  config.leakage.embedding = placeholder(str)  # a pattern
  config.leakage.word_threshold = placeholder(float)

  config.local_privacy = ConfigDict()  # of what a client sends, at its end
  config.local_privacy.mechanism = placeholder(str)  # None: none
  config.local_privacy.clip_norm = placeholder(float)
  config.local_privacy.epsilon = placeholder(float)
  config.local_privacy.delta = placeholder(float)
  config.local_privacy.stddev = placeholder(float)  # instead of epsilon
  config.local_privacy.max_weight = placeholder(float)
  config.local_privacy.min_weight = placeholder(float)
  config.local_privacy.weight_scale = placeholder(float)
  config.local_privacy.norm_share = placeholder(float)
  config.local_privacy.per_layer = placeholder(bool)

  config.secure = ConfigDict()  # of server.aggregator="secure_..."
  config.secure.clip = placeholder(float)
  config.secure.most_weight = placeholder(float)
  config.secure.bits = placeholder(int)
  config.secure.rounding = placeholder(str)
  config.secure.neighbours = placeholder(int)
  config.secure.dropout = placeholder(float)
  config.secure.noise_multiplier = placeholder(float)

  config.transforms = ConfigDict()  # in this order; None leaves one out
  config.transforms.clip = ConfigDict({"norm": placeholder(float)})
  config.transforms.gaussian = ConfigDict({"stddev": placeholder(float)})
  config.transforms.quantize = ConfigDict(
    {
      "sparsity": placeholder(float),
      "bits": placeholder(int),
      "anneal": placeholder(float),
      "per_layer": placeholder(bool),
    }
  )

  config.runtime = ConfigDict()
  config.runtime.lanes = FieldReference("auto", object)  # or a number
  config.runtime.devices = placeholder(int)
  config.runtime.model_devices = placeholder(int)
  config.runtime.deterministic_reduction = placeholder(int)
  config.runtime.residency = "auto"
  config.runtime.rounds_per_dispatch = placeholder(int)
  config.runtime.eval_batch_size = 256
  config.runtime.checkpoint_every = 10
  config.runtime.keep_checkpoints = 3
  config.runtime.compute_dtype = "float32"
  config.runtime.remat = False
  config.runtime.peer_timeout = 30.0
  config.runtime.start_timeout = 300.0
  return config
