"""Gossip against its recursion in numpy, and its rate against the spectrum."""

import dataclasses

import jax
import numpy as np
import pytest

from fedjax_sim import aggregators
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.algorithms.gossip import gossip
from fedjax_sim.core.validate import UnknownNameError
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.training import topologies
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
from problems import make_simulator, quadratic, quadratic_data, sgd, train

NODES = len(SIZES)


def of(topology, rate=0.3, **options):
  return gossip(TASK, sgd(rate), NODES, topology=topology, **options)


@pytest.mark.parametrize("topology", ["ring", "random_regular"])
def test_it_is_the_papers_recursion(topology):
  mix = topologies.mixing_matrix(topology, NODES, degree=2)
  x = np.zeros((NODES, DIM))
  for r in range(4):
    y = x.copy()
    for i in cohort(r):
      for rows in batches(i):
        y[i] -= 0.3 * gradient(y[i], rows)
    x = mix @ y
  algorithm = of(topology, degree=2)
  _, state = simulate(algorithm, 4, aggregator=aggregators.stack())
  params, _ = state.server.nodes
  np.testing.assert_allclose(params["w"], x, atol=2e-6)
  np.testing.assert_allclose(
    algorithm.variables(state.server).params["w"], x.mean(0), atol=2e-6
  )


def test_where_all_are_neighbors_it_is_fedavg():
  """Of everybody, all with the same weight."""
  everyone = {"sampler": None, "clients_per_round": NODES}
  plain = fedavg(TASK, sgd(0.3), sgd(1.0), weighting="uniform")
  ours = model(of("complete"), 3, aggregator=aggregators.stack(), **everyone)
  np.testing.assert_allclose(ours, model(plain, 3, **everyone), rtol=1e-5)


@pytest.mark.parametrize("mixings", [1, 3])
@pytest.mark.parametrize("topology", ["ring", "torus"])
def test_models_come_together_at_the_rate_of_the_spectral_gap(
  topology, mixings
):
  """Without training, along the slowest eigenvector, each round by |lambda|."""
  nodes, task = 9, quadratic(1)
  mix = topologies.mixing_matrix(topology, nodes)
  values, vectors = np.linalg.eigh(mix)
  slowest = np.argsort(np.abs(values))[-2]
  algorithm = gossip(task, sgd(0.0), nodes, topology=topology, mixings=mixings)
  simulator = make_simulator(
    task,
    algorithm,
    quadratic_data(np.zeros((nodes, 1))),
    aggregator=aggregators.stack(),
    batching=LocalBatching(batch_size=1),
  )
  state = simulator.init()
  params = {"w": jax.numpy.asarray(vectors[:, [slowest]], "float32")}
  state = state._replace(server=state.server._replace(nodes=(params, ())))
  rows = []
  for out in simulator.run(state, 4):
    rows += out.rows
  distances = np.array([row["consensus"] for row in rows])
  rate = (1 - topologies.spectral_gap(mix)) ** mixings
  np.testing.assert_allclose(distances[1:] / distances[:-1], rate, rtol=1e-4)
  # Both directions of every edge, each time that clients mix.
  neighbors = 2 if topology == "ring" else 4
  assert rows[0]["bytes_up"] == pytest.approx(
    nodes * neighbors * mixings * (4 + 4)
  )
  assert rows[0]["bytes_down"] == nodes * neighbors * mixings * 4


def test_a_client_is_evaluated_with_its_own_model():
  task = quadratic(1)
  centres = np.array([[0.0], [1.0], [5.0], [7.0]])
  algorithm = gossip(task, sgd(0.5), 4)
  data = quadratic_data(centres)
  simulator = make_simulator(
    task,
    algorithm,
    dataclasses.replace(data, seen=data.train),
    aggregator=aggregators.stack(),
    batching=LocalBatching(batch_size=1),
    devices=2,
  )
  state = train(simulator, 3)
  params, _ = state.server.nodes
  expected = 0.5 * ((np.asarray(params["w"]) - centres) ** 2).sum(1)
  found = simulator.evaluate.clients(state, "seen").per_client()
  np.testing.assert_allclose(found["loss"], expected, rtol=1e-5)


def test_matrices():
  for topology in ("ring", "torus", "complete", "random_regular"):
    weights = topologies.mixing_matrix(topology, 12)
    np.testing.assert_allclose(weights.sum(1), 1)
    np.testing.assert_array_equal(weights, weights.T)
  closed = 1 - (1 + 2 * np.cos(2 * np.pi / 12)) / 3  # of a cycle
  ring = topologies.mixing_matrix("ring", 12)
  assert topologies.spectral_gap(ring) == pytest.approx(closed)
  full = topologies.mixing_matrix("complete", 12)
  np.testing.assert_allclose(full, 1 / 12)
  assert topologies.spectral_gap(full) == pytest.approx(1)
  assert topologies.mean_degree(topologies.mixing_matrix("torus", 12)) == 4


def test_matrices_of_files(tmp_path):
  ring = topologies.mixing_matrix("ring", 4)
  np.save(tmp_path / "w.npy", ring)
  np.savetxt(tmp_path / "w.csv", ring, delimiter=",")
  (tmp_path / "w.edges").write_text("0 1\n1 2\n2 3\n3 0\n")
  for name in ("w.npy", "w.csv", "w.edges"):
    found = topologies.mixing_matrix(str(tmp_path / name), 4)
    np.testing.assert_allclose(found, ring)


BAD = {
  "row 0 sums to 1.5": [[1.0, 0.5], [0.5, 0.5]],
  "weights of 0 and 1 for each other differ": [[0.5, 0.5], [0.4, 0.6]],
  "its spectral gap is 0": [[1.0, 0.0], [0.0, 1.0]],
  "mixing swings forever": [[0.0, 1.0], [1.0, 0.0]],
  "row 0 has -0.5 in column 1": [[1.5, -0.5], [-0.5, 1.5]],
  r"its shape is \(1, 1\)": [[1.0]],
}


@pytest.mark.parametrize("message", BAD)
def test_matrices_that_do_not_lead_to_the_mean_are_refused(message, tmp_path):
  np.save(tmp_path / "w.npy", np.array(BAD[message]))
  with pytest.raises(ValueError, match=message):
    gossip(quadratic(1), sgd(0.1), 2, topology=str(tmp_path / "w.npy"))


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("w.edges", "0,1", r"two numbers from 0 to 1, .*correct the file \("),
    ("w.edges", "0 1 0.5", "two numbers from 0 to 1"),
    ("w.edges", "1 2", "two numbers from 0 to 1"),
    ("w.edges", "", r"correct the file \(it is empty\)"),
    ("w.csv", "a,b\n1,2", "holds no matrix; give a row on each line"),
    ("w.npy", "words", r"holds no matrix; .* as numpy.save writes it\.$"),
    ("w.txt", None, "there is no such file; correct the path"),
  ],
)
def test_files_that_hold_no_graph_are_refused(name, content, message, tmp_path):
  path = tmp_path / name
  if content is not None:
    path.write_text(content)
  with pytest.raises((ValueError, OSError), match=message) as caught:
    topologies.mixing_matrix(str(path), 2)
  assert f"topology={str(path)!r}" in str(caught.value)
  assert "pickle" not in str(caught.value)


def test_other_topologies_are_refused():
  with pytest.raises(UnknownNameError, match="give complete, random_regular"):
    of("star")
  with pytest.raises(ValueError, match="make no grid but a ring"):
    of("torus")
  with pytest.raises(ValueError, match=r"degree=3: no graph of 5 nodes"):
    of("random_regular", degree=3)
  with pytest.raises(ValueError, match="and the run has 5 clients"):
    model(gossip(TASK, sgd(0.3), 7), 1, aggregator=aggregators.stack())
