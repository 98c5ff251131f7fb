"""Other simulators' virtual environments, and commands that run in them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

FLUTE = "flute"


class Peer(NamedTuple):
  """Another simulator.

  Attributes:
    requirements: what pip is asked for; what a round's time hangs on, in the
      version that was measured.
    packages: whose versions are reported: its own, what it trains with, others.
    least_python: the oldest Python that it runs on.
  """

  requirements: tuple[str, ...]
  packages: tuple[str, ...]
  least_python: tuple[int, int] = (3, 11)


PEERS: Mapping[str, Peer] = {
  # FedJAX 0.0.17 calls jax.tree_map, which JAX 0.6 no longer has.
  "fedjax": Peer(
    (
      "fedjax==0.0.17",
      "jax==0.5.3",
      "jaxlib==0.5.3",
      "dm-haiku==0.0.17",
      "optax==0.2.8",
      "numpy==2.4.6",
    ),
    ("fedjax", "jax", "dm-haiku", "optax", "numpy"),
  ),
  "pfl": Peer(
    ("pfl[pytorch]==0.6.0", "torch==2.14.1", "numpy==2.4.6"),
    ("pfl", "torch", "numpy"),
  ),
  # The PyTorch that its client uses is not among Flower's own requirements.
  "flower": Peer(
    (
      "flwr[simulation]==1.42.0",
      "ray==2.55.1",
      "torch==2.14.1",
      "numpy==2.4.6",
    ),
    ("flwr", "torch", "ray", "numpy"),
  ),
  # 3.0 needs Python 3.14.
  "blazefl": Peer(
    (
      "blazefl[contrib,reproducibility]==2.0.3",
      "torch==2.14.1",
      "numpy==2.4.6",
    ),
    ("blazefl", "torch", "numpy"),
    (3, 12),
  ),
  # What its modules import for this task, in releases of today: of the torch
  # 1.11 in its own list there is none for these Pythons.
  FLUTE: Peer(
    (
      "azureml-core==1.61.0.post4",
      "cerberus==1.3.8",
      "easydict==1.13",
      "h5py==3.16.0",
      "pandas==2.3.3",
      "psutil==7.2.2",
      "pyyaml==6.0.3",
      "scikit-learn==1.8.0",
      "scipy==1.17.1",
      "setuptools==80.9.0",
      "tensorboardX==2.6.4",
      "tqdm==4.67.1",
      "wget==3.2",
      "torch==2.14.1",
      "numpy==2.4.6",
    ),
    (FLUTE, "torch", "azureml-core", "numpy"),
  ),
}
_VERSIONS = """
import importlib.metadata, json, sys
found = {}
for name in sys.argv[1:]:
  try:
    found[name] = importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    found[name] = "not installed"
print(json.dumps(found))
"""


class FailedError(RuntimeError):
  """A command failed or took too long; the message is one line."""


def call(
  command: Sequence[str | Path],
  *,
  seconds: float,
  env: Mapping[str, str] | None = None,
) -> str:
  """Run a command in a process group of its own, and return its output.

  Raises:
    FailedError: it failed, or ran out of time; then its group is killed.
  """
  with subprocess.Popen(
    [str(part) for part in command],
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    stdin=subprocess.DEVNULL,
    text=True,
    errors="replace",
    env=dict(os.environ if env is None else env),
    start_new_session=True,
  ) as process:
    try:
      output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
      # Some start processes in groups of their own, and end them when asked to.
      os.killpg(process.pid, signal.SIGTERM)
      with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
      raise FailedError(f"took more than {seconds:.0f} s") from None
    finally:  # also what it left behind
      with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
  if process.returncode:
    raise FailedError(reason(output) or f"exit status {process.returncode}")
  return output


def reason(output: str) -> str:
  """Return the last line of the output that has "error" in it, or the last."""
  lines = [line.strip() for line in output.splitlines() if line.strip()]
  errors = [line for line in lines if "error" in line.lower()]
  return (errors or lines or [""])[-1][:300]


def environment(
  folder: Path, requirements: Sequence[str], *, python: str, seconds: float
) -> Path:
  """Return a virtual environment's interpreter; make it where there is none.

  Raises:
    FailedError: it cannot be made.
  """
  interpreter, done = folder / "bin" / "python", folder / "requirements.json"
  wanted = json.dumps([python, *requirements])
  if done.exists() and done.read_text() == wanted:
    return interpreter
  shutil.rmtree(folder, ignore_errors=True)
  call([python, "-m", "venv", folder], seconds=seconds)
  pip = ["-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
  call([interpreter, *pip, *requirements], seconds=seconds)
  done.write_text(wanted)
  return interpreter


def python_for(
  pythons: Sequence[str], least: tuple[int, int], *, seconds: float
) -> str:
  """Return the first interpreter that is no older than a version.

  Raises:
    FailedError: there is none, or one does not run.
  """
  code = "import sys; print(*sys.version_info[:2])"
  for python in pythons:
    try:
      printed = call([python, "-c", code], seconds=seconds)
    except OSError as error:
      raise FailedError(f"{python}: {error.strerror}") from error
    major, minor = printed.split()[-2:]
    if (int(major), int(minor)) >= least:
      return python
  wanted = ".".join(map(str, least))
  raise FailedError(
    f"needs Python {wanted} or newer; --python={','.join(pythons)} has none"
  )


def versions(
  interpreter: str | Path,
  packages: Sequence[str],
  env: Mapping[str, str] | None = None,
) -> dict[str, str]:
  """Return the versions of packages that an interpreter finds.

  Raises:
    FailedError: it does not run.
  """
  found = call([interpreter, "-c", _VERSIONS, *packages], seconds=60, env=env)
  by_package: dict[str, str] = json.loads(found.splitlines()[-1])
  return by_package
