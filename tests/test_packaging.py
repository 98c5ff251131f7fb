"""What a user gets: the wheel, built from the source distribution alone."""

import os
import pathlib
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest

pytestmark = pytest.mark.integration

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDERS = ("algorithms", "models")  # packaged inside fedjax_sim
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "fedjax_sim", *FOLDERS)


def run(*command: str, cwd: pathlib.Path, **environment: str) -> str:
  result = subprocess.run(
    command,
    cwd=cwd,
    env=os.environ | environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    check=False,
  )
  assert result.returncode == 0, result.stdout
  return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """The wheel; the build leaves nothing behind in the source tree."""
  folder = tmp_path_factory.mktemp("packaging")
  tree = folder / "tree"
  tree.mkdir()
  for name in (*SOURCES, "configs", "tests"):
    source = ROOT / name
    if source.is_dir():
      ignore = shutil.ignore_patterns("__pycache__")
      shutil.copytree(source, tree / name, symlinks=True, ignore=ignore)
    else:
      shutil.copy(source, tree / name)
  command = ("build", "--no-isolation", "--outdir", str(folder / "dist"))
  run(sys.executable, "-m", *command, cwd=tree)
  (wheel,) = (folder / "dist").glob("*.whl")
  return wheel


@pytest.fixture(scope="module")
def unpacked(wheel: pathlib.Path) -> pathlib.Path:
  folder = wheel.parent / "unpacked"
  with zipfile.ZipFile(wheel) as archive:
    archive.extractall(folder)
  return folder


def test_links_lead_to_the_folders() -> None:
  for name in FOLDERS:
    link = ROOT / "fedjax_sim" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"


def test_wheel_has_one_top_level_package(unpacked: pathlib.Path) -> None:
  names = {path.name for path in unpacked.iterdir()}
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  assert names == {
    "fedjax_sim",
    f"fedjax_sim-{project['version']}.dist-info",
  }


def test_wheel_has_every_module(unpacked: pathlib.Path) -> None:
  expected = {"fedjax_sim/py.typed"}
  for folder in ("fedjax_sim", *FOLDERS):
    for path in (ROOT / folder).rglob("*.py"):
      name = path.relative_to(ROOT).as_posix()
      expected.add(f"fedjax_sim/{name}" if folder in FOLDERS else name)
  for path in (ROOT / "fedjax_sim" / "reporting").glob("*/templates/*"):
    expected.add(path.relative_to(ROOT).as_posix())
  found = {
    path.relative_to(unpacked).as_posix()
    for path in (unpacked / "fedjax_sim").rglob("*")
    if path.is_file()
  }
  assert "fedjax_sim/algorithms/__init__.py" in found
  assert "fedjax_sim/models/__init__.py" in found
  assert found == expected


def test_wheel_has_metadata(unpacked: pathlib.Path) -> None:
  (info,) = unpacked.glob("*.dist-info")
  metadata = (info / "METADATA").read_text()
  assert "License-Expression: Apache-2.0" in metadata
  assert (info / "licenses" / "LICENSE").is_file()
  scripts = (info / "entry_points.txt").read_text()
  assert "fedjax-sim = fedjax_sim.cli.main:main" in scripts


def test_wheel_imports_elsewhere(unpacked: pathlib.Path) -> None:
  """Away from the source tree, its packages import from the wheel."""
  code = (
    "import fedjax_sim, fedjax_sim.algorithms, fedjax_sim.models\n"
    "for module in fedjax_sim, fedjax_sim.algorithms, fedjax_sim.models:\n"
    "  print(module.__file__)"
  )
  path = str(unpacked)
  output = run(sys.executable, "-c", code, cwd=unpacked, PYTHONPATH=path)
  files = output.splitlines()[-3:]
  assert all(file.startswith(path) for file in files), output
