"""The four workloads of FLUTE's README, through fedjax_sim and a bare loop.

    FEDJAX_SIM_DATA=DIR python -m benchmarks.flute --json=flute.json
    python -m benchmarks.flute --workloads=cv_cnn_femnist --femnist=STORE

FLUTE's models, cohorts, batch sizes, learning rates and single epoch
(github.com/microsoft/msrflute, README.md and experiments/), as the configs of
`Workload.config` have them. In turns, within one process, by
`benchmarks.engine`: rounds on one device and on all, and plain SGD over the
same batches in one compiled loop (`benchmarks.bare`). The peak of memory is
that of a process of its own that only trains, and known on a CPU alone.

MNIST and Shakespeare by role are read from `--data` if they are there; a client
store, as `fedjax-sim data import` writes it by the first lines of the configs,
is given by `--femnist`, `--fedcifar100` and `--fedshakespeare`. Without them
clients are random: as many as FLUTE has, of the same mean size and shape.

Beside each stands what FLUTE's README reports of itself and of FedML, on its
own machine with four GPUs: the time of a whole run, its start and its tests
included, divided by its rounds.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

import fedjax_sim
from benchmarks import cases, engine, machine, show
from benchmarks.apart import apart
from benchmarks.cases import Case
from fedjax_sim.core import Task
from fedjax_sim.core.files import write_json
from fedjax_sim.data import (
  FederatedDataset,
  load_mnist_power_law,
  load_shakespeare,
  load_store,
)
from fedjax_sim.data.preprocess import with_reshape
from fedjax_sim.models.char_lstm import char_lstm
from fedjax_sim.models.femnist_cnn import femnist_cnn
from fedjax_sim.models.logistic_regression import logistic_regression
from fedjax_sim.models.resnet import resnet
from fedjax_sim.tasks.freezing import with_kept_buffers

RANDOM = "random"


class Reported(NamedTuple):
  """What FLUTE's README reports.

  Attributes:
    rounds: of a run.
    flute_seconds: a run of FLUTE took, with NCCL.
    fedml_seconds: a run of FedML took, with MPI.
    flute_megabytes: memory of a GPU.
    fedml_megabytes: the same of FedML.
  """

  rounds: int
  flute_seconds: int
  fedml_seconds: int
  flute_megabytes: int
  fedml_megabytes: int


class Workload(NamedTuple):
  """One of FLUTE's benchmarks.

  Attributes:
    case: the same here; its sizes are those of random clients.
    config: the file in `configs` with the same setting.
    store: the option that gives a store of its data; "": there is none.
    reported: what FLUTE's README reports.
  """

  case: Case
  config: str
  store: str
  reported: Reported


def fedcifar100_resnet(shape: tuple[int, ...], classes: int) -> Task:
  """Return torchvision's ResNet-18, whose clients keep their statistics."""
  return with_kept_buffers(
    resnet(shape, classes, stem="7x7", norm="batch", zero_scale=True)
  )


# Mean sizes of TensorFlow Federated's clients: Reddi et al. 2021, "Adaptive
# federated optimization" (arXiv 2003.00295). How they are spread is ours:
# Shakespeare's as Tiny Shakespeare's roles are.
WORKLOADS: Mapping[str, Workload] = {
  "cv_lr_mnist": Workload(
    Case(
      model=functools.partial(
        logistic_regression, init="uniform", sigmoid=True
      ),
      pytorch="linear",
      example_shape=(28, 28, 1),
      num_classes=10,
      stored="byte",
      mean_size=60,
      learning_rate=0.03,
      rounds=64,
    ),
    "mnist_lr_fedavg.py",
    "",
    Reported(100, 95, 189, 1060, 3060),
  ),
  "cv_cnn_femnist": Workload(
    Case(
      model=femnist_cnn,
      pytorch="femnist_cnn",
      example_shape=(28, 28, 1),
      num_classes=62,
      stored="byte",
      num_clients=3400,
      mean_size=671_585 / 3400,
      sigma=0.4,
      batch_size=20,
      learning_rate=0.1,
      rounds=1,
    ),
    "femnist_cnn.py",
    "femnist",
    Reported(1500, 502, 20_992, 1770, 5180),
  ),
  "cv_resnet_fedcifar100": Workload(
    Case(
      model=fedcifar100_resnet,
      pytorch="resnet18",
      example_shape=(32, 32, 3),
      num_classes=1000,  # FLUTE's network has as many outputs for 100 classes
      stored="byte",
      num_clients=500,
      mean_size=100,
      sigma=0.0,
      batch_size=20,
      learning_rate=0.1,
      rounds=1,
    ),
    "cifar100_resnet.py",
    "fedcifar100",
    Reported(4000, 6121, 57_336, 1900, 5530),
  ),
  "nlp_rnn_fedshakespeare": Workload(
    Case(
      model=functools.partial(char_lstm, recurrent_bias=True),
      pytorch="char_lstm",
      example_shape=(80,),
      num_classes=90,
      stored="token",
      num_clients=715,
      mean_size=16_068 / 715,
      sigma=1.1,
      batch_size=4,
      learning_rate=0.8,
      rounds=1,
    ),
    "tff_shakespeare_lstm.py",
    "fedshakespeare",
    Reported(1200, 1310, 24_381, 1270, 3690),
  ),
}
# Loaders of data that stand in for FLUTE's: MNIST in as many clients by the
# same law, and fewer roles of Shakespeare's.
LOADERS: Mapping[str, Callable[..., FederatedDataset]] = {
  "cv_lr_mnist": load_mnist_power_law,
  "nlp_rnn_fedshakespeare": load_shakespeare,
}


class Source(NamedTuple):
  """Where the data of a workload come from.

  Attributes:
    store: a client store; None: there is none.
    folder: of files that loaders read; None: that of FEDJAX_SIM_DATA.
    synthetic: take random clients, whatever is there.
    smoke: as little as a test needs.
  """

  store: str | None = None
  folder: str | None = None
  synthetic: bool = False
  smoke: bool = False


def case_of(name: str, source: Source) -> Case:
  """Return what is trained; of little data, where that is asked for."""
  case = WORKLOADS[name].case
  return cases.smoke(case) if source.smoke else case


def load(name: str, source: Source) -> tuple[FederatedDataset, str]:
  """Return the data of a workload, and what they are.

  Raises:
    OSError, ValueError: what the source names is missing or damaged, or its
      examples have another shape than the workload's.
  """
  case = case_of(name, source)
  if source.store is not None:
    data = load_store(path=source.store)
    if data.example_shape != case.example_shape:
      data = with_reshape(data, case.example_shape)
    return data, source.store
  if name in LOADERS and not source.synthetic:
    try:
      data = LOADERS[name](path=source.folder, heldout_fraction=0.0)
    except (FileNotFoundError, ValueError):
      if source.folder is not None:
        raise
    else:
      return data, data.name
  return cases.dataset(case), RANDOM


def train_alone(name: str, source: Source) -> dict[str, Any]:
  """Train as a run does, on all devices; for the process's peak of memory."""
  fedjax_sim.setup()
  case = case_of(name, source)
  data, _ = load(name, source)
  task = case.model(case.example_shape, case.num_classes)
  simulator = cases.simulator(case, task, data, devices=None)
  for done in simulator.run(simulator.init(), 2 * case.rounds):
    jax.block_until_ready(done.state)
  return {}


def measure(
  name: str, source: Source, pairs: int, lanes: str = ""
) -> dict[str, Any]:
  """Return all that is reported of a workload.

  Args:
    name: of `WORKLOADS`.
    source: of its data.
    pairs: turns that count.
    lanes: a number, or "auto"; "": those that a run has.
  """
  peak = None
  if jax.default_backend() == "cpu":
    peak = apart(train_alone, name, source)["peak"]
  data, kind = load(name, source)
  engines: tuple[str, ...]
  engines = ("one", "all") if jax.device_count() > 1 else ("one",)
  if lanes:
    engines = tuple(f"{engine}_{lanes}" for engine in engines)
  found = engine.measure(case_of(name, source), engines, pairs, None, data)
  reported = WORKLOADS[name].reported
  return {
    **found,
    "data": kind,
    "mean_size": float(data.train.sizes.mean()),
    "alone_peak_bytes": peak,
    "reported": {
      **reported._asdict(),
      "flute_seconds_per_round": reported.flute_seconds / reported.rounds,
      "fedml_seconds_per_round": reported.fedml_seconds / reported.rounds,
    },
  }


def main(arguments: list[str] | None = None) -> None:
  """Measure, print a table, and write JSON if asked to."""
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.flute",
    description=str(__doc__).splitlines()[0],
  )
  parser.add_argument(
    "--workloads",
    default=",".join(WORKLOADS),
    help="comma-separated, of: %(default)s",
  )
  parser.add_argument("--pairs", type=int, default=3, help="turns to measure")
  parser.add_argument(
    "--lanes", default="", help="a number, or auto, instead of those of a run"
  )
  parser.add_argument(
    "--data", help="the folder of MNIST and Shakespeare; FEDJAX_SIM_DATA"
  )
  stores = [w.store for w in WORKLOADS.values() if w.store]
  for option in stores:
    parser.add_argument(f"--{option}", help="a client store of its data")
  parser.add_argument(
    "--synthetic", action="store_true", help="random clients everywhere"
  )
  parser.add_argument("--scale", choices=("full", "smoke"), default="full")
  parser.add_argument("--json", help="file to write")
  args = parser.parse_args(arguments)
  names = args.workloads.split(",")
  for name in names:
    if name not in WORKLOADS:
      parser.error(f"--workloads: {name!r} is none of {', '.join(WORKLOADS)}")
  if args.pairs < 1:
    parser.error("--pairs: give at least 1")
  if args.lanes and not engine.are_lanes(args.lanes):
    parser.error(f"--lanes: {args.lanes!r} is neither 'auto' nor a number > 0")
  if args.synthetic and (args.data or any(vars(args)[s] for s in stores)):
    parser.error("--synthetic: give no data, or leave it out")

  fedjax_sim.setup()
  report: dict[str, Any] = {
    "machine": machine.describe(),
    "pairs": args.pairs,
    "workloads": {},
  }
  for name in names:
    source = Source(
      vars(args).get(WORKLOADS[name].store),
      args.data,
      args.synthetic,
      args.scale == "smoke",
    )
    began = time.perf_counter()
    report["workloads"][name] = measure(name, source, args.pairs, args.lanes)
    show.progress(f"{name}: {time.perf_counter() - began:.0f} s")
    if args.json:  # what is there if a later one fails
      write_json(args.json, report)
  show.flute(report)


if __name__ == "__main__":
  main()
