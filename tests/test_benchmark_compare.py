"""The working tree against another revision: turns, ratios, worktrees."""

import argparse
import importlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture
def benchmark(monkeypatch):
  """Imports a module of the folder, which is not installed."""
  monkeypatch.syspath_prepend(str(ROOT))
  return lambda name: importlib.import_module(f"benchmarks.{name}")


@pytest.mark.parametrize(
  ("theirs", "expected"),
  [
    ([1.1, 1.2, 1.3, 1.4, 1.5, 3.0], (1.35, 1.1, 3.0, "faster")),
    ([0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99], (0.8, 0.5, 0.99, "slower")),
    ([1.1, 1.2, 1.3, 1.4, 1.5, 0.9], (1.25, 0.9, 1.5, "")),  # they disagree
    ([1.1, 1.2, 1.3, 1.4, 1.5], (1.3, 1.1, 1.5, "")),  # too few
  ],
)
def test_ratios_of_turns(benchmark, theirs, expected):
  spread = benchmark("compare").spread
  twice = [2 * seconds for seconds in theirs]  # of turns of two seconds
  found = spread(twice, [2.0] * len(theirs))
  assert found[:3] == pytest.approx(expected[:3])
  assert found.verdict == expected[3]


def answer(seconds, digest="a", result=1.0):
  return {
    "seconds": seconds,
    "cpu_seconds": 2 * seconds,
    "digest": digest,
    "result": result,
  }


def test_both_take_turns_and_neither_is_always_first(benchmark):
  compare, asked = benchmark("compare"), []

  def side(name, seconds):
    def call(kind):
      asked.append(f"{name} {kind}")
      return answer(seconds)

    return call

  sides = {"theirs": side("T", 3.0), "ours": side("O", 1.5)}
  found = compare.take_turns(sides, ["x", "y"], 3)
  assert asked == [
    *("T x", "O x", "T y", "O y"),
    *("O x", "T x", "O y", "T y"),
    *("T x", "O x", "T y", "O y"),
  ]
  assert found["x"] == found["y"]
  assert found["x"]["seconds"] == {"theirs": [3.0] * 3, "ours": [1.5] * 3}
  assert found["x"]["time"]["median"] == 2.0
  assert found["x"]["equal"]


def test_results_that_differ_once_are_not_equal(benchmark):
  compared = benchmark("compare").compared
  turns = [
    {"theirs": answer(1.0), "ours": answer(1.0)},
    {"theirs": answer(1.0, "a", 4.0), "ours": answer(1.0, "b", 3.0)},
  ]
  assert compared(turns[:1])["equal"]
  found = compared(turns)
  assert not found["equal"]
  assert found["difference"] == 0.25


def test_a_case_that_fails_costs_a_line(benchmark, monkeypatch, capsys):
  compare, revision = benchmark("compare"), benchmark("revision")

  def measure(trees, case, *rest):
    if case == "lr":
      raise compare.FailedError("old: no `plan`\nworking tree: no `plan`")
    turns = [{"theirs": answer(3.0), "ours": answer(1.0, "b")}]
    return {"all": compare.compared(turns)}, {"processor": "?"}

  monkeypatch.setattr(compare, "measure", measure)
  trees = {
    "theirs": revision.Tree("old", ROOT, "1" * 40, False),
    "ours": revision.Tree("working tree", ROOT, "2" * 40, True),
  }
  flags = argparse.Namespace(turns=None, json=None)
  report = compare._compare(trees, ["lr", "cnn"], ROOT, True, flags)
  assert list(report["cases"]) == ["cnn"]
  assert len(report["failed"]["lr"]) == 2
  out = capsys.readouterr().out
  assert "old (111111111) / times of the working tree (222222222, changed)" in (
    " ".join(out.split())
  )
  assert "3.00 (3.00-3.00)" in out
  assert "differ by 0.0e+00" in out
  assert "lr could not be compared. old: no `plan`" in out


# --- worktrees ----------------------------------------------------------------


def git(folder: pathlib.Path, *arguments: str) -> str:
  names = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
  return subprocess.run(
    ["git", "-C", str(folder), *names, *arguments],
    check=True,
    capture_output=True,
    text=True,
  ).stdout


@pytest.fixture
def repository(tmp_path):
  """Two commits, and a change that is in none."""
  folder = tmp_path / "repository"
  folder.mkdir()
  git(folder, "init", "--initial-branch=main")
  for text in ("first", "second"):
    (folder / "file").write_text(text)
    git(folder, "add", "file")
    git(folder, "commit", "--message", text)
  (folder / "file").write_text("third")
  return folder


def worktrees(folder: pathlib.Path) -> int:
  return len(git(folder, "worktree", "list").splitlines())


def test_a_revision_lies_beside_the_working_tree(
  benchmark, repository, tmp_path
):
  revision, folder = benchmark("revision"), tmp_path / "other"
  ours = revision.working(repository)
  assert ours.changed
  with revision.checked_out(repository, "HEAD~1", folder) as theirs:
    assert (theirs.root / "file").read_text() == "first"
    assert (ours.root / "file").read_text() == "third"
    assert not theirs.changed
    assert theirs.commit == git(repository, "rev-parse", "HEAD~1").strip()
    assert worktrees(repository) == 2
  assert worktrees(repository) == 1
  assert not folder.exists()

  def fails():
    with revision.checked_out(repository, "main", folder):
      assert worktrees(repository) == 2
      raise KeyError

  with pytest.raises(KeyError):
    fails()
  assert worktrees(repository) == 1
  assert not folder.exists()


def test_what_is_wrong_with_a_revision_is_said(
  benchmark, repository, tmp_path, monkeypatch
):
  revision = benchmark("revision")
  error = revision.RevisionError

  def enter(name):
    with revision.checked_out(repository, name, tmp_path / "other"):
      pass

  for name in ("nothing", "--all", "HEAD:file"):
    with pytest.raises(error, match=f"--against='{name}' is no revision"):
      enter(name)
  with pytest.raises(error, match="not a git repository"):
    revision.working(tmp_path)
  (repository / "inner").mkdir()
  with pytest.raises(error, match="not the top"):
    revision.working(repository / "inner")
  (repository / ".gitmodules").write_text("")
  with pytest.raises(error, match="working tree has submodules"):
    revision.working(repository)
  monkeypatch.setenv("PATH", str(tmp_path))
  with pytest.raises(error, match="not installed"):
    enter("main")
  assert not (tmp_path / "other").exists()


HOLDS = """
import pathlib, signal, sys, time
from benchmarks import revision
# A shell's background processes ignore Ctrl-C, and so do their children.
signal.signal(signal.SIGINT, signal.default_int_handler)
root = pathlib.Path(sys.argv[1])
with revision.scratch() as folder:
  with revision.checked_out(root, "HEAD", folder / "other"):
    print(folder, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_worktree_goes_when_the_process_is_told_to_end(repository, number):
  with subprocess.Popen(
    [sys.executable, "-c", HOLDS, str(repository)],
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    text=True,
  ) as process:
    assert process.stdout is not None
    folder = pathlib.Path(process.stdout.readline().strip())
    assert worktrees(repository) == 2
    assert (folder / "other" / "file").exists()
    process.send_signal(number)
    assert process.wait(30) != 0
  assert worktrees(repository) == 1
  assert not folder.exists()


def compare(folder: pathlib.Path, *arguments: str) -> subprocess.Popen[str]:
  return subprocess.Popen(
    [sys.executable, "-m", "benchmarks.compare", *arguments],
    cwd=folder,
    env=os.environ | {"PYTHONPATH": str(folder), "JAX_PLATFORMS": "cpu"},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


@pytest.mark.integration
def test_revisions_are_compared(tmp_path):
  """Of a repository with this code, and with a commit that does not work."""
  folder = tmp_path / "repository"
  folder.mkdir()
  for name in ("fedjax_sim", "algorithms", "models", "benchmarks"):
    shutil.copytree(
      ROOT / name,
      folder / name,
      symlinks=True,
      ignore=shutil.ignore_patterns("__pycache__", "peers_", "papers"),
    )
  git(folder, "init", "--initial-branch=main")
  git(folder, "add", ".")
  git(folder, "commit", "--message=works")
  package = folder / "fedjax_sim" / "__init__.py"
  text = package.read_text()
  package.write_text(f"{text}\nraise ImportError('not written yet')\n")
  git(folder, "commit", "--all", "--message=does not")
  package.write_text(text)  # and this is in no commit

  written = tmp_path / "compare.json"
  options = ["--cases=planning", "--scale=smoke", "--turns=2"]
  process = compare(folder, "--against=main~1", *options, f"--json={written}")
  out, _ = process.communicate()
  assert process.returncode == 0, out
  report = json.loads(written.read_text())
  assert report["ours"]["changed"]
  assert not report["failed"]
  assert report["machine"]["backend"] == "cpu"
  for name in ("lr", "lr_large"):
    found = report["cases"]["planning"][name]
    assert found["equal"]
    assert found["difference"] == 0
    assert len(found["seconds"]["ours"]) == 2
    assert found["time"]["least"] > 0
    assert f"planning, {name}" in out

  process = compare(folder, "--against=main", *options)
  out, _ = process.communicate()
  assert process.returncode == 1
  expected = "planning could not be compared. main: ImportError: not written"
  assert expected in out
  assert worktrees(folder) == 1


@pytest.mark.slow
def test_processes_end_with_the_comparison():
  process = compare(ROOT, "--against=HEAD", "--cases=lr", "--turns=1000")
  deadline = time.monotonic() + 60
  made = None
  while made is None:
    assert time.monotonic() < deadline
    made = re.search(r"\S*/compare-\w+/revision", git(ROOT, "worktree", "list"))
  time.sleep(5)  # its processes have begun
  process.terminate()
  process.communicate(timeout=30)
  assert made.group() not in git(ROOT, "worktree", "list")
  listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True)
  assert made.group() not in listed.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
  ("case", "calls"),
  [
    ("lr", {"one", "all"}),
    ("start", {"cold", "warm"}),
    ("study", {"cold", "warm"}),
    ("evaluation", {"lr", "cnn"}),
  ],
)
def test_every_kind_of_case_is_measured(benchmark, tmp_path, case, calls):
  compare, revision = benchmark("compare"), benchmark("revision")
  tree = revision.Tree("working tree", ROOT, "", False)
  shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks")
  sides = {"theirs": tree, "ours": tree}
  found, _ = compare.measure(sides, case, tmp_path, True, 1)
  assert set(found) == calls
  assert all(call["equal"] for call in found.values())
