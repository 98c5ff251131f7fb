"""What tests of whole runs share."""

import pathlib

import pytest

from fedjax_sim import reporting
from fedjax_sim.run import report

SUMMARY = {  # what a report needs of summary.json
  "params_digest": "ab" * 32,
  "rounds": 3,
  "seed": 0,
  "parameters": 650,
  "wall_seconds": 12.5,
  "phase_seconds": {"build": 2.5, "train": 10.0},
  "train_seconds": 10.0,
  "clients_per_second": 1234.5,
  "examples_per_second": 9876.5,
  "padding_waste": 0.25,
  "compilations": 1,
  "lanes": 4,
  "lanes_reason": "measured",
  "processes": 1,
  "devices": ["cpu:0", "cpu:1"],
  "device_kind": "cpu",
  "versions": {"python": "3.11", "jax": "0.10"},
}


def skip_pictures(patch: pytest.MonkeyPatch) -> None:
  """Leave out curves and report, which take longer than a quick run."""
  patch.setattr(reporting, "draw_curves", lambda *_: None)
  patch.setattr(report, "write_report", lambda *_: None)


def first_rounds(folder: pathlib.Path) -> list[int]:
  """The first round of every process that began to write events, in order.

  A run that begins anew has the same bits in the end as one that went on; here
  it has a 1 more.
  """
  return [int(p.name.split(".")[-1]) for p in sorted(folder.glob("events/*"))]
