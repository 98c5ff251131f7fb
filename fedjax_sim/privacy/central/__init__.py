"""Central differential privacy: the mechanism, its checks and its audits."""

from fedjax_sim.privacy.central.contribution import Contribution
from fedjax_sim.privacy.central.mechanism import (
  LEAST_FACTOR,
  Message,
  PrivateState,
  central,
)
from fedjax_sim.privacy.central.settings import Central

__all__ = [
  "LEAST_FACTOR",
  "Central",
  "Contribution",
  "Message",
  "PrivateState",
  "central",
]
