"""Attacks: Byzantine clients that poison data or updates, alone or together."""

from collections.abc import Callable

from fedjax_sim.attacks.adaptive import adaptive
from fedjax_sim.attacks.algorithm import with_false_reports, with_poisoned_data
from fedjax_sim.attacks.alie import alie
from fedjax_sim.attacks.attack import Attack, Honest
from fedjax_sim.attacks.backdoor import backdoor
from fedjax_sim.attacks.collusion import with_collusion
from fedjax_sim.attacks.gaussian import gaussian
from fedjax_sim.attacks.ipm import ipm
from fedjax_sim.attacks.label_flip import label_flip
from fedjax_sim.attacks.min_max import min_max, min_sum
from fedjax_sim.attacks.random_labels import random_labels
from fedjax_sim.attacks.same_value import same_value
from fedjax_sim.attacks.scaling import scaling
from fedjax_sim.attacks.selection import with_attackers
from fedjax_sim.attacks.sign_flip import sign_flip

__all__ = [
  "ATTACKS",
  "Attack",
  "Honest",
  "adaptive",
  "alie",
  "backdoor",
  "gaussian",
  "ipm",
  "label_flip",
  "min_max",
  "min_sum",
  "random_labels",
  "same_value",
  "scaling",
  "sign_flip",
  "with_attackers",
  "with_collusion",
  "with_false_reports",
  "with_poisoned_data",
]


ATTACKS: dict[str, Callable[..., Attack]] = {
  "adaptive": adaptive,
  "alie": alie,
  "backdoor": backdoor,
  "gaussian": gaussian,
  "ipm": ipm,
  "label_flip": label_flip,
  "min_max": min_max,
  "min_sum": min_sum,
  "random_labels": random_labels,
  "same_value": same_value,
  "scaling": scaling,
  "sign_flip": sign_flip,
}
