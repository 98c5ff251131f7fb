"""Every notebook runs from its first cell to its last, and draws.

pytest -m slow tests/test_notebooks.py
"""

import os
import pathlib

import nbclient
import nbformat
import pytest

pytestmark = pytest.mark.integration

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = [
  pytest.param(
    path,
    marks=pytest.mark.slow if path.stem == "gradient_inversion" else (),
    id=path.stem,
  )
  for path in sorted((ROOT / "notebooks").glob("*.ipynb"))
]


@pytest.mark.parametrize("path", NOTEBOOKS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_notebook_runs(path, monkeypatch, tmp_path):
  monkeypatch.setenv("PYTHONPATH", str(ROOT))
  monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
  monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
  assert "JAX_COMPILATION_CACHE_DIR" in os.environ
  notebook = nbformat.read(path, as_version=4)
  for cell in notebook.cells:  # what is stored holds no results
    assert not cell.get("outputs")
  nbclient.NotebookClient(
    notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}
  ).execute()
  outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
  assert sum("image/png" in o.get("data", {}) for o in outputs) >= 3
  text = "".join(o.get("text", "") for o in outputs if "text" in o)
  assert text.strip()
  (tmp_path / "done.ipynb").write_text(nbformat.writes(notebook))
