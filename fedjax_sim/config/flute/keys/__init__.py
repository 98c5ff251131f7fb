"""Every key that FLUTE reads, section by section: `KEYS`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedjax_sim.config.flute.keys.client import CLIENT
from fedjax_sim.config.flute.keys.model import MODEL
from fedjax_sim.config.flute.keys.privacy import LEAKAGE, PRIVACY
from fedjax_sim.config.flute.keys.server import SERVER
from fedjax_sim.config.flute.rules import (
  File,
  Key,
  Outcome,
  idle,
  used,
  without,
)

_STRATEGIES = {"dga", "fedavg", "fedprox", "fedlabels"}


def _strategy(value: str, file: File) -> Outcome:
  """Name the algorithm, which the server's type or its agent may replace."""
  if value.lower() not in _STRATEGIES:
    raise ValueError(
      f"strategy={value!r} is unknown. Known: DGA, FedAvg, FedLabels, FedProx."
    )
  if file.strategy == "apfl":
    return idle("algorithm.name='apfl', by server_config.type")
  fields: dict[str, Any] = {"algorithm.name": file.strategy}
  note = ""
  if file.task.tokens and file.strategy in ("fedavg", "fedprox"):
    fields["algorithm.weighting"] = "tokens"
    note = "clients weigh by words, tokens or characters"
  if file.strategy == "fedlabels":
    fields["algorithm.evaluate_means"] = True
  return used(fields, note)


def _log(value: bool, file: File) -> Outcome:
  return used({"server.client_log": value})


# Name -> `Key`, or a section's table.
KEYS: Mapping[str, Any] = {
  "model_config": MODEL,
  "dp_config": PRIVACY,
  "privacy_metrics_config": LEAKAGE,
  "strategy": Key(str, _strategy),
  "server_config": SERVER,
  "client_config": CLIENT,
  "dump_norm_stats": Key(bool, _log),
  "decoder_config": Key(dict, without("FLUTE hands it on and never uses it")),
}
