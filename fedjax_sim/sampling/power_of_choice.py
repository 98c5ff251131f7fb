"""Prefer the clients whose model fits their data the least.

Cho, Wang and Joshi 2020, "Client selection in federated learning: convergence
analysis and power-of-choice selection strategies" (arXiv 2010.01243), in the
variant rpow-d that costs clients nothing: instead of asking candidates for
their loss, the server remembers what they reported when they last trained.
"""

from __future__ import annotations

import numpy as np

from fedjax_sim.core import Sampler, validate
from fedjax_sim.sampling.draws import generator


def power_of_choice(
  num_clients: int,
  clients_per_round: int,
  sizes: np.ndarray,
  candidates: int | None = None,
) -> Sampler:
  """Draw candidates by size, and take those with the largest last-known loss.

  The candidates of a round are drawn without replacement, one after the other,
  with probabilities proportional to the clients' numbers of examples. A
  client's last-known loss is the mean training loss that it reported when it
  last was in an aggregate; that of a client that never was is infinite. Ties
  go to the candidate drawn first.

  Who takes part depends on what clients report, so a private run refuses this
  sampler, and a dispatch has one round.

  Args:
    num_clients: the population.
    clients_per_round: how many take part.
    sizes: shape=(num_clients,), integer; examples of every client.
    candidates: how many are drawn, d in the paper, between `clients_per_round`
      (the loss then decides nothing) and `num_clients` (the loss decides
      alone); None for twice `clients_per_round`, or all clients if there are
      fewer.

  Returns:
    A sampler whose state is the last-known losses, shape=(num_clients,),
    float32. The algorithm has to report a metric "loss".

  Raises:
    TypeError, ValueError: clients_per_round is not within 1..num_clients,
      candidates not within clients_per_round..num_clients, or a size is not 1
      or more.
  """
  num_clients = validate.integer("num_clients", num_clients)
  size = validate.integer(
    "server.clients_per_round", clients_per_round, le=num_clients
  )
  if candidates is None:
    candidates = min(num_clients, 2 * size)
  drawn = validate.integer("candidates", candidates, ge=size, le=num_clients)
  sizes = np.asarray(sizes)
  if sizes.shape != (num_clients,) or sizes.min() < 1:
    raise ValueError(
      f"sizes has shape {sizes.shape} for {num_clients} clients, or one below"
      " 1; give every client its number of examples."
    )

  def sample(seed: int, round_: int, losses: np.ndarray) -> np.ndarray:
    # The smallest of exponential times with these rates are such draws, in
    # order (Efraimidis and Spirakis 2006).
    times = generator(seed, round_).exponential(size=num_clients) / sizes
    chosen = np.argpartition(times, drawn - 1)[:drawn]
    chosen = chosen[np.argsort(times[chosen])]
    largest = np.argsort(-losses[chosen], kind="stable")[:size]
    return np.sort(chosen[largest])

  def observe(
    losses: np.ndarray,
    round_: int,
    ids: np.ndarray,
    present: np.ndarray,
    values: dict[str, np.ndarray],
  ) -> np.ndarray:
    del round_
    if "loss" not in values:
      raise ValueError(
        "power_of_choice needs the metric 'loss' in Report.metrics, and the"
        f" algorithm reports {', '.join(sorted(values)) or 'none'}; take"
        " another sampler or algorithm."
      )
    losses = losses.copy()
    losses[ids[present]] = values["loss"][present]
    return losses

  return Sampler(
    sample=sample,
    sizes=(size,),
    expected=size,
    init=lambda: np.full(num_clients, np.inf, np.float32),
    observe=observe,
  )
