"""Federated algorithms, one a file, and their registry.

An algorithm is a function of a task, of the optimizers that it uses
(`client_optimizer`, `server_optimizer`) and of options of its own, which
returns an `Algorithm`.
"""

from collections.abc import Callable

from fedjax_sim.algorithms import (
  apfl,
  centralized,
  dga,
  dga_rl,
  fedavg,
  fedlabels,
  fedlaw,
  fedprox,
  fedsgd,
  kmeans,
  per_fedavg,
  reptile,
)
from fedjax_sim.core import Algorithm

ALGORITHMS: dict[str, Callable[..., Algorithm]] = {
  "apfl": apfl.apfl,
  "centralized": centralized.centralized,
  "dga": dga.dga,
  "dga_rl": dga_rl.dga_rl,
  "fedavg": fedavg.fedavg,
  "fedlabels": fedlabels.fedlabels,
  "fedlaw": fedlaw.fedlaw,
  "fedprox": fedprox.fedprox,
  "fedsgd": fedsgd.fedsgd,
  "kmeans": kmeans.kmeans,
  "per_fedavg": per_fedavg.per_fedavg,
  "reptile": reptile.reptile,
}
