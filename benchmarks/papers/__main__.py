"""Figures that papers print, beside ours.

    FEDJAX_SIM_DATA=DIR python -m benchmarks.papers --to=studies/papers
    python -m benchmarks.papers --figures=drive,q_ffl --seeds=2 --rounds=10

Prints a Markdown table: of each number what the paper prints and our mean and
standard error over the seeds. Settings are those of the papers, and of their
authors' code where papers leave them open; each file of this folder says which.
Studies are kept in `--to`, where a command that was stopped goes on.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import fedjax_sim as fs
from benchmarks.papers import drive, fedavg, ifca, medians, pfedme, q_ffl
from benchmarks.papers.figure import Figure, Scale
from benchmarks.seeds import told
from fedjax_sim.core import validate

FIGURES: dict[str, Figure] = {
  "drive": drive.FIGURE,
  "fedavg": fedavg.FIGURE,
  "ifca": ifca.FIGURE,
  "medians": medians.FIGURE,
  "pfedme": pfedme.FIGURE,
  "q_ffl": q_ffl.FIGURE,
}


def main(arguments: Sequence[str] | None = None) -> None:
  """Train what the figures need, and print the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  listed = lambda text: text.split(",")
  parser.add_argument("--figures", type=listed, default=[*FIGURES])
  parser.add_argument("--seeds", type=int, default=5)
  parser.add_argument("--rounds", type=int, help="instead of the figures' own")
  parser.add_argument("--to", help="folder to keep the studies in")
  args = parser.parse_args(arguments)
  for name in args.figures:
    validate.one_of("figures", name, FIGURES)
  scale = Scale(validate.integer("seeds", args.seeds), args.rounds)
  fs.setup()
  with tempfile.TemporaryDirectory() as scratch:
    folder = Path(args.to or scratch)
    lines = [
      line
      for name in args.figures
      for line in _lines(FIGURES[name], folder / name, scale)
    ]
  print("| paper | what | printed | ours | what differs |")
  print("| --- | --- | --- | --- | --- |")
  print("\n".join(lines))


def _lines(figure: Figure, folder: Path, scale: Scale) -> list[str]:
  """Return a line of the table for each number of a figure."""
  source, differs = figure.source, figure.differs
  lines = []
  for row in figure.rows(folder, scale):
    ours = told(row.ours, row.digits)
    lines.append(
      f"| {source} | {row.what} | {row.printed} | {ours} | {differs} |"
    )
    source = differs = ""  # once
  return lines


if __name__ == "__main__":
  main()
