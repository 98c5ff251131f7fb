"""`fedjax-sim privacy`: its answers, its files, its refusals."""

import csv
import pathlib
import re
import shlex

import pytest

from fedjax_sim.cli.main import main
from fedjax_sim.core import PrivacySpec
from fedjax_sim.privacy.accounting import Ledger
from fedjax_sim.sampling import (
  Participation,
  cyclic_poisson,
  poisson,
  uniform,
)
from tiers import slow_but

DOCUMENT = pathlib.Path(__file__).parents[2] / "docs" / "privacy_accounting.md"
TEXT = DOCUMENT.read_text()
COMMANDS = re.findall(r"```sh\n(.*?)```\n\n```text\n(.*?)```", TEXT, re.S)
GIVEN = {
  "--population": "1000",
  "--clients-per-round": "50",
  "--rounds": "30",
  "--delta": "1e-5",
}


def promised(sampler) -> Participation:
  assert sampler.participation is not None
  return sampler.participation


@pytest.fixture
def say(capsys):
  """Runs a question; what it prints."""

  def call(action, **changes):
    assert main(["privacy", action, *words_of(changes)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out

  return call


@pytest.fixture
def refused(capsys, tmp_path, monkeypatch):
  """Asks what must be refused before anything is done; the message."""
  monkeypatch.chdir(tmp_path)

  def call(*arguments):
    assert main(["privacy", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fedjax-sim: error: ")
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())
    return err

  return call


def words_of(changes):
  named = {f"--{k.replace('_', '-')}": v for k, v in changes.items()}
  given = GIVEN | named
  return [f"{k}={v}" for k, v in given.items() if v is not None]


def facts(out):
  lines = [line.split("  ", 1) for line in out.splitlines() if "  " in line]
  return {name: value.strip() for name, value in lines}


def test_epsilon(say):
  told = facts(say("epsilon", noise_multiplier=1.2))
  ledger = Ledger(
    PrivacySpec("gaussian", 1.2), promised(poisson(1000, 50)), 1e-5
  )
  assert float(told["epsilon"]) == pytest.approx(ledger.epsilon(30), rel=1e-3)
  assert told["guarantee"] == ledger.describe(30)
  assert told["clients a round"] == "50 of 1,000"
  assert told["noise on the mean"] == "0.024 times the clip norm"


def test_kinds(say):
  kinds = {"sampling": "uniform", "accountant": "rdp"}
  told = facts(say("epsilon", noise_multiplier=1.2, **kinds))
  ledger = Ledger(
    PrivacySpec("gaussian", 1.2), promised(uniform(1000, 50)), 1e-5, "rdp"
  )
  assert told["guarantee"] == ledger.describe(30)
  told = facts(say("epsilon", noise_multiplier=0, noise="laplace"))
  assert told["epsilon"] == "inf"


def test_samplers_of_groups(say):
  told = facts(
    say(
      "epsilon",
      noise_multiplier=1.2,
      sampling="cyclic_poisson",
      sampling_groups=4,
    )
  )
  promise = promised(cyclic_poisson(1000, 50, 4))
  ledger = Ledger(PrivacySpec("gaussian", 1.2), promise, 1e-5)
  assert told["guarantee"] == ledger.describe(30)
  turns = {"sampling": "cyclic", "clients_per_round": 600}
  told = facts(say("epsilon", noise_multiplier=1, **turns))
  assert told["noise on the mean"] == "0.002 times the clip norm"  # 500 each


@pytest.mark.slow
def test_a_curve_of_groups(say, tmp_path):
  groups = {"sampling": "cyclic_poisson", "sampling_groups": 10}
  say("curve", out=tmp_path, noise_multiplier=1, **groups)
  with (tmp_path / "privacy.csv").open(newline="") as file:
    rows = [r for r in csv.DictReader(file) if r["curve"] == "cohorts"]
  assert max(int(row["clients_per_round"]) for row in rows) == 100


def test_delta_is_told_in_full(say):
  told = facts(say("epsilon", noise_multiplier=1, delta=0.00010049))
  assert "0.00010049)-DP" in told["guarantee"]


@pytest.mark.parametrize(
  ("missing", "row", "given"),
  [
    ("noise-multiplier", "noise multiplier", {}),
    ("rounds", "rounds", {"noise_multiplier": 1, "rounds": None}),
    (
      "clients-per-round",
      "clients a round",
      {"noise_multiplier": 1, "clients_per_round": None},
    ),
  ],
)
def test_calibrate_finds_what_is_left_out(say, missing, row, given):
  told = facts(say("calibrate", epsilon=1.5, **given))
  assert 0.9 * 1.5 < float(told["epsilon"]) <= 1.5
  found = float(told[row].split(" ")[0].replace(",", ""))
  again = given | {missing.replace("-", "_"): f"{found:g}"}
  assert facts(say("epsilon", **again))["epsilon"] == told["epsilon"]


@pytest.mark.parametrize(
  "given",
  slow_but(
    [{"noise_multiplier": 2}], [{"noise_multiplier": 2}, {"epsilon": 1}]
  ),
)
def test_curve(say, tmp_path, given):
  folder = tmp_path / "a" / "curves"
  told = facts(say("curve", out=folder, accountant="rdp", **given))
  assert sorted(p.name for p in folder.iterdir()) == [
    "privacy.csv",
    "privacy.png",
  ]
  with (folder / "privacy.csv").open(newline="") as file:
    rows = list(csv.DictReader(file))
  rounds = [r for r in rows if r["curve"] == "rounds"]
  cohorts = [r for r in rows if r["curve"] == "cohorts"]
  epsilons = [float(r["epsilon"]) for r in rounds]
  assert epsilons == sorted(epsilons)
  assert epsilons[-1] == pytest.approx(float(told["epsilon"]), rel=1e-3)
  assert int(rounds[-1]["rounds"]) == 30
  sizes = [int(r["clients_per_round"]) for r in cohorts]
  assert (sizes[0], sizes[-1]) == (5, 1000)
  noise = [float(r["noise_multiplier"]) for r in cohorts]
  assert noise == sorted(noise)  # more clients: more noise on their sum
  on_mean = [float(r["noise_std"]) for r in cohorts]
  assert on_mean == sorted(on_mean, reverse=True)  # less on their mean


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    ([], ["say what to do first", "calibrate, compose, curve, epsilon"]),
    (["--rounds=3"], ["say what to do first"]),
    (["epsilom"], ["privacy='epsilom' is unknown", "'epsilon'"]),
    (["epsilon"], ["--population=... is missing"]),
    (
      ["epsilon", *words_of({})],
      ["--noise-multiplier=... is missing"],
    ),
    (["curve", *words_of({})], ["--out=... is missing"]),
    (
      ["curve", *words_of({"out": "there"})],
      ["give --noise-multiplier, or --epsilon, or both"],
    ),
    (
      ["curve", *words_of({"out": "there", "noise_multiplier": 0})],
      ["--noise-multiplier=0 is no noise"],
    ),
    (["calibrate", *words_of({"epsilon": 1, "rounds": None})], ["give two of"]),
    (
      ["calibrate", *words_of({"epsilon": 1, "noise_multiplier": 1})],
      ["give two of --clients-per-round, --rounds, --noise-multiplier"],
    ),
    (
      [
        "calibrate",
        *words_of({"epsilon": 0.01, "noise_multiplier": 1, "rounds": None}),
      ],
      ["--epsilon=0.01 is less than the", "of one round"],
    ),
    (
      [
        "calibrate",
        *words_of({"epsilon": 1, "noise_multiplier": 1e4, "rounds": None}),
      ],
      ["--epsilon=1 allows more than", "less --noise-multiplier"],
    ),
    (
      [
        "calibrate",
        *words_of(
          {"epsilon": 1e-3, "noise_multiplier": 1, "clients_per_round": None}
        ),
      ],
      ["epsilon=0.001", "one client a round spends"],
    ),
  ],
)
def test_what_is_missing_is_named(refused, arguments, words):
  err = refused(*arguments)
  assert all(word in err for word in words), err


@pytest.mark.parametrize(
  ("flag", "value", "words"),
  [
    ("population", "0", ["--population=0", "from 1"]),
    ("population", "many", ["--population=many", "whole number"]),
    ("clients_per_round", "1001", ["--clients-per-round=1001", "1000"]),
    ("clients_per_round", "2.5", ["--clients-per-round=2.5", "whole number"]),
    ("rounds", "0", ["--rounds=0", "from 1"]),
    ("noise_multiplier", "-1", ["--noise-multiplier=-1", ">= 0"]),
    ("noise_multiplier", "loud", ["--noise-multiplier=loud", "a number"]),
    ("delta", "0", ["--delta=0", "> 0"]),
    ("delta", "nan", ["--delta=nan", "> 0"]),
    ("delta", "1e-3", ["delta=0.001", "less than 1/1000"]),
    ("sampling", "poison", ["--sampling='poison'", "'poisson'"]),
    ("noise", "cauchy", ["--noise='cauchy'", "gaussian, laplace"]),
    ("accountant", "prv", ["--accountant='prv'", "gdp, pld, rdp"]),
    ("accountant", "gdp", ["accountant='gdp'", "'pld'"]),
    ("epsilon", "1", ["epsilon"]),
    ("noise_multiplier", "1e155", ["noise multiplier=1e+155", "<= 1e+09"]),
    ("sampling_groups", "3", ["--sampling-groups is of", "leave it out"]),
    ("sampling", "cyclic_poisson", ["--sampling-groups"]),
  ],
)
def test_what_is_wrong_is_named(refused, flag, value, words):
  changes = {"noise_multiplier": 1, flag: value}
  err = refused("epsilon", *words_of(changes))
  assert all(word in err for word in words), err


# --- the document -------------------------------------------------------------


# The curve takes longest; `test_curve` draws one with less in it.
@pytest.mark.parametrize(
  ("command", "output"),
  slow_but([c for c in COMMANDS if " curve " not in c[0]], COMMANDS),
)
def test_the_commands_print_what_the_document_says(
  command, output, capsys, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  program, *arguments = shlex.split(command.replace("\\\n", " "))
  assert program == "fedjax-sim"
  assert main(arguments) == 0
  assert capsys.readouterr().out == output


def test_the_code_of_the_document_runs():
  (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.S)
  exec(compile(code, DOCUMENT, "exec"), {})


def test_every_command_of_the_document_has_its_output():
  assert len(COMMANDS) == TEXT.count("```sh\n") >= 5
