"""DiLoCo: pre-training of a small decoder by four workers that seldom talk.

Douillard et al. 2023 (arXiv 2311.08105): FedAvg with AdamW inside and
Nesterov's momentum outside, on i.i.d. shards, here of Shakespeare's roles:

fedjax-sim data import --format=leaf_json --text=characters
  --train=tinyshakespeare/roles_leaf.json.gz --store=runs/roles
fedjax-sim data partition --store=runs/roles --to=runs/shakespeare_iid
  --partition=iid --num-clients=4 --heldout-fraction=0.1
fedjax-sim run --config=configs/shakespeare_diloco.py --workdir=runs/diloco

docs/guides/diloco.md has results.
"""

from ml_collections import ConfigDict

from fedjax_sim.config import default_config
from fedjax_sim.core import validate

WORKERS = 4


def get_config(arg: str = "") -> ConfigDict:
  """Return the config; `arg` "smoke" is a run of two rounds."""
  config = default_config()
  config.data.name = "store"
  config.data.path = "runs/shakespeare_iid"
  config.model.name = "llama"
  config.model.width = 32
  config.model.layers = 2
  config.model.heads = 4
  config.model.key_value_heads = 2
  config.model.tied = True
  config.algorithm.keep_optimizer = True
  config.algorithm.weighting = "uniform"
  config.client.optimizer = "adamw"
  config.client.learning_rate = 0.003
  config.client.weight_decay = 0.1
  config.client.max_grad_norm = 1.0
  config.client.batch_size = 8
  config.client.steps = 10
  config.server.optimizer = "sgd"
  config.server.learning_rate = 0.7
  config.server.momentum = 0.9
  config.server.nesterov = True
  config.server.rounds = 50
  config.server.clients_per_round = WORKERS
  config.server.eval_every = 10
  config.runtime.lanes = 2
  config.runtime.checkpoint_every = 50
  if validate.one_of("argument", arg, ("", "smoke")) == "smoke":
    config.server.rounds = 2
    config.client.steps = 2
    config.model.width = 8
    config.model.layers = 1
  return config
