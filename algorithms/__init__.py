"""Federated algorithms, one per file, and their registry.

An entry is a function of a task, of the optimizers that it uses
(`client_optimizer`, `server_optimizer`) and of options of its own. It returns
an `Algorithm`.
"""

from collections.abc import Callable

from fedjax_sim.algorithms import (
  apfl,
  centralized,
  dga,
  dga_rl,
  ditto,
  fedavg,
  fedbuff,
  fedex_lora,
  fedlabels,
  fedlaw,
  fedlin,
  fednova,
  fedprox,
  fedsgd,
  fltrust,
  gossip,
  hierarchical,
  kmeans,
  mime,
  mime_lite,
  per_fedavg,
  reptile,
  scaffold,
)
from fedjax_sim.core import Algorithm

ALGORITHMS: dict[str, Callable[..., Algorithm]] = {
  "apfl": apfl.apfl,
  "centralized": centralized.centralized,
  "dga": dga.dga,
  "dga_rl": dga_rl.dga_rl,
  "ditto": ditto.ditto,
  "fedavg": fedavg.fedavg,
  "fedbuff": fedbuff.fedbuff,
  "fedex_lora": fedex_lora.fedex_lora,
  "fedlabels": fedlabels.fedlabels,
  "fedlaw": fedlaw.fedlaw,
  "fedlin": fedlin.fedlin,
  "fednova": fednova.fednova,
  "fedprox": fedprox.fedprox,
  "fedsgd": fedsgd.fedsgd,
  "fltrust": fltrust.fltrust,
  "gossip": gossip.gossip,
  "hierarchical": hierarchical.hierarchical,
  "kmeans": kmeans.kmeans,
  "mime": mime.mime,
  "mime_lite": mime_lite.mime_lite,
  "per_fedavg": per_fedavg.per_fedavg,
  "reptile": reptile.reptile,
  "scaffold": scaffold.scaffold,
}
