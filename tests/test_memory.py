"""Memory: lanes x parameters a device, whatever the cohort and the rounds."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.integration

PROGRAM = """
import json, resource, sys
import fedjax_sim
fedjax_sim.setup(2)
from fedjax_sim import sampling
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.data import load_digits
from fedjax_sim.models.mlp import mlp
from fedjax_sim.training.optimizers import optimizer
from fedjax_sim.simulation.runtime import Runtime
from fedjax_sim.simulation.simulator import Simulator

size, rounds, width = map(int, sys.argv[1:])
data = load_digits(num_clients=1000, partition="iid")
task = mlp(data.example_shape, data.num_classes, (width, width))
simulator = Simulator(
  task=task,
  algorithm=fedavg(
    task,
    optimizer("sgd", learning_rate=0.1),
    optimizer("sgd", learning_rate=1.0),
  ),
  data=data,
  sampler=sampling.uniform(1000, size),
  work=LocalBatching(batch_size=2),
  runtime=Runtime(lanes=4),
)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
peaks = []
for out in simulator.run(simulator.init(), rounds, stops=(rounds // 4,)):
  if out.rows[-1]["round"] % (rounds // 4) == 0:
    peaks.append(peak())
print(json.dumps(peaks))
"""


def run(size: int, rounds: int, width: int) -> list[float]:
  """Peak RSS in MiB after each quarter of the rounds."""
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM, str(size), str(rounds), str(width)],
    capture_output=True,
    text=True,
    check=True,
  )
  peaks: list[float] = json.loads(done.stdout.splitlines()[-1])
  print(f"{size} clients a round, {rounds} rounds, MiB by quarter: {peaks}")
  return peaks


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_cohort():
  small, large = run(50, 20, 512), run(1000, 20, 512)
  assert large[-1] <= 1.1 * small[-1]


@pytest.mark.slow
def test_peak_memory_is_flat_over_2000_rounds():
  peaks = run(50, 2000, 64)
  assert peaks[-1] <= 1.02 * peaks[0]
