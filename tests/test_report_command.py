"""`fedjax-sim report`: its files, its refusals, and a run that goes on."""

import fcntl
import json
import pathlib

import pytest

from fedjax_sim.cli.main import main
from fedjax_sim.config import flags, nondefault
from fedjax_sim.run import experiment
from fedjax_sim.run.workdir import locked

DIGITS = pathlib.Path(__file__).parents[1] / "configs" / "digits_fedavg.py"
QUICK = {
  "model.name": "logistic_regression",
  "model.hidden_sizes": "None",
  "data.num_clients": "20",
  "data.unseen_clients": "2",
  "data.heldout_fraction": "0.2",
  "server.clients_per_round": "6",
  "server.rounds": "4",
  "server.eval_every": "2",
  "client.epochs": "1",
  "runtime.devices": "1",
}


class StopError(Exception):
  """Ends a run early."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """A finished run, one of another algorithm, and one that stopped."""
  folder = tmp_path_factory.mktemp("runs")

  def stop(done):
    if done >= 2:
      raise StopError

  experiment.run(flags.load(str(DIGITS), QUICK), folder / "fedavg")
  prox = QUICK | {"algorithm.name": "fedprox", "algorithm.mu": "1.0"}
  experiment.run(flags.load(str(DIGITS), prox), folder / "fedprox")
  with pytest.raises(StopError):
    experiment.run(flags.load(str(DIGITS), QUICK), folder / "stopped", stop)
  return folder


def contents(folder):
  return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.integration
def test_the_command_writes_what_the_run_wrote(runs, tmp_path, capsys):
  before = contents(runs)
  path = tmp_path / "again.html"
  assert main(["report", f"--workdir={runs}/fedavg", f"--to={path}"]) == 0
  assert capsys.readouterr() == (f"{path}\n", "")
  assert path.read_bytes() == (runs / "fedavg" / "report.html").read_bytes()
  assert contents(runs) == before


@pytest.mark.integration
def test_a_report_repeats_its_run(runs, tmp_path):
  """Its config file gives the same digest of the parameters."""
  tree = json.loads((runs / "fedavg" / "config.json").read_text())
  file = tmp_path / "repeat.py"
  file.write_text(nondefault.config_file(tree))
  summary = experiment.run(flags.load(str(file)), tmp_path / "again")
  first = json.loads((runs / "fedavg" / "summary.json").read_text())
  assert summary["params_digest"] == first["params_digest"]


@pytest.mark.integration
def test_a_run_that_goes_on_is_reported(runs, tmp_path, capsys):
  """While another process holds its lock."""
  folder = runs / "stopped"
  with locked(folder):
    assert main(["report", f"--workdir={folder}"]) == 0
  path = folder / "report.html"
  assert capsys.readouterr() == (f"{path}\n", "")
  assert "Not finished: 2 of 4 rounds are done." in path.read_text()
  path.unlink()
  with (folder / ".lock").open("w") as lock:  # it was let go
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.integration
def test_several_runs_and_papers(runs, tmp_path, capsys):
  three = [f"--workdir={runs}/{n}" for n in ("fedavg", "fedprox", "stopped")]
  page = tmp_path / "all.html"
  assert main(["report", *three, f"--to={page}"]) == 0
  text = page.read_text()
  assert "<title>3 runs compared</title>" in text
  assert "fedprox" in text
  paper = tmp_path / "curves.pdf"
  command = ["report", *three, "--style=paper", f"--to={paper}"]
  assert main([*command, "--metrics=test/accuracy"]) == 0
  assert paper.read_bytes().startswith(b"%PDF")
  assert capsys.readouterr() == (f"{page}\n{paper}\n", "")
  assert main([*command, "--metrics=test/accurate"]) == 2
  assert "Did you mean 'test/accuracy'?" in capsys.readouterr().err


@pytest.mark.integration
def test_another_version_is_said(runs, tmp_path, capsys):
  tree = json.loads((runs / "fedavg" / "config.json").read_text())
  del tree["leakage"]
  (tmp_path / "config.json").write_text(json.dumps(tree))
  (tmp_path / "metrics.jsonl").touch()
  assert main(["report", f"--workdir={tmp_path}"]) == 0
  err = capsys.readouterr().err
  assert "was begun by another version of fedjax_sim" in err
  assert err.count("\n") == 1


@pytest.mark.parametrize(
  ("arguments", "said"),
  [
    ([], "--workdir=... is missing"),
    (["--workdir=a", "--workdir=./a"], "--workdir=a is given twice"),
    (["--workdir=a", "--workdir=b"], "--to=... is missing; name the file"),
    (["--workdir=a", "--to=a.pdf"], "end in .html, or give --style=paper."),
    (
      ["--workdir=a", "--to=a.html", "--style=paper"],
      "end in .pdf or .svg or .png, or give --style=page.",
    ),
    (["--workdir=a", "--to=a.txt"], "let its name end in .html."),
    (["--workdir=a", "--style=book"], "--style='book' is unknown"),
    (["--workdir=a", "--metrics=b"], "--metrics=b is for --style=paper"),
    (["--workdir=missing/a"], "--workdir=missing/a: there is no such folder."),
    (
      ["--workdir=s3://b/run"],
      "--workdir=s3://b/run is a URL, which only run takes",
    ),
    (["a"], "unexpected argument 'a'"),
  ],
)
def test_what_is_wrong_with_the_flags(
  arguments, said, capsys, monkeypatch, tmp_path
):
  monkeypatch.chdir(tmp_path)
  assert main(["report", *arguments]) == 2
  out, err = capsys.readouterr()
  assert out == ""
  assert said in err
  assert err.count("\n") == 1
  assert not [*tmp_path.iterdir()]
