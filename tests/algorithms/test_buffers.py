"""Buffers go with their models: one that counts the steps of each."""

import numpy as np
import pytest

from fedjax_sim import aggregators, sampling
from fedjax_sim.algorithms.ditto import ditto
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.algorithms.gossip import gossip
from fedjax_sim.algorithms.hierarchical import hierarchical
from fedjax_sim.algorithms.ifca import ifca
from fedjax_sim.algorithms.moon import moon
from fedjax_sim.algorithms.pfedme import pfedme
from fedjax_sim.engine.batching import LocalBatching
from problems import (
  counting_steps,
  make_simulator,
  quadratic,
  quadratic_data,
  sgd,
  train,
)

CENTRES = np.array([[4.0, 0.0], [-2.0, 1.0], [1.0, 3.0]])
STEPS = 7
TASK = counting_steps(quadratic(2))._replace(
  features=lambda variables, examples: (
    examples["x"] * variables.params["w"][None]
  )
)
RATES = sgd(0.1), sgd(1.0)


def after(algorithm, cohorts, factors=None):
  """The global model's count, and the state, after a round of each cohort."""
  sampler = sampling.Sampler(
    sample=lambda seed, round_: np.array(cohorts[round_]),
    sizes=(3,),
    expected=3.0,
    weights=factors and (lambda seed, round_, ids: np.array(factors)[ids]),
  )
  stacked = algorithm.requirements.all_updates
  simulator = make_simulator(
    TASK,
    algorithm,
    quadratic_data(CENTRES),
    sampler=sampler,
    aggregator=aggregators.stack() if stacked else None,
    batching=LocalBatching(batch_size=1, steps=STEPS),
    lanes=2,
  )
  state = train(simulator, len(cohorts))
  return algorithm.variables(state.server).buffers["steps"], state


@pytest.mark.parametrize(
  "algorithm",
  [
    fedavg(TASK, *RATES),
    hierarchical(TASK, sgd(0.1), 3, edges=2, cloud_every=2),
  ],
)
def test_the_mean_of_equal_counts_is_that_count(algorithm):
  """Also with weights of which it has rounding errors."""
  count, _ = after(algorithm, [[0, 1, 2]] * 3, [0.9, 0.3, 0.7])
  assert count == 3 * STEPS


@pytest.mark.parametrize(
  ("algorithm", "shared", "own"),
  [
    # A model of its own, which has trained in the rounds of its client.
    (ditto(TASK, *RATES), 2, [1, 2, 1]),
    # What came of the received model, after two steps on every batch.
    (pfedme(TASK, *RATES, inner_steps=2), 4, [2, 4, 4]),
    # The model that it sent last.
    (moon(TASK, *RATES), 2, [1, 2, 2]),
    # Both of a cohort choose the same of equal models.
    (ifca(TASK, *RATES, clusters=2), 2, None),
  ],
)
def test_counts_are_of_the_model_that_made_the_steps(algorithm, shared, own):
  count, state = after(algorithm, [[0, 1], [1, 2]])
  assert count == shared * STEPS
  if own is not None:
    found = state.clients[0].buffers["steps"]
    np.testing.assert_array_equal(found[:3], STEPS * np.array(own))


def test_neighbors_mix_their_buffers():
  algorithm = gossip(TASK, sgd(0.1), 3, topology="complete")
  count, state = after(algorithm, [[0, 1], [1, 2]])
  first = round(2 * STEPS / 3)  # a third of each, also of who did not train
  second = round(first + 2 * STEPS / 3)
  _, buffers = state.server.nodes
  np.testing.assert_array_equal(buffers["steps"], [second] * 3)
  assert count == second
