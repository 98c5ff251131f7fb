"""Federated algorithms, one a file, and their registry.

An algorithm is a function of a task, of the optimisers that it uses
(`client_optimizer`, `server_optimizer`) and of options of its own, which
returns an `Algorithm`.
"""

from collections.abc import Callable

from fedjax_sim.algorithms import centralized, fedavg, fedprox, fedsgd
from fedjax_sim.base import Algorithm

ALGORITHMS: dict[str, Callable[..., Algorithm]] = {
  "centralized": centralized.centralized,
  "fedavg": fedavg.fedavg,
  "fedprox": fedprox.fedprox,
  "fedsgd": fedsgd.fedsgd,
}
