"""The script for a GPU, tried on the CPU, and what its parts need."""

import importlib
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu_check.sh"
# Of lines that run a part: its name, and its seconds.
PART = re.compile(r"^(?:part|engine|flute) (\w+) (\d+)", re.MULTILINE)


@pytest.fixture
def benchmark(monkeypatch):
  """Imports a module of the folder, which is not installed."""
  monkeypatch.syspath_prepend(str(ROOT))
  return lambda name: importlib.import_module(f"benchmarks.{name}")


def test_engines_are_named_by_devices_and_lanes(benchmark):
  engine, show = benchmark("engine"), benchmark("show")
  assert engine.named("one") == (1, None)
  assert engine.named("one_8") == (1, 8)
  assert engine.named("all_auto") == (None, "auto")
  assert engine.ratios_of(["one"]) == engine.RATIOS
  assert engine.ratios_of(["one_8", "one_auto"]) == {
    "one_8_to_bare": ("bare", "one_8"),
    "one_auto_to_bare": ("bare", "one_auto"),
    "one_8_to_torch": ("torch", "one_8"),
    "one_auto_to_torch": ("torch", "one_auto"),
  }
  assert show.ratio_name("one_8_to_bare") == "one device, 8 lanes / bare loop"
  assert show.ratio_name("all_1_to_torch") == "all devices, 1 lane / PyTorch"
  assert show.ratio_name("all_to_one") == "all devices / one device"
  for text, fits in (("8", True), ("auto", True), ("0", False), ("-1", False)):
    assert engine.are_lanes(text) == fits


def test_larger_cohorts_train_as_many_clients_a_turn(benchmark):
  cases = benchmark("cases")
  case = cases.with_cohort(cases.CASES["lr"], 128)
  assert (case.clients_per_round, case.num_clients) == (128, 1000)
  assert case.rounds == 5  # 64 of 10 clients
  assert cases.with_cohort(cases.CASES["lr"], 5).rounds == 64
  case = cases.with_cohort(cases.CASES["resnet18"], 128)
  assert (case.rounds, case.num_clients) == (1, 128)


@pytest.mark.integration
def test_engine_is_measured_by_lanes_within_its_time(benchmark, tmp_path):
  engine, written = benchmark("engine"), tmp_path / "engine.json"
  options = ["--cases=lr", "--scale=smoke", "--devices=1", "--pairs=3"]
  engine.main([*options, "--lanes=1,2,auto", f"--json={written}"])
  case = json.loads(written.read_text())["cases"]["lr"]
  lanes = {name: found["lanes"] for name, found in case["engines"].items()}
  assert lanes == {"one_1": 1, "one_2": 2, "one_auto": lanes["one_auto"]}
  assert case["pairs"] == 3
  assert not case["left_out"]
  assert case["ratios"]["one_2_to_bare"] > 0

  engine.main(
    [*options, "--lanes=2,1", "--seconds=0.000001", f"--json={written}"]
  )
  case = json.loads(written.read_text())["cases"]["lr"]
  assert list(case["engines"]) == ["one_2"]
  assert case["left_out"] == ["one_1"]
  assert case["pairs"] == 1


# --- the report ---------------------------------------------------------------


def wrote(folder, name, text, result=None):
  (folder / f"{name}.txt").write_text(text)
  if result is not None:
    (folder / f"{name}.json").write_text(json.dumps(result))


def test_report_has_what_failed_parts_left(benchmark, tmp_path):
  report = benchmark("gpu_report")
  parts, out = tmp_path / "parts", tmp_path / "out"
  parts.mkdir()
  out.mkdir()
  lines = [
    "tests\t0\t3\t40",
    "memory\t124\t40\t40",
    "flute\t1\t2\t20",
    "study\tleft out\t0\t45",
  ]
  (parts / "parts.tsv").write_text("\n".join(lines) + "\n")
  wrote(parts, "tests", "....\n4 passed in 2.0s\n\n")
  row = {
    "case": "cnn",
    "lanes": 32,
    "program_bytes": 300e6,
    "waiting_bytes": 100e6,
    "taken_bytes": 500e6,
  }
  wrote(parts, "memory", "cnn, 32 lanes: done\n", {"rows": [row]})
  wrote(parts, "flute", "Traceback\nValueError: no\n")
  (parts / "flute.json").write_text('{"half')
  wrote(parts, "study", "")
  report.main([str(parts), str(out)])
  found = json.loads((out / "gpu_check.json").read_text())
  assert [part["status"] for part in found["parts"]] == [
    *("done", "out of time", "failed with status 1", "left out")
  ]
  assert found["parts"][0]["last_line"] == "4 passed in 2.0s"
  assert found["results"] == {"memory": {"rows": [row]}}
  tables = (out / "gpu_check.txt").read_text()
  assert re.search(r"cnn .* 32 .* 300 .* 100 .* 500 .* 1\.25 ", tables)
  assert tables.endswith(
    "Left out:\n"
    "  memory: out of time; cnn, 32 lanes: done\n"
    "  flute: failed with status 1; ValueError: no\n"
    "  study: left out\n"
  )


def test_lanes_for_want_of_time_are_told(benchmark):
  left_out = benchmark("gpu_report").left_out
  case = {"left_out": ["one_32", "one_auto"]}
  assert left_out(
    {
      "parts": [],
      "results": {
        "engine_lr": {"cases": {"lr": case}, "notes": ["no PyTorch"]},
        "engine_cnn": {"cases": {"cnn": {"left_out": []}}, "notes": []},
      },
    }
  ) == ["lr: one_32, one_auto, for want of time", "no PyTorch"]


# --- the script ---------------------------------------------------------------


def test_budgets_of_the_parts_add_up_to_eight_minutes():
  text = SCRIPT.read_text()
  parts = dict(PART.findall(text))
  assert len(parts) == 13
  assert sum(map(int, parts.values())) == 8 * 60
  assert "TOTAL=$((480 * FACTOR))" in text
  subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


@pytest.mark.parametrize(
  ("options", "arguments", "said"),
  [
    ({}, [], "usage"),
    ({"SCALE": "large"}, ["out"], "give full or smoke"),
    ({"FACTOR": "0"}, ["out"], "give 1 to 99"),
  ],
)
def test_what_is_wrong_with_its_options_is_said(
  tmp_path, options, arguments, said
):
  done = subprocess.run(
    [str(SCRIPT), *arguments],
    cwd=tmp_path,
    env=os.environ | options,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2
  assert said in done.stderr


@pytest.mark.slow
def test_script_runs_on_a_cpu(tmp_path):
  done = subprocess.run(
    [str(SCRIPT), str(tmp_path)],
    env=os.environ
    | {
      "PYTHON": sys.executable,
      "SCALE": "smoke",
      "FACTOR": "20",
      "JAX_PLATFORMS": "cpu",
    },
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  report = json.loads((tmp_path / "gpu_check.json").read_text())
  names = [name for name, _ in PART.findall(SCRIPT.read_text())]
  of = lambda name: f"engine_{name}" if name in ENGINE else name
  assert [part["name"] for part in report["parts"]] == [of(n) for n in names]
  failed = [p for p in report["parts"] if p["status"] != "done"]
  assert not failed, (tmp_path / "log.txt").read_text()
  assert "skipped" in report["parts"][0]["last_line"]
  assert set(report["results"]) == {of(n) for n in names} - {"tests"}
  rows = report["results"]["memory"]["rows"]
  assert [row["case"] for row in rows] == ["cnn", "lstm", "resnet18"]
  assert all(row["taken_bytes"] is None for row in rows)
  assert "Left out:" in done.stdout


ENGINE = ("lr", "cnn", "lstm", "resnet18", "lr_large")
