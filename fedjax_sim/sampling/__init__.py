"""Samplers: which clients take part in a round."""

from collections.abc import Callable

from fedjax_sim.core import Participation, Sampler
from fedjax_sim.sampling.available import available
from fedjax_sim.sampling.cyclic import cyclic, cyclic_poisson, shuffled
from fedjax_sim.sampling.device_trace import Trace, load_trace, make_trace
from fedjax_sim.sampling.draws import generator, without_replacement
from fedjax_sim.sampling.importance import importance
from fedjax_sim.sampling.in_flight import delayed, in_flight
from fedjax_sim.sampling.power_of_choice import power_of_choice
from fedjax_sim.sampling.stratified import stratified
from fedjax_sim.sampling.uniform import poisson, uniform
from fedjax_sim.sampling.weighted import by_size
from fedjax_sim.sampling.without import without

__all__ = [
  "SAMPLERS",
  "Participation",
  "Sampler",
  "Trace",
  "available",
  "by_size",
  "cyclic",
  "cyclic_poisson",
  "delayed",
  "generator",
  "importance",
  "in_flight",
  "load_trace",
  "make_trace",
  "poisson",
  "power_of_choice",
  "shuffled",
  "stratified",
  "uniform",
  "without",
  "without_replacement",
]


SAMPLERS: dict[str, Callable[..., Sampler]] = {
  "uniform": uniform,
  "poisson": poisson,
  "cyclic": cyclic,
  "cyclic_poisson": cyclic_poisson,
  "shuffled": shuffled,
  "by_size": by_size,
  "available": available,
  "importance": importance,
  "in_flight": in_flight,
  "power_of_choice": power_of_choice,
  "stratified": stratified,
}
