"""How the tests run: strict JAX flags, two CPU devices, shared fixtures.

A test that needs two devices takes `jax.devices("cpu")`, which are two whether
or not there is a GPU. A test marked `gpu` is skipped without one; everything
else runs on JAX's default backend, the CPU with `JAX_PLATFORMS=cpu`.
"""

import contextlib
import gc
import os
import pathlib
import subprocess
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

# In the environment, so that processes that a test starts have them too: all
# that is compiled is kept for the next run, and several processes can share a
# GPU.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import hypothesis
import jax
import numpy as np
import pytest

import programs
from workdirs import skip_pictures

ROOT = pathlib.Path(__file__).resolve().parents[1]

# The user's, so that checkouts share it. JAX could limit its size, but then
# reads all of its files whenever it adds one.
CACHE = (
  pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
  / "fedjax_sim"
  / "tests"
)
CACHE_BYTES = 2**30
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE)
  jax.config.update("jax_compilation_cache_dir", str(CACHE))

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

# XLA's newer kernels for fusions, and splitting a program to compile on many
# threads, take two thirds of a compilation. XLA ends a process that names a
# flag it does not know, hence the version.
KERNELS = "xla_cpu_use_fusion_emitters"
QUICK_FLAGS = f" --{KERNELS}=false --xla_cpu_parallel_codegen_split_count=1"
FLAGS_KNOWN = jax.__version_info__ < (0, 11)

BEGAN = pytest.StashKey[tuple[float, float]]()
QUICK = pytest.StashKey[bool]()


def pytest_addoption(parser: pytest.Parser) -> None:
  # Three times what such a test may take on a usual machine: others are slower.
  help = "a test without a mark that takes longer than this fails"
  parser.addini("seconds_of_a_default_test", help, default="30")


def pytest_configure(config: pytest.Config) -> None:
  # Compiling takes most of the time, and what is compiled here runs once or
  # twice. With the slow tests everything is as users have it.
  quick = "not slow" in config.option.markexpr
  config.stash[QUICK] = quick
  jax.config.update("jax_disable_most_optimizations", quick)
  if quick:  # for processes that a test starts; xdist's inherit it
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
  hypothesis.settings.load_profile("quick" if quick else "slow")
  flags = os.environ.get("XLA_FLAGS", "")  # xdist's processes inherit them
  if quick and FLAGS_KNOWN and KERNELS not in flags:
    os.environ["XLA_FLAGS"] = flags + QUICK_FLAGS
  if not hasattr(config, "workerinput"):  # not in each of xdist's processes
    forget_oldest(CACHE, CACHE_BYTES)


def forget_oldest(folder: pathlib.Path, limit: int) -> None:
  """Delete the files that were written first, until `limit` bytes are left."""
  files = []
  for path in folder.glob("*"):
    with contextlib.suppress(FileNotFoundError):  # another run deletes, too
      info = path.stat()
      files.append((info.st_mtime, info.st_size, path))
  total = sum(size for _, size, _ in files)
  for _, size, path in sorted(files):
    if total <= limit:
      return
    path.unlink(missing_ok=True)
    total -= size


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """Put files with whole programs first, so that none is left at the end.

  Several processes take files in this order; one that takes long would keep
  the last of them busy alone.
  """
  long = {i.path for i in items if i.get_closest_marker("integration")}
  items.sort(key=lambda item: item.path not in long)


def pytest_collection_finish() -> None:
  # Tracing makes many objects, and looking for cycles among them and all that
  # was imported takes a tenth of the time.
  gc.freeze()
  gc.set_threshold(50_000, 20, 20)


def pytest_report_header() -> str:
  return f"jax {jax.__version__}, devices: {jax.devices()}"


def seconds() -> tuple[float, float]:
  """Seconds on the clock, and of processors, its children's included."""
  return time.perf_counter(), sum(os.times()[:4])


@pytest.hookimpl(tryfirst=True)  # before fixtures
def pytest_runtest_setup(item: pytest.Item) -> None:
  item.stash[BEGAN] = seconds()
  if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
    pytest.skip(f"needs a GPU, the backend is {jax.default_backend()!r}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
  item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
  """Fail a test of the default tier that takes too long.

  On a busy machine every test takes long, but not many seconds of processors;
  with several processors it is the other way around. So both have to be over
  the limit, and whatever else the machine does fails no test.
  """
  report = yield
  if not (report.when == "call" and report.passed and item.config.stash[QUICK]):
    return report
  if any(map(item.get_closest_marker, ("integration", "slow", "gpu"))):
    return report
  limit = float(item.config.getini("seconds_of_a_default_test"))
  taken = min(np.subtract(seconds(), item.stash[BEGAN]))
  if taken > limit:
    report.outcome = "failed"
    report.longrepr = (
      f"{item.nodeid} took {taken:.1f} s, of at most {limit:g} s "
      "(seconds_of_a_default_test). Make it smaller, or mark it `integration` "
      "or `slow`."
    )
  return report


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
  """XLA's usual kernels, for a test that compares bits of several programs.

  Of programs that are compiled with `Lowered.compile`, as the rounds are.
  """
  compile = jax.stages.Lowered.compile

  def with_usual_kernels(
    lowered: jax.stages.Lowered,
    compiler_options: dict[str, Any] | None = None,
    **more: Any,
  ) -> jax.stages.Compiled:
    options = {KERNELS: True, **(compiler_options or {})}
    return compile(lowered, options, **more)

  if FLAGS_KNOWN and jax.default_backend() == "cpu":
    monkeypatch.setattr(jax.stages.Lowered, "compile", with_usual_kernels)


@pytest.fixture(scope="session")
def data_folder() -> pathlib.Path:
  """The folder of real data sets, `FEDJAX_SIM_DATA` or ../shared/data."""
  named = os.environ.get("FEDJAX_SIM_DATA")
  folder = pathlib.Path(named) if named else ROOT.parent / "shared" / "data"
  if not folder.is_dir():
    pytest.skip(f"no real data at {folder}; set FEDJAX_SIM_DATA to its folder")
  return folder


@pytest.fixture
def real_data(
  data_folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> pathlib.Path:
  """The folder of real data sets, where configs find them, too."""
  monkeypatch.setenv("FEDJAX_SIM_DATA", str(data_folder))
  return data_folder


@pytest.fixture(scope="module")
def same_programs(request: pytest.FixtureRequest) -> Iterator[None]:
  """A module's runs compile what is the same once; not with the slow tests."""
  with pytest.MonkeyPatch.context() as patch:
    if request.config.stash[QUICK]:
      programs.share(patch)
    yield


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
  """Runs leave no curves and no report, which take longer than a quick run."""
  skip_pictures(monkeypatch)


@pytest.fixture
def optimized() -> Iterator[None]:
  """All of LLVM's optimizations, for a test that computes for long."""
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
