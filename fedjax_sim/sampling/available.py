"""Who can take part when: a trace of when devices were ready.

Such as FLASH's phones (Yang et al. 2021, "Characterizing impacts of
heterogeneity in federated learning upon large-scale smartphone data", arXiv
2006.06983), idle and charging in a wireless network.
"""

from __future__ import annotations

import functools

import numpy as np

from fedjax_sim.core import Sampler, validate
from fedjax_sim.sampling.device_trace import Trace, load_trace
from fedjax_sim.sampling.draws import generator, without_replacement

_POINTS = 1000  # random times, at which the mean cohort is taken


def available(
  num_clients: int,
  clients_per_round: int,
  trace: Trace | str,
  round_seconds: float = 60.0,
) -> Sampler:
  """Draw cohorts uniformly among the clients that are ready.

  Round r begins r * round_seconds after the trace does, which is repeated when
  it ends. The seed gives every device of the trace as many clients as any
  other, or one more or less. Where fewer are ready than wanted, all of them
  take part, which may be nobody. To draw takes a time that depends on cohort
  and trace, not on the number of clients.

  Args:
    num_clients: the population.
    clients_per_round: how many, if so many are ready.
    trace: when devices are ready, or a file, see `load_trace`.
    round_seconds: how long a round lasts.

  Raises:
    TypeError, ValueError, FileNotFoundError: an argument is out of range.
  """
  num_clients = validate.integer("num_clients", num_clients)
  size = validate.integer(
    "server.clients_per_round", clients_per_round, le=num_clients
  )
  seconds = validate.number("round_seconds", round_seconds, gt=0)
  made = load_trace(trace) if isinstance(trace, str) else trace
  validate.instance("trace", made, Trace, "load_trace('trace.npz')")
  devices = min(made.devices, num_clients)

  @functools.lru_cache(maxsize=4)  # seeds
  def places(seed: int) -> np.ndarray:
    """Return each device's place; it has clients place, place + devices, ..."""
    order = generator(seed, 0, stream=2).permutation(made.devices)
    return np.argsort(order)

  def counts_at(seed: int, time: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the places that are ready, and how many clients have each."""
    place = np.sort(places(seed)[made.ready(time)])
    place = place[place < devices]
    return place, (num_clients - place + devices - 1) // devices

  def sample(seed: int, round_: int) -> np.ndarray:
    place, counts = counts_at(seed, round_ * seconds)
    total = int(counts.sum())
    rng = generator(seed, round_)
    drawn = without_replacement(rng, total, min(size, total))
    ends = np.cumsum(counts)
    which = np.searchsorted(ends, drawn, side="right")
    nth = drawn - (ends - counts)[which]
    return np.sort(place[which] + devices * nth)

  times = generator(0, 0).uniform(0, made.seconds, _POINTS)
  means = [min(size, int(counts_at(0, time)[1].sum())) for time in times]
  return Sampler(sample=sample, sizes=(size,), expected=float(np.mean(means)))
