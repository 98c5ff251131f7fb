"""`fedjax-sim compare`: tables of runs made by hand, and its refusals."""

import csv
import io
import json
import math
import re

import numpy as np
import pytest
from scipy import stats

import fedjax_sim as fs
from fedjax_sim.cli.main import main
from fedjax_sim.reporting import read_metrics
from fedjax_sim.studies.compare import compare
from fedjax_sim.studies.compared_runs import CompareError, labels_of
from fedjax_sim.studies.comparison_tables import (
  latex,
  markdown,
  pairs_csv,
  text,
)

METRIC = "test/accuracy"
FEDAVG = {0: [0.5, 0.80], 1: [0.6, 0.84], 2: [0.4, 0.82]}
FEDPROX = {0: [0.7, 0.83], 1: [0.8, 0.88], 2: [0.5, 0.84]}


def config(seed, **changes):
  """A config of a few fields; "section__field" changes one."""
  tree = {
    "seed": seed,
    "data": {"name": "digits", "seed": 0, "path": None},
    "model": {"name": "mlp"},
    "algorithm": {"name": "fedavg"},
    "server": {"rounds": 2},
    "runtime": {"lanes": 1},
    "trackers": {"mlflow": {"uri": str(seed)}},
  }
  for name, value in changes.items():
    section, _, field = name.partition("__")
    tree[section][field] = value
  return tree


def write_run(folder, tree, values, *, finished=True, metric=METRIC, **summary):
  """Write a workdir: a round for each value, with 10 bytes down and 5 up."""
  folder.mkdir(parents=True)
  (folder / "config.json").write_text(json.dumps(tree))
  rows = [
    {"round": i, metric: value, "bytes_down": 10, "bytes_up": 5}
    for i, value in enumerate(values, 1)
  ]
  lines = "".join(f"{json.dumps(row)}\n" for row in rows)
  (folder / "metrics.jsonl").write_text(lines)
  if finished:
    facts = {"rounds": len(values), "seed": tree["seed"]} | summary
    (folder / "summary.json").write_text(json.dumps(facts))
  return folder


def write_two(folder, metric=METRIC):
  """Write three seeds of fedavg and of fedprox."""
  return [
    write_run(
      folder / f"{name}-{seed}",
      config(seed, algorithm__name=name),
      values,
      metric=metric,
    )
    for name, runs in (("fedavg", FEDAVG), ("fedprox", FEDPROX))
    for seed, values in runs.items()
  ]


def write_study(folder, runs, fields=("algorithm.name",)):
  """Write a study of runs (point, seed, status, values)."""
  listed = []
  for i, (point, seed, status, values) in enumerate(runs):
    name = f"{i:03d}"
    if values is not None:
      changes = {k.replace(".", "__"): v for k, v in point.items()}
      where = folder / "runs" / name
      done = status == "finished"
      write_run(where, config(seed, **changes), values, finished=done)
    listed.append(
      {"name": name, "point": point, "seed": seed, "status": status}
    )
  by = {"metric": "test/accuracy", "higher_is_better": True}
  told = {"fields": [*fields], "runs": listed}
  study = {"format": 1, "study": {}, **by, **told}
  folder.mkdir(exist_ok=True)
  (folder / "study.json").write_text(json.dumps(study))
  return folder


@pytest.fixture
def two(tmp_path):
  return write_two(tmp_path)


def test_two_algorithms(two):
  found = compare(two)
  assert [s.label for s in found.settings] == ["fedprox", "fedavg"]
  best, other = found.settings
  assert best.seeds == other.seeds == (0, 1, 2)
  assert best.mean == pytest.approx(0.85)
  assert best.std == pytest.approx(np.std([0.83, 0.88, 0.84], ddof=1))
  (pair,) = found.pairs
  a, b = [0.83, 0.88, 0.84], [0.80, 0.84, 0.82]
  test = stats.ttest_rel(a, b)
  np.testing.assert_allclose(
    pair.difference.interval, test.confidence_interval(), rtol=1e-9
  )
  assert pair.adjusted_p == pytest.approx(test.pvalue)
  welch = stats.ttest_ind(a, b, equal_var=False).confidence_interval()
  ratio = test.confidence_interval()
  assert found.width_ratio == pytest.approx(
    (ratio.high - ratio.low) / (welch.high - welch.low)
  )
  np.testing.assert_array_equal(found.wins(), [[math.nan, 1], [0, math.nan]])
  assert found.notes == []


def test_the_order_of_runs_does_not_matter(two):
  one, other = compare(two), compare(two[::-1])
  assert text(one) == text(other)
  assert pairs_csv(one) == pairs_csv(other)


def test_rounds_and_bytes_to_a_target(two):
  """A run that never reaches it counts as later than all that do."""
  found = compare(two, target=0.7)
  prox, avg = (s.reached for s in found.settings)
  assert prox == (3, 3, 1, 10, 5)
  assert avg == (3, 3, 2, 20, 10)
  found = compare(two, target=0.84)
  assert found.settings[0].reached == (2, 3, 2, 20, 10)
  assert found.settings[1].reached == (1, 3, math.inf, math.inf, math.inf)
  assert "not reached" in text(found)
  found = compare(two, target=0.99)
  assert (
    "The target 0.9900 is never reached by: fedprox; fedavg." in found.notes
  )
  found = compare(two)
  assert found.target == pytest.approx(0.95 * 0.85)
  assert found.target_rule == "95 % of the best setting's mean"


def test_the_value_that_counts(two):
  found = compare(two, at=1)
  assert found.settings[0].mean == pytest.approx(2 / 3)
  write_metrics = two[0] / "metrics.jsonl"
  rows = read_metrics(write_metrics)
  rows[0][METRIC] = 0.9
  write_metrics.write_text("".join(f"{json.dumps(r)}\n" for r in rows))
  best = compare(two, at="best").settings
  assert {s.label: s.mean for s in best}["fedavg"] == pytest.approx(
    (0.9 + 0.84 + 0.82) / 3
  )
  with pytest.raises(CompareError, match="nearest rounds with it are 1, 2"):
    compare(two, at=7)


def test_a_value_that_is_not_finite_does_not_count(two):
  rows: list = read_metrics(two[0] / "metrics.jsonl")
  rows[-1][METRIC] = None
  text = "".join(f"{json.dumps(row)}\n" for row in rows)
  (two[0] / "metrics.jsonl").write_text(text)
  found = compare(two)
  assert found.settings[1].seeds == (1, 2)
  assert found.pairs[0].difference.seeds == 2
  assert f"seed 0: its {METRIC} is not finite." in found.notes[0]
  best = compare(two, at="best")
  assert best.settings[1].values[0] == 0.5
  assert "flatters" in best.notes[0]


def test_noise_that_is_not_shared_is_said(tmp_path):
  for seed in (None, 1):
    privacy = {"privacy": {"mechanism": "gaussian", "noise_seed": seed}}
    runs = [
      write_run(
        tmp_path / f"{name}-{seed}",
        config(0, algorithm__name=name) | privacy,
        [0.5],
      )
      for name in ("fedavg", "fedprox")
    ]
    notes = "".join(compare(runs).notes)
    assert ("draw their noise from fresh" in notes) == (seed is None)


def test_a_loss_is_better_lower(tmp_path):
  runs = write_two(tmp_path, "test/loss")
  found = compare(runs, "test/loss")
  assert found.settings[0].label == "fedavg"
  assert found.target == pytest.approx(1.05 * 0.82)
  assert found.settings[0].reached.rounds == 1
  assert found.pairs[0].wins == 1
  assert found.pairs[0].difference.mean < 0
  turned = compare(runs, "test/loss", higher_is_better=True)
  assert turned.settings[0].label == "fedprox"


def test_a_metric_of_ones_own_needs_a_direction(tmp_path, capsys, monkeypatch):
  runs = [str(run) for run in write_two(tmp_path, "test/churn")]
  monkeypatch.chdir(tmp_path)
  assert main(["compare", *runs, "--metric=test/churn"]) == 2
  assert (
    "give --higher_is_better or --lower_is_better" in capsys.readouterr().err
  )
  flags = ["--metric", "test/churn", "--lower_is_better"]
  assert main(["compare", *runs, *flags]) == 0
  assert "lower is better" in capsys.readouterr().out


def test_what_changes_no_number_is_no_setting(tmp_path):
  """Lanes, places and trackers; also data partitioned anew for each seed."""
  runs = [
    write_run(
      tmp_path / f"{name}-{seed}",
      config(
        seed,
        algorithm__name=name,
        runtime__lanes=lanes,
        data__seed=10 + seed,
        data__path=name,
      ),
      [value],
    )
    for name, lanes in (("fedavg", 1), ("fedprox", 4))
    for seed, value in ((0, 0.5), (1, 0.6))
  ]
  found = compare(runs)
  assert [s.fields for s in found.settings] == [
    {"algorithm.name": "fedavg"},
    {"algorithm.name": "fedprox"},
  ]


def test_labels_are_short_and_different():
  both = [
    {"algorithm.name": "fedavg", "client.lr": 0.1},
    {"algorithm.name": "fedprox", "client.lr": 0.1, "algorithm.mu": 1.0},
  ]
  assert labels_of(both) == ["fedavg, lr=0.1", "fedprox, lr=0.1"]
  more = [*both, {**both[1], "algorithm.mu": 2.0}]
  assert labels_of(more)[1:] == [
    "fedprox, lr=0.1, mu=1.0",
    "fedprox, lr=0.1, mu=2.0",
  ]
  two_lr = [{"client.lr": 1, "server.lr": 2}, {"client.lr": 2, "server.lr": 2}]
  assert labels_of(two_lr)[0] == "client.lr=1, server.lr=2"
  assert labels_of([{}]) == ["all runs"]
  wide = [{"a.sizes": "64,32", "b": 1}, {"a.sizes": "(64)", "b": 1}]
  assert labels_of(wide) == ["sizes=(64,32), b=1", "sizes=(64), b=1"]
  assert labels_of([{"a.x": 1}, {}]) == ["x=1", "without a.x"]


def test_a_study(tmp_path):
  """Diverged and ended runs do not count, but at a round; and are told."""
  avg, prox = {"algorithm.name": "fedavg"}, {"algorithm.name": "fedprox"}
  nova = {"algorithm.name": "fednova"}
  study = write_study(
    tmp_path / "study",
    [
      *((avg, seed, "finished", FEDAVG[seed]) for seed in FEDAVG),
      (prox, 0, "finished", FEDPROX[0]),
      (prox, 1, "diverged", FEDPROX[1][:1]),
      (prox, 2, "finished", FEDPROX[2]),
      (nova, 0, "ended", [0.9]),
      (nova, 1, "waiting", None),
    ],
  )
  halved = write_study(
    tmp_path / "halved",
    [(avg, 0, "finished", [0.5, 0.6]), (nova, 0, "ended", [0.4])],
  )
  found = compare([study])
  assert [s.label for s in found.settings] == ["fedprox", "fedavg", "fednova"]
  assert found.settings[0].seeds == (0, 2)
  assert found.pairs[0].difference.seeds == 2
  assert len(found.pairs) == 1
  told = "\n".join(found.notes)
  assert (
    "fedprox: 1 of 3 runs do not count: seed 1: diverged after round 1" in told
  )
  assert "1 of 8 runs of" in told
  assert "have not begun: 007" in told
  assert found.settings[2].reached.seeds == 1
  with pytest.raises(CompareError, match="in round 1, so give --at=1"):
    compare([halved])
  early = compare([study], at=1)
  assert [len(s.seeds) for s in early.settings] == [1, 3, 3]


def test_ended_settings_follow_by_how_far_they_came(tmp_path, capsys):
  """As successive halving leaves them; of one rung the better one is first."""
  ends = [[0.5], [0.8], [0.3, 0.4], [0.9], [0.5, 0.6, 0.9], [0.5, 0.6, 0.7]]
  names = [{"algorithm.name": name} for name in "abcdef"]
  done = ["finished" if len(values) == 3 else "ended" for values in ends]
  rows = [*zip(names, [0] * 6, done, ends, strict=True)]
  study = write_study(tmp_path / "halved", rows)
  order = [setting.label for setting in compare([study]).settings]
  assert order == ["e", "f", "c", "d", "b", "a"]
  assert main(["report", f"--workdir={study}"]) == 2
  assert f"a study; give fedjax-sim compare {study}" in capsys.readouterr().err


def test_many_settings_are_short_in_a_terminal(tmp_path):
  runs = [
    write_run(
      tmp_path / f"{i}-{seed}",
      config(seed, model__name=f"m{i:02d}"),
      [0.9 - i / 100 + seed / (50 + i)],
    )
    for i in range(17)
    for seed in range(2)
  ]
  found = compare(runs)
  assert len(found.pairs) == 17 * 16 / 2
  printed = text(found)
  assert printed.count("\nand ") == 2
  assert "and 2 more" in printed
  assert "m00 − m15" in printed
  assert "m01 − m02" not in printed
  assert "36 more are in pairs.csv" in markdown(found)
  assert pairs_csv(found).count("\n") == 137


def test_a_baseline(two, tmp_path):
  third = [
    write_run(
      tmp_path / f"scaffold-{seed}",
      config(seed, algorithm__name="scaffold"),
      [0.9 + seed / 100],
    )
    for seed in FEDAVG
  ]
  found = compare([*two, *third], baseline="fedavg")
  assert [(p.a, p.b) for p in found.pairs] == [
    ("scaffold", "fedavg"),
    ("fedprox", "fedavg"),
  ]
  assert len(compare([*two, *third]).pairs) == 3
  best = compare([*two, *third], baseline="best")
  assert {p.a for p in best.pairs} | {p.b for p in best.pairs} == {
    "scaffold",
    "fedavg",
    "fedprox",
  }
  assert all("scaffold" in (p.a, p.b) for p in best.pairs)
  assert "its lead is flattered" in best.notes[-1]
  with pytest.raises(ValueError, match=r"'fedavg'\? Known: 'best', 'fed"):
    compare(two, baseline="fedavgs")


def test_one_seed_has_no_interval(two, tmp_path):
  found = compare([two[0], two[3]], to=tmp_path / "out")
  assert "no interval and no test can be given" in found.notes[0]
  assert math.isnan(found.width_ratio)
  assert "nan" not in (tmp_path / "out" / "comparison.md").read_text()
  assert "nan" not in (tmp_path / "out" / "pairs.csv").read_text()


def test_equal_differences_are_shown_without_an_interval(tmp_path):
  runs = [
    write_run(
      tmp_path / f"{name}-{seed}",
      config(seed, algorithm__name=name),
      [better + seed / 10],
    )
    for name, better in (("fedavg", 0.5), ("fedprox", 0.6))
    for seed in range(3)
  ]
  found = compare(runs)
  assert found.pairs[0].difference.mean == pytest.approx(0.1)
  row = next(x for x in markdown(found).split("\n") if "fedprox − fed" in x)
  assert row.split(" | ")[3:5] == ["–", "–"]
  assert "no spread to test" in found.notes[0]


def test_the_files(two, tmp_path, capsys):
  to = tmp_path / "out"
  names = [str(run) for run in two]
  assert main(["compare", *names, f"--to={to}"]) == 0
  out, err = capsys.readouterr()
  assert err == ""
  assert out.endswith(f"\n{to}/report.html\n")
  assert "fedprox − fedavg" in out
  assert {p.name for p in to.iterdir()} == {
    *("comparison.csv", "comparison.md", "comparison.tex", "curves.png"),
    *("pairs.csv", "report.html"),
  }
  lines = [*csv.DictReader(io.StringIO((to / "comparison.csv").read_text()))]
  assert [line["algorithm.name"] for line in lines] == ["fedprox", "fedavg"]
  assert float(lines[0]["mean"]) == pytest.approx(0.85)
  assert lines[0]["values"] == "0.83 0.88 0.84"
  (pair,) = csv.DictReader(io.StringIO((to / "pairs.csv").read_text()))
  assert float(pair["difference"]) == pytest.approx(0.03)
  page = (to / "report.html").read_text()
  assert page.startswith("<!DOCTYPE html>")
  assert "fedprox − fedavg" in page
  assert not re.search(r"<(script|link|img)|https?://(?!www.w3.org)", page)
  before = {p.name: p.read_bytes() for p in to.iterdir()}
  fs.compare(two[::-1], to=to)
  assert {p.name: p.read_bytes() for p in to.iterdir()} == before


def test_tables_escape_what_has_a_meaning(tmp_path):
  runs = [
    write_run(
      tmp_path / f"{i}-{seed}",
      config(seed, model__name=f"a|b_{i}%&"),
      [0.5 + i / 10 + seed / (9 - i)],
    )
    for i in range(2)
    for seed in range(2)
  ]
  found = compare(runs)
  table = [x for x in markdown(found).split("\n") if x.startswith("|")]
  cells = [len(re.findall(r"(?<!\\)\|", line)) for line in table]
  assert cells[:4] == [9] * 4
  rows = [x for x in latex(found).split("\n") if x.endswith(r"\\")]
  assert [len(re.findall(r"(?<!\\)&", row)) for row in rows] == [7] * 3 + [
    10
  ] * 2
  assert r"a|b\_1\%\&" in rows[1]


def test_data_have_to_be_the_same(tmp_path, two):
  """Runs on other data are left alone; changed files are refused."""
  other = [
    write_run(
      tmp_path / f"cifar-{seed}",
      config(seed, data__name="cifar10"),
      [0.3 + seed / 10],
    )
    for seed in FEDAVG
  ]
  found = compare([*two, *other])
  assert len(found.pairs) == 1
  assert any("Evaluated on different data" in note for note in found.notes)
  with pytest.raises(CompareError, match=r"6 of 6 runs count \(6 finished\)"):
    compare([*two[:3], *other])
  changed = [
    write_run(tmp_path / f"changed-{i}", config(i), [0.5], data_digest=str(i))
    for i in range(2)
  ]
  with pytest.raises(CompareError, match="trained on different data"):
    compare([*changed])


def test_what_is_refused(two, tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(tmp_path)
  single = write_run(tmp_path / "other", config(7, algorithm__name="x"), [0.5])
  again = write_run(tmp_path / "again", config(0), [0.5])
  stopped = write_run(tmp_path / "stop", config(0), [0.5], finished=False)
  stopped_too = write_run(
    tmp_path / "stop2", config(0, model__name="b"), [0.5], finished=False
  )
  damaged = tmp_path / "damaged"
  damaged.mkdir()
  (damaged / "study.json").write_text("{}")
  (tmp_path / "empty").mkdir()
  cases = [
    ([], "no folder is given"),
    (["missing"], "compare: missing is not there"),
    (["empty"], "holds no run"),
    ([str(tmp_path)], f"holds some; name them: {tmp_path}/*"),
    (["damaged"], "study.json is damaged"),
    ([two[0], two[0]], "is given twice"),
    (["s3://b/run"], "compare=s3://b/run is a URL"),
    (two[:3], "all 3 runs are of the same setting"),
    ([two[0], single], "no two settings have a seed in common"),
    ([two[0], again, two[3]], "the same setting and the same seed, 0"),
    (
      [two[0], two[3], "--metric=test/acuracy"],
      "Did you mean 'test/accuracy'?",
    ),
    ([two[0], two[3], "--at=x"], "--at=x is wrong; give a whole number, last"),
    ([two[0], two[3], "--at=-1"], "--at=-1 is out of range"),
    ([two[0], two[3], "--target=x"], "--target=x is wrong; give a number."),
    ([two[0], two[3], "--confidence=1"], "--confidence=1.0 is out of range"),
    ([two[0], two[3], "--banana=1"], "banana"),
    (
      [two[0], "--lower_is_better", "--higher_is_better"],
      "--lower_is_better and --higher_is_better: give one of them.",
    ),
    ([two[0], two[3], "--to", again / "config.json"], "is a file; name a"),
    ([stopped, stopped_too], "compare them at a round, such as --at=1."),
  ]
  for arguments, said in cases:
    assert main(["compare", *map(str, arguments)]) == 2, said
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.count("\n") == 1
  assert not (tmp_path / "comparison").exists()
