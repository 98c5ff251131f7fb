"""PyTorch's weights, converted as docs/weights.md shows, give its outputs."""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import pytest

from fedjax_sim.core.weights import read_weights

ROOT = pathlib.Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "docs" / "examples" / "torch_weights.py"
DOCUMENT = ROOT / "docs" / "weights.md"


def test_the_page_shows_functions_of_the_script():
  shown = re.findall(
    r"^```python\n(def .*?)^```$", DOCUMENT.read_text(), re.M | re.S
  )
  source = SCRIPT.read_text()
  assert len(shown) == 1
  for function in shown[0].split("\n\n\n"):
    assert function.strip() in source, function


@pytest.mark.integration
@pytest.mark.skipif(
  importlib.util.find_spec("torch") is None,
  reason="PyTorch is not installed: pip install 'fedjax_sim[benchmarks]'",
)
def test_converted_models_say_what_pytorch_says(tmp_path):
  done = subprocess.run(
    [sys.executable, str(SCRIPT), str(tmp_path / "weights")],
    env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  found = re.findall(
    r"(\w+)\.safetensors: largest difference (\S+)", done.stdout
  )
  assert [name for name, _ in found] == ["images", "text", "words"]
  assert all(float(difference) < 1e-5 for _, difference in found)
  arrays = read_weights(tmp_path / "weights" / "text.safetensors").arrays
  assert arrays["reader/layers/1/recurrent"].shape == (256, 1024)
