"""A search by Optuna, in which every trial is a run in a workdir of its own.

python docs/examples/optuna_sweep.py [TRIALS [CONFIG]]
"""

import sys

import optuna

from fedjax_sim import setup
from fedjax_sim.config import flags
from fedjax_sim.run import experiment
from fedjax_sim.simulation.dispatch import DivergedError


def main(trials=20, config="configs/digits_fedavg.py") -> optuna.Study:
  """Search for a high accuracy, and print what gave the highest."""

  def accuracy(trial):
    fields = {
      "client.learning_rate": trial.suggest_float("rate", 0.01, 1.0, log=True),
      "client.epochs": trial.suggest_int("epochs", 1, 5),
    }
    texts = {name: str(value) for name, value in fields.items()}
    workdir = f"runs/optuna/{trial.number}"
    return experiment.run(flags.load(config, texts), workdir)["test/accuracy"]

  setup()  # a device for every CPU core
  study = optuna.create_study(
    study_name="digits",
    direction="maximize",
    storage="sqlite:///optuna.db",  # where a stopped search goes on
    load_if_exists=True,
  )
  study.optimize(accuracy, n_trials=int(trials), catch=(DivergedError,))
  print(study.best_params, study.best_value)
  return study


if __name__ == "__main__":
  main(*sys.argv[1:])
