"""Central differential privacy: the mechanism, its checks and its audits."""

from fedjax_sim.privacy.central.contribution import Contribution
from fedjax_sim.privacy.central.mechanism import (
  LEAST_FACTOR,
  Message,
  PrivateState,
  with_central_dp,
)
from fedjax_sim.privacy.central.settings import CentralDPConfig

__all__ = [
  "LEAST_FACTOR",
  "CentralDPConfig",
  "Contribution",
  "Message",
  "PrivateState",
  "with_central_dp",
]
