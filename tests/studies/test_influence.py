"""Studies that leave clients out: influences, Shapley values, refusals."""

import csv
import json
import pathlib
import types
from typing import Any

import jax
import numpy as np
import pytest

import fedjax_sim as fs
from fedjax_sim.cli.main import main
from fedjax_sim.config import flags
from fedjax_sim.config.build.parts import Parts
from fedjax_sim.config.flags import UsageError
from fedjax_sim.data import FederatedData
from fedjax_sim.reporting import read_metrics
from fedjax_sim.reporting.figures import player_bars
from fedjax_sim.run import experiment
from fedjax_sim.run.workdir import WorkdirError
from fedjax_sim.studies import shapley
from fedjax_sim.studies.influence import shapley_values, sum_up
from fedjax_sim.studies.leave_out import FIELD, LeaveOut, read
from fedjax_sim.studies.runs import StudyError
from fedjax_sim.studies.study import predict
from fedjax_sim.studies.training import Trainer
from workdirs import skip_pictures

DIGITS = pathlib.Path(__file__).parents[2] / "configs" / "digits_fedavg.py"
QUICK = {
  "model.name": "logistic_regression",
  "model.hidden_sizes": "None",
  "data.num_clients": "4",
  "data.unseen_clients": "None",
  "server.clients_per_round": "3",
  "server.rounds": "4",
  "server.eval_every": "4",
  "client.epochs": "1",
  "runtime.checkpoint_every": "2",
  "runtime.rounds_per_dispatch": "2",
}
METRIC = "test/accuracy"


@pytest.fixture(autouse=True)
def fast(monkeypatch):
  """Drawing takes longer than a quick run."""
  skip_pictures(monkeypatch)


def config(**changes):
  named = {field.replace("__", "."): text for field, text in changes.items()}
  return flags.load(str(DIGITS), QUICK | named)


def game(folder, **more):
  """Run the study of these tests: all coalitions of 4 clients, 2 seeds."""
  vary = {"leave_out": "clients()"}
  return fs.study(config(), folder, vary=vary, seeds=2, shapley=16, **more)


@pytest.fixture(scope="module")
def played(tmp_path_factory):
  """The finished study."""
  return game(tmp_path_factory.mktemp("left") / "out")


def table(study, name):
  with (study.folder / name).open() as file:
    return {row["name"]: row for row in csv.DictReader(file)}


def worth(study, seed):
  """The metric of each coalition, from the files of the runs."""
  found = {}
  for run in study.runs:
    if run["seed"] != seed:
      continue
    folder = study.folder / "runs" / run["name"]
    rows = read_metrics(folder / "metrics.jsonl")
    told = json.loads((folder / "config.json").read_bytes())
    left = told["server"]["leave_out"] or ()
    found[frozenset(range(4)) - {*left}] = rows[-1][METRIC]
    if not left:
      assert rows[0]["round"] == 0
      found[frozenset()] = rows[0][METRIC]
  return found


def test_influences_are_those_of_single_runs(played, tmp_path):
  assert {run["program"] for run in played.runs} == {0}
  rows = table(played, "influence.csv")
  worths = [worth(played, seed) for seed in (0, 1)]
  everyone = frozenset(range(4))
  for client in range(4):
    lost = [w[everyone] - w[everyone - {client}] for w in worths]
    row = rows[f"client {client}"]
    assert row["clients"] == str(client)
    assert float(row["influence"]) == pytest.approx(np.mean(lost))
    error = np.std(lost, ddof=1) / 2**0.5
    assert float(row["seeds_standard_error"]) == pytest.approx(error)
  order = [float(row["influence"]) for row in rows.values()]
  assert order == sorted(order, reverse=True)
  page = (played.folder / "report.html").read_text()
  for title in ("Influence", "Shapley value", "Results"):
    assert f">{title}</h2>" in page
  assert "client 3" in page
  # The same table as pairs: each with all clients, less that without one.
  pairs = (played.folder / "pairs.csv").read_text().splitlines()[1:]
  assert all("leave_out=None" in pair for pair in pairs)
  # By hand: the config says it all, and the row is the model without client 2.
  (name,) = [
    run["name"]
    for run in played.runs
    if run["point"] == {"server.leave_out": "2"} and run["seed"] == 1
  ]
  by_hand = config(server__leave_out="2", seed="1", runtime__devices="1")
  experiment.run(by_hand, tmp_path / "single")
  row, single = fs.load(played.folder, run=name), fs.load(tmp_path / "single")
  for a, b in zip(
    jax.tree.leaves(row.params), jax.tree.leaves(single.params), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_shapley_values_share_the_worth_of_all(played):
  rows = table(played, "shapley.csv")
  values = [float(rows[f"client {i}"]["shapley"]) for i in range(4)]
  worths = [worth(played, seed) for seed in (0, 1)]
  everyone = frozenset(range(4))
  gained = [w[everyone] - w[frozenset()] for w in worths]
  assert sum(values) == pytest.approx(np.mean(gained))
  # Exact, by the weights of all 2^4 coalitions, within 4 standard errors.
  assert all(len(w) == 16 for w in worths)
  for i in range(4):
    exact = sum(
      np.mean([w[c | {i}] - w[c] for w in worths]) / (4 * [1, 3, 3, 1][len(c)])
      for c in worths[0]
      if i not in c
    )
    row = rows[f"client {i}"]
    error = float(row["permutations_standard_error"])
    assert 0 < error < 0.05
    assert abs(values[i] - exact) < 4 * error


def test_what_is_told_is_of_the_seeds_that_count(tmp_path, capsys):
  """One seed's run of both diverged, another's without the first."""
  orders = np.array([[0, 1], [1, 0]])
  left = LeaveOut([(0,), (1,), (2, 3)], ["a", "b", "c"], 4, None)
  left = left._replace(orders=np.array([[0, 1, 2], [2, 1, 0]]))
  runs = [
    {"point": {FIELD: left.point(c)}, "seed": seed, "name": f"{seed} {len(c)}"}
    for c in left.coalitions
    for seed in (0, 1, 2)
  ]
  lost = "1 3", "2 1"
  for run in runs:
    run["status"] = "diverged" if run["name"] in lost else "finished"
  study: Any = types.SimpleNamespace(
    runs=runs,
    metric="x",
    fields=[FIELD],
    higher_is_better=True,
    folder=tmp_path,
    last=lambda name: {"x": float(name[-1])},
    metrics=lambda name: [{"round": 0, "x": 0.25}],
  )
  sum_up(study, left)
  said = capsys.readouterr().out
  assert "with all clients 3.0000; lost without" in said  # of seeds 0 and 2
  assert "sum to 2.7500, which is 3.0000 with all, less 0.2500 with" in said
  # A coalition that no order has is not missed.
  game = {c: float(len(c)) for c in shapley.coalitions(orders)}
  game |= {frozenset({5}): np.nan}
  assert shapley_values([game], orders)[0].seeds == 1


def test_a_killed_study_goes_on(played, tmp_path, monkeypatch):
  save = Trainer.save

  def die(trainer):
    save(trainer)
    trainer.folder.wait()
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(Trainer, "save", die)
    with pytest.raises(KeyboardInterrupt):
      game(tmp_path / "killed")
  again = game(tmp_path / "killed")
  for name in ("study.csv", "influence.csv", "shapley.csv"):
    before = (played.folder / name).read_bytes()
    assert (again.folder / name).read_bytes() == before
  with pytest.raises(WorkdirError, match="holds another study"):
    game(tmp_path / "killed", search_seed=1)


def test_other_fields_have_tables_of_their_own(tmp_path, capsys):
  study = fs.study(
    config(server__rounds="2"),
    tmp_path / "study",
    vary={"leave_out": [0, (1, 2)], "client.learning_rate": [0.1, 0.3]},
    metric="test/loss",
  )
  with (study.folder / "influence.csv").open() as file:
    rows = list(csv.DictReader(file))
  assert [(r["client.learning_rate"], r["clients"]) for r in rows] == [
    (rate, clients)
    for rate, clients in zip(
      ["0.1", "0.1", "0.3", "0.3"], [r["clients"] for r in rows], strict=True
    )
  ]
  assert {r["clients"] for r in rows} == {"0", "1 2"}
  for rate in ("0.1", "0.3"):  # less loss is better, so the first is lower
    first, second = [
      float(r["influence"]) for r in rows if r["client.learning_rate"] == rate
    ]
    assert first <= second
  assert "Influence on test/loss (client.learning_rate=0.3)" in (
    capsys.readouterr().out
  )


class _Parts(Parts):
  """Stands for the data of four clients with names."""

  def data(self, config: Any) -> Any:
    train = FederatedData(
      examples={"x": np.zeros((4, 1), np.float32)},
      offsets=np.arange(5),
      names=("101", "bob", "ann", "eve"),
    )
    return types.SimpleNamespace(train=train)


@pytest.mark.parametrize(
  ("values", "texts", "names"),
  [
    ("clients()", "None,0,1,2,3", ["101", "bob", "ann", "eve"]),
    ("clients(1:3)", "None,1,2", ["bob", "ann"]),
    ("clients(eve,'101',2)", "None,3,0,2", ["eve", "101", "ann"]),
    ("groups(0:2,(ann,3))", "None,(0,1),(2,3)", ["101, bob", "ann, eve"]),
    ("0,(3,ann)", "None,0,(2,3)", ["101", "ann, eve"]),
    ([None, "101", ("eve", 1)], "None,0,(1,3)", ["101", "bob, eve"]),
  ],
)
def test_values_of_leave_out(values, texts, names):
  _, vary, left = read(config(), {"leave_out": values}, _Parts(), None, 0)
  assert vary == {"server.leave_out": texts}
  assert left is not None
  assert left.names == names


@pytest.mark.parametrize(
  ("values", "told"),
  [
    ("clients(9)", "no client 9; clients have the numbers 0 to 3"),
    ("clients(101)", "the client of that name is '101'"),
    ("clients(bop)", "no client 'bop'. Did you mean 'bob'"),
    ("clients(0:9)", "range 0:9 .* from 0 to 3"),
    ("groups(0:2,1:3)", "groups overlap, at 'bob'"),
    ("clients(1,bob)", "a client comes twice, at 'bob'; name each client once"),
    ("client()", r"give clients\(\), such as"),
    ("clients(", r"give clients\(\), such as"),
    ("groups(0:4)", "leaves out all 4 clients"),
    ("groups()", "names no client"),
  ],
)
def test_values_that_are_refused(values, told):
  with pytest.raises((UsageError, ValueError), match=told) as found:
    read(config(), {"leave_out": values}, _Parts(), None, 0)
  assert str(found.value).count("=") == 1


def test_one_client_has_no_influence():
  parts: Any = types.SimpleNamespace(
    data=lambda config: types.SimpleNamespace(
      train=types.SimpleNamespace(num_clients=1, client_name=str)
    )
  )
  with pytest.raises(UsageError, match="one client alone"):
    read(config(), {"leave_out": "clients()"}, parts, None, 0)


@pytest.mark.parametrize(
  ("changes", "more", "told"),
  [
    ({}, {"halving": 2}, "--halving ends runs early"),
    ({}, {"random": 2}, "--random draws some points"),
    ({}, {"shapley": 3}, "shapley=3 is odd"),
    ({}, {"vary": {}, "shapley": 2}, "--shapley needs players"),
    ({"algorithm__name": "centralized"}, {}, "pools the data of all clients"),
  ],
)
def test_what_cannot_be_told_is_refused(changes, more, told):
  arguments = {"vary": {"leave_out": "clients()"}, **more}
  with pytest.raises((UsageError, StudyError, ValueError), match=told):
    predict(config(**changes), **arguments)


def test_the_command_plans_coalitions(capsys):
  arguments = [f"--config.{k}={v}" for k, v in QUICK.items()]
  command = ["study", f"--config={DIGITS}", "--studydir=s", *arguments]
  told = ["--vary=leave_out=groups(0:2,2,3)", "--shapley=2", "--plan"]
  assert main([*command, *told]) == 0
  # All, each of 3 left out, and at most one group of both orders.
  assert "runs: " in (said := capsys.readouterr().out)
  assert int(said.split()[0]) in (5, 6, 7)
  assert not pathlib.Path("s").exists()


def test_bars_have_names_and_errors():
  panel = player_bars.Panel(
    "", ["a", "b", "c"], np.array([0.2, np.nan, -0.1]), np.array([0.1] * 3)
  )
  figure = player_bars.players_figure([panel], "x", higher_is_better=True)
  (ax,) = figure.axes
  assert [t.get_text() for t in ax.get_xticklabels()] == ["a", "b", "c"]
  bars: list[Any] = [*ax.patches]
  heights = [bar.get_height() for bar in bars]
  assert heights == [0.2, 0.0, -0.1]
  colors = [bar.get_facecolor() for bar in bars]
  assert colors[0] != colors[2]
  many = np.arange(200.0)
  long = player_bars.Panel("s", [*map(str, range(200))], -many, many)
  figure = player_bars.players_figure([long], "x", higher_is_better=True)
  (ax,) = figure.axes
  assert len(ax.patches) == player_bars.MOST_BARS
  assert "of 200" in ax.get_title()
