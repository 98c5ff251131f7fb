"""FedAvg with FLUTE's news recommender on MIND, a user a client.

fedjax-sim data import --format=mind --train=MINDlarge_train
  --test=MINDlarge_dev --news=runs/mind_news.npz --store=runs/mind
fedjax-sim run --config=configs/mind_news.py --workdir=runs/mind_news

`glove.840B.300d.txt` is Stanford's. The data are not here, so no result either;
FLUTE reports 0.58, 0.24, 0.26 and 0.33 (AUC, MRR, nDCG@5, nDCG@10).
"""

from ml_collections import ConfigDict

from fedjax_sim.config import default_config
from fedjax_sim.core import validate


def get_config(arg: str = "") -> ConfigDict:
  """Return the config; `arg` "smoke" is a run of two rounds."""
  config = default_config()
  config.data.name = "store"
  config.data.path = "runs/mind"
  config.model.name = "news_recommender"
  config.model.news = "runs/mind_news.npz"
  config.model.embedding = "glove.840B.300d.txt"
  config.client.learning_rate = 0.1
  config.client.batch_size = 64
  config.client.epochs = 1
  config.server.rounds = 1500
  config.server.clients_per_round = 500
  config.server.eval_every = 50
  config.server.best_metrics = ("test/auc",)
  config.runtime.eval_batch_size = 8  # 350 titles each
  config.runtime.checkpoint_every = 50
  if validate.one_of("argument", arg, ("", "smoke")) == "smoke":
    config.server.rounds = 2
    config.server.clients_per_round = 2
    config.server.eval_every = 1
    config.client.batch_size = 2
    config.model.heads = 2
    config.model.head_size = 3
    config.model.pooling = 4
  return config
