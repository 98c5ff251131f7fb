"""What privacy costs: accuracy for an epsilon, and time.

    python -m benchmarks.private --out=DIR
    python -m benchmarks.private --cost

The first trains a logistic regression on MNIST by writer, 539 of whom train,
with independent noise and Poisson sampling (DP-FedAvg), and with correlated
noise and fixed turns (DP-FTRL, buffered Toeplitz), for several epsilons, both
as they are and as with a population `--larger` times as large. Accuracy on the
writers that never train, mean and standard error over the seeds; DIR gets the
table as CSV and the plot as PNG. The second compares the times of rounds with
and without privacy, taking turns.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import math
import pathlib
import time
from typing import Any

import jax
import numpy as np
from absl import app, flags

from benchmarks import cases, seeds, turns
from fedjax_sim import Runtime, Simulator, optimizer, sampling
from fedjax_sim import setup as one_device_a_core
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.data import load_mnist_writers
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.models.logistic_regression import logistic_regression
from fedjax_sim.privacy.accounting.calibration import calibrate
from fedjax_sim.privacy.central import CentralDPConfig, with_central_dp
from fedjax_sim.privacy.central.factorization import blt
from fedjax_sim.privacy.central.guard import Budget, simulated_participation
from fedjax_sim.reporting import print_final_table

COST = flags.DEFINE_bool("cost", False, "times instead of accuracies")
OUT = flags.DEFINE_string("out", "", "folder of the plot and the table")
SEEDS = flags.DEFINE_integer("seeds", 3, "how many seeds")
ROUNDS = flags.DEFINE_integer("rounds", 0, "of every run; 0: as tuned")
LARGER = flags.DEFINE_integer("larger", 10, "of the simulated population")
TURNS = flags.DEFINE_integer("turns", 15, "times that each is timed")
SMOKE = flags.DEFINE_bool("smoke", False, "small models and few clients")

EPSILONS = (1.0, 2.0, 4.0, 8.0, math.inf)
DELTA = 1e-3  # below 1 in 539
CLIP_NORM = 0.5
MECHANISMS = {"DP-FedAvg": (60, 200), "DP-FTRL": (40, 135)}  # rounds, cohort


def accuracy(mechanism: str, epsilon: float, larger: int, seed: int) -> float:
  """Return the last model's accuracy on the writers that never train.

  Args:
    mechanism: one of `MECHANISMS`.
    epsilon: after all rounds; infinite: clipping alone.
    larger: by how much the simulated population and cohort are; 1: not at all.
    seed: of the run.
  """
  data = load_mnist_writers()
  task = logistic_regression(data.example_shape, data.num_classes)
  rounds, cohort = MECHANISMS[mechanism]
  rounds = ROUNDS.value or rounds
  population = data.train.num_clients
  draw = sampling.poisson if mechanism == "DP-FedAvg" else sampling.cyclic
  sampler = draw(population, cohort)
  assert sampler.participation is not None
  simulated = None
  if larger > 1:
    simulated = (float(larger * cohort), float(larger * population))
  part = simulated_participation(sampler.participation, simulated)
  settings = CentralDPConfig(
    clip_norm=CLIP_NORM,
    noise_multiplier=0.0,
    denominator=float(cohort),
    strategy=None if mechanism == "DP-FedAvg" else blt(rounds, part.period),
    simulated=simulated,
  )
  if math.isfinite(epsilon):
    fitted = calibrate(settings.release, part, rounds, DELTA / larger, epsilon)
    settings = dataclasses.replace(settings, noise_multiplier=fitted.multiplier)
  inner = fedavg(
    task,
    optimizer("sgd", learning_rate=0.3),
    optimizer("sgd", learning_rate=0.5, momentum=0.9),
    weighting="uniform",
  )
  simulator = Simulator(
    task=task,
    algorithm=with_central_dp(inner, settings),
    data=data,
    sampler=sampler,
    batching=LocalBatching(batch_size=20),
    seed=seed,
    noise_seed=seed,  # a table that can be made again
    runtime=Runtime(lanes=1),
  )
  return seeds.trained(simulator, rounds)["unseen/accuracy"]


def accuracies() -> None:
  """Run all, print the table, draw the plot."""
  variants = {
    f"{name}, epsilon {epsilon:g}"
    + (f", population x {larger}" if larger > 1 else ""): functools.partial(
      accuracy, name, epsilon, larger
    )
    for larger in (1, LARGER.value)
    for name in MECHANISMS
    for epsilon in EPSILONS
    if larger == 1 or math.isfinite(epsilon)
  }
  rows = seeds.compare(variants, SEEDS.value)
  print_final_table({}, {name: seeds.told(row) for name, row in rows.items()})
  if OUT.value:
    folder = pathlib.Path(OUT.value)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "privacy_accuracy.csv").open("w", newline="") as file:
      writer = csv.writer(file, lineterminator="\n")
      writer.writerow(["variant", *(f"seed {i}" for i in range(SEEDS.value))])
      writer.writerows([name, *row] for name, row in rows.items())
    draw(rows, folder / "privacy_accuracy.png")


def draw(rows: dict[str, list[float]], path: pathlib.Path) -> None:
  """Draw a PNG of accuracy against epsilon, with standard errors."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
  FigureCanvasAgg(figure)
  ax = figure.subplots()
  finite = [e for e in EPSILONS if math.isfinite(e)]
  for i, name in enumerate(MECHANISMS):
    without = np.mean(rows[f"{name}, epsilon inf"])
    ax.axhline(float(without), color=f"C{i}", ls=":", label=f"{name}, no noise")
    for larger, style in ((1, "-"), (LARGER.value, "--")):
      suffix = f", population x {larger}" if larger > 1 else ""
      values = np.array(
        [rows[f"{name}, epsilon {e:g}{suffix}"] for e in finite]
      )
      error = values.std(1, ddof=1) / np.sqrt(values.shape[1])
      ax.errorbar(
        finite,
        values.mean(1),
        error if values.shape[1] > 1 else None,
        label=name + suffix,
        color=f"C{i}",
        ls=style,
        marker="o",
        capsize=3,
      )
  ax.set_xscale("log", base=2)
  ax.set_xticks(finite, [f"{e:g}" for e in finite])
  ax.set_xlabel("Epsilon")
  ax.set_ylabel("Accuracy on writers that never train")
  ax.set_title("MNIST by writer, logistic regression, 539 clients")
  ax.grid(alpha=0.3)
  ax.spines[["top", "right"]].set_visible(False)
  ax.legend(frameon=False, fontsize=8)
  figure.savefig(path, metadata={"Software": None})


def variants(case: cases.Case) -> dict[str, Simulator]:
  """Return simulators of the case, without privacy and with kinds of it."""
  task = case.model(case.example_shape, case.num_classes)
  data = cases.dataset(case)
  plain = cases.simulator(case, task, data, devices=None)
  horizon = case.rounds * (2 + TURNS.value)
  settings: dict[str, dict[str, Any]] = {
    "gaussian": {},
    "discrete_gaussian": {
      "noise": "discrete_gaussian",
      "most_clients": case.clients_per_round,
    },
    "quantile, noised weights": {
      "quantile": 0.5,
      "max_weight": 100.0,
      "noise_weights": True,
    },
    "blt": {
      "strategy": blt(horizon, case.num_clients // case.clients_per_round)
    },
  }
  found = {"no privacy": plain}
  for name, more in settings.items():
    private = CentralDPConfig(
      clip_norm=1.0,
      noise_multiplier=4.0,
      denominator=float(case.clients_per_round),
      **more,
    )
    algorithm = with_central_dp(plain.algorithm, private)
    budget = Budget(delta=1e-4, rounds=horizon)
    sampler = turns_or_chance(case, private.strategy is None)
    found[name] = dataclasses.replace(
      plain, algorithm=algorithm, budget=budget, sampler=sampler
    )
  return found


def turns_or_chance(case: cases.Case, chance: bool) -> sampling.Sampler:
  """Return a sampler of the case's cohorts, by chance or in turns."""
  draw = sampling.uniform if chance else sampling.cyclic
  return draw(case.num_clients, case.clients_per_round)


def costs(name: str) -> dict[str, list[float]]:
  """Return the seconds of rounds without privacy and with it, turn by turn."""
  case = cases.CASES[name]
  if SMOKE.value:
    case = cases.smoke(case)
  simulators = variants(case)
  states = {key: sim.init() for key, sim in simulators.items()}
  done = dict.fromkeys(simulators, 0)
  found: dict[str, list[float]] = {key: [] for key in simulators}
  for turn in range(-2, TURNS.value):  # the first two warm up
    for key in turns.rotated(simulators, turn):
      planned = simulators[key].plan(done[key], case.rounds)
      began = time.perf_counter()
      out = simulators[key].dispatch(states[key], planned)
      jax.block_until_ready(out.state)
      if turn >= 0:
        found[key].append(time.perf_counter() - began)
      states[key] = out.state
      done[key] += planned.num_rounds
  return found


def main(argv: list[str]) -> None:
  """Measure accuracies, or times, and print them."""
  del argv
  one_device_a_core()
  if not COST.value:
    accuracies()
    return
  lines = {}
  for name in ("lr", "cnn"):
    found = {key: np.array(times) for key, times in costs(name).items()}
    plain = found.pop("no privacy")
    for key, times in found.items():
      ratios = times / plain
      low, middle, high = np.percentile(ratios, [25, 50, 75])
      lines[f"{name}, {key}"] = f"{middle:.3f} ({low:.3f} to {high:.3f})"
  print_final_table({}, lines)


if __name__ == "__main__":
  app.run(main)
