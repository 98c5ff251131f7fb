"""Federated algorithms, one a file, and their registry.

An algorithm is a function of a task, of the optimisers that it uses
(`client_optimizer`, `server_optimizer`) and of options of its own, which
returns an `Algorithm`.
"""

from collections.abc import Callable

from fedjax_sim.algorithms.centralized import centralized
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.algorithms.fedprox import fedprox
from fedjax_sim.algorithms.fedsgd import fedsgd
from fedjax_sim.base import Algorithm

ALGORITHMS: dict[str, Callable[..., Algorithm]] = {
  "centralized": centralized,
  "fedavg": fedavg,
  "fedprox": fedprox,
  "fedsgd": fedsgd,
}
