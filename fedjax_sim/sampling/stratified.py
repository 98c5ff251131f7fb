"""Cohorts in which every kind of client has its share.

Neyman 1934, "On the two different aspects of the representative method":
drawing from strata by their sizes leaves every client as likely as before, and
removes what differs between strata from the variance of means. Fraboni et al.
2021, "Clustered sampling" (arXiv 2105.05883), show it of federated cohorts.
"""

from __future__ import annotations

import numpy as np

from fedjax_sim.core import Sampler, validate
from fedjax_sim.sampling import systematic
from fedjax_sim.sampling.draws import generator


def stratified(
  num_clients: int,
  clients_per_round: int,
  label_counts: np.ndarray,
  sizes: np.ndarray,
  by: str = "labels",
  strata: int = 10,
) -> Sampler:
  """Draw from every stratum in proportion to its number of clients.

  Every client is as likely as any other. Clients lie stratum after stratum, in
  a new random order within each in every round, and are drawn at equal
  distances, so that the number from a stratum is its share, rounded up or down.

  Who takes part depends on what clients hold, so a private run refuses this
  sampler.

  Args:
    num_clients: the population.
    clients_per_round: how many take part.
    label_counts: shape=(num_clients, classes); examples of each label. A config
      knows it.
    sizes: shape=(num_clients,), integer; examples of every client.
    by: what makes strata: `labels`, by k-means of the clients' distributions of
      labels; or `sizes`, which cuts the clients, by their sizes, into strata
      of as many clients each.
    strata: how many, if there are as many clients, and kinds of them.

  Raises:
    TypeError, ValueError: clients_per_round is not within 1..num_clients, or
      the strata cannot be made.
  """
  num_clients = validate.integer("num_clients", num_clients)
  size = validate.integer(
    "server.clients_per_round", clients_per_round, le=num_clients
  )
  validate.one_of("by", by, ("labels", "sizes"))
  strata = validate.integer("strata", strata, ge=1)
  strata = min(strata, num_clients)
  if by == "labels":
    stratum = _by_labels(np.asarray(label_counts), num_clients, strata)
  else:
    ranks = np.argsort(np.argsort(np.asarray(sizes), kind="stable"))
    stratum = ranks * strata // num_clients
  equal = np.full(num_clients, size / num_clients)

  def sample(seed: int, round_: int) -> np.ndarray:
    rng = generator(seed, round_)
    order = np.lexsort((rng.permutation(num_clients), stratum))
    return systematic.draw(rng, equal, order)

  return Sampler(sample=sample, sizes=(size,), expected=size)


def _by_labels(counts: np.ndarray, clients: int, strata: int) -> np.ndarray:
  """Return the stratum of every client, shape=(clients,), int."""
  if counts.ndim != 2 or len(counts) != clients or not counts.shape[1]:
    raise ValueError(
      f"by='labels': label_counts has shape {counts.shape}, and there are"
      f" {clients} clients; their data have no labels, perhaps: take"
      " by='sizes'."
    )
  from sklearn.cluster import KMeans  # imports for a second

  shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
  distinct = len(np.unique(shares, axis=0))
  fitted = KMeans(min(strata, distinct), n_init=4, random_state=0).fit(shares)
  labels: np.ndarray = fitted.labels_
  return labels
