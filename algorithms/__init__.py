"""Federated algorithms, one a file, and their registry.

An algorithm is a function of a task, of the optimisers that it uses
(`client_optimizer`, `server_optimizer`) and of options of its own, which
returns an `Algorithm`.
"""

from collections.abc import Callable

from fedjax_sim.algorithms import (
  centralized,
  dga,
  dga_rl,
  fedavg,
  fedlabels,
  fedprox,
  fedsgd,
  kmeans,
  learned_weights,
  per_fedavg,
  personalized,
  reptile,
)
from fedjax_sim.core import Algorithm

ALGORITHMS: dict[str, Callable[..., Algorithm]] = {
  "centralized": centralized.centralized,
  "dga": dga.dga,
  "dga_rl": dga_rl.dga_rl,
  "fedavg": fedavg.fedavg,
  "fedlabels": fedlabels.fedlabels,
  "fedprox": fedprox.fedprox,
  "fedsgd": fedsgd.fedsgd,
  "kmeans": kmeans.kmeans,
  "learned_weights": learned_weights.learned_weights,
  "per_fedavg": per_fedavg.per_fedavg,
  "personalized": personalized.personalized,
  "reptile": reptile.reptile,
}
