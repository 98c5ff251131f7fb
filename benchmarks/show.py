"""Tables of what was measured."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

_COMPARED = {
  "one": "one device",
  "all": "all devices",
  "bare": "bare loop",
  "torch": "PyTorch",
}

_ENGINE = {
  "examples_per_second": "examples/s",
  "clients_per_second": "clients/s",
  "step_waste": "step waste",
  "last_batch_waste": "last-batch waste",
  "device_imbalance": "device imbalance",
  "lanes": "lanes",
  "compilations": "compilations",
  "flops_per_second": "FLOP/s",
  "share_of_peak": "share of matmul peak",
  "program_bytes": "program's memory on a device, bytes",
}


def progress(text: str) -> None:
  """Print a line on the standard error."""
  print(text, file=sys.stderr, flush=True)


def number(value: Any) -> str:
  """Return a number with three digits; `-` for None and NaN."""
  if value is None or (isinstance(value, float) and math.isnan(value)):
    return "-"
  if isinstance(value, int) and abs(value) < 10_000:
    return str(value)
  return f"{value:.3g}"


def table(
  title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
  """Print a table, each row on one line wherever it goes."""
  made = Table(title=title)
  for i, column in enumerate(columns):
    made.add_column(column, justify="right" if i else "left", no_wrap=True)
  for row in rows:
    made.add_row(*row)
  Console(width=max(Console().width, 120)).print(made)


def engine(report: Mapping[str, Any]) -> None:
  """Print the table of `benchmarks.engine`: a column a case."""
  found = report["cases"]
  rows = [
    [label, *(number(case[key]) for case in found.values())]
    for key, label in (
      ("parameters", "parameters"),
      ("clients_per_round", "clients a round"),
      ("batch_size", "batch size"),
    )
  ]
  for key in dict.fromkeys(
    k for case in found.values() for k in case["ratios"]
  ):
    cells = [_ratio(case, key) for case in found.values()]
    rows.append([ratio_name(key), *cells])
  theirs = [case["torch"] for case in found.values()]
  rows.append(["PyTorch's best number of threads", *map(_threads, theirs)])
  rows.append(["PyTorch is timed on batches", *map(_batches, theirs)])
  names = list(dict.fromkeys(n for case in found.values() for n in _of(case)))
  for key, label in _ENGINE.items():
    for name in names:
      values = [_of(case).get(name, {}).get(key) for case in found.values()]
      rows.append([f"{label}, {name}", *map(number, values)])
  peaks = [number(case["process_peak_bytes"]) for case in found.values()]
  rows.append(["peak memory of the whole process, bytes", *peaks])
  facts = report["machine"]
  title = (
    f"{facts['devices']} x {facts['device_kind']}, {facts['cpu_count']} cores,"
    f" jax {facts['versions']['jax']}"
  )
  table(title, ["", *found], rows)
  if facts["backend"] == "cpu":
    print("One device may use every core; the matmul peak is all cores'.")
  for note in report["notes"]:
    print(note)
  for name, case in found.items():
    if case["left_out"]:
      print(f"{name}: left out for want of time: {', '.join(case['left_out'])}")
  for name, case in found.items():
    for key in case["short"]:
      print(
        f"{name}: {ratio_name(key)} is {case['ratios'][key]:.2f}, below the aim"
        f" of {case['aims'][key]}"
      )


def _of(case: Mapping[str, Any]) -> Mapping[str, Any]:
  engines: Mapping[str, Any] = case["engines"]
  return engines


def ratio_name(key: str) -> str:
  """Return a ratio in words: "one_8_to_bare" is one device, 8 lanes, to it."""
  names = []
  for name in key.split("_to_"):
    what, _, lanes = name.partition("_")
    side = (
      "" if not lanes else ", 1 lane" if lanes == "1" else f", {lanes} lanes"
    )
    names.append(_COMPARED[what] + side)
  return " / ".join(names)


def _ratio(case: Mapping[str, Any], key: str) -> str:
  value = number(case["ratios"].get(key))
  turns = case["ratios_of_turns"].get(key)
  if not turns:
    return value
  return f"{value} ({min(turns):.2f}-{max(turns):.2f})"


def _threads(theirs: Mapping[str, Any] | None) -> str:
  if theirs is None:
    return "-"
  return f"{theirs['threads']} (of {', '.join(theirs['seconds_by_threads'])})"


def _batches(theirs: Mapping[str, Any] | None) -> str:
  if theirs is None:
    return "-"
  timed = f"{theirs['timed_batches']:.0f} of {theirs['batches']:.0f}"
  return f"{timed}, extrapolated" if theirs["extrapolated"] else timed


def flute(report: Mapping[str, Any]) -> None:
  """Print the table of `benchmarks.flute`: a column a workload."""
  found = report["workloads"].values()
  mebibytes = lambda size: None if size is None else size / 2**20
  rows = [
    ["data", *(str(row["data"]) for row in found)],
    *(
      [label, *(number(row[key]) for row in found)]
      for key, label in (
        ("num_clients", "clients"),
        ("mean_size", "examples a client"),
        ("clients_per_round", "clients a round"),
        ("batch_size", "batch size"),
        ("parameters", "parameters"),
      )
    ),
  ]
  for name in dict.fromkeys(n for row in found for n in row["engines"]):
    engines = [row["engines"].get(name, {}) for row in found]
    for key, label in (
      ("rounds_per_second", "rounds/s"),
      ("examples_per_second", "examples/s"),
    ):
      values = [number(engine.get(key)) for engine in engines]
      rows.append([f"{label}, {name}", *values])
    ratio = f"{name}_to_bare"
    rows.append([ratio_name(ratio), *(_ratio(row, ratio) for row in found)])
  peaks = [number(mebibytes(row["alone_peak_bytes"])) for row in found]
  rows.append(["peak memory of a process that trains, MiB", *peaks])
  best = [_best_rounds_per_second(row) for row in found]
  rows.append(["seconds a round", *(number(1 / rate) for rate in best)])
  for key, label in (
    ("flute_seconds_per_round", "seconds a round, FLUTE on 4 GPUs"),
    ("fedml_seconds_per_round", "seconds a round, FedML on 4 GPUs"),
    ("flute_megabytes", "memory of a GPU, FLUTE, MB"),
    ("fedml_megabytes", "memory of a GPU, FedML, MB"),
  ):
    rows.append([label, *(number(row["reported"][key]) for row in found)])
  facts = report["machine"]
  title = (
    f"{facts['devices']} x {facts['device_kind']}, {facts['cpu_count']} cores,"
    f" jax {facts['versions']['jax']}, {report['pairs']} turns"
  )
  table(title, ["", *report["workloads"]], rows)
  print("FLUTE's and FedML's numbers are those of FLUTE's README.")


def _best_rounds_per_second(row: Mapping[str, Any]) -> float:
  rates = [engine["rounds_per_second"] for engine in row["engines"].values()]
  return max(rates)


def scaling(report: Mapping[str, Any]) -> None:
  """Print the tables of `benchmarks.scaling`."""
  table(
    "LR, all devices, by cohort",
    [
      "clients a round",
      "rounds a call",
      "µs a client",
      "time / first",
      "one round a call",
      "bytes of one round",
      "bytes a client",
      "memory / first",
    ],
    [
      [
        str(row["clients_per_round"]),
        str(row["rounds_per_call"]),
        number(1e6 * row["seconds_per_client"]),
        number(row["time_ratio"]),
        number(row["one_round_time_ratio"]),
        number(row["program_bytes"]),
        number(row["program_bytes_per_client"]),
        number(row["memory_ratio"]),
      ]
      for row in report["cohorts"]
    ],
  )
  print(f"step waste, 1,000 clients in 10 lanes: {report['step_waste']:.2%}")
  parts = report["start"]
  table(
    "Seconds from a process's start to its first round",
    [*parts, "sum"],
    [[*map(number, parts.values()), number(sum(parts.values()))]],
  )


def weak_scaling(report: Mapping[str, Any]) -> None:
  """Print the table of `benchmarks.weak_scaling`."""
  keys = {
    "devices": "devices",
    "clients_per_round": "clients a round",
    "time_ratio": "time / one device",
    "devices_per_core": "devices a core",
    "efficiency": "ideal time / time",
    "sent_bytes": "bytes a device sends",
  }
  table(
    "As many clients a device",
    ["case", *keys.values()],
    [[row["case"], *(number(row[k]) for k in keys)] for row in report["rows"]],
  )


def comparison(report: Mapping[str, Any]) -> None:
  """Print the table of `benchmarks.compare`: a row a kind of turn."""
  theirs, ours = report["theirs"], report["ours"]
  rows = [
    [
      f"{name}, {call}",
      str(len(found["seconds"]["ours"])),
      *(_spread(found[key]) for key in ("time", "cpu_time")),
      "equal" if found["equal"] else f"differ by {found['difference']:.1e}",
    ]
    for name, case in report["cases"].items()
    for call, found in case.items()
  ]
  changed = ", changed" if ours["changed"] else ""
  title = (
    f"Times of {theirs['name']} ({theirs['commit'][:9]}) / times of the working"
    f" tree ({ours['commit'][:9]}{changed})"
  )
  columns = ["", "turns", "time", "processors' time", "results"]
  table(title, columns, rows)
  for name, reasons in report["failed"].items():
    for reason in reasons:
      print(f"{name} could not be compared. {reason}")


def _spread(found: Mapping[str, Any]) -> str:
  shown = (
    f"{found['median']:.2f} ({found['least']:.2f}-{found['greatest']:.2f})"
  )
  return f"{shown} {found['verdict']}".rstrip()


def memory(report: Mapping[str, Any]) -> None:
  """Print the table of `benchmarks.memory`: a row a case and lanes."""
  rows = []
  for row in report["rows"]:
    predicted = row["program_bytes"] + row["waiting_bytes"]
    taken = row["taken_bytes"]
    rows.append(
      [
        row["case"],
        str(row["lanes"]),
        number(row["program_bytes"] / 1e6),
        number(row["waiting_bytes"] / 1e6),
        number(None if taken is None else taken / 1e6),
        number(None if taken is None else taken / predicted),
      ]
    )
  columns = ["case", "lanes", "predicted, MB", "of the next call", "taken, MB"]
  table("Memory of a device", [*columns, "taken / predicted"], rows)
