"""Studies: rows are single runs, kills lose nothing, the worst end."""

import json
import pathlib
import shutil
import signal

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

import fedjax_sim as fs
from fedjax_sim.cli.main import main
from fedjax_sim.config import flags
from fedjax_sim.config.flags import UsageError
from fedjax_sim.core.validate import UnknownNameError
from fedjax_sim.reporting import read_metrics
from fedjax_sim.run import experiment
from fedjax_sim.run.workdir import WorkdirError
from fedjax_sim.studies import execution
from fedjax_sim.studies import folder as folders
from fedjax_sim.studies.program import StudyProgram
from fedjax_sim.studies.runs import StudyError
from fedjax_sim.studies.study import predict
from fedjax_sim.studies.training import Trainer
from workdirs import skip_pictures

DIGITS = pathlib.Path(__file__).parents[2] / "configs" / "digits_fedavg.py"
QUICK = {
  "model.name": "logistic_regression",
  "model.hidden_sizes": "None",
  "data.num_clients": "12",
  "data.unseen_clients": "2",
  "server.clients_per_round": "4",
  "server.rounds": "4",
  "server.eval_every": "2",
  "client.epochs": "1",
  "runtime.checkpoint_every": "2",
  "runtime.rounds_per_dispatch": "2",
}
RATES = {"client.learning_rate": "0.05,0.2"}


@pytest.fixture(autouse=True)
def fast(monkeypatch):
  """Drawing takes longer than a quick run."""
  skip_pictures(monkeypatch)


def config(**changes):
  named = {field.replace("__", "."): text for field, text in changes.items()}
  return flags.load(str(DIGITS), QUICK | named)


@pytest.fixture(scope="module")
def rates(tmp_path_factory):
  """The folder of a finished study of two rates and two seeds."""
  folder = tmp_path_factory.mktemp("study") / "rates"
  fs.study(config(), folder, vary=RATES, seeds=2)
  return folder


def rows_of(folder, name):
  return read_metrics(folder / "runs" / name / "metrics.jsonl")


def alone(folder, name, workdir):
  """Run the config of a study's run by itself."""
  own = ConfigDict(
    json.loads((folder / "runs" / name / "config.json").read_bytes())
  )
  experiment.run(own, workdir)
  return read_metrics(workdir / "metrics.jsonl")


def assert_rows_equal(found, expected, rtol=1e-5):
  assert [row.keys() for row in found] == [row.keys() for row in expected]
  for row, other in zip(found, expected, strict=True):
    np.testing.assert_allclose(
      list(row.values()), list(other.values()), rtol=rtol, atol=1e-5
    )


def test_a_row_is_its_single_run(rates, tmp_path):
  found = json.loads((rates / "study.json").read_bytes())
  assert [(r["point"], r["seed"], r["status"]) for r in found["runs"]] == [
    ({"client.learning_rate": rate}, seed, "finished")
    for rate in ("0.05", "0.2")
    for seed in (0, 1)
  ]
  assert {r["program"] for r in found["runs"]} == {0}
  expected = alone(rates, "003", tmp_path / "single")
  assert_rows_equal(rows_of(rates, "003"), expected)
  row, single = fs.load(rates, run="003"), fs.load(tmp_path / "single")
  assert row.round == single.round == 4
  for a, b in zip(
    jax.tree.leaves(row.params), jax.tree.leaves(single.params), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  assert row.summary is not None
  assert single.summary is not None
  assert row.summary["parameters"] == single.summary["parameters"]


def test_a_run_is_opened_by_name_or_number(rates):
  assert fs.load(rates, run=3).config.client.learning_rate == 0.2
  with pytest.raises(UnknownNameError, match="run='9'"):
    fs.load(rates, run="9")
  with pytest.raises(WorkdirError, match="holds a study of 4 runs"):
    fs.load(rates)
  with pytest.raises(WorkdirError, match="keeps the last model"):
    fs.load(rates, 2, run=0)
  with pytest.raises(WorkdirError, match="holds no study"):
    fs.load(rates / "runs" / "000", run=0)


def test_the_table_has_a_line_a_run(rates, capsys):
  lines = (rates / "study.csv").read_text().splitlines()
  assert len(lines) == 5
  assert lines[0].startswith("run,client.learning_rate,seed,status,rounds,")
  study = fs.study(config(), rates, vary=RATES, seeds=2)  # is finished
  best, worst = study.settings()
  assert best["mean"] >= worst["mean"]
  values = [rows_of(rates, n)[-1]["test/accuracy"] for n in ("000", "001")]
  (row,) = [r for r in (best, worst) if r["client.learning_rate"] == "0.05"]
  np.testing.assert_allclose(row["mean"], np.mean(values))
  np.testing.assert_allclose(row["std"], np.std(values, ddof=1))
  assert "About" not in capsys.readouterr().out  # nothing was compiled


@pytest.mark.parametrize(
  ("algorithm", "more"),
  [
    ("scaffold", {}),
    *(
      pytest.param(name, more, marks=pytest.mark.slow)
      for name, more in (
        ("apfl", {}),
        ("dga", {}),
        ("dga_rl", {"aggregator__name": "stack", "data__server_clients": "2"}),
        ("ditto", {}),
        ("fedbuff", {}),
        ("fednova", {}),
        ("fedprox", {}),
        ("mime_lite", {}),
        ("per_fedavg", {}),
        ("reptile", {}),
        (
          "fedavg",
          {
            "server__best_metrics": "test/accuracy",
            "server__revert_to_best": "True",
            "client__schedule": "plateau(metric='test/loss')",
          },
        ),
        (
          "fedavg",
          {
            "privacy__mechanism": "gaussian",
            "privacy__clip_norm": "1.0",
            "privacy__delta": "1e-3",
            "privacy__noise_multiplier": "2.0",
            "privacy__noise_seed": "1",
            "sampler__name": "poisson",
          },
        ),
        ("fedavg", {"aggregator__name": "median"}),
        (
          "fedavg",
          {
            "transforms__q__name": "quantize",
            "transforms__q__sparsity": "0.5",
          },
        ),
        ("fedavg", {"server__initial_eval": "True", "seed": "7"}),
      )
    ),
  ],
)
def test_rows_of_any_algorithm_are_their_single_runs(algorithm, more, tmp_path):
  changes = {"algorithm__name": algorithm, **more}
  fs.study(config(**changes), tmp_path / "study", vary=RATES, seeds=2)
  expected = alone(tmp_path / "study", "003", tmp_path / "single")
  assert_rows_equal(rows_of(tmp_path / "study", "003"), expected)


def killed_after(monkeypatch, saves):
  """Let a study die, as if killed, once it has begun so many checkpoints."""
  save = Trainer.save

  def die(trainer):
    before = trainer.saves
    save(trainer)
    if before < trainer.saves == saves:
      trainer.folder.wait()
      raise KeyboardInterrupt

  monkeypatch.setattr(Trainer, "save", die)


@pytest.mark.parametrize("saves", [1, 2])
def test_a_killed_study_goes_on_bit_for_bit(
  rates, tmp_path, monkeypatch, saves
):
  folder = tmp_path / "killed"
  with monkeypatch.context() as patch:
    killed_after(patch, saves)
    with pytest.raises(KeyboardInterrupt):
      fs.study(config(), folder, vary=RATES, seeds=2)
  # As if rows of later rounds had been written before the kill.
  with (folder / "runs" / "000" / "metrics.jsonl").open("a") as file:
    file.write('{"round": 9, "to')
  fs.study(config(), folder, vary=RATES, seeds=2)
  for name in ("000", "001", "002", "003"):
    metrics = pathlib.Path("runs") / name / "metrics.jsonl"
    assert (folder / metrics).read_bytes() == (rates / metrics).read_bytes()
  assert (folder / "study.csv").read_bytes() == (
    rates / "study.csv"
  ).read_bytes()


def test_a_signal_leaves_a_checkpoint(tmp_path, monkeypatch):
  calls = []
  call = Trainer.predicted

  def predicted(trainer):
    calls.append(1)
    signal.raise_signal(signal.SIGTERM)
    return call(trainer)

  monkeypatch.setattr(Trainer, "predicted", predicted)
  with pytest.raises(folders.StudyInterrupted, match="SIGTERM") as stopped:
    fs.study(config(), tmp_path / "study", vary=RATES)
  assert stopped.value.exit_code == 143
  assert folders.read_study(tmp_path / "study") is not None


def test_halving_counts_who_is_left(tmp_path, capsys):
  # Those that diverge at once are the worst, and are not counted again.
  rates = "1e38,2e38,3e38,0.1,0.2,0.3,0.4,0.5,0.6"
  changed = config(server__rounds="8")
  vary = {"client.learning_rate": rates}
  fs.study(changed, tmp_path / "study", vary=vary, halving=3)
  said = capsys.readouterr().out
  assert "Round 2: 3 of 9 settings go on" in said
  assert "Round 4: 1 of 3 settings go on" in said
  again = fs.study(changed, tmp_path / "study", vary=vary, halving=3)
  assert "Round 4: 1 of 3 settings go on" in capsys.readouterr().out
  counts = [r["status"] for r in again.runs].count
  assert [counts(s) for s in ("finished", "diverged", "ended")] == [1, 3, 5]


def test_halving_ends_the_worst(tmp_path, capsys):
  # While rates are small, the loss falls with them after any round.
  vary = {"client.learning_rate": "0.0001,0.001,0.01"}
  study = fs.study(
    config(),
    tmp_path / "study",
    vary=vary,
    seeds=2,
    halving=3,
    metric="test/loss",
  )
  status = [(r["status"], r["rounds"]) for r in study.runs]
  assert status == [("ended", 2)] * 4 + [("finished", 4)] * 2
  assert "1 of 3 settings go on" in capsys.readouterr().out
  assert study.settings()[0]["client.learning_rate"] == "0.01"
  summaries = sorted(tmp_path.glob("study/runs/*/summary.json"))
  assert [path.parent.name for path in summaries] == ["004", "005"]


def test_seeds_come_once(tmp_path):
  with pytest.raises(UsageError, match="each seed once"):
    fs.study(config(), tmp_path / "study", vary=RATES, seeds=[1, 1])


def test_a_diverging_run_ends_alone(tmp_path):
  vary = {"client.learning_rate": "0.1,1e38"}
  study = fs.study(config(), tmp_path / "study", vary=vary)
  assert fs.load(tmp_path / "study", run=1).round <= study.runs[1]["rounds"]
  fine, wild = study.runs
  assert (fine["status"], wild["status"]) == ("finished", "diverged")
  assert "not finite" in wild["reason"]
  assert wild["rounds"] < 4


def test_runs_that_are_no_rows_go_one_by_one(tmp_path, capsys):
  changed = config(server__client_log="True", server__rounds="2")
  study = fs.study(changed, tmp_path / "study", vary=RATES)
  assert [r["status"] for r in study.runs] == ["finished"] * 2
  assert "one by one: server.client_log=True" in capsys.readouterr().out
  assert fs.load(tmp_path / "study", run=1).round == 2


def test_more_programs_than_a_process_has_room_for(
  tmp_path, capsys, monkeypatch
):
  """They are compiled, trained and given up one after the other."""
  vary = {"client.epochs": "1,2"}
  fs.study(config(), tmp_path / "both", vary=vary)
  monkeypatch.setattr(execution, "MOST_COMPILED", 1)
  held = []
  release = StudyProgram.release

  def seen(program):
    release(program)
    held.append(len(program._compiled))

  monkeypatch.setattr(StudyProgram, "release", seen)
  capsys.readouterr()
  study = fs.study(config(), tmp_path / "each", vary=vary)
  assert "1 more program, 1 at a time" in capsys.readouterr().out
  assert held == [0, 0]
  assert [r["status"] for r in study.runs] == ["finished"] * 2
  for name in ("000", "001"):
    assert rows_of(tmp_path / "each", name) == rows_of(tmp_path / "both", name)


def test_runs_of_fewer_rounds_keep_their_models(tmp_path):
  vary = {"server.rounds": "2,4"}
  fs.study(config(), tmp_path / "study", vary=vary)
  expected = alone(tmp_path / "study", "000", tmp_path / "single")
  assert_rows_equal(rows_of(tmp_path / "study", "000"), expected)
  run, single = fs.load(tmp_path / "study", run=0), fs.load(tmp_path / "single")
  assert run.round == single.round == 2
  for a, b in zip(
    jax.tree.leaves(run.params), jax.tree.leaves(single.params), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


PRIVATE = {
  "privacy__mechanism": "gaussian",
  "privacy__delta": "1e-3",
  "privacy__noise_seed": "1",
}


def test_no_row_goes_beyond_its_budget(tmp_path, capsys):
  changed = config(
    **PRIVATE, privacy__clip_norm="1.0", privacy__noise_multiplier="2.0"
  )
  vary = {"privacy.target_epsilon": "2.5,20.0"}
  study = fs.study(changed, tmp_path / "study", vary=vary)
  short, long = study.runs
  assert 0 < short["rounds"] < long["rounds"] == 4
  assert {r["program"] for r in study.runs} == {0}
  run = fs.load(tmp_path / "study", run=0)
  assert run.summary is not None
  assert run.round == short["rounds"] == run.summary["rounds"]
  assert run.metrics["privacy/epsilon"][-1] <= 2.5
  assert "none for several of them together" in capsys.readouterr().err
  kept = json.loads((tmp_path / "study/runs/000/privacy.json").read_bytes())
  assert kept["rounds"] == short["rounds"]


def test_rows_with_other_noise_have_their_own_epsilon(tmp_path):
  vary = {
    "privacy.noise_multiplier": "1.0,4.0",
    "privacy.clip_norm": "0.5,2.0",
  }
  numbers = {"privacy__clip_norm": "1.0", "privacy__noise_multiplier": "1.0"}
  changed = config(**PRIVATE, **numbers)
  study = fs.study(changed, tmp_path / "study", vary=vary)
  assert {r["program"] for r in study.runs} == {0}
  expected = alone(tmp_path / "study", "003", tmp_path / "single")
  assert_rows_equal(rows_of(tmp_path / "study", "003"), expected)
  epsilons = [
    rows_of(tmp_path / "study", n)[-1]["privacy/epsilon"]
    for n in ("000", "001", "002", "003")
  ]
  assert epsilons[0] == epsilons[1] > epsilons[2] == epsilons[3]


def test_a_chunk_is_kept_over_a_kill(rates, tmp_path, monkeypatch):
  folder = tmp_path / "killed"
  with monkeypatch.context() as patch:
    patch.setattr(Trainer, "__post_init__", lambda t: setattr(t, "chunk", 3))
    killed_after(patch, 1)
    with pytest.raises(KeyboardInterrupt):
      fs.study(config(), folder, vary=RATES, seeds=2)
  found = fs.study(config(), folder, vary=RATES, seeds=2)
  assert {r["status"] for r in found.runs} == {"finished"}
  for name in ("000", "003"):
    assert_rows_equal(rows_of(folder, name), rows_of(rates, name))


STATIC = """
from fedjax_sim.algorithms.fedavg import fedavg


def own(task, client_optimizer, server_optimizer, *, shrink: float = 1.0):
  \"\"\"Reads its number while it is traced, where nobody sees it.\"\"\"
  base = fedavg(task, client_optimizer, server_optimizer)
  hparams = {**base.hparams, "shrink": shrink}
  made = base._replace(hparams=hparams)
  held = [made]

  def apply(state, aggregate, context):
    factor = held[0].hparams["shrink"]
    scaled = jax.tree.map(lambda x: factor * x, aggregate.update)
    return base.apply(state, aggregate._replace(update=scaled), context)

  return made._replace(apply=apply)


import jax
"""


def test_numbers_that_code_reads_make_programs_of_their_own(tmp_path):
  (tmp_path / "mine.py").write_text(STATIC)
  changed = config(algorithm__name=f"{tmp_path}/mine.py:own")
  vary = {"algorithm.shrink": "1.0,0.01"}
  study = fs.study(changed, tmp_path / "study", vary=vary)
  assert [r["program"] for r in study.runs] == [0, 1]
  losses = [
    rows_of(tmp_path / "study", n)[-1]["test/loss"] for n in ("000", "001")
  ]
  assert losses[0] < losses[1]


def test_what_is_no_row_keeps_its_devices(tmp_path):
  changed = config(runtime__devices="2", runtime__model_devices="2")
  study = fs.study(changed, tmp_path / "study", vary=RATES)
  assert [r["status"] for r in study.runs] == ["finished"] * 2
  run = fs.load(tmp_path / "study", run=0)
  assert run.config.runtime.model_devices == 2


def test_the_plan_runs_nothing(capsys):
  before = sorted(pathlib.Path().iterdir())
  predict(config(), vary=RATES, seeds=3)
  said = capsys.readouterr().out
  assert sorted(pathlib.Path().iterdir()) == before
  assert "6 runs: 2 settings x 3 seeds, 4 rounds each" in said
  assert "MB a device" in said
  assert "s of training" in said


@pytest.mark.parametrize(
  ("vary", "told"),
  [
    ({"client.lerning_rate": "1,2"}, "learning_rate"),
    ({"client.learning_rate": "0.1,-1"}, "client.learning_rate=-1"),
    ({"algorithm.name": "fedavg,fedprocs"}, "fedprox"),
    ({"seed": "1,2"}, "--seeds"),
    ({"server.client_log": "True,False"}, "is none: server.client_log=True"),
  ],
)
def test_what_is_refused_is_named_before_anything_runs(tmp_path, vary, told):
  with pytest.raises((UsageError, StudyError, UnknownNameError), match=told):
    fs.study(config(), tmp_path / "study", vary=vary, halving=2)
  assert not (tmp_path / "study").exists()


def test_points_that_are_the_same_are_said(capsys):
  vary = {"client.learning_rate": "0.1,0.10"}
  predict(config(), vary=vary)
  said = capsys.readouterr()
  assert "are the same config" in said.err
  assert "1 run: 1 setting x 1 seed" in said.out


def test_an_unknown_metric_is_refused(tmp_path):
  with pytest.raises(StudyError, match="--metric=test/acuracy.*test/accuracy"):
    fs.study(config(), tmp_path / "study", vary=RATES, metric="test/acuracy")


def test_settings_that_take_other_fields_are_listed(tmp_path, capsys):
  points = tmp_path / "points.csv"
  points.write_text("algorithm.name,algorithm.mu\nfedavg,\nfedprox,0.1\n")
  arguments = [f"--config.{k}={v}" for k, v in QUICK.items()]
  command = ["study", f"--config={DIGITS}", f"--points={points}", "--plan"]
  assert main([*command, *arguments]) == 0
  assert "2 runs: 2 settings" in capsys.readouterr().out
  vary = {"algorithm.name": "fedavg,fedprox", "algorithm.mu": "0.1,1.0"}
  with pytest.raises(StudyError, match="list them by --points"):
    predict(config(), vary=vary)


def test_the_config_of_a_run_runs_by_itself(rates, tmp_path, capsys):
  stored = rates / "runs" / "002" / "config.json"
  assert main(["run", f"--config={stored}", f"--workdir={tmp_path}/r"]) == 0
  found = read_metrics(tmp_path / "r" / "metrics.jsonl")
  assert_rows_equal(rows_of(rates, "002"), found)
  broken = tmp_path / "x.json"
  broken.write_text("{}")
  capsys.readouterr()
  assert main(["run", f"--config={broken}", f"--workdir={tmp_path}/s"]) == 2
  assert "holds no config of a run" in capsys.readouterr().err


def test_the_folder_of_a_study_is_no_workdir(rates, tmp_path):
  with pytest.raises(WorkdirError, match="holds a study"):
    experiment.run(config(), rates)
  with pytest.raises(WorkdirError, match=r"fs\.load\(.*run='001'\)"):
    fs.load(rates / "runs" / "001")
  (tmp_path / "notes.txt").write_text("mine")
  with pytest.raises(WorkdirError, match=r"other files, such as notes\.txt"):
    fs.study(config(), tmp_path, vary=RATES)


def test_a_finished_study_of_several_programs_writes_nothing(tmp_path):
  changed = config(server__rounds="2", runtime__checkpoint_every="1")
  vary = {"algorithm.name": "fedavg,fedprox"}
  fs.study(changed, tmp_path / "s", vary=vary)
  stamp = lambda: {
    p: p.stat().st_mtime_ns for p in (tmp_path / "s/programs").rglob("*")
  }
  before = stamp()
  fs.study(changed, tmp_path / "s", vary=vary)
  assert stamp() == before


def test_a_folder_of_something_else_is_refused(rates, tmp_path, capsys):
  with pytest.raises(WorkdirError, match="holds another study: seeds differ"):
    fs.study(config(), rates, vary=RATES, seeds=3)
  with pytest.raises(WorkdirError, match="holds a run"):
    fs.study(config(), rates / "runs" / "000", vary=RATES)
  with (
    folders.held(rates),
    pytest.raises(WorkdirError, match="--studydir=.*in use"),
  ):
    fs.study(config(), rates, vary=RATES, seeds=2)


def test_data_that_changed_are_refused(rates, tmp_path, monkeypatch):
  copy = tmp_path / "copy"
  shutil.copytree(rates, copy)
  monkeypatch.setattr(
    "fedjax_sim.studies.execution.data_digest", lambda simulator: "other"
  )
  with pytest.raises(WorkdirError, match="training data are not those"):
    fs.study(config(), copy, vary=RATES, seeds=2)


def test_the_command(tmp_path, capsys):
  arguments = [f"--config.{k}={v}" for k, v in QUICK.items()]
  done = main(
    [
      "study",
      f"--config={DIGITS}",
      f"--studydir={tmp_path / 's'}",
      "--vary",
      "client.learning_rate=0.1,0.3",
      "--vary=config.server.momentum=linear(0.0,0.9,2)",
      "--seeds=1",
      "--config.server.rounds=2",
      *arguments,
      "--plan",
    ]
  )
  assert done == 0
  assert "4 runs: 4 settings x 1 seed" in capsys.readouterr().out
  for wrong in ("--vary", "--vary=x", "--seeds=x", "--random=x", "--halving=1"):
    assert main(["study", f"--config={DIGITS}", "--studydir=s", wrong]) == 2
  assert not pathlib.Path("s").exists()


def test_a_study_in_a_file(tmp_path, capsys):
  file = tmp_path / "study.py"
  text = (
    "from fedjax_sim.config import flags\n\n\n"
    "def get_config():\n"
    f"  return flags.load({str(DIGITS)!r}, {QUICK!r})\n\n\n"
    "def get_study():\n"
    "  return {'vary': {'server.momentum': (0.0, 0.5, 0.9)}, 'seeds': 2}\n"
  )
  file.write_text(text)
  assert main(["study", f"--config={file}", "--plan"]) == 0
  assert "6 runs: 3 settings x 2 seeds" in capsys.readouterr().out
  assert main(["study", f"--config={file}", "--plan", "--seeds=1"]) == 0
  assert "3 runs: 3 settings x 1 seed" in capsys.readouterr().out
  file.write_text(text.replace("'seeds'", "'seedz'"))
  assert main(["study", f"--config={file}", "--plan"]) == 2
  assert "Did you mean 'seeds'?" in capsys.readouterr().err
  assert main(["study", f"--config={DIGITS}"]) == 2
  assert "--studydir=... is missing" in capsys.readouterr().err
