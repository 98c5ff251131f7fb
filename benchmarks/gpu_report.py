"""What `benchmarks/gpu_check.sh` found, as one JSON and as tables.

    python -m benchmarks.gpu_report PARTS OUT

PARTS is the folder that its parts wrote to: `parts.tsv`, a line a part, and of
each a text, NAME.txt, and mostly results, NAME.json. Written are
OUT/gpu_check.json and OUT/gpu_check.txt.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import show

OUT_OF_TIME = ("124", "137")  # what `timeout` exits with, gently or not


def joined(folder: Path) -> dict[str, Any]:
  """Return all that is known of all parts so far.

  Args:
    folder: that they wrote to.
  """
  parts, results = [], {}
  for line in (folder / "parts.tsv").read_text().splitlines():
    name, status, seconds, budget = line.split("\t")
    text = folder / f"{name}.txt"
    lines = (
      text.read_text(errors="replace").split("\n") if text.exists() else []
    )
    said = [told.strip() for told in lines if told.strip()]
    parts.append(
      {
        "name": name,
        "status": verdict(status),
        "seconds": int(seconds),
        "budget": int(budget),
        "last_line": said[-1][:200] if said else "",
      }
    )
    # What a part wrote before it failed counts, too.
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
      results[name] = json.loads((folder / f"{name}.json").read_bytes())
  return {"parts": parts, "results": results}


def verdict(status: str) -> str:
  """Return what an exit status means; a status in words stays."""
  if status in OUT_OF_TIME:
    return "out of time"
  if status == "0":
    return "done"
  return f"failed with status {status}" if status.isdecimal() else status


def left_out(report: Mapping[str, Any]) -> list[str]:
  """Return lines on what was not measured, and why."""
  lines = [
    f"{part['name']}: {part['status']}; {part['last_line']}".rstrip("; ")
    for part in report["parts"]
    if part["status"] != "done"
  ]
  for result in report["results"].values():
    for name, case in result.get("cases", {}).items():
      if case["left_out"]:
        names = ", ".join(case["left_out"])
        lines.append(f"{name}: {names}, for want of time")
    lines += result.get("notes", [])
  return list(dict.fromkeys(lines))


def shown(report: Mapping[str, Any]) -> None:
  """Print all tables, and what was left out."""
  results = report["results"].values()
  show.table(
    "Parts",
    ["", "", "seconds", "at most", "last line"],
    [
      [p["name"], p["status"], str(p["seconds"]), str(p["budget"]),
       p["last_line"][:48]]
      for p in report["parts"]
    ],
  )  # fmt: skip
  machines = (result["machine"] for result in results if "machine" in result)
  facts: Mapping[str, Any] = next(machines, {})
  if facts:
    versions = facts["versions"]
    print(
      f"{facts['devices']} x {facts['device_kind']}, jax {versions['jax']},"
      f" torch {versions.get('torch', 'not installed')}"
    )
  rows = [
    row
    for part, result in report["results"].items()
    for row in _engine_rows(result, ", loops in graphs" * (part == "graphs"))
  ]
  if rows:
    show.table(
      "The engine on one device: speed as a ratio, median of turns",
      ["case", "lanes", "/ bare loop", "/ PyTorch", "examples/s", "clients/s",
       "share of matmul peak", "program, MB"],
      rows,
    )  # fmt: skip
  rows = [row for result in results for row in _flute_rows(result)]
  if rows:
    show.table(
      "FLUTE's workloads",
      ["workload", "devices", "rounds/s", "examples/s", "/ bare loop",
       "s a round", "s a round, FLUTE on 4 GPUs"],
      rows,
    )  # fmt: skip
  for result in results:
    if "rows" in result:
      show.memory(result)
    for turn in result.get("turns", []):
      show.table(
        f"A study of {turn['runs']} runs",
        [*(key for key in turn if " / " in key), "greatest difference"],
        [
          [
            *(show.number(turn[key]) for key in turn if " / " in key),
            f"{turn['greatest difference']:.1e}",
          ]
        ],
      )
  print("Left out:")
  for line in left_out(report) or ["nothing"]:
    print(f"  {line}")


def _engine_rows(result: Mapping[str, Any], how: str) -> Iterator[list[str]]:
  for name, case in result.get("cases", {}).items():
    for engine, found in case["engines"].items():
      ratio = lambda other, engine=engine, case=case: show.number(
        case["ratios"].get(f"{engine}_to_{other}")
      )
      asked = engine.partition("_")[2]
      auto = "auto: " if asked == "auto" else ""
      yield [
        f"{name}{how}",
        f"{auto}{found['lanes']}",
        ratio("bare"),
        ratio("torch"),
        *(
          show.number(found[key])
          for key in ("examples_per_second", "clients_per_second")
        ),
        show.number(found["share_of_peak"]),
        show.number(found["program_bytes"] / 1e6),
      ]


def _flute_rows(result: Mapping[str, Any]) -> Iterator[list[str]]:
  for name, found in result.get("workloads", {}).items():
    for engine, speeds in found["engines"].items():
      yield [
        name,
        engine.partition("_")[0],
        show.number(speeds["rounds_per_second"]),
        show.number(speeds["examples_per_second"]),
        show.number(found["ratios"].get(f"{engine}_to_bare")),
        show.number(1 / speeds["rounds_per_second"]),
        show.number(found["reported"]["flute_seconds_per_round"]),
      ]


def main(arguments: Sequence[str]) -> None:
  """Write the JSON and the tables."""
  folder, out = map(Path, arguments)
  report = joined(folder)
  (out / "gpu_check.json").write_text(json.dumps(report, indent=2) + "\n")
  tables = (out / "gpu_check.txt").open("w")
  with tables, contextlib.redirect_stdout(tables):
    shown(report)


if __name__ == "__main__":
  main(sys.argv[1:])
