"""All that a private run leaves is covered by its epsilon, or named."""

import fnmatch
import json

import pytest

from fedjax_sim.cli import describe
from fedjax_sim.config import flags
from fedjax_sim.config.build import build
from fedjax_sim.core.weights import write_weights
from fedjax_sim.run import experiment
from fedjax_sim.run.checkpoint import Checkpoints
from fedjax_sim.tasks.freezing import named_variables
from test_features import DIGITS

# What takes nothing from training clients but noisy sums. Before a name is
# added here, think of what it is computed from.
COVERED = [
  # The noisy model, on data of nobody who trains.
  *("test/*", "unseen/*", "best/*", "clients_unseen.csv", "params_digest"),
  # The account, and what canaries, who are nobody's data, betray.
  *("privacy/*", "privacy", "privacy_told", "privacy_noise"),
  *("privacy_audit", "privacy_audit_told"),
  *("privacy_not_covered", "privacy budget", "not covered by epsilon"),
  # The config, and what follows from it; the number of clients is public.
  *(
    "config.json",
    "privacy.json",
    "round",
    "rounds",
    "parameters",
    "client/*",
    "server/*",
  ),
  *("lanes", "lanes_reason", "residency", "residency_reason"),
  *("clients a round", "bytes a client and round", "examples"),
  *("unseen", "test", "evaluation", "memory a device, * lanes"),
  # The machine and the software.
  *("processes", "devices", "device_kind", "versions"),
  # What holds the rest: rows and fields are looked at one by one.
  *("metrics.jsonl", "summary.json", ".lock"),
]
CHECKPOINTED = {  # facts beside the state; `checkpoints` is named as a whole
  *("lanes", "totals", "environment", "data", "sources", "privacy"),
  "timetables",
}
PRIVATE = {
  "server.rounds": "2",
  "server.eval_every": "2",
  "sampler.name": "poisson",
  "privacy.mechanism": "gaussian",
  "privacy.clip_norm": "1.0",
  "privacy.delta": "0.001",
  "privacy.noise_multiplier": "1.0",
}
EVERYTHING = {  # that tells something more
  "data.heldout_fraction": "0.2",
  "data.unseen_clients": "4",
  "data.server_clients": "4",
  "client.schedule": "step(every=1)",
  "replay.steps": "1",
  "leakage.statistic": "max",
  "privacy.canaries": "20",
  "privacy.quantile": "0.5",
  "server.best_metrics": "test/loss",
  "server.client_log": "True",
  "transforms.quantize.sparsity": "0.5",
}


def names_of(folder):
  """Of metrics, fields of the summary, and files."""
  rows = (folder / "metrics.jsonl").read_text().splitlines()
  names = {name for row in rows for name in json.loads(row)}
  names |= set(json.loads((folder / "summary.json").read_text()))
  return names | {path.name for path in folder.iterdir()}


def described(config):
  """The names of lines."""
  text = describe.describe(build(config))
  facts = text.rpartition("\n\n")[2].splitlines()
  return {line.split("  ")[0].strip() for line in facts}


def patterns(uncovered):
  """Those of the list, without what explains them."""
  return [told.split(" (")[0] for told in uncovered]


@pytest.mark.integration
@pytest.mark.parametrize(
  "more", [pytest.param({}, marks=pytest.mark.slow), EVERYTHING]
)
def test_nothing_that_a_run_leaves_is_neither_covered_nor_named(more, tmp_path):
  config = flags.load(str(DIGITS), PRIVATE | more | {"runtime.lanes": "1"})
  summary = experiment.run(config, tmp_path / "run")
  named = patterns(summary["privacy_not_covered"])
  match = lambda name, given: any(fnmatch.fnmatch(name, p) for p in given)
  left = names_of(tmp_path / "run")
  if not more:  # which compiles anew
    left |= described(config)
  assert len(left) > 40
  odd = [name for name in left if not match(name, [*COVERED, *named])]
  assert not odd, f"neither covered nor named: {odd}"
  for name in ("train/loss", "padding_waste", "device_idle", "timings.jsonl"):
    assert name in left
    assert match(name, named)
    assert not match(name, COVERED)
  assert bool(more) == match("seen/loss", named)
  facts = record(config, tmp_path / "run")
  assert set(facts) == CHECKPOINTED
  assert any("data's digest" in told for told in summary["privacy_not_covered"])


def record(config, folder):
  """The facts of the newest checkpoint."""
  kept = Checkpoints(folder / "checkpoints", keep=2)
  restored = kept.restore(build(config).simulator.states.host_shapes, print)
  kept.close()
  assert restored is not None
  return restored.facts


def test_what_is_measured_is_named():
  measured = build(flags.load(str(DIGITS), PRIVATE))
  named, runtime = patterns(measured.uncovered), measured.simulator.runtime
  assert ("lanes*" in named) == (runtime.lanes == "auto")
  assert ("residency*" in named) == (runtime.residency == "auto")
  fixed = {"runtime.lanes": "1", "runtime.residency": "device"}
  named = patterns(build(flags.load(str(DIGITS), PRIVATE | fixed)).uncovered)
  assert not {"lanes*", "residency*"} & set(named)


LOCAL = {
  "local_privacy.mechanism": "gaussian",
  "local_privacy.clip_norm": "1.0",
  "local_privacy.epsilon": "8.0",
  "local_privacy.delta": "1e-5",
}


@pytest.mark.parametrize("private", [PRIVATE, LOCAL])
def test_weights_that_a_private_run_begins_from_are_named(private, tmp_path):
  """They may have been trained on the same clients, without noise."""
  made = build(flags.load(str(DIGITS), private))
  assert not any("initial" in told for told in made.uncovered)
  simulator, path = made.simulator, tmp_path / "of_the_same_clients.npz"
  server = simulator.init().server
  write_weights(path, named_variables(simulator.algorithm.variables(server)))
  more = {"model.initial": str(path)}
  named = build(flags.load(str(DIGITS), private | more)).uncovered
  assert (
    "initial weights (of_the_same_clients.npz: whose data they were trained on)"
    in named
  )
