"""How the tests run: strict JAX flags, two CPU devices, shared fixtures.

A test that needs two devices takes `jax.devices("cpu")`, which are two whether
or not there is a GPU. A test marked `gpu` is skipped without one; everything
else runs on JAX's default backend, the CPU with `JAX_PLATFORMS=cpu`.
"""

import os
import pathlib
import subprocess
from collections.abc import Callable, Iterator, Sequence
from typing import Any

# In the environment, so that processes that a test starts have them too:
# what took a while to compile is kept for the next run (the limit on its size
# makes JAX lock the folder, which processes that write at once need, and go
# through all of its files, so there should be few), and several processes can
# share a GPU.
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR",
  str(pathlib.Path(__file__).resolve().parents[1] / ".cache" / "jax"),
)
os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(2**30))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import hypothesis
import jax
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

# Compilation, or a busy machine, is no failure. With the slow tests there are
# as many examples as hypothesis has by itself.
hypothesis.settings.register_profile("slow", deadline=None)
hypothesis.settings.register_profile("quick", deadline=None, max_examples=30)

jax.config.update("jax_num_cpu_devices", 2)
# With it, one run in a few hangs in a collective of several CPU devices.
jax.config.update("jax_cpu_enable_async_dispatch", False)
jax.config.update("jax_numpy_rank_promotion", "raise")
# A GPU would multiply float32 matrices in TF32.
jax.config.update("jax_default_matmul_precision", "highest")


SLOW = {
  line
  for line in (ROOT / "tests" / "slow.txt").read_text().splitlines()
  if not line.startswith("#")
}


def pytest_configure(config: pytest.Config) -> None:
  # LLVM's optimisations take most of a compilation, and what is compiled here
  # runs once or twice. With the slow tests everything is as users have it.
  quick = config.option.markexpr == "not slow"
  jax.config.update("jax_disable_most_optimizations", quick)
  hypothesis.settings.load_profile("quick" if quick else "slow")


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(
  config: pytest.Config, items: list[pytest.Item]
) -> None:
  left = set(SLOW)
  for item in items:
    names = {item.nodeid, item.nodeid.partition("[")[0]}
    if names & SLOW:
      item.add_marker(pytest.mark.slow)
      left -= names
  if left and config.args == config.getini("testpaths"):
    raise pytest.UsageError(f"tests/slow.txt names no test: {min(left)}")


def pytest_report_header() -> str:
  return f"jax {jax.__version__}, devices: {jax.devices()}"


def pytest_runtest_setup(item: pytest.Item) -> None:
  if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
    pytest.skip(f"needs a GPU, the backend is {jax.default_backend()!r}")


@pytest.fixture(scope="session")
def data_folder() -> pathlib.Path:
  """The folder of real data sets, `FEDJAX_SIM_DATA` or ../shared/data."""
  named = os.environ.get("FEDJAX_SIM_DATA")
  folder = pathlib.Path(named) if named else ROOT.parent / "shared" / "data"
  if not folder.is_dir():
    pytest.skip(f"no real data at {folder}; set FEDJAX_SIM_DATA to its folder")
  return folder


@pytest.fixture
def optimized() -> Iterator[None]:
  """All of LLVM's optimisations, for a test that computes for long."""
  before = jax.config.values["jax_disable_most_optimizations"]
  jax.config.update("jax_disable_most_optimizations", False)
  yield
  jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def x64() -> Iterator[None]:
  """Double precision while the test runs."""
  with jax.enable_x64(True):
    yield


@pytest.fixture
def popen() -> Iterator[Callable[..., subprocess.Popen[str]]]:
  """`subprocess.Popen` in a session of its own, with its output in pipes.

  Nothing is left of it when the test ends.
  """
  started: list[subprocess.Popen[str]] = []

  def call(command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(
      command, text=True, start_new_session=True, **(pipes | options)
    )
    started.append(process)
    return process

  yield call
  for process in started:
    process.kill()
    process.communicate(timeout=60)
