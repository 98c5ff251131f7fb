"""The command line: what it prints, what it returns, what it leaves."""

import importlib
import json
import os
import pathlib
import pkgutil
import re
import signal
import subprocess
import sys
import warnings
from importlib.metadata import version

import pytest

import fedjax_sim
from fedjax_sim.cli.main import COMMANDS, _short_warnings, main
from fedjax_sim.core.errors import FedjaxSimError
from fedjax_sim.data.exporters import EXPORTERS
from fedjax_sim.data.importers import IMPORTERS
from fedjax_sim.distributed import mesh
from fedjax_sim.run import experiment, signals
from fedjax_sim.run import workdir as workdirs
from fedjax_sim.run.checkpoint import CheckpointError
from fedjax_sim.simulation.dispatch import DivergedError

ROOT = pathlib.Path(__file__).parents[1]
DIGITS = ROOT / "configs" / "digits_fedavg.py"
SMOKE = f"--config={DIGITS}:smoke"


@pytest.fixture(autouse=True)
def prepared(monkeypatch, tmp_path):
  """JAX is in use already, and the working folder is an empty one."""
  monkeypatch.setattr(mesh, "setup", lambda: None)
  (tmp_path / "here").mkdir()
  monkeypatch.chdir(tmp_path / "here")


@pytest.fixture
def refused(capsys, tmp_path):
  """Runs a command that must fail before anything is done; its message."""

  def call(*arguments):
    before = sorted(tmp_path.rglob("*"))
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fedjax-sim: error: ")
    assert err.count("\n") == 1
    assert len(err) < 1000
    assert sorted(tmp_path.rglob("*")) == before
    return err

  return call


@pytest.mark.parametrize(
  ("field", "words"),
  [
    ("client.learnin_rate=1", ["client.learnin_rate", "learning_rate"]),
    ("sede=1", ["'sede' is unknown", "'seed'"]),
    ("client.batch_size=0", ["client.batch_size=0", ">= 1"]),
    ("client.batch_size=many", ["client.batch_size=many", "whole number"]),
    ("server.rounds=0", ["server.rounds=0", ">= 1"]),
    ("server.clients_per_round=91", ["server.clients_per_round=91", "90"]),
    ("algorithm.name=fedvag", ["algorithm.name", "'fedavg'", "centralized"]),
    ("algorithm.name=fedadm", ["Did you mean 'fedadam'"]),
    ("model.name=logistic_regression", ["--config.model.hidden_sizes=None"]),
    ("runtime.lanes=many", ["runtime.lanes", "'auto'"]),
    ("runtime.devices=99", ["runtime.devices=99"]),
    ("data.name=npz", ["npz", "data.alpha"]),
  ],
)
def test_wrong_fields_leave_nothing(refused, field, words):
  err = refused("run", SMOKE, "--workdir=run", f"--config.{field}")
  assert all(word in err for word in words), err
  err = refused("describe", SMOKE, f"--config.{field}")
  assert all(word in err for word in words), err


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    (["run", SMOKE], ["--workdir=... is missing"]),
    (["run", SMOKE, "--workdir="], ["--workdir=... is missing"]),
    (["run", "--workdir=run"], ["--config=... is missing"]),
    (["describe"], ["--config=... is missing"]),
    (["run", SMOKE, "--workdr=run"], ["workdr", "workdir"]),
    (["run", SMOKE, "--workdir"], ["Missing value", "--workdir"]),
    (["run", SMOKE, "run"], ["unexpected argument 'run'"]),
    (["describe", SMOKE, "--workdir=run"], ["workdir"]),
    (["list", "algorithms"], ["Did you mean 'algorithm'"]),
    (["list", "--config=configs/a.py"], ["config"]),
    (["rum"], ["'rum'", "Did you mean 'run'", "describe"]),
    (
      ["run", "--config=configs/nope.py", "--workdir=run"],
      ["--config=configs/nope.py: there is no such file"],
    ),
  ],
)
def test_wrong_arguments_leave_nothing(refused, arguments, words):
  err = refused(*arguments)
  assert all(word in err for word in words), err


PLAN = {"--devices": "4", "--link-gbps": "10", "--flops": "1e9"}


@pytest.mark.parametrize(
  ("flag", "value", "words"),
  [
    ("--devices", None, ["--devices=... is missing"]),
    ("--devices", "0", ["--devices=0", "from 1 to 65536"]),
    ("--devices", "1000000", ["--devices=1000000", "from 1 to 65536"]),
    ("--devices", "2.5", ["--devices=2.5", "whole number"]),
    ("--devices", "many", ["--devices=many", "whole number"]),
    ("--link-gbps", None, ["--link-gbps=... is missing"]),
    ("--link-gbps", "0", ["--link-gbps=0", "> 0"]),
    ("--link-gbps", "inf", ["--link-gbps=inf", "finite"]),
    ("--link-gbps", "10G", ["--link-gbps=10G", "give a number"]),
    ("--host-gbps", "-1", ["--host-gbps=-1", "> 0"]),
    ("--memory-gbps", "nan", ["--memory-gbps=nan", "> 0"]),
    ("--flops", None, ["--flops=... is missing"]),
    ("--flops", "fast", ["--flops=fast", "give a number", "'measure'"]),
    ("--flops", "-1e9", ["--flops=-1", "> 0"]),
    ("--config.runtime.lanes", "auto", ["runtime.lanes", "--flops=measure"]),
    ("--config.runtime.model_devices", "1", ["runtime.model_devices=None"]),
    ("--config.client.batch_size", "0", ["client.batch_size=0"]),
    ("--cohort", "3", ["cohort"]),
  ],
)
def test_a_wrong_plan_is_named(refused, flag, value, words):
  given = {"--config": f"{DIGITS}:smoke", **PLAN, flag: value}
  err = refused("plan", *(f"{k}={v}" for k, v in given.items() if v))
  assert all(word in err for word in words), err


def test_what_is_measured_is_not_given(refused):
  given = {**PLAN, "--flops": "measure", "--memory-gbps": "100"}
  err = refused("plan", SMOKE, *(f"{k}={v}" for k, v in given.items()))
  assert "--memory-gbps=100 does not go with --flops=measure" in err


def test_a_config_that_raises(refused, tmp_path):
  path = tmp_path / "mine.py"
  path.write_text("def get_config(arg=''):\n  raise KeyError('boom')\n")
  err = refused("run", f"--config={path}", "--workdir=run")
  assert f"--config={path}, line 2: KeyError: boom" in err
  path.write_text("def get_config(\n")
  err = refused("describe", f"--config={path}")
  assert "SyntaxError" in err


def test_a_file_in_the_way(refused, tmp_path):
  (tmp_path / "file").write_text("mine")
  for workdir in (tmp_path / "file", tmp_path / "file" / "run"):
    err = refused("run", SMOKE, f"--workdir={workdir}")
    assert f"--workdir={workdir} " in err
    assert "is a file" in err or "cannot be written" in err


def test_values_may_stand_apart_and_fields_anywhere(capsys):
  arguments = [
    *("run", "--config", f"{DIGITS}:smoke", "--config.seed", "3"),
    *("--config.runtime.devices=1", "--workdir", "run"),
  ]
  assert main(arguments) == 0
  out, err = capsys.readouterr()
  assert err == ""
  assert "test/accuracy" in out
  summary = json.loads(pathlib.Path("run", "summary.json").read_text())
  assert summary["seed"] == 3
  assert summary["rounds"] == 2
  # The same once more, and with another field.
  assert main(arguments) == 0
  assert "is finished" in capsys.readouterr().out
  assert main([*arguments, "--config.seed=4"]) == 2
  assert "seed: 3 -> 4" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("error", "code"),
  [
    (DivergedError("all gone"), 1),
    (CheckpointError("disk full"), 1),
    (workdirs.WriteError("disk full"), 1),
    (workdirs.WorkdirError("in use"), 2),
    (workdirs.ConfigChangedError("other"), 2),
    (signals.Interrupted(15, 3, pathlib.Path("run")), 143),
    (signals.Interrupted(2, 3, pathlib.Path("run")), 130),
    (ImportError("install scikit-learn"), 2),
  ],
)
def test_exit_codes(monkeypatch, capsys, error, code):
  def fail(*_, **__):
    raise error

  monkeypatch.setattr(experiment, "run", fail)
  assert main(["run", SMOKE, "--workdir=run"]) == code
  out, err = capsys.readouterr()
  assert out == ""
  assert err.startswith("fedjax-sim: ")
  assert str(error) in err
  assert err.count("\n") == 1


def test_all_errors_have_one_base():
  """Of the package's own; what they specialize is a built-in error."""
  modules = pkgutil.walk_packages(fedjax_sim.__path__, "fedjax_sim.")
  found = {
    value
    for module in modules
    if not module.name.endswith("__main__")
    for value in vars(importlib.import_module(module.name)).values()
    if isinstance(value, type)
    and not value.__name__.startswith("_")
    and issubclass(value, Exception)
    and value.__module__.startswith("fedjax_sim")
  }
  assert len(found) > 12
  assert [e for e in found if not issubclass(e, FedjaxSimError)] == []
  codes = {e.__name__ for e in found if getattr(e, "exit_code", 2) == 1}
  assert codes == {
    "CheckpointError",
    "CopyError",
    "DivergedError",
    "RowsError",
    "StageError",
    "WriteError",
  }


@pytest.mark.integration
def test_a_wrong_call_is_answered_without_jax():
  """JAX takes most of a second to import."""
  calls = [
    ["bogus"],
    ["run"],
    ["run", "--workdir=run", "--config.server.rounds=1"],
    ["describe", "--bogus"],
    ["describe", f"--config={DIGITS}", "--config.sever.rounds=1"],
    ["verify"],
    ["report"],
    ["export"],
    ["flute"],
    ["flute", f"--config={DIGITS}", "--workdir=run"],
    ["launch"],
    ["data", "info"],
    ["privacy"],
    ["privacy", "bogus"],
  ]
  code = f"""
import sys
from fedjax_sim.cli.main import main
for call in {calls}:
  assert main(call) == 2, call
  assert "jax" not in sys.modules, call
"""
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
  assert done.stderr.count("fedjax-sim: error: ") == len(calls)


def test_our_own_errors_show_a_traceback(monkeypatch):
  def fail(*_, **__):
    raise ZeroDivisionError

  monkeypatch.setattr(experiment, "run", fail)
  with pytest.raises(ZeroDivisionError):
    main(["run", SMOKE, "--workdir=run"])


def test_debug_shows_a_traceback():
  wrong = "--config.client.batch_size=0"
  with pytest.raises(ValueError, match=r"client\.batch_size=0"):
    main(["--debug", "run", SMOKE, "--workdir=run", wrong])


@pytest.mark.parametrize(
  "arguments",
  [["help"], ["-h"], ["--help"], ["runs", "--help"], ["--help", "x"]],
)
def test_help(capsys, arguments):
  assert main(arguments) == 0
  out = capsys.readouterr().out
  assert all(f"fedjax-sim {name}" in out for name in COMMANDS)


@pytest.mark.parametrize(
  ("arguments", "uses"),
  [
    (["run", "-h"], 1),
    (["run", "--config=no.py", "--help"], 1),
    (["privacy", "curve", "--help"], 2),
    (["data", "import", "--help"], 2),
    (["data", "import", "--help", "--nothing"], 2),
    (["data", "--help"], 6),
    (["list", "--help"], 1),
  ],
)
def test_help_for_one_command(capsys, arguments, uses):
  assert main(arguments) == 0
  out = capsys.readouterr().out
  assert out.count("  fedjax-sim ") == uses
  assert out.startswith(f"  fedjax-sim {arguments[0]}")
  assert "--version" not in out


def test_help_names_the_formats(capsys):
  for action, formats in (("import", IMPORTERS), ("export", EXPORTERS)):
    assert main(["data", action, "--help"]) == 0
    words = re.findall(r"\w+", capsys.readouterr().out)
    assert set(formats) <= set(words)


def test_no_command_shows_help_and_fails(capsys):
  assert main([]) == 2
  assert "fedjax-sim run" in capsys.readouterr().out


def test_what_users_are_warned_of_is_a_line():
  given = ("told", UserWarning, "file.py", 1)
  with _short_warnings():
    assert warnings.formatwarning(*given) == "fedjax-sim: warning: told\n"
    other = warnings.formatwarning("told", DeprecationWarning, "file.py", 1)
  assert "file.py:1: DeprecationWarning: told" in other
  assert "file.py:1: UserWarning: told" in warnings.formatwarning(*given)


def test_describe_leaves_nothing(capsys, tmp_path):
  fields = ["--config.model.name=logistic_regression"]
  fields += ["--config.model.hidden_sizes=None", "--config.runtime.devices=1"]
  before = sorted(tmp_path.rglob("*"))
  assert main(["describe", SMOKE, *fields]) == 0
  out, err = capsys.readouterr()
  assert err == ""
  assert "650" in out
  assert sorted(tmp_path.rglob("*")) == before


LINEAR = (
  "--config.model.name=logistic_regression",
  "--config.model.hidden_sizes=None",
  "--config.runtime.devices=1",
)


def test_a_plan(capsys, tmp_path):
  before = sorted(tmp_path.rglob("*"))
  given = [f"{k}={v}" for k, v in PLAN.items()] + ["--host-gbps=100"]
  assert main(["plan", SMOKE, *LINEAR, *given]) == 0
  out, err = capsys.readouterr()
  assert err == ""
  assert sorted(tmp_path.rglob("*")) == before
  facts, head, *rows = out.split("clients  compute, s")
  assert not rows
  named = dict(line.split("  ", 1) for line in facts.splitlines() if line)
  assert named["parameters"].strip() == "650"
  assert named["devices"].strip() == "4, lanes of each: 1"
  assert named["speed of a device"].strip() == "1e+09 FLOP/s (as given)"
  links = "10 Gbit/s to the others, 100 Gbit/s to its host"
  assert named["links of a device"].strip() == links
  table, _, notes = head.partition("\n\n")
  cells = [line.split() for line in table.splitlines()[1:]]
  sizes = [20 * 10**i for i in range(5)] + [10**6]
  assert [int(row[0].replace(",", "")) for row in cells] == sizes
  seconds = [float(row[1]) for row in cells]
  assert seconds == sorted(seconds)
  assert len({row[2] for row in cells}) == 1  # what is summed does not grow
  assert "Beyond 90 clients" in notes


def test_a_plan_by_rounds_that_are_measured(capsys):
  given = [f"{k}={v}" for k, v in {**PLAN, "--flops": "measure"}.items()]
  lanes = "--config.runtime.lanes=auto"
  assert main(["plan", SMOKE, *LINEAR, lanes, *given]) == 0
  out, err = capsys.readouterr()
  assert err == ""
  assert "Gbit/s with its memory" in out
  assert "s a round beside (measured on one device here)" in out


def test_a_plan_that_no_run_could_do(capsys):
  given = [f"{k}={v}" for k, v in PLAN.items()]
  epochs = "--config.client.epochs=1000"
  assert main(["plan", SMOKE, *LINEAR, epochs, *given]) == 0
  assert "From 200,000 clients on a round has more" in capsys.readouterr().out


@pytest.mark.integration
def test_from_a_shell(tmp_path):
  """In a process of its own: one line, no traceback."""
  paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
  wrong = "--config.client.batch_size=0"
  done = subprocess.run(
    [sys.executable, "-m", "fedjax_sim", "run", SMOKE, "--workdir=run", wrong],
    cwd=tmp_path / "here",
    env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 2
  assert done.stdout == ""
  assert done.stderr == (
    "fedjax-sim: error: client.batch_size=0 is out of range; give a number"
    " >= 1.\n"
  )
  assert not os.listdir(tmp_path / "here")


def test_the_version(capsys):
  assert main(["--version"]) == 0
  assert capsys.readouterr().out == f"{version('fedjax_sim')}\n"


@pytest.mark.integration
@pytest.mark.parametrize(
  ("command", "code", "words"),
  [
    (
      "fedjax_sim list | head -1; exit ${PIPESTATUS[0]}",
      (0, 141),
      "A config names",
    ),
    (
      f"JAX_PLATFORMS=cuda fedjax_sim describe {SMOKE}",
      (2,),
      "JAX_PLATFORMS='cuda': JAX finds no such device",
    ),
  ],
)
def test_no_traceback(command, code, words):
  command = command.replace("fedjax_sim", f"{sys.executable} -m fedjax_sim")
  result = subprocess.run(
    ["bash", "-c", command],
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    check=False,
  )
  assert result.returncode in code
  assert words in result.stdout
  assert "Traceback" not in result.stdout


@pytest.mark.integration
@pytest.mark.parametrize("seconds", [0.1, 0.5])
def test_an_early_interrupt(seconds):
  """While the first imports run an exception could get lost."""
  code = (
    "import os, signal, threading\n"
    "from fedjax_sim.cli import main as cli\n"
    "kill = lambda: os.kill(os.getpid(), signal.SIGINT)\n"
    f"threading.Timer({seconds}, kill).start()\n"
    f"cli.main(['describe', {SMOKE!r}])\n"
  )
  result = subprocess.run(
    [sys.executable, "-c", code],
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode == 130
  assert result.stderr == "fedjax-sim: interrupted\n"
  assert result.stdout == ""


@pytest.mark.integration
@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_in_an_import_leaves_nothing(tmp_path, number):
  (tmp_path / "mine.py").write_text(
    "import os, signal\n"
    "def stops(client, examples):\n"
    f"  os.kill(os.getpid(), signal.{number})\n"
  )
  (tmp_path / "a.jsonl").write_text('{"client": 1, "x": 1}')
  given = ["data", "import", "--format=json_lines", "--train=a.jsonl"]
  given += ["--store=s", "--map=mine.py:stops"]
  code = (
    "import signal, sys\n"
    f"signal.signal(signal.{number}, signal.SIG_DFL)\n"  # nohup ignores it
    "from fedjax_sim.cli import main as cli\n"
    f"sys.exit(cli.main({given}))"
  )
  result = subprocess.run(
    [sys.executable, "-c", code],
    cwd=tmp_path,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode == 128 + getattr(signal, number)
  assert result.stderr == "fedjax-sim: interrupted\n"
  assert {f.name for f in tmp_path.iterdir()} <= {
    *("mine.py", "a.jsonl", "here", "__pycache__")
  }


def test_memory_that_runs_out_is_one_line(monkeypatch, capsys):
  def fails(arguments):
    raise MemoryError("a.h5: memory ran out")

  monkeypatch.setitem(COMMANDS, "list", fails)
  assert main(["list"]) == 2
  assert capsys.readouterr().err == "fedjax-sim: error: a.h5: memory ran out\n"
