"""`run --profile`: its table, its trace, and what it leaves alone."""

import gzip
import json
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from fedjax_sim import reporting
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.cli.main import main
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.models.logistic_regression import logistic_regression
from fedjax_sim.run import experiment, profiling, signals
from fedjax_sim.run.profiling import Profile, Trained
from fedjax_sim.simulation import simulator as simulators
from fedjax_sim.simulation.timing import MEANING, Phases
from problems import blobs, make_simulator, sgd
from test_experiment import at, quick, summary_of
from tiers import slow_but
from workdirs import skip_pictures


@pytest.fixture(autouse=True)
def fast(monkeypatch):
  skip_pictures(monkeypatch)


@pytest.fixture
def named_scopes():
  """What is compiled here has our names, not those of a cached program."""
  flag = "jax_compilation_cache_include_metadata_in_key"
  before = getattr(jax.config, flag)
  jax.config.update(flag, True)
  yield
  jax.config.update(flag, before)


def table_of(folder):
  return json.loads((folder / "profile" / "phases.json").read_text())


def traces(folder):
  return sorted((folder / "profile" / "plugins" / "profile").glob("*"))


@pytest.mark.integration
def test_what_a_profile_leaves(tmp_path, capfd, named_scopes):
  plain, profiled = tmp_path / "plain", tmp_path / "profiled"
  experiment.run(quick(), plain)
  assert not (plain / "profile").exists()
  capfd.readouterr()
  experiment.run(quick(), profiled, profile=True)
  out, err = capfd.readouterr()
  assert err == ""

  # The results are those of a run without a profile.
  ours, theirs = summary_of(profiled), summary_of(plain)
  assert ours["params_digest"] == theirs["params_digest"]
  name = "metrics.jsonl"
  assert (profiled / name).read_bytes() == (plain / name).read_bytes()
  for summary in (ours, theirs):
    seconds = summary["phase_seconds"]
    assert list(seconds) == list(MEANING)
    assert sum(seconds.values()) == pytest.approx(summary["wall_seconds"])
    assert seconds["train"] >= summary["train_seconds"] > 0
    assert min(seconds.values()) >= 0
  assert ours["phase_seconds"]["profile"] > 0
  assert theirs["phase_seconds"]["profile"] == 0

  found = table_of(profiled)
  seconds = found["phase_seconds"]
  assert sum(seconds.values()) == pytest.approx(found["wall_seconds"])
  assert found["wall_seconds"] >= ours["wall_seconds"]
  assert found["rounds_traced"] == profiling.TRACED
  assert found["rounds_measured"] == 12 - profiling.TRACED
  devices = len(ours["devices"])
  each = found["flops_per_second_and_device"]
  assert found["flops_per_second"] == pytest.approx(devices * each)
  words = [line.split() for line in out.splitlines()]
  shown = {line[0]: line[1] for line in words if len(line) == 4}
  assert all(shown[k] == f"{v:.3f}" for k, v in seconds.items())
  assert "GFLOP/s" in out
  assert str(traces(profiled)[0]) in out

  (trace,) = traces(profiled)
  (raw,) = trace.glob("*.xplane.pb")
  content = raw.read_bytes()
  scopes = ("broadcast", "local_training", "aggregate", "server_step")
  for scope in (*scopes, "phase: train", "plan rounds"):
    assert scope.encode() in content, scope
  (viewed,) = trace.glob("*.trace.json.gz")
  events = json.loads(gzip.decompress(viewed.read_bytes()))["traceEvents"]
  steps = [e for e in events if e.get("name") == "dispatch"]
  assert len(steps) == profiling.TRACED
  assert {e["args"]["step_num"] for e in steps} == {"1", "2", "3"}


@pytest.mark.integration
def test_a_single_round_is_traced(tmp_path):
  experiment.run(quick(server__rounds="1"), tmp_path, profile=True)
  found = table_of(tmp_path)
  assert found["rounds_traced"] == found["rounds_measured"] == 1
  assert len(traces(tmp_path)) == 1


def test_a_finished_run_has_nothing_to_profile(tmp_path, capsys):
  experiment.run(quick(server__rounds="1"), tmp_path)
  experiment.run(quick(server__rounds="1"), tmp_path, profile=True)
  assert "nothing is left to profile" in capsys.readouterr().out
  assert not (tmp_path / "profile").exists()


def test_no_round_is_left(tmp_path, capsys):
  """The run ended after its last checkpoint, before its summary."""
  experiment.run(quick(server__rounds="1"), tmp_path)
  (tmp_path / "summary.json").unlink()
  experiment.run(quick(server__rounds="1"), tmp_path, profile=True)
  assert "No round was left" in capsys.readouterr().out
  assert table_of(tmp_path)["flops"] is None
  assert summary_of(tmp_path)["rounds"] == 1


@pytest.mark.slow
def test_a_resumed_run(tmp_path):
  """The summary counts all that was saved; the profile this process alone."""
  folder = tmp_path / "run"

  def stop(done):
    if done == 2:
      signal.raise_signal(signal.SIGTERM)

  with pytest.raises(signals.Interrupted):  # in the middle of a trace
    experiment.run(quick(), folder, stop, profile=True)
  assert len(traces(folder)) == 1
  assert not (folder / "profile" / "phases.json").exists()
  # No trace is left open.
  experiment.run(quick(), folder, profile=True)
  summary, found = summary_of(folder), table_of(folder)
  assert found["rounds_traced"] + found["rounds_measured"] == 10
  total = sum(summary["phase_seconds"].values())
  assert total == pytest.approx(summary["wall_seconds"])
  assert summary["phase_seconds"]["build"] > found["phase_seconds"]["build"]
  whole = tmp_path / "whole"
  experiment.run(quick(), whole)
  assert summary["params_digest"] == summary_of(whole)["params_digest"]


@pytest.mark.parametrize("name", ["start_trace", "stop_trace"])
def test_a_trace_that_fails_costs_no_run(tmp_path, monkeypatch, capsys, name):
  original = getattr(jax.profiler, name)

  def full(*args, **options):
    if name == "stop_trace":
      original()
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(jax.profiler, name, full)
  experiment.run(quick(server__rounds="6"), tmp_path, profile=True)
  err = capsys.readouterr().err
  assert err.startswith("There is no trace: ")
  assert err.count("\n") == 1
  assert summary_of(tmp_path)["rounds"] == 6
  assert table_of(tmp_path)["trace"] is None


def test_an_error_ends_the_trace(tmp_path, monkeypatch):
  def fail():
    raise ZeroDivisionError

  at(monkeypatch, simulators.Simulator, "dispatch", 2, fail)
  with pytest.raises(ZeroDivisionError):
    experiment.run(quick(), tmp_path, profile=True)
  with jax.profiler.trace(str(tmp_path / "another")):
    pass


# --- FLOP/s -------------------------------------------------------------------


def dense(batch=20, features=784, classes=10, **options):
  """Clients of two steps each."""
  data = blobs([2 * batch] * 3, features=features, classes=classes)
  task = logistic_regression(data.example_shape, data.num_classes)
  return make_simulator(
    task,
    fedavg(task, sgd(0.01), sgd(1)),
    data,
    batching=LocalBatching(batch_size=batch),
    **options,
  )


@pytest.mark.parametrize(
  ("lanes", "devices"),
  slow_but([(1, 2), (2, 1)], [(n, m) for n in (1, 2) for m in (1, 2)]),
)
def test_flops_of_a_dense_layer(devices, lanes):
  """Two products a step, x W and x^T g; lanes without a client do not count."""
  simulator = dense(devices=devices, lanes=lanes)
  state, trained = simulator.init(), Trained()
  for out in simulator.run(state, 4):
    np.testing.assert_array_equal(out.steps, [6])
    trained = trained.plus(out)
  assert trained.rounds == 4
  assert trained.clients == 12
  assert trained.examples == 4 * 3 * 40
  found = profiling.measured(simulator, trained._replace(seconds=2.0))
  expected = 4 * 6 * 4 * 20 * 784 * 10
  assert found["flops"] == pytest.approx(expected, rel=0.1)
  assert found["flops_per_second"] == found["flops"] / 2
  assert found["flops_per_second_and_device"] == found["flops"] / 2 / devices
  assert found["clients_per_second"] == 6
  assert found["examples_per_second"] == 240


@pytest.mark.parametrize("flops", [0.0, -1.0, np.nan])
def test_a_count_that_is_unknown(monkeypatch, flops):
  simulator = dense()
  real = profiling.costs.costs_of(simulator)
  given = real._replace(step_flops=np.array([flops]))
  monkeypatch.setattr(profiling.costs, "costs_of", lambda _: given)
  trained = Trained(1, 3, 120, np.array([6]), 2.0)
  found = profiling.measured(simulator, trained)
  assert found["flops"] is found["flops_per_second"] is None
  assert found["clients_per_second"] == 1.5
  lines = profiling.facts({**found, "trace": None})
  assert lines["achieved"].startswith("unknown: ")


def test_a_trace_ends_with_enough_steps(tmp_path, monkeypatch):
  monkeypatch.setattr(profiling, "MOST_STEPS", 10)
  simulator = dense()
  state = simulator.init()
  with Profile(tmp_path / "profile", Phases()) as profile:
    for i, out in enumerate(simulator.run(state, 5)):
      profile.after(out)
      if i < 4:
        profile.before(4 - i)
    assert profile.write(simulator)["rounds_traced"] == 2


# --- the command line ---------------------------------------------------------

SMOKE = f"--config={Path(__file__).parents[1]}/configs/digits_fedavg.py:smoke"


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    (["run", "--workdir=w", "--profile=3"], ["--profile=3", "no value"]),
    (["run", "--workdir=w", "--profile", "3"], ["unexpected argument '3'"]),
    (["run", "--workdir=w", "--noprofile=1"], ["--noprofile=1", "no value"]),
    (["describe", "--profile"], ["profile"]),
    (
      *(["plan", "--devices=2", "--link-gbps=1", "--flops=1", "--profile"],),
      ["profile"],
    ),
  ],
)
def test_wrong_flags(tmp_path, monkeypatch, capsys, arguments, words):
  monkeypatch.chdir(tmp_path)
  command, *rest = arguments
  assert main([command, SMOKE, *rest]) == 2
  out, err = capsys.readouterr()
  assert out == ""
  assert err.startswith("fedjax-sim: error: ")
  assert err.count("\n") == 1
  assert all(word in err for word in words), err
  assert not list(tmp_path.iterdir())


def test_list_has_no_profile(capsys):
  assert main(["list", "--profile"]) == 2
  assert "profile" in capsys.readouterr().err


def test_the_table_as_text():
  text = reporting.phases_text({"train": 3.0, "other": 1.0}, {"clients/s": "7"})
  assert text.splitlines() == [
    "phase  seconds    share",
    "train    3.000   75.0 %",
    "other    1.000   25.0 %",
    "all      4.000  100.0 %",
    "clients/s  7",
  ]
