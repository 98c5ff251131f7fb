"""A decoder adapted to people's posts: all of it, or by adapters.

    python -m benchmarks.posts --folder=runs/adapted_posts

A small decoder reads Shakespeare first, in tokens of the posts' vocabulary, and
is adapted then to the posts of 781 people (docs/transformers.md): federated
averaging of all parameters, or of adapters of every kernel. Perplexity is of
tokens of the clients' held-out sequences. What is in the folder already is not
computed again.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import fedjax_sim
from fedjax_sim import reporting
from fedjax_sim.cli.main import main as command
from fedjax_sim.core.tree import nbytes
from fedjax_sim.tasks.lora import adapters_of, merged, unadapted

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = ROOT / "docs" / "examples" / "train_tokenizer.py"
CONFIG = f"--config={ROOT / 'configs' / 'shakespeare_decoder.py'}"
POSTS = Path("stackexchange") / "beer_posts.jsonl.gz"
PLAYS = Path("tinyshakespeare") / "input.txt"
TOKENS, TIME = 1000, 64
METRIC = "seen/loss"  # of held-out examples
MODEL = {
  "data.name": "store",
  "data.heldout_fraction": "None",
  "model.width": "64",
  "algorithm.weighting": "examples",
}
ADAPTED = {  # of all runs that begin from the base
  "client.optimizer": "adam",
  "client.learning_rate": "0.001",
  "client.epochs": "2",
  "server.optimizer": "sgd",
  "server.learning_rate": "1.0",
  "server.initial_eval": "True",
}
ADAPTER = {
  "client.learning_rate": "0.005",
  "adapter.name": "lora",
  "adapter.targets": ".*/attention/.*/kernel,.*/feed_forward/.*/kernel",
}
VARIANTS: dict[str, dict[str, str]] = {
  "all parameters": {},
  "LoRA, rank 2": {**ADAPTER, "adapter.rank": "2"},
  "LoRA, rank 8": {**ADAPTER, "adapter.rank": "8"},
  "LoRA, rank 8, `fixed_a`": {
    **ADAPTER,
    "adapter.rank": "8",
    "adapter.fixed_a": "True",
  },
  "LoRA, rank 8, `fedex_lora`": {
    **ADAPTER,
    "adapter.rank": "8",
    "algorithm.name": "fedex_lora",
    "algorithm.weighting": "None",
    "aggregator.name": "stack",
  },
}


def run(*words: str) -> None:
  """Run a command of `fedjax-sim` without what it prints.

  Raises:
    RuntimeError: it fails.
  """
  printed = io.StringIO()
  with contextlib.redirect_stdout(printed):
    code = command(list(words))
  if code:
    raise RuntimeError(f"fedjax-sim {' '.join(words)}\n{printed.getvalue()}")


def stores(folder: Path, data: Path) -> tuple[Path, Path]:
  """Return the stores of the plays' and of the posts' tokens."""
  tokenizer, speeches = folder / "tokenizer.json", folder / "speeches.jsonl"
  if not tokenizer.exists():
    words = [str(data / POSTS), "text", str(tokenizer), str(TOKENS)]
    subprocess.run([sys.executable, str(TOKENIZER), *words], check=True)
  with speeches.open("w") as file:
    for part in (data / PLAYS).read_text().split("\n\n"):
      role, _, text = part.partition(":\n")
      file.write(json.dumps({"role": role, "text": text}) + "\n")
  found = []
  for name, source, user in (
    ("plays", speeches, "role"),
    ("posts", data / POSTS, "user"),
  ):
    whole, split = folder / f"{name}_whole", folder / name
    if not split.exists():
      run(
        *("data", "import", "--format=json_lines", f"--client={user}"),
        *("--fields=x:text", f"--train={source}", "--text=tokens"),
        *(f"--tokenizer={tokenizer}", f"--sequence-length={TIME}"),
        f"--store={whole}",
      )
      run(
        *("data", "partition", f"--store={whole}", f"--to={split}"),
        *("--heldout-fraction=0.2", "--min-examples=5"),
      )
    found.append(split)
  return found[0], found[1]


def trained(workdir: Path, store: Path, changes: dict[str, str]) -> Path:
  """Return the workdir of a run, after it has run."""
  if not (workdir / "summary.json").exists():
    fields = {**MODEL, "data.path": str(store), **changes}
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    run("run", CONFIG, f"--workdir={workdir}", *flags)
  return workdir


def row(name: str, workdir: Path) -> str:
  """Return a run as a row of the table."""
  metrics = reporting.read_metrics(workdir / "metrics.jsonl")
  losses = [m[METRIC] for m in metrics if METRIC in m]
  sent = [m for m in metrics if "bytes_down" in m]
  params = nbytes(fedjax_sim.load(workdir).params) // np.float32().nbytes
  down, up = (
    sum(m[key] for m in sent) / len(sent) for key in ("bytes_down", "bytes_up")
  )
  return (
    f"| {name} | {params:,} | {math.exp(losses[0]):.1f} |"
    f" {math.exp(losses[-1]):.1f} | {down / 1e6:.2f} | {up / 1e6:.2f} |"
  )


def missed(workdir: Path, base: Path) -> float:
  """Return what a run of FedEx-LoRA added to its kernels, as a share of all.

  That is what the mean of adapters misses of the mean of their products, summed
  over the rounds: its norm over that of the whole change of the kernels.
  """
  variables = fedjax_sim.load(workdir).variables
  begun = fedjax_sim.read_weights(base).arrays
  parts = {"added": unadapted(variables), "changed": merged(variables)}
  norms = {}
  for name, whole in parts.items():
    found = fedjax_sim.named_variables(whole)
    squares = [
      np.sum(np.square(np.asarray(found[path]) - begun[path]))
      for path in adapters_of(variables)
    ]
    norms[name] = math.sqrt(sum(squares))
  return norms["added"] / norms["changed"]


def main(arguments: Sequence[str] | None = None) -> None:
  """Train what is missing, and print the table."""
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.posts",
    description="Perplexity of posts after adaptation, and what it sends.",
  )
  parser.add_argument("--folder", required=True, help="of stores and runs")
  parser.add_argument("--rounds", type=int, default=30, help="of adaptation")
  parser.add_argument("--base-rounds", type=int, default=40, help="before it")
  flags = parser.parse_args(arguments)
  if "FEDJAX_SIM_DATA" not in os.environ:
    parser.error("FEDJAX_SIM_DATA: set it to the folder of the data sets")
  fedjax_sim.setup()
  folder = Path(flags.folder)
  folder.mkdir(parents=True, exist_ok=True)
  plays, posts = stores(folder, Path(os.environ["FEDJAX_SIM_DATA"]))
  base = trained(
    folder / "base",
    plays,
    {
      "server.rounds": str(flags.base_rounds),
      "server.eval_every": str(flags.base_rounds),
    },
  )
  weights = folder / "base.npz"
  run("export", f"--workdir={base}", f"--to={weights}")
  print("| trained | parameters | perplexity before | after | MB down | up |")
  print("| --- | --- | --- | --- | --- | --- |")
  for i, (name, changes) in enumerate(VARIANTS.items()):
    fields = {
      "model.initial": str(weights),
      "server.rounds": str(flags.rounds),
      "server.eval_every": str(flags.rounds),
      **ADAPTED,
      **changes,
    }
    workdir = trained(folder / f"run{i}", posts, fields)
    print(row(name, workdir), flush=True)
    if changes.get("algorithm.name") == "fedex_lora":
      share = missed(workdir, weights)
      print(f"\nFedEx-LoRA added {share:.1%} of the change of its kernels.")


if __name__ == "__main__":
  main()
