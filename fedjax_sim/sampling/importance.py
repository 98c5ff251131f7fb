"""Draw the clients that move the model most, and weigh them less.

Rizk, Vlaski and Sayed 2022, "Federated learning under importance sampling"
(arXiv 2012.07383): the variance of the mean update is smallest where a client
is drawn with a probability in proportion to its weight times the length of its
update. Weights over probabilities leave the mean as it was.
"""

from __future__ import annotations

import numpy as np

from fedjax_sim.core import Sampler, validate
from fedjax_sim.sampling import systematic
from fedjax_sim.sampling.draws import generator


def importance(
  num_clients: int,
  clients_per_round: int,
  sizes: np.ndarray,
  uniform_share: float = 0.1,
) -> Sampler:
  """Draw clients by the norms of their last updates, and undo it by weights.

  Client i is drawn with the probability

      p_i = (1 - uniform_share) q_i + uniform_share S / N

  where q_i is in proportion to its number of examples times the L2 norm of the
  update that it sent last, at most 1; one that never sent any counts as the
  mean of those that did. Exactly S of N are drawn. A client's weight is
  multiplied by S / (N p_i), so that a weighted mean estimates the one over all
  clients, as a mean by weights that are drawn, too: without bias as cohorts
  grow.

  Who takes part depends on what clients report, so a private run refuses this
  sampler, and a dispatch has one round. Algorithms that let all clients of a
  cohort count the same (`feddyn`, `ifca`, `scaffold`) refuse it, too.

  Args:
    num_clients: N, the population.
    clients_per_round: S, how many take part.
    sizes: shape=(num_clients,), integer; examples of every client.
    uniform_share: share of the probability that all have alike, in (0, 1]; it
      bounds factors of weights by 1 / uniform_share. 1 is uniform sampling.

  Returns:
    A sampler whose state is the last norms, shape=(num_clients,), float32, -1
    of clients that sent none.

  Raises:
    TypeError, ValueError: clients_per_round is not within 1..num_clients, or
      another argument is out of range.
  """
  num_clients = validate.integer("num_clients", num_clients)
  size = validate.integer(
    "server.clients_per_round", clients_per_round, le=num_clients
  )
  share = validate.number("uniform_share", uniform_share, gt=0, le=1)
  sizes = np.asarray(sizes, np.float64)
  if sizes.shape != (num_clients,) or sizes.min() <= 0:
    raise ValueError(
      f"sizes has shape {sizes.shape} for {num_clients} clients, or one below"
      " 1; give every client its number of examples."
    )

  def probabilities(norms: np.ndarray) -> np.ndarray:
    known = norms >= 0
    mean = norms[known].mean(dtype=np.float64) if known.any() else 1.0
    scores = sizes * np.where(known, norms, mean)
    even = size / num_clients
    if np.count_nonzero(scores) < size:  # too few to choose from
      return np.full(num_clients, even)
    likely = systematic.inclusion(scores, size)
    return (1 - share) * likely + share * even

  def sample(seed: int, round_: int, norms: np.ndarray) -> np.ndarray:
    rng = generator(seed, round_)
    order = rng.permutation(num_clients)
    return systematic.draw(rng, probabilities(norms), order)

  def weights(
    seed: int, round_: int, ids: np.ndarray, norms: np.ndarray
  ) -> np.ndarray:
    del seed, round_
    return size / num_clients / probabilities(norms)[ids]

  def observe(
    norms: np.ndarray,
    round_: int,
    ids: np.ndarray,
    present: np.ndarray,
    values: dict[str, np.ndarray],
  ) -> np.ndarray:
    del round_
    norms = norms.copy()
    norms[ids[present]] = values["update/norm"][present]
    return norms

  return Sampler(
    sample=sample,
    sizes=(size,),
    expected=size,
    weights=weights,
    init=lambda: np.full(num_clients, -1, np.float32),
    observe=observe,
  )
