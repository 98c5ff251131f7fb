"""Federated algorithms, one per file, and their registry.

An entry is a function of a task, of the optimizers that it uses
(`client_optimizer`, `server_optimizer`) and of options of its own. It returns
an `Algorithm`.
"""

from collections.abc import Callable

from fedjax_sim.algorithms import (
  agnostic,
  apfl,
  centralized,
  dga,
  dga_rl,
  ditto,
  fedavg,
  fedavgm,
  fedbuff,
  feddyn,
  fedex_lora,
  fedexp,
  fedlabels,
  fedlaw,
  fedlin,
  fednova,
  fedopt,
  fedprox,
  fedsgd,
  fedshuffle,
  fltrust,
  gossip,
  hierarchical,
  kmeans,
  mime,
  mime_lite,
  moon,
  per_fedavg,
  q_fedavg,
  reptile,
  scaffold,
)
from fedjax_sim.core import Algorithm

ALGORITHMS: dict[str, Callable[..., Algorithm]] = {
  "agnostic": agnostic.agnostic,
  "apfl": apfl.apfl,
  "centralized": centralized.centralized,
  "dga": dga.dga,
  "dga_rl": dga_rl.dga_rl,
  "ditto": ditto.ditto,
  "fedadagrad": fedopt.fedadagrad,
  "fedadam": fedopt.fedadam,
  "fedavg": fedavg.fedavg,
  "fedavgm": fedavgm.fedavgm,
  "fedbuff": fedbuff.fedbuff,
  "feddyn": feddyn.feddyn,
  "fedex_lora": fedex_lora.fedex_lora,
  "fedexp": fedexp.fedexp,
  "fedlabels": fedlabels.fedlabels,
  "fedlaw": fedlaw.fedlaw,
  "fedlin": fedlin.fedlin,
  "fednova": fednova.fednova,
  "fedprox": fedprox.fedprox,
  "fedsgd": fedsgd.fedsgd,
  "fedshuffle": fedshuffle.fedshuffle,
  "fedyogi": fedopt.fedyogi,
  "fltrust": fltrust.fltrust,
  "gossip": gossip.gossip,
  "hierarchical": hierarchical.hierarchical,
  "kmeans": kmeans.kmeans,
  "mime": mime.mime,
  "mime_lite": mime_lite.mime_lite,
  "moon": moon.moon,
  "per_fedavg": per_fedavg.per_fedavg,
  "q_fedavg": q_fedavg.q_fedavg,
  "reptile": reptile.reptile,
  "scaffold": scaffold.scaffold,
}
