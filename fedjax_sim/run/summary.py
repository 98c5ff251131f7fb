"""Summarize a run in files and on the screen."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from fedjax_sim import distributed, reporting
from fedjax_sim.config import build
from fedjax_sim.core.digests import tree_digest
from fedjax_sim.core.files import plain
from fedjax_sim.core.metric_names import is_cell
from fedjax_sim.data import FederatedData
from fedjax_sim.distributed import processes
from fedjax_sim.engine.client_metrics import ClientMetrics
from fedjax_sim.engine.state import RunState
from fedjax_sim.run import report
from fedjax_sim.run.resume import Totals, versions
from fedjax_sim.simulation.lanes import Choice
from fedjax_sim.simulation.simulator import Simulator
from fedjax_sim.simulation.timing import Phases


def rejection(simulator: Simulator, round_: int, ids: Any) -> str:
  """Return a line that names the clients whose updates were left out."""
  name = simulator.data.train.client_name
  named = (
    ["the pooled data"]
    if simulator.algorithm.requirements.pools_data
    else [name(int(i)) for i in ids[:10]]
  )
  more = ", ..." if len(ids) > 10 else ""
  return (
    f"Round {round_}: left out, update not finite: {', '.join(named)}{more}"
  )


def sum_up(
  experiment: build.Experiment,
  simulator: Simulator,
  state: RunState,
  choice: Choice,
  count: Callable[[], Totals],
  phases: Phases,
  folder: Path,
  measured: Mapping[str, ClientMetrics] | None,
  data_digest: str,
) -> dict[str, Any]:
  """Write what a finished run leaves, `summary.json` last, and return that.

  Args:
    experiment: what the config describes.
    simulator: what ran.
    state: the state after the last round.
    choice: number of lanes, and why.
    count: gives what was counted until this moment.
    phases: measures what takes how long.
    folder: the workdir.
    measured: set -> metrics of its clients, by the evaluation after the last
      round; None if a process before this one made it.
    data_digest: of the data.
  """
  sets = ("seen", "unseen")
  if measured is None:
    with phases("evaluate"):
      measured = experiment.measure(state, sets)
  clients = {
    name: measured[name] for name in (*sets, "finetuned") if name in measured
  }
  params = simulator.algorithm.variables(state.server).params
  digest = tree_digest(distributed.fetch(params))
  best = simulator.react.best_row(state)

  def write() -> dict[str, Any]:
    rows = reporting.read_metrics(folder / "metrics.jsonl")
    with phases("write"):
      first = simulator.best_metrics[:1]
      kept = best.get(f"best/{first[0]}/round") if first else None
      reporting.draw_curves(
        rows,
        folder / "curves.png",
        folder.name,
        None if kept is None else int(kept),
      )
      parts, table = folder / "client_rounds", folder / "client_rounds.parquet"
      if simulator.log_clients:
        reporting.join_client_rounds(parts, table)
        image = folder / "client_rounds.png"
        reporting.draw_client_rounds(table, image, folder.name)
      for name, metrics in clients.items():
        part = "seen" if name == "finetuned" else name
        data = getattr(simulator.data, part)
        _write_clients(data, metrics, folder / f"clients_{name}.csv")
    totals = count()
    device = simulator.mesh.devices.flat[0]
    summary = {
      **result_facts(experiment, rows[-1], state, digest, data_digest),
      "wall_seconds": totals.wall_seconds,
      "phase_seconds": totals.phase_seconds,
      "train_seconds": totals.train_seconds,
      "clients_per_second": totals.clients_per_second,
      "examples_per_second": totals.useful / max(totals.train_seconds, 1e-9),
      "padding_waste": 1 - totals.useful / max(totals.computed, 1),
      "device_idle": totals.idle / max(totals.computed + totals.idle, 1),
      "compilations": totals.compilations,
      "lanes": choice.lanes,
      "lanes_reason": choice.reason,
      "residency": simulator.residency.name,
      "residency_reason": simulator.residency.why,
      **_client_states(simulator),
      "processes": jax.process_count(),
      "devices": [str(d) for d in simulator.mesh.devices.flat],
      "device_kind": device.device_kind,
      "versions": versions(),
    }
    with phases("write"):  # no part of the seconds that the summary has
      report.write_report([folder], folder / report.FILE, plain(summary))
    reporting.write_json(folder / "summary.json", summary)
    if simulator.log_clients:  # until now the run might have had to go back
      reporting.remove_parts(parts)
    return summary

  return processes.from_first(write)


def _client_states(simulator: Simulator) -> dict[str, str]:
  """Return where client states are; nothing if clients keep nothing."""
  if not jax.tree.leaves(simulator.states.shapes.clients):
    return {}
  name, why = simulator.states.residency
  return {"state_residency": name, "state_residency_reason": why}


def result_facts(
  experiment: build.Experiment,
  last: Mapping[str, float],
  state: RunState,
  digest: str,
  data_digest: str,
) -> dict[str, Any]:
  """Return what a summary says of a run's result, and of its privacy.

  Args:
    experiment: what the config describes.
    last: the last row of metrics.
    state: the state after the last round, on the devices or on the host.
    digest: of the parameters.
    data_digest: of the data.
  """
  simulator, rounds = experiment.simulator, int(state.round)
  ledger = simulator.account.ledger
  facts: dict[str, Any] = {
    **{k: v for k, v in last.items() if k != "round"},
    **simulator.account.exact_row(rounds),
    **simulator.react.best_row(state),
    "params_digest": digest,
    "rounds": rounds,
    "seed": simulator.seed,
    "noise_seed": simulator.noise_seed,
    "parameters": simulator.states.num_parameters,
  }
  audited = simulator.account.audit(state)
  if audited is not None:
    facts["privacy_audit"] = audited._asdict()
    facts["privacy_audit_told"] = audited.describe()
  if ledger is None and not experiment.local_guarantee:
    facts["data_digest"] = data_digest  # else no epsilon would cover it
  if ledger is not None:
    facts["privacy"] = ledger.facts(rounds)
    facts["privacy_told"] = ledger.describe(rounds)
  if simulator.states.noise_origin:
    facts["privacy_noise"] = simulator.states.noise_origin
  if experiment.budget_end:
    facts["privacy_budget"] = experiment.budget_end
  if experiment.local_guarantee:
    facts["local_privacy"] = experiment.local_guarantee
  if experiment.secure_noise:
    facts["secure_noise"] = experiment.secure_noise
  if experiment.uncovered:
    facts["privacy_not_covered"] = list(experiment.uncovered)
  return facts


def _write_clients(
  data: FederatedData, evaluated: ClientMetrics, path: Path
) -> None:
  """Write every client's own metrics as CSV, one line a client."""
  metrics = evaluated.per_client()
  text = io.StringIO()
  writer = csv.writer(text, lineterminator="\n")
  writer.writerow(["client", "examples", *metrics])
  for i, size in enumerate(data.sizes):
    values = [float(v[i]) for v in metrics.values()]
    writer.writerow([data.client_name(i), int(size), *values])
  reporting.write_atomically(path, text.getvalue().encode())


def print_summary(summary: dict[str, Any], workdir: str) -> None:
  """Print a run's metrics and facts."""
  sets = ("train/", "test/", "seen/", "finetuned/", "unseen/")
  shown = (*sets, "best/", "privacy/")
  metrics = {
    k: v
    for k, v in summary.items()
    if k.startswith(shown) and isinstance(v, int | float) and not is_cell(k)
  }
  facts = {
    "rounds": str(summary["rounds"]),
    "wall time": f"{summary['wall_seconds']:.1f} s",
    "clients/s": f"{summary['clients_per_second']:,.0f}",
    "examples/s": f"{summary['examples_per_second']:,.0f}",
    "padding waste": f"{100 * summary['padding_waste']:.1f} %",
    "compilations": str(summary["compilations"]),
    "devices": f"{len(summary['devices'])} x {summary['device_kind']}",
    "lanes": str(summary["lanes"]),
    "workdir": workdir,
  }
  if "privacy_told" in summary:
    simulated = "privacy/simulated_epsilon" in summary
    told = summary["privacy_told"]
    facts["privacy, simulated" if simulated else "privacy"] = told
  if "privacy_noise" in summary:
    facts["noise"] = summary["privacy_noise"]
  if "privacy_budget" in summary:
    facts["privacy budget"] = summary["privacy_budget"]
  if "local_privacy" in summary:
    facts["local privacy"] = summary["local_privacy"]
  if "secure_noise" in summary:
    facts["secure noise"] = summary["secure_noise"]
  if "privacy_audit_told" in summary:
    facts["audit"] = summary["privacy_audit_told"]
  if "privacy_not_covered" in summary:
    told = ", ".join(summary["privacy_not_covered"])
    facts["not covered by epsilon"] = told
  reporting.print_final_table(metrics, facts)
