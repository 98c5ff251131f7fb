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
  fedprox,
  fedsgd,
  learned_weights,
)
from fedjax_sim.base import Algorithm

ALGORITHMS: dict[str, Callable[..., Algorithm]] = {
  "centralized": centralized.centralized,
  "dga": dga.dga,
  "dga_rl": dga_rl.dga_rl,
  "fedavg": fedavg.fedavg,
  "fedprox": fedprox.fedprox,
  "fedsgd": fedsgd.fedsgd,
  "learned_weights": learned_weights.learned_weights,
}
