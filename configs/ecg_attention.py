"""DGA with the CNN-LSTM-attention network on Kaggle's heartbeats.

fedjax-sim run --config=configs/ecg_attention.py --workdir=runs/ecg_attention

The setting of FLUTE's experiment ecg_cnn, 136,965 parameters, of which its page
reports an accuracy of 0.87: 1,000 clients in the order of the file, which is
sorted by class. FLUTE's loss of a client is the sum over batches, divided by
the examples, with batches of 96 a 96th of the mean: its beta of 20 is 20 / 96
here. It takes two softmaxes, as --config.model.double_softmax=true does. Not
run on those files here. They are mitbih_train.csv and mitbih_test.csv:
docs/data.md. The same network on beats by patient:

fedjax-sim run --config=configs/ecg_attention.py:patients --workdir=runs/ecg
"""

from ml_collections import ConfigDict

from fedjax_sim.config import default_config
from fedjax_sim.core import validate


def get_config(arg: str = "") -> ConfigDict:
  """Return the config.

  Args:
    arg: "smoke" is a run of two rounds; "patients" takes the data of
      configs/ecg_cnn.py, and "patients_smoke" two rounds of it.
  """
  validate.one_of("argument", arg, ("", "smoke", "patients", "patients_smoke"))
  config = default_config()
  if arg.startswith("patients"):
    config.data.name = "ecg"
  else:
    config.data.name = "ecg_kaggle"
    config.data.num_clients = 1000
    config.data.partition = "stored_order"
  config.model.name = "ecg_attention"
  config.algorithm.name = "dga"
  config.algorithm.beta = 20 / 96
  config.client.learning_rate = 0.001
  config.client.momentum = 0.9
  config.client.batch_size = 96
  config.client.epochs = 1
  config.server.rounds = 2000
  config.server.clients_per_round = 25
  config.server.eval_every = 50
  config.runtime.checkpoint_every = 50
  if arg.endswith("smoke"):
    config.client.batch_size = 8
    config.client.max_examples = 16
    config.server.rounds = 2
    config.server.clients_per_round = 2
    config.model.width = 4
    config.runtime.lanes = 1
    if config.data.name == "ecg_kaggle":
      config.data.num_clients = 5
  return config
