"""HierFAVG against algorithm 1 of its paper, in numpy."""

import dataclasses

import numpy as np
import pytest

from fedjax_sim import aggregators
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.algorithms.hierarchical import hierarchical
from fedjax_sim.privacy.central import CentralDPConfig, with_central_dp
from logistic import (
  DIM,
  SIZES,
  TASK,
  batches,
  cohort,
  gradient,
  model,
  simulate,
)
from problems import sgd

RATE, EDGES = 0.3, 2
NODES = len(SIZES)
EDGE_OF = {
  "blocks": np.array([0, 0, 0, 1, 1]),
  "interleaved": np.array([0, 1, 0, 1, 0]),
}


def by_hand(rounds, edge_of, every, robust=False):
  """The cloud's model, the edges' models, and their weights."""
  w, weight = np.zeros((EDGES, DIM)), np.zeros(EDGES)
  cloud = np.zeros(DIM)
  for r in range(rounds):
    updates: list[list[np.ndarray]] = [[] for _ in range(EDGES)]
    sizes: list[list[int]] = [[] for _ in range(EDGES)]
    for i in cohort(r):
      edge = edge_of[i]
      y = w[edge].copy()
      for rows in batches(i):
        y -= RATE * gradient(y, rows)
      updates[edge].append(y - w[edge])
      sizes[edge].append(SIZES[i])
    for edge in range(EDGES):
      if sizes[edge]:
        shares = None if robust else sizes[edge]
        w[edge] += np.average(updates[edge], axis=0, weights=shares)
        weight[edge] += sum(sizes[edge])
    cloud = np.average(w, axis=0, weights=weight)
    if (r + 1) % every == 0:
      w[:], weight[:] = cloud, 0
  return cloud, w, weight


@pytest.mark.parametrize("assignment", EDGE_OF)
def test_it_is_the_papers_recursion(assignment):
  algorithm = hierarchical(
    TASK, sgd(RATE), NODES, edges=EDGES, cloud_every=2, assignment=assignment
  )
  simulator, state = simulate(algorithm, 5, devices=2)
  cloud, edges, weight = by_hand(5, EDGE_OF[assignment], 2)
  server = state.server
  np.testing.assert_allclose(server.cloud.params["w"], cloud, atol=2e-6)
  np.testing.assert_allclose(server.edges[0]["w"], edges, atol=2e-6)
  np.testing.assert_allclose(server.weight, weight)
  # A client gets and sends one model, and says how much it weighs.
  traffic = simulator.traffic
  assert (traffic.down, traffic.up) == (4 * DIM, 4 * DIM + 4)


def test_other_aggregators_work_at_the_edges():
  algorithm = hierarchical(TASK, sgd(RATE), NODES, edges=EDGES, cloud_every=3)
  found = model(algorithm, 3, aggregator=aggregators.mean())
  cloud, _, _ = by_hand(3, EDGE_OF["blocks"], 3, robust=True)
  np.testing.assert_allclose(found, cloud, atol=2e-6)
  with pytest.raises(ValueError, match="several groups of clients"):
    model(algorithm, 1, aggregator=aggregators.median())


def test_an_average_in_every_round_of_one_cohort_is_fedavg():
  algorithm = hierarchical(TASK, sgd(RATE), NODES, edges=3, cloud_every=1)
  plain = fedavg(TASK, sgd(RATE), sgd(1.0))
  np.testing.assert_allclose(model(algorithm, 3), model(plain, 3), rtol=1e-5)


def test_the_clouds_bytes_are_those_of_its_rounds():
  algorithm = hierarchical(TASK, sgd(RATE), NODES, edges=EDGES, cloud_every=2)
  simulator, state = simulate(algorithm, 0)
  rows = []
  for out in simulator.run(state, 4):
    rows += out.rows
  told = [row["cloud_bytes"] for row in rows]
  assert told == [0, 2 * EDGES * 4 * DIM, 0, 2 * EDGES * 4 * DIM]


def test_clients_are_evaluated_with_the_model_of_their_edge():
  algorithm = hierarchical(TASK, sgd(RATE), NODES, edges=EDGES, cloud_every=9)
  simulator, state = simulate(algorithm, 2)
  data = dataclasses.replace(simulator.data, seen=simulator.data.train)
  simulator = dataclasses.replace(simulator, data=data)
  found = simulator.evaluate.clients(state, "seen").per_client()["loss"]
  w = np.asarray(state.server.edges[0]["w"], np.float64)
  for i in range(NODES):
    own = data.train.client(i)
    logits = own["x"] @ w[EDGE_OF["blocks"][i]]
    loss = np.mean(np.logaddexp(0, logits) - own["y"] * logits)
    assert found[i] == pytest.approx(loss, rel=1e-5)


def test_what_does_not_fit_is_refused():
  with pytest.raises(ValueError, match="edges"):
    hierarchical(TASK, sgd(RATE), NODES, edges=NODES + 1)
  algorithm = hierarchical(TASK, sgd(RATE), NODES)
  settings = CentralDPConfig(
    clip_norm=1.0, noise_multiplier=1.0, denominator=3.0
  )
  with pytest.raises(ValueError, match="several groups of clients"):
    with_central_dp(algorithm, settings)
  with pytest.raises(ValueError, match="and the run has 5 clients"):
    model(hierarchical(TASK, sgd(RATE), 9), 1)
