"""Trackers in configs, and in runs: what is chosen, refused and recorded."""

import json
import os
import re
import subprocess
import sys
import types
from importlib import metadata

import pytest

from fedjax_sim import reporting
from fedjax_sim.cli import listing
from fedjax_sim.config import default_config, flags
from fedjax_sim.config.build import build_trackers
from fedjax_sim.config.completion import complete
from fedjax_sim.core import optional
from fedjax_sim.reporting.trackers import (
  TRACKERS,
  RunFacts,
  Selection,
  Tracker,
)
from fedjax_sim.run import experiment
from fedjax_sim.run import trackers as run_trackers
from fedjax_sim.run.bucket.mirror import Place
from fedjax_sim.run.report import write_report
from fedjax_sim.run.resume import warn
from fedjax_sim.run.signals import Interrupted
from fedjax_sim.simulation.dispatch import DivergedError
from test_experiment import DIGITS, quick
from workdirs import skip_pictures

pytestmark = pytest.mark.usefixtures("same_programs")

OWN = '''
import json
from fedjax_sim.reporting.trackers import Opened, Tracker

class Lines(Tracker):
  def __init__(self, file, fails):
    self.file, self.fails = file, fails
    self.place = file

  def open(self, run):
    self.path = run.folder / self.file
    facts = {"params": dict(run.params), "tags": dict(run.tags)}
    self.write(["open", {**facts, "id": run.run_id}])
    return Opened(run.run_id or run.key, run.sent)

  def send(self, rows):
    if self.fails:
      raise OSError("no such server")
    self.write(["rows", [dict(row) for row in rows]])

  def close(self, status, files):
    self.write(["close", [status, [file.name for file in files]]])

  def write(self, line):
    with self.path.open("a") as file:
      file.write(json.dumps(line) + "\\n")

def lines(file: str = "lines.txt", fails: bool = False) -> Tracker:
  """Append lines to a file."""
  return Lines(file, fails)

def none() -> Tracker:
  """Return no tracker."""
'''


@pytest.fixture
def own(tmp_path):
  path = tmp_path / "own.py"
  path.write_text(OWN)
  return f"{path}:lines"


@pytest.fixture
def fast(monkeypatch):
  skip_pictures(monkeypatch)


def lines_of(folder, kind, file="lines.txt"):
  lines = (folder / file).read_text().splitlines()
  found = [json.loads(line) for line in lines]
  return [value for name, value in found if name == kind]


# --- configs ------------------------------------------------------------------


def test_tensorboard_alone_is_the_default():
  trackers = build_trackers(complete(default_config()))
  assert [t.label for t in trackers] == ["tensorboard"]
  assert trackers[0].tracker.live


def test_trackers_are_removed_and_added():
  text = {"trackers.tensorboard": "None"}
  config = flags.overridden(default_config(), text)
  assert build_trackers(complete(config)) == []
  del (config := default_config()).trackers.tensorboard
  assert build_trackers(complete(config)) == []
  config = flags.overridden(
    default_config(),
    {
      "trackers.b.name": "tensorboard",
      "trackers.b.folder": "more/events",
      "trackers.b.metrics": "test/*, train/loss",
      "trackers.b.wait": "2",
    },
  )
  _, b = build_trackers(complete(config))[::-1]
  assert b.label == "b"
  assert b.select == Selection(("test/*", "train/loss"))
  assert b.wait == 2.0


def test_a_transform_of_a_file_is_removed():
  config = default_config()
  config.transforms.clip = {"norm": 1.0}
  config = flags.overridden(config, {"transforms.clip": "None"})
  assert complete(config).transforms.order == ()


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"mlfow.uri": "x"}, r"trackers\.mlfow\.name='mlfow' .*mean 'mlflow'"),
    ({"mlflow.url": "x"}, r"trackers\.mlflow does not.*mlflow\.uri'"),
    ({"mlflow.timeout": "0"}, r"trackers\.mlflow\.timeout=0 is out of range"),
    ({"mlflow.wait": "0"}, r"trackers\.mlflow\.wait=0\.0 is out of range"),
    ({"wandb.mode": "on"}, r"trackers\.wandb\.mode='on' is unknown"),
    ({"wandb.timeout": "0"}, r"trackers\.wandb\.timeout=0\.0 is out of range"),
    (
      {"tensorboard.folder": "../x"},
      r"tensorboard\.folder='../x' is no",
    ),
    ({"wandb.metrics": "(1,)"}, r"trackers\.wandb\.metrics=\(1,\) holds a int"),
    ({"wandb.primary_metric": "loss"}, r"primary_metric='loss' has no part"),
  ],
)
def test_what_is_refused(fields, message):
  texts = {f"trackers.{name}": text for name, text in fields.items()}
  with pytest.raises((ValueError, TypeError), match=message):
    build_trackers(complete(flags.overridden(default_config(), texts)))


@pytest.mark.parametrize(
  "uri",
  [
    "http://me:hunter2@host:5000",
    "https://hunter2@host",
    "http://me:hunter2/@x@host/path",
    "postgresql://me:hunter2@host/db",
    "postgresql:///db?user=me&password=hunter2",
    "https://host/?access_token=hunter2&x=1",
    "mssql+pyodbc:///?odbc_connect=UID%3Dme%3BPWD%3Dhunter2",
    "mysql://me:hunter 2'hunter2@host/db",
  ],
)
def test_a_password_in_a_uri_is_refused(uri, own):
  """It would be in config.json, which trackers get."""
  for fields in (
    {"trackers.mlflow.uri": uri},
    {"trackers.a.name": own, "trackers.a.file": uri},
  ):
    config = complete(flags.overridden(default_config(), fields))
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_PASSWORD") as caught:
      build_trackers(config)
    assert "hunter" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("trackers.")


def test_a_password_in_any_field_is_refused(tmp_path, own):
  """Reports and exported models have the other sections, too."""
  uri = "s3://me:hunter2@host/x.npz"
  several = quick(trackers__a__name=own)
  several.trackers.a.metrics = ("test/*", uri)
  for config, message in (
    (quick(model__initial=uri), "model.initial='s3://***@host/x.npz' holds"),
    (several, "trackers.a.metrics=('test/*', 's3://***@host/x.npz') holds"),
  ):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
      experiment.run(config, tmp_path / "run")
    assert str(caught.value).count("environment") == 1
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  "uri",
  [
    "http://host:5000/path",
    "sqlite:////home/me@work/mlflow.db",
    "databricks",
    "databricks://profile:prefix",
    "azureml://westeurope.api.azureml.ms/mlflow",
    "postgresql+psycopg2://host/db",
    "postgresql://host/db?sslmode=require",
    "mssql+pyodbc://host/db?driver=ODBC+Driver+18+for+SQL+Server",
  ],
)
def test_a_uri_without_a_password_is_taken(uri):
  texts = {"trackers.mlflow.uri": uri, "trackers.tensorboard": "None"}
  config = flags.overridden(default_config(), texts)
  (made,) = build_trackers(complete(config))
  assert made.label == "mlflow"


@pytest.mark.parametrize(
  "uri", ["file:///home/me@work/mlruns", "foo", "./mlruns", "s3://bucket/x"]
)
@pytest.mark.parametrize("name", ["uri", "MLFLOW_TRACKING_URI"])
def test_a_store_that_mlflow_refuses(uri, name, monkeypatch):
  """At the start, as the client would say so only when all is trained."""
  texts = {"trackers.mlflow.name": "mlflow"}
  if name == "uri":
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    texts["trackers.mlflow.uri"] = uri
  else:
    monkeypatch.setenv(name, uri)
  monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
  config = complete(flags.overridden(default_config(), texts))
  message = rf"{name}='{uri}' is of no store .* give sqlite:///FILE, .* server"
  with pytest.raises(ValueError, match=message) as caught:
    build_trackers(config)
  # What MLflow takes if it is asked to is not refused.
  monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
  if uri.startswith("s3:"):
    assert str(caught.value).endswith("or install the plugin of MLflow for s3.")
    knows_s3(monkeypatch)
  else:
    assert str(caught.value).endswith("or set MLFLOW_ALLOW_FILE_STORE=true.")
  assert "mlflow" in [made.label for made in build_trackers(config)]


def knows_s3(monkeypatch):
  """Let MLflow have a plugin for s3, as sagemaker-mlflow is one for arn."""
  entry = metadata.EntryPoint("s3", "plugin:store", "mlflow.tracking_store")
  monkeypatch.setattr(
    metadata, "entry_points", lambda **_: metadata.EntryPoints([entry])
  )


def test_a_folder_that_is_mlflows_default(tmp_path, monkeypatch):
  """Which it refuses when the run is under way."""
  for name in ("MLFLOW_TRACKING_URI", "MLFLOW_ALLOW_FILE_STORE"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.chdir(tmp_path)
  made = TRACKERS["mlflow"]()
  (tmp_path / "mlruns" / "0").mkdir(parents=True)
  assert TRACKERS["mlflow"]().place == made.place
  (tmp_path / "mlruns" / "0" / "meta.yaml").touch()
  message = "the folder mlruns here, .* is of no store .*ALLOW_FILE_STORE=true"
  with pytest.raises(ValueError, match=message):
    TRACKERS["mlflow"]()
  assert TRACKERS["mlflow"](uri="sqlite:///a.db").place
  monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
  assert TRACKERS["mlflow"]().place == made.place


def test_the_place_of_a_tracker(monkeypatch):
  for name in ("URI", "EXPERIMENT_NAME", "EXPERIMENT_ID"):
    variable = f"MLFLOW_{name.replace('URI', 'TRACKING_URI')}"
    monkeypatch.delenv(variable, raising=False)
  mlflow = TRACKERS["mlflow"]
  assert mlflow().place == "fedjax_sim"
  assert mlflow(uri="sqlite:///a.db").place == "sqlite:///a.db fedjax_sim"
  monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2@host")
  monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "b")
  assert mlflow().place == "http://***@host b"
  assert mlflow(experiment="c").place == "http://***@host c"
  secret = "mssql+pyodbc:///?odbc_connect=UID%3Dme%3BPWD%3Dhunter2"
  monkeypatch.setenv("MLFLOW_TRACKING_URI", secret)
  assert mlflow().place == "mssql+pyodbc:///?odbc_connect=*** b"


def test_no_warning_has_a_password(capsys):
  warn(
    "a: no answer of http://me:hunter2@host:5000/x; trackers.a.uri:"
    " 'https://hunter2@b' -> 'postgresql:///db?password=hunter2&user=me'."
  )
  assert capsys.readouterr().err == (
    "a: no answer of http://***@host:5000/x; trackers.a.uri:"
    " 'https://***@b' -> 'postgresql:///db?password=***&user=***'.\n"
  )


@pytest.mark.parametrize(
  ("run_id", "step", "warned"),
  [("", 0, False), ("", 8, True), ("theirs", 8, False)],
)
def test_wandbs_run_of_another_workdir(
  tmp_path, monkeypatch, run_id, step, warned
):
  """W&B drops rows of steps that it has, whoever sent them."""
  monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
  tracker = TRACKERS["wandb"](run_id="theirs")
  joined = types.SimpleNamespace(
    id="theirs", step=step, offline=False, config={}
  )
  monkeypatch.setattr(tracker, "_init", lambda run: joined)
  facts = RunFacts("run", tmp_path, "key", run_id, -1, 1, {}, {})
  opened = tracker.open(facts)
  assert opened[:2] == ("theirs", step - 1)
  assert ("the run theirs has rows through step 7" in opened.warning) == warned


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_missing_extra_is_named_before_anything_runs(
  name, tmp_path, monkeypatch
):
  monkeypatch.setitem(sys.modules, name, None)
  message = rf"The tracker {name} needs {name}.*'fedjax_sim\[{name}\]'"
  with pytest.raises(ImportError, match=message):
    experiment.run(quick(**{f"trackers__{name}__name": name}), tmp_path / "x")
  assert not (tmp_path / "x").exists()


def test_what_is_installed_is_not_imported():
  before = set(sys.modules)
  optional.require("this", "zen", "Nobody")  # the standard library's
  assert "this" not in sys.modules or "this" in before


def test_trackers_are_listed():
  text = listing.run(["trackers", "mlflow"])
  for field in ("uri", "experiment", "run_name", "metrics", "wait"):
    assert f"\n  trackers.mlflow.{field}: " in text
  assert set(TRACKERS) == {"mlflow", "tensorboard", "wandb"}


# --- selections ---------------------------------------------------------------


def test_patterns_choose_metrics():
  row = {"round": 1, "train/loss": 1.0, "test/loss": 2.0, "test/accuracy": 0.5}
  assert Selection()(row) == row
  assert Selection(())(row) == {"round": 1}
  chosen = Selection(("test/*",))(row)
  assert chosen == {"round": 1, "test/loss": 2.0, "test/accuracy": 0.5}
  both = Selection(("t*/loss",), "test/accuracy")(row)
  assert both == {
    "round": 1,
    "train/loss": 1.0,
    "test/loss": 2.0,
    "accuracy": 0.5,
  }
  assert Selection(("test/*",), "test/accuracy")({"round": 2}) == {"round": 2}


# --- runs ---------------------------------------------------------------------


def test_a_run_with_trackers_of_ones_own(tmp_path, fast, own):
  """Two at once; one of them has no server. The result stays the same."""
  folder = tmp_path / "run"
  summary = experiment.run(
    quick(
      trackers__tensorboard="None",
      trackers__a__name=own,
      trackers__a__metrics="test/*",
      trackers__a__primary_metric="test/accuracy",
      trackers__b__name=own,
      trackers__b__file="b.txt",
      server__rounds="8",
      server__initial_eval="True",
    ),
    folder,
  )
  assert not (folder / "events").exists()
  rows = reporting.read_metrics(folder / "metrics.jsonl")
  assert rows[0]["round"] == 0
  sent = [row for rows in lines_of(folder, "rows", "b.txt") for row in rows]
  assert sent == rows
  sent = [row for rows in lines_of(folder, "rows") for row in rows]
  assert [row["round"] for row in sent] == [0, 5, 8]
  assert sent[-1]["accuracy"] == summary["test/accuracy"]
  assert sent[-1].keys() == {"round", "accuracy", "test/accuracy", "test/loss"}
  (facts,) = lines_of(folder, "open")
  assert facts["params"]["client.batch_size"] == 8
  assert not [name for name in facts["params"] if name.startswith("trackers")]
  assert facts["tags"]["jax"]
  ((status, files),) = lines_of(folder, "close")
  assert status == "finished"
  assert {"summary.json", "config.json", "clients_unseen.csv"} <= {*files}
  records = json.loads((folder / "trackers.json").read_text())
  assert records.keys() == {"a", "b"}
  assert records["a"]["sent"] == 8
  plain = experiment.run(
    quick(server__rounds="8", server__initial_eval="True"), tmp_path / "plain"
  )
  assert plain["params_digest"] == summary["params_digest"]
  assert not (tmp_path / "plain" / "trackers.json").exists()
  assert len(os.listdir(tmp_path / "plain" / "events")) == 1


def test_a_run_resumes_with_other_trackers(tmp_path, fast, own):
  folder = tmp_path / "run"

  def stop(done):
    if done >= 8:
      raise Interrupted(15, done, folder)

  with pytest.raises(Interrupted):
    experiment.run(quick(trackers__a__name=own), folder, stop)
  assert lines_of(folder, "close") == [["killed", []]]
  experiment.run(
    quick(
      trackers__a__name=own, trackers__b__name=own, trackers__b__file="b.txt"
    ),
    folder,
  )
  rows = reporting.read_metrics(folder / "metrics.jsonl")
  for file in ("lines.txt", "b.txt"):
    sent = [row for rows in lines_of(folder, "rows", file) for row in rows]
    assert sent == rows
  records = json.loads((folder / "trackers.json").read_text())
  first, second = lines_of(folder, "open")
  assert first["id"] == ""
  assert second["id"] == records["a"]["run_id"] == records["a"]["key"]


def test_a_tracker_that_fails_is_reported(tmp_path, fast, own, capfd):
  folder = tmp_path / "run"
  config = lambda **fields: quick(
    trackers__a__name=own, trackers__a__wait="0.5", **fields
  )
  experiment.run(config(trackers__a__fails="True"), folder)
  lines = capfd.readouterr().err.splitlines()
  assert lines[-1] == (
    "a: 12 of 12 rows were not sent: no such server; they are in metrics.jsonl."
  )
  assert all("the run goes on" in line for line in lines[:-1])
  assert len(lines) <= 2
  # The same command sends what is left.
  experiment.run(config(), folder)
  sent = [row for rows in lines_of(folder, "rows") for row in rows]
  assert sent == reporting.read_metrics(folder / "metrics.jsonl")
  assert lines_of(folder, "close")[0][0] == "finished"
  assert capfd.readouterr().err == ""
  before = (folder / "lines.txt").read_bytes()
  experiment.run(config(), folder)
  assert (folder / "lines.txt").read_bytes() == before


def test_a_finished_run_needs_no_package(
  tmp_path, fast, own, monkeypatch, capfd
):
  """A tracker that is gone keeps nothing from the others."""
  folder = tmp_path / "run"
  first = experiment.run(quick(), folder)
  capfd.readouterr()
  monkeypatch.setitem(sys.modules, "mlflow", None)
  config = quick(trackers__mlflow__name="mlflow", trackers__z__name=own)
  assert experiment.run(config, folder) == first
  (line,) = capfd.readouterr().err.splitlines()
  assert line.startswith("mlflow: it gets nothing more: The tracker mlflow")
  assert "pip install 'fedjax_sim[mlflow]'" in line
  sent = [row for rows in lines_of(folder, "rows") for row in rows]
  assert sent == reporting.read_metrics(folder / "metrics.jsonl")
  # One that got everything is not asked for.
  records = json.loads((folder / "trackers.json").read_text())
  records["mlflow"] = records["z"]
  (folder / "trackers.json").write_text(json.dumps(records))
  assert experiment.run(config, folder) == first
  assert capfd.readouterr().err == ""


def test_another_place_gets_all_rows(tmp_path, fast, own):
  """Also of a finished run; what was sent elsewhere counts there alone."""
  folder = tmp_path / "run"
  config = lambda file: quick(trackers__a__name=own, trackers__a__file=file)
  records = lambda: json.loads((folder / "trackers.json").read_text())["a"]
  first = experiment.run(config("a.txt"), folder)
  before = records()
  rows = reporting.read_metrics(folder / "metrics.jsonl")
  for file in ("b.txt", "b.txt", "a.txt"):
    assert experiment.run(config(file), folder) == first
  for file in ("a.txt", "b.txt"):
    sent = [row for rows in lines_of(folder, "rows", file) for row in rows]
    assert sent == rows
    (facts,) = lines_of(folder, "open", file)
    assert facts["id"] == ""
  assert records()["place"] == "b.txt"
  assert records()["elsewhere"] == {"a.txt": before}
  assert records()["key"] != before["key"]


def test_records_of_earlier_versions_are_of_any_place(tmp_path):
  path = tmp_path / "trackers.json"
  old = {"key": "k", "run_id": "r", "sent": 3, "ended": "finished"}
  path.write_text(json.dumps({"a": old}))
  records = run_trackers._Records(path)
  assert records.finished("a", 3, "here")
  assert records.of("a", "here") == old | {"place": "here"}
  assert not run_trackers._Records(path).finished("a", 3, "there")
  assert run_trackers._Records(path).finished("a", 3)
  assert run_trackers._Records(path).finished("a", 0)
  assert not run_trackers._Records(path).finished("a", 4)


def test_no_record_has_a_password(tmp_path):
  """Whoever made the place, or wrote the record; both are the same place."""
  path = tmp_path / "trackers.json"
  here = "mssql:///?odbc_connect=PWD%3Dhunter2 b"
  old = {"key": "k", "run_id": "r", "sent": 3, "ended": "finished"}
  elsewhere = {"http://host/?sig=hunter2": {"key": "l"}}
  path.write_text(
    json.dumps({"a": old | {"place": here, "elsewhere": elsewhere}})
  )
  records = run_trackers._Records(path)
  assert records.finished("a", 3, here)
  assert records.sent("a", here) == 3
  assert records.of("a", here)["key"] == "k"
  records.change("a", {"sent": 4})
  assert "hunter2" not in path.read_text()
  assert run_trackers._Records(path).sent("a", here) == 4


def test_rows_of_more_rounds_are_sent_later(tmp_path, own):
  """Though the tracker had ended the run, of fewer rounds."""
  rows = [{"round": i, "train/loss": 1 / i} for i in range(1, 9)]
  with reporting.MetricsFile(
    tmp_path / "metrics.jsonl", keep_through=0
  ) as metrics:
    metrics.append(rows)
  record = {"key": "k", "run_id": "r", "sent": 4, "ended": "finished"}
  (tmp_path / "trackers.json").write_text(json.dumps({"a": record}))
  config = complete(quick(trackers__a__name=own))
  place = Place(tmp_path, str(tmp_path), None)
  for rounds in (8, 8, 4):
    run_trackers.deliver_rest(config, place, rounds)
  assert lines_of(tmp_path, "rows") == [rows[4:]]
  assert len(lines_of(tmp_path, "close")) == 1


def test_no_report_has_the_trackers(tmp_path, fast, own):
  """Their sections may hold what is secret."""
  folder = tmp_path / "run"
  experiment.run(
    quick(trackers__mine__name=own, trackers__mine__file="hunter2.txt"), folder
  )
  config = json.loads((folder / "config.json").read_text())
  assert config["trackers"]["mine"]["file"] == "hunter2.txt"
  # No config may have that any more.
  config["data"]["path"] = "http://me:hunter2@host"
  (folder / "config.json").write_text(json.dumps(config))
  for folders in ([folder], [folder, folder]):
    write_report(folders, tmp_path / "report.html")
    assert "hunter2" not in (tmp_path / "report.html").read_text()


def test_a_run_that_diverges_has_failed(tmp_path, own):
  with pytest.raises(DivergedError):
    experiment.run(
      quick(trackers__a__name=own, client__learning_rate="3e38"), tmp_path
    )
  assert lines_of(tmp_path, "close") == [["failed", []]]


def test_something_else_than_a_tracker(own):
  config = quick(trackers__a__name=own.replace(":lines", ":none"))
  with pytest.raises(TypeError, match=r"NoneType; .*type Tracker"):
    build_trackers(complete(config))


def test_damaged_records_begin_anew(tmp_path):
  (tmp_path / "trackers.json").write_text("{")
  records = run_trackers._Records(tmp_path / "trackers.json")
  assert len(records.of("a")["key"]) == 32
  again = run_trackers._Records(tmp_path / "trackers.json")
  assert again.of("a") == records.of("a")


def test_what_a_tracker_has_to_define():
  with pytest.raises(NotImplementedError):
    Tracker().send([])
  assert Tracker().unsent([{"round": 1}]) == [{"round": 1}]


def test_a_run_that_gets_more_rounds(tmp_path, fast, own):
  folder = tmp_path / "run"
  experiment.run(quick(trackers__a__name=own, server__rounds="8"), folder)
  experiment.run(quick(trackers__a__name=own), folder)
  rows = reporting.read_metrics(folder / "metrics.jsonl")
  assert len(rows) == 12
  sent = [row for rows in lines_of(folder, "rows") for row in rows]
  assert sent == rows
  assert [x[0] for x in lines_of(folder, "close")] == ["finished"] * 2


@pytest.mark.slow
@pytest.mark.integration
def test_only_the_first_of_several_processes_sends(tmp_path, own):
  folder = tmp_path / "run"
  subprocess.run(
    [
      *(sys.executable, "-m", "fedjax_sim", "launch", "--processes=2", "--"),
      *("run", f"--config={DIGITS}:smoke", f"--workdir={folder}"),
      f"--config.trackers.a.name={own}",
    ],
    env=os.environ | {"PYTHONPATH": str(DIGITS.parents[1])},
    check=True,
    timeout=240,
  )
  rows = reporting.read_metrics(folder / "metrics.jsonl")
  assert lines_of(folder, "rows") == [rows]
  assert len(lines_of(folder, "open")) == len(lines_of(folder, "close")) == 1
