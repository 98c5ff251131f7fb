"""Samplers: which clients take part in a round."""

from fedjax_sim.sampling.available import (
  Trace,
  available,
  load_trace,
  make_trace,
)
from fedjax_sim.sampling.uniform import (
  SAMPLERS,
  Participation,
  Sampler,
  by_size,
  cyclic,
  cyclic_poisson,
  generator,
  poisson,
  shuffled,
  uniform,
  without_replacement,
)

__all__ = [
  "SAMPLERS",
  "Participation",
  "Sampler",
  "Trace",
  "available",
  "by_size",
  "cyclic",
  "cyclic_poisson",
  "generator",
  "load_trace",
  "make_trace",
  "poisson",
  "shuffled",
  "uniform",
  "without_replacement",
]
