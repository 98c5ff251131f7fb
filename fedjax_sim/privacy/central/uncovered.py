"""What a private run reveals about training clients that no epsilon covers.

An epsilon is for the noisy sums and what is computed from them. A simulator
shows more: all of it is named here, by the names that it has among metrics,
fields of summaries, lines of `describe`, and files. A test compares this with
what a run leaves.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedjax_sim.core import Transform
from fedjax_sim.data import FederatedDataset


def uncovered(
  data: FederatedDataset,
  transforms: Sequence[Transform],
  *,
  log_clients: bool,
  measured: Sequence[str],
  keeps_state: bool,
  finetuned: bool = False,
  initial: str | None = None,
) -> list[str]:
  """Return what a private run reveals about training clients without noise.

  Args:
    data: federated data.
    transforms: the run's.
    log_clients: whether every client is logged.
    measured: what is chosen by looking at clients' data and work: `lanes`,
      `residency`, `state_residency`.
    keeps_state: whether clients keep something of their own.
    finetuned: whether clients are evaluated after fine-tuning.
    initial: name of the weights file that the run begins from; None if it
      begins anew.

  Returns:
    Names, patterns of names, and words in parentheses that explain them.
  """
  told = ["train/*", "clients", "clients_rejected", "bytes_*"]
  told += [f"{transform.name}/*" for transform in transforms]
  if data.seen is not None:
    told += ["seen/*", "clients_seen.csv"]
  if finetuned:
    told += ["finetuned/*", "clients_finetuned.csv"]
  if log_clients:
    told.append("client_rounds*")
  told += [
    "curves.png",
    "report.html",
    "data_profile.json",
    "events (the same as pictures)",
    "timings.jsonl",
    "*_seconds",
    "*_per_second",
    "profile (how long clients' work takes)",
    "padding_waste",
    "device_idle",
    "compilations",
    "local steps",
    "train",
  ]
  if data.seen is not None:
    told.append("seen")
  told[-1] += " (how many examples clients have)"
  if "lanes" in measured:
    told.append("lanes* (chosen by the time that clients' work takes)")
  if "residency" in measured:
    told.append("residency* (chosen by the size of all data)")
  if keeps_state and "state_residency" in measured:
    told.append("state_residency* (chosen by how many clients there are)")
  told += ["seed", "noise_seed (who takes part, and the noise, follow)"]
  kept = "the data's digest, the state of the noise"
  kept += ", what clients keep" if keeps_state else ""
  told.append(f"checkpoints ({kept})")
  if keeps_state:
    told.append("client_states (what clients keep, if it is on the disk)")
  told.append(
    "that a run ends, or warns by name, if clients' numbers are not finite"
  )
  if initial is not None:
    told.append(f"initial weights ({initial}: whose data they were trained on)")
  if data.server is not None:
    told.append("the server's examples, on which it trains")
  return told
