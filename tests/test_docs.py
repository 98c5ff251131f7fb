"""The documents are true: their commands, code, tables and links."""

import ast
import contextlib
import importlib
import io
import json
import os
import pathlib
import pkgutil
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
import tomllib
import types
import typing
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
import pytest

import fedjax_sim
from fedjax_sim import reporting
from fedjax_sim.algorithms import ALGORITHMS
from fedjax_sim.cli import listing
from fedjax_sim.cli.main import main
from fedjax_sim.config import components, default_config
from fedjax_sim.core.weights import read_weights
from tiers import slow_but
from workdirs import skip_pictures

pytestmark = pytest.mark.integration

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
DOCUMENTS = (
  *(README, CONTRIBUTING),
  *sorted((ROOT / "docs").glob("*.md")),
  *sorted((ROOT / "docs" / "guides").glob("*.md")),
)
INSTALL = "python3 -m venv .venv && . .venv/bin/activate && pip install -e "


class Block(NamedTuple):
  """A fenced block, with the paragraph before it."""

  language: str
  code: str
  lead: str


def blocks(text: str) -> list[Block]:
  found = []
  fence = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", re.M | re.S)
  for match in fence.finditer(text):
    indent, language, code = match.groups()
    code = re.sub(f"^{indent}", "", code, flags=re.M)
    lead = text[: match.start()].rstrip().rpartition("\n\n")[2]
    found.append(Block(language, code, " ".join(lead.split())))
  return found


def section(path: pathlib.Path, title: str) -> str:
  (body,) = re.findall(
    rf"^## {title}\n(.*?)(?=^## |\Z)", path.read_text(), re.M | re.S
  )
  return body


def table(text: str) -> list[list[str]]:
  """The cells of the text's only table, without its head."""
  rows = [line for line in text.splitlines() if line.startswith("|")]
  return [[c.strip() for c in row[1:-1].split(" | ")] for row in rows[2:]]


def run(command: list[str], folder: pathlib.Path) -> str:
  """Run a command with the package of `folder`, or else of the root.

  A command of the root's own package runs in this process, which has JAX; a
  script as well, but for one that chooses devices, which are chosen here.
  """
  own = (folder / "fedjax_sim").exists()
  if command[0] == "fedjax-sim" and not own:
    return run_here(command[1:], folder)
  if command[1] == "-c" and not own and "setup()" not in command[2]:
    return script_here(command[2], folder)
  if command[0] == "fedjax-sim":
    command = [sys.executable, "-m", "fedjax_sim", *command[1:]]
  result = subprocess.run(
    command,
    cwd=folder,
    env=os.environ | {"PYTHONPATH": str(folder if own else ROOT)},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    check=False,
  )
  assert result.returncode == 0, f"{command}\n{result.stdout}"
  return result.stdout


@contextlib.contextmanager
def as_a_user(folder: pathlib.Path) -> Iterator[io.StringIO]:
  """Be in a folder, with a user's settings; yield what is printed."""
  with (
    contextlib.chdir(folder),
    contextlib.redirect_stdout(io.StringIO()) as printed,
    warnings.catch_warnings(action="default"),  # they do not end a user's run
    jax.numpy_rank_promotion("allow"),
  ):
    yield printed


def run_here(arguments: list[str], folder: pathlib.Path) -> str:
  """Return what `fedjax-sim` prints; the current folder is `folder`."""
  with as_a_user(folder) as printed:
    code = main(arguments)
  assert code == 0, f"{arguments}\n{printed.getvalue()}"
  return printed.getvalue()


def script_here(code: str, folder: pathlib.Path) -> str:
  """Return what a script prints; the current folder is `folder`."""
  with as_a_user(folder) as printed, tempfile.TemporaryDirectory() as elsewhere:
    path = pathlib.Path(elsewhere) / "script.py"
    path.write_text(code)
    runpy.run_path(str(path), run_name="__main__")
  return printed.getvalue()


def commands(shell: str) -> list[list[str]]:
  """The commands of a block, as lists of words."""
  lines = shell.replace("\\\n", " ").replace("&&\n", "&& ").splitlines()
  return [shlex.split(line) for line in lines if line]


def follow(text: str, folder: pathlib.Path) -> None:
  """Does what the blocks of a text say, one after the other.

  "Write `FILE`" makes a file of the block that follows; "add to `FILE`" puts
  the lines of all blocks up to the next step into a registry; other Python is
  run as a script, `fedjax-sim` as a command.
  """
  registry = None
  for language, code, lead in blocks(text):
    written = re.search(r"Write `(\S+)`", lead)
    if added := re.search(r"add to `(\S+)`", lead):
      registry = folder / added[1]
    elif not lead.endswith("```"):  # a block after a block is the same step's
      registry = None
    if written:
      assert not (folder / written[1]).exists(), f"there is a {written[1]}"
      (folder / written[1]).write_text(code)
    elif registry is not None:
      add(registry, code)
    elif language == "python":
      run([sys.executable, "-c", code], folder)
    elif language == "sh":
      for command in commands(code):
        run(command, folder)


def add(registry: pathlib.Path, line: str) -> None:
  """Adds an import before the first, or an entry at the dictionary's end."""
  text = registry.read_text()
  if line.startswith("from "):
    registry.write_text(
      text.replace("from fedjax_sim", f"{line}from fedjax_sim", 1)
    )
  else:
    registry.write_text(text.replace("\n}\n", f"\n{line}}}\n", 1))


def fields(tree, prefix: str = "") -> dict[str, object]:
  flat: dict[str, object] = {}
  for key, value in tree.items():
    if isinstance(value, dict):
      flat |= fields(value, f"{prefix}{key}.")
    else:
      flat[prefix + key] = value
  return flat


DEFAULT = fields(default_config().to_dict())
FIELDS = {
  **DEFAULT,
  **{
    f"{slot.section}.{key}": field.default
    for slot in components.SLOTS
    for name in slot.registry
    for key, field in slot.fields(name).items()
  },
  **{
    f"{slot.section}.{name}.{key}": field.default
    for slot in components.LABELED
    for name in slot.registry
    for key, field in slot.fields(name).items()
  },
}


# --- README -------------------------------------------------------------------


def test_the_readme_has_two_setup_commands():
  shells = [b for b in blocks(README.read_text()) if b.language == "sh"]
  setups = [b.code for b in shells if "venv" in b.code or "pip" in b.code]
  assert len(setups) == 2
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  jobs = []
  for setup in setups:
    subprocess.run(["sh", "-n", "-c", setup], check=True)
    line = setup.replace("&&\n ", "&&").strip()
    assert "\n" not in line  # one command
    assert line.startswith(INSTALL)
    what, _, job = line.removeprefix(INSTALL).partition(" && ")
    for extra in re.findall(r"\[(\w+)\]", what):
      assert extra in project["optional-dependencies"]
    jobs.append(job)
  main, tests = map(shlex.split, jobs)
  assert main[0] in project["scripts"]
  assert tests == ["python", "-m", "pytest", "-n", "auto"]


def test_the_main_command_prints_and_leaves_what_the_readme_says(tmp_path):
  (tmp_path / "configs").symlink_to(ROOT / "configs")
  text = section(README, "Start")
  setup, _, output = blocks(text)
  _, _, job = setup.code.replace("&&\n ", "&&").rpartition("&& ")
  printed = run(shlex.split(job), tmp_path)
  lines = dict(line.split(maxsplit=1) for line in printed.splitlines() if line)
  for line in output.code.splitlines():
    name, value = line.split(maxsplit=1)
    if "/" in name:  # on other devices float sums have another order
      assert float(lines[name]) == pytest.approx(float(value), rel=0.05)
    else:
      assert lines[name] == value
  assert float(lines["test/accuracy"]) >= 0.93

  (workdir,) = (tmp_path / "runs").iterdir()
  summary = json.loads((workdir / "summary.json").read_text())
  assert summary["wall_seconds"] < 60
  left = {path.name for path in workdir.iterdir() if path.name[0] != "."}
  named = set(re.findall(r"`([\w.]+)/?`", "".join(r[0] for r in table(text))))
  # The data hold nothing out, and clients keep nothing.
  assert named == left | {"clients_seen.csv", "client_states"}


WITH_PYTHON = (
  "In a script or a notebook",
  "Your own model and data",
  "A sweep, a schedule",
)


@pytest.mark.parametrize(
  "title",
  [
    "The command line",
    *slow_but(WITH_PYTHON[:1] + WITH_PYTHON[2:], WITH_PYTHON),
  ],
)
def test_the_readme_can_be_followed(title, tmp_path, monkeypatch):
  skip_pictures(monkeypatch)
  (tmp_path / "configs").symlink_to(ROOT / "configs")
  follow(section(README, title), tmp_path)


def test_every_python_block_of_the_readme_is_followed():
  titles = re.findall(r"^## (.*)$", README.read_text(), re.M)
  with_code = {
    title
    for title in titles
    if any(b.language == "python" for b in blocks(section(README, title)))
  }
  assert with_code == {"The command line", *WITH_PYTHON}


def test_the_fields_that_the_readme_names_exist():
  sections = {name.split(".")[0] for name in FIELDS}
  named = re.findall(r"`(\w+\.\w+)(?:=\S*)?`", README.read_text())
  named = [n for n in named if n.split(".")[0] in sections]
  assert named
  assert set(named) <= FIELDS.keys()


# --- docs ---------------------------------------------------------------------


def test_the_config_table_is_the_default_config():
  rows = table((ROOT / "docs" / "config.md").read_text())
  assert all(len(row) == 3 and row[2] for row in rows)
  stated = {
    name.strip("`"): ast.literal_eval(default.strip("`"))
    for name, default, _ in rows
  }
  assert len(stated) == len(rows)
  assert stated.keys() == DEFAULT.keys()
  typed = lambda given: {k: (type(v), v) for k, v in given.items()}
  assert typed(stated) == typed(DEFAULT)


def test_the_tables_of_components_are_those_of_the_code():
  text = (ROOT / "docs" / "components.md").read_text()
  assert text == listing.markdown() + "\n"


def test_every_row_of_the_converter_has_its_test():
  rows = table(section(ROOT / "docs" / "flute.md", "Numbers"))
  assert len(rows) > 20
  named = set()
  for row in rows:
    assert len(row) == 5, row[0]
    file, _, test = row[4].strip("`").partition("::")
    assert f"\ndef {test}(" in (ROOT / "tests" / file).read_text(), row[0]
    named.add((file, test))
  for file in ("test_flute.py", "test_flute_optimizers.py"):
    text = (ROOT / "tests" / file).read_text()
    tests = re.findall(r"^def (test_\w+)", text, re.M)
    assert {(file, test) for test in tests} <= named


def test_the_design_names_every_module():
  rows = table(section(ROOT / "docs" / "design.md", "Where things are"))
  named = {
    row[0].strip("`/"): set(re.findall(r"`(\w+)\.py`", row[2])) for row in rows
  }
  folder = ROOT / "fedjax_sim"
  found: dict[str, set[str]] = {}
  for path in folder.rglob("*.py"):
    package = path.parent.relative_to(folder).as_posix()
    if package not in (".", "algorithms", "models"):
      found.setdefault(package, set()).add(path.stem)
  assert named == {k: v - {"__init__"} for k, v in found.items()}


@pytest.mark.parametrize(
  "name",
  [
    "hypergradients.md",
    "privacy.md",
    "privacy_local.md",
    "privacy_secure.md",
    "robust.md",
  ],
)
@pytest.mark.slow
def test_the_code_of_a_document_runs(name, tmp_path):
  found = blocks((ROOT / "docs" / name).read_text())
  code = [block.code for block in found if block.language == "python"]
  assert code
  (tmp_path / "script.py").write_text("\n".join(code))
  assert run([sys.executable, "script.py"], tmp_path).strip()


def test_preprocessing_can_be_followed(tmp_path, monkeypatch):
  skip_pictures(monkeypatch)
  (tmp_path / "configs").symlink_to(ROOT / "configs")
  path = ROOT / "docs" / "preprocessing.md"
  follow(section(path, "Tables"), tmp_path)
  code = [block.code for block in blocks(section(path, "In Python"))]
  run([sys.executable, "-c", "\n".join(code)], tmp_path)


def test_weights_can_be_followed(tmp_path, monkeypatch):
  skip_pictures(monkeypatch)
  (tmp_path / "configs").symlink_to(ROOT / "configs")
  follow((ROOT / "docs" / "weights.md").read_text(), tmp_path)
  left = {path.name for path in (tmp_path / "runs").glob("*.*")}
  assert left == {
    *("model.safetensors", "model.safetensors.json"),
    *("model.stablehlo", "model.stablehlo.json"),
    *("best.npz", "best.npz.json"),
    *("lenet.safetensors", "lenet_torch.safetensors"),
  }


def test_the_move_from_flute_can_be_followed(tmp_path, monkeypatch):
  skip_pictures(monkeypatch)
  (tmp_path / "docs").symlink_to(ROOT / "docs")
  text = (ROOT / "docs" / "guides" / "from_flute.md").read_text()
  follow(text.replace("python docs", f"{sys.executable} docs"), tmp_path)
  runs = tmp_path / "runs" / "gestures"
  summary = json.loads((runs / "run" / "summary.json").read_text())
  for name in ("test/accuracy", "test/top_2"):
    (said,) = re.findall(rf"`{name}` (0\.\d+)", text)
    assert summary[name] == pytest.approx(float(said), abs=0.02)
  assert summary["best/test/top_2"] >= summary["test/top_2"] - 1e-6
  same = [
    read_weights(runs / f"{name}.safetensors") for name in ("best", "back")
  ]
  for name, array in same[0].arrays.items():
    np.testing.assert_array_equal(array, same[1].arrays[name])
  assert (runs / "more" / "summary.json").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_diloco_can_be_followed(tmp_path, data_folder, monkeypatch):
  monkeypatch.setenv("FEDJAX_SIM_DATA", str(data_folder))
  (tmp_path / "configs").symlink_to(ROOT / "configs")
  text = (ROOT / "docs" / "guides" / "diloco.md").read_text()
  for said, quick in (
    ("diloco.py", "diloco.py:smoke"),
    ("steps=50", "steps=3"),
    ("rounds=500", "rounds=5"),
  ):
    text = text.replace(said, quick)
  follow(text, tmp_path)
  assert len(list((tmp_path / "runs").glob("*/summary.json"))) == 6


@pytest.mark.slow
def test_transformers_can_be_followed(tmp_path, data_folder, monkeypatch):
  monkeypatch.setenv("FEDJAX_SIM_DATA", str(data_folder))
  for name in ("configs", "docs"):
    (tmp_path / name).symlink_to(ROOT / name)
  path = ROOT / "docs" / "transformers.md"
  for part in ("From scratch", "Text to tokens", "To a Hugging Face folder"):
    text = section(path, part).replace("$FEDJAX_SIM_DATA", str(data_folder))
    follow(text.replace("python docs", f"{sys.executable} docs"), tmp_path)
  assert len(list((tmp_path / "runs").glob("*/summary.json"))) == 3


@pytest.mark.slow
def test_adapters_can_be_followed(tmp_path):
  (tmp_path / "configs").symlink_to(ROOT / "configs")
  text = (ROOT / "docs" / "adapters.md").read_text()
  follow(text, tmp_path)
  sent = []
  for name in ("lora", "base"):
    rows = (tmp_path / "runs" / name / "metrics.jsonl").read_text()
    sent.append(json.loads(rows.splitlines()[0])["bytes_down"])
  assert "sends {:,} bytes down there, and {:,}".format(*sent) in text


def test_importing_can_be_followed(tmp_path):
  path = ROOT / "docs" / "importing.md"
  for part in ("In Python", "Other clients, other splits", "To other formats"):
    follow(section(path, part), tmp_path)
  assert (tmp_path / "runs" / "mine.h5").is_file()


def test_reports_can_be_followed(tmp_path, monkeypatch):
  monkeypatch.setattr(reporting, "draw_curves", lambda *_: None)
  (tmp_path / "configs").symlink_to(ROOT / "configs")
  path = ROOT / "docs" / "report.md"
  for part in ("One run", "Several runs"):
    shells = [b for b in blocks(section(path, part)) if b.language == "sh"]
    (shell,) = shells
    for command in loops(shell.code.replace("rounds=20", "rounds=2")):
      run(command, tmp_path)
  follow(section(path, "For a paper"), tmp_path)
  written = {"compared.html", "curves.pdf", "accuracy.svg"}
  left = {p.name for p in (tmp_path / "runs").iterdir() if p.is_file()}
  assert left == written
  page = (tmp_path / "runs" / "fedavg" / "report.html").read_text()
  titles = re.findall(r"<h2[^>]*>(.*?)</h2>", page)
  rows = [row[0] for row in table(section(path, "One run"))]
  assert titles == [name for row in rows for name in row.split(", ")]


def loops(shell: str) -> list[list[str]]:
  """The commands of a block, those of a loop `for name in ...` for each."""
  loop = re.search(r"^for name in (.*); do\n(.*?)^done\n", shell, re.M | re.S)
  if loop is None:
    return commands(shell)
  names, body = loop[1].split(), textwrap.dedent(loop[2])
  inside = [c for n in names for c in commands(body.replace("$name", n))]
  return [*inside, *commands(shell[loop.end() :])]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_nothing_is_left_to_be_filled_in(path):
  text = path.read_text()
  assert not re.search(r"@[A-Z]+@|TODO|FIXME|^[A-Z]{3,}$", text, re.M)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
  for target in re.findall(r"\]\(([^)]+)\)", path.read_text()):
    if not target.startswith(("http://", "https://")):
      name, _, anchor = target.partition("#")
      there = path.parent / name if name else path
      assert there.exists(), target
      titles = (
        re.findall(r"^#+ (.*)$", there.read_text(), re.M) if anchor else ()
      )
      anchors = {
        re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles
      }
      assert not anchor or anchor in anchors, target


def test_every_algorithm_is_in_the_table():
  text = (ROOT / "docs" / "algorithms.md").read_text()
  assert re.findall(r"^\| `(\w+)` \|", text, re.M) == sorted(ALGORITHMS)


# --- CONTRIBUTING and the package ---------------------------------------------


def test_an_extension_by_the_steps_of_contributing(tmp_path):
  tree = tmp_path / "tree"
  for name in ("fedjax_sim", "algorithms", "models", "configs"):
    ignore = shutil.ignore_patterns("*.pyc.*")  # being written
    shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignore)
  follow(
    section(CONTRIBUTING, "How to add a component"),
    tree,
  )
  workdir = tree / "runs" / "smoke"
  config = json.loads((workdir / "config.json").read_text())
  parts = ("algorithm", "model", "data", "aggregator", "sampler")
  assert [config[part]["name"] for part in parts] == [
    "full_length",
    "tanh_network",
    "wine",
    "clipped_mean",
    "semi_cyclic",
  ]
  assert config["aggregator"]["radius"] == 0.5
  assert config["sampler"]["half_day"] == 5
  assert config["transforms"]["scaled_sign"] == {
    "name": "scaled_sign",
    "factor": 0.9,
    "error_feedback": True,
    "ef21": False,
  }
  summary = json.loads((workdir / "summary.json").read_text())
  assert summary["rounds"] == 1
  assert 0 < summary["seen/loss"] < 2


def test_public_names_exist_and_hide_no_module():
  modules = {path.stem for path in (ROOT / "fedjax_sim").iterdir()}
  assert fedjax_sim.__all__ == sorted(fedjax_sim.__all__)
  assert not modules & set(fedjax_sim.__all__)


def test_packages_export_their_own_names_alone():
  found = pkgutil.walk_packages(fedjax_sim.__path__, "fedjax_sim.")
  names = ["fedjax_sim", *(module.name for module in found if module.ispkg)]
  for package in map(importlib.import_module, names):
    for name in getattr(package, "__all__", ()):
      where, value = f"{package.__name__}.{name}", getattr(package, name)
      assert not name.startswith("_"), where
      assert value is not getattr(typing, name, None), where
      if isinstance(value, types.ModuleType):
        assert value.__name__.startswith("fedjax_sim."), where
