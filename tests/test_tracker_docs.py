"""What docs/trackers.md and docs/azure.md show can be followed."""

import importlib.util
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from fedjax_sim import reporting
from fedjax_sim.config import flags
from fedjax_sim.config.build import build_trackers
from fedjax_sim.config.completion import complete
from fedjax_sim.distributed import processes
from fedjax_sim.reporting.trackers import wandb_files
from test_docs import blocks, follow, section

pytestmark = pytest.mark.integration

ROOT = pathlib.Path(__file__).parents[1]
TRACKERS = ROOT / "docs" / "trackers.md"
AZURE = ROOT / "docs" / "azure.md"
EXAMPLE = ROOT / "docs" / "examples" / "optuna_sweep.py"


def yaml_of(text):
  """The only YAML block of a text, read."""
  yaml = pytest.importorskip("yaml", reason="MLflow and W&B bring PyYAML along")
  (code,) = [b.code for b in blocks(text) if b.language == "yaml"]
  return yaml.safe_load(code)


@pytest.fixture
def here(tmp_path, monkeypatch, no_pictures):
  """A working folder with the project's configs."""
  (tmp_path / "configs").symlink_to(ROOT / "configs")
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
  return tmp_path


@pytest.mark.slow  # test_tracker_servers.py has runs with either tracker
def test_the_first_command(here):
  (block,) = [
    b for b in blocks(TRACKERS.read_text()) if "runs/tracked" in b.code
  ]
  follow(f"```sh\n{block.code}```\n", here)
  assert (here / "mlflow.db").exists()
  assert list((here / "runs" / "tracked" / "wandb").glob("offline-run-*"))


def test_a_tracker_of_ones_own(here):
  follow(section(TRACKERS, "A tracker of your own"), here)
  lines = (here / "runs" / "lines" / "lines.jsonl").read_text().splitlines()
  rows = reporting.read_metrics(here / "runs" / "lines" / "metrics.jsonl")
  assert len(lines) == len(rows) + 1
  assert lines[-1] == '{"status": "finished"}'


def test_sections_of_a_config():
  (block,) = [
    b for b in blocks(TRACKERS.read_text()) if "trackers.team" in b.code
  ]
  config = flags.load(str(ROOT / "configs" / "digits_fedavg.py"))
  exec(block.code, {"config": config})
  found = build_trackers(complete(config))
  assert [tracker.label for tracker in found] == ["mine", "team"]


def test_the_page_shows_the_example():
  assert f"```python\n{EXAMPLE.read_text()}```" in TRACKERS.read_text()


@pytest.mark.slow
def test_a_search_by_optuna(here, monkeypatch):
  reason = "pip install optuna"
  pytest.importorskip("optuna", reason=reason).logging.disable_default_handler()
  spec = importlib.util.spec_from_file_location("example", EXAMPLE)
  assert spec is not None
  assert spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  monkeypatch.setattr(module, "setup", lambda: None)  # devices are there
  study = module.main(2, "configs/digits_fedavg.py:smoke")
  assert len(study.trials) == 2
  for trial in study.trials:
    folder = here / "runs" / "optuna" / str(trial.number)
    last = reporting.read_metrics(folder / "metrics.jsonl")[-1]
    assert trial.value == last["test/accuracy"]
  assert len(module.main(1, "configs/digits_fedavg.py:smoke").trials) == 3


@pytest.mark.slow
def test_a_trial_of_a_sweep(here):
  """The command that W&B's agent makes out of the file, executed."""
  utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
  sweep = yaml_of(section(TRACKERS, "Weights & Biases"))
  chosen = {
    "config.client.learning_rate": {"value": 0.05},
    "config.client.epochs": {"value": 2},
  }
  assert sweep["parameters"].keys() == chosen.keys()
  found = utils.create_sweep_command_args({"args": chosen})
  values = {"args": found["args"], "env": ["/usr/bin/env"]}
  command: list[str] = []
  for part in sweep["command"]:
    name = part.removeprefix("${").removesuffix("}")
    command += (
      [sweep["program"]] if name == "program" else values.get(name, [part])
    )
  command[command.index("fedjax-sim")] = str(here / "fedjax-sim")
  program = f'#!/bin/sh\nexec "{sys.executable}" -m fedjax_sim "$@"\n'
  (here / "fedjax-sim").write_text(program)
  (here / "fedjax-sim").chmod(0o755)
  shown = [re.sub(r"(digits_fedavg\.py)", r"\1:smoke", c) for c in command]
  subprocess.run(
    shown,
    env=os.environ
    | {"PYTHONPATH": str(ROOT)}
    | {"WANDB_MODE": "offline", "WANDB_RUN_ID": "trial1"},
    check=True,
  )
  folder = here / "runs" / "sweep" / "trial1"
  (file,) = (folder / "wandb").glob("offline-run-*/run-trial1.wandb")
  rows = wandb_files.rows(file)
  assert sweep["metric"]["name"] in rows[max(rows)]
  config = (folder / "config.json").read_text()
  assert '"learning_rate": 0.05' in config


@pytest.mark.parametrize("title", ["A run", "A sweep", "Two nodes"])
def test_the_commands_of_azures_files(title, here, monkeypatch):
  """Their fields are those of the config, and their variables are given."""
  job = yaml_of(section(AZURE, title))
  trial = job.get("trial", job)
  known = {
    **{f"inputs.{k}": str(v) for k, v in job.get("inputs", {}).items()},
    **{f"search_space.{k}": "1" for k in job.get("search_space", {})},
    **{f"outputs.{k}": str(here) for k in job.get("outputs", {})},
  }
  command = re.sub(
    r"\$\{\{([\w.]+)\}\}", lambda match: known[match[1]], trial["command"]
  )
  _, _, run = command.partition("&& fedjax-sim run ")
  parts = shlex.split(run)
  parsed = flags.parse(parts, "config", "workdir", distributed="off")
  (mlflow,) = [
    t for t in build_trackers(complete(parsed.config)) if t.label == "mlflow"
  ]
  if title == "A sweep":
    row = {"round": 1, "test/accuracy": 0.5, "clients": 3}
    assert job["objective"]["primary_metric"] in mlflow.select(row)
  environment = trial["environment"]
  assert "python=3.12" in environment["conda_file"]["dependencies"]
  if title == "Two nodes":
    count = job["resources"]["instance_count"]
    names = {"MASTER_ADDR": "node0", "MASTER_PORT": "6105"}
    names |= {"RANK": "1", "WORLD_SIZE": str(count)}
    for name, value in names.items():
      monkeypatch.setenv(name, value)
    given = processes.parse(os.path.expandvars(parsed.distributed))
    assert given == processes.Address("node0:6105", 1, 2)
