"""A run as its workdir shows it, and its config explained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fedjax_sim.reporting.pages.record import RunRecord


class DescribedRun(NamedTuple):
  """A run for a report.

  Attributes:
    record: what its files say.
    fields: "section.field" -> value, of the whole config.
    changes: (field, value, default) of those that differ from their defaults.
    config_file: a config file that gives the same config.
    command: what repeats the run with that file as `repeat.py`.
    origin: the round and the run that it branched from; "" if from none.
    other_version: that another version began it; "" if this one did.
  """

  record: RunRecord
  fields: Mapping[str, Any]
  changes: Sequence[tuple[str, Any, Any]]
  config_file: str
  command: str
  origin: str = ""
  other_version: str = ""

  @property
  def headline(self) -> str:
    """The run's components in a line."""
    config = self.record.config
    names = {part: config[part]["name"] for part in _PARTS}
    cohort = config["server"].get("clients_per_round")
    return f"{names['algorithm']} with {names['model']} on {names['data']}" + (
      f", {cohort:,} clients a round" if cohort else ""
    )

  @property
  def components(self) -> dict[str, str]:
    """Component -> its name, of those that are on."""
    named = {
      title: self.fields.get(field) for field, title in _COMPONENTS.items()
    }
    for section in ("transforms", "downlink"):
      order = self.record.config.get(section, {}).get("order")
      named[section] = ", ".join(order or ())
    named["branched from"] = self.origin
    return {title: str(name) for title, name in named.items() if name}

  @property
  def best_round(self) -> int | None:
    """The round of the best model, by the first metric that selects one."""
    metrics = self.record.config["server"].get("best_metrics")
    if not metrics:
      return None
    summary = self.record.summary or {}
    round_ = summary.get(f"best/{metrics[0]}/round")
    return None if round_ is None else int(round_)


_PARTS = ("algorithm", "model", "data")
_COMPONENTS = {
  "data.name": "data",
  "data.partition": "partition",
  "model.name": "model",
  "algorithm.name": "algorithm",
  "client.optimizer": "client's optimizer",
  "server.optimizer": "server's optimizer",
  "sampler.name": "sampler",
  "aggregator.name": "aggregator",
  "privacy.mechanism": "privacy",
  "local_privacy.mechanism": "local privacy",
  "attack.name": "attack",
  "leakage.statistic": "leakage",
}
