"""One session for every test: two virtual CPU devices, strict numerics, no GPU unless asked for with `-m gpu`.

On a CPU, shapes in signatures are checked as functions are called, and XLA optimizes nothing: nine tenths of the time
of these tests is compilation. Tests that run a program often ask for the fixture `optimized`. What one process has
compiled the others of the session read from a folder.
"""

from __future__ import annotations

import faulthandler
import functools
import gc
import os
import re
import shutil
import signal
import tempfile
import time
from importlib import metadata
from pathlib import Path

import hypothesis
import jaxtyping
import pytest

hypothesis.settings.register_profile("quick", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=2000)  # --hypothesis-profile=thorough
hypothesis.settings.load_profile("quick")


def pytest_addoption(parser: pytest.Parser):
  parser.addoption(
    "--longbench_dir",
    default=os.environ.get("SPARSE_SERVE_LONGBENCH_DIR"),
    help="LongBench's folder, the one that holds data/; by default $SPARSE_SERVE_LONGBENCH_DIR",
  )


# Packages and modules whose annotations are checked. Values that jax also makes of other things than arrays (shardings,
# sentinels) are checked by test_shapes.py.
CHECKED_ROOMS = (
  "attention.audit",
  "attention.decode",
  "attention.prefill",
  "models.llama",
  "models.sampling",
  "memory.eviction",
  "memory.loads",
  "memory.saves",
)
CHECKED = ("pallas_kernels", *(f"sparse_serve_jax.{room}" for room in CHECKED_ROOMS))
# Level 1 for what is optimized: compiling at 2 takes longer than it saves here. Nearly half of that time goes into the
# code generator of fusions, which jaxlib 0.10 can do without, and a fifth of the rest into cutting a program into parts
# that compile beside each other. Later ones have no such flag, and XLA ends a process for a flag that it does not know.
CPU_FLAGS = ("--xla_backend_optimization_level=1",)
if metadata.version("jaxlib").startswith("0.10."):
  CPU_FLAGS += ("--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1")


def pytest_configure(config: pytest.Config):
  """Sets the environment, which processes that tests start inherit."""
  if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # so a shell starts what runs behind it; processes inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
  gc.set_threshold(
    100_000, 20, 50
  )  # tracing makes many objects; by default a tenth of its time is to look through them
  on_gpu = re.search(r"(?<!not )\bgpu\b", config.option.markexpr)
  flags = os.environ.get("XLA_FLAGS", "").split()
  given = {flag.partition("=")[0] for flag in flags}
  ours = ("--xla_force_host_platform_device_count=2", *(() if on_gpu else CPU_FLAGS))
  os.environ["XLA_FLAGS"] = " ".join([*flags, *(flag for flag in ours if flag.partition("=")[0] not in given)])
  if on_gpu:
    from sparse_serve_jax import runtime

    runtime.configure()
  else:
    jaxtyping.install_import_hook(CHECKED, "beartype.beartype")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")  # level 0
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
      folder = tempfile.mkdtemp(prefix="compiled-")
      config.add_cleanup(functools.partial(shutil.rmtree, folder, ignore_errors=True))
      os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
      os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

  if not hasattr(config, "workerinput"):
    os.environ[ENDS] = tempfile.mkdtemp(prefix="ends-")
    config.add_cleanup(functools.partial(shutil.rmtree, os.environ[ENDS], ignore_errors=True))

  import jax  # only now: it reads the environment

  jax.config.update("jax_numpy_dtype_promotion", "strict")
  jax.config.update("jax_numpy_rank_promotion", "raise")


ENDS = "SPARSE_SERVE_TEST_ENDS"  # a folder where worker processes of a session tell why they ended before it
LONGEST = 600  # seconds of a test with its fixtures; one that takes longer hangs
_end = 0  # a file descriptor of a worker process


def pytest_sessionstart(session: pytest.Session):
  global _end
  if worker := getattr(session.config, "workerinput", None):
    _end = os.open(Path(os.environ[ENDS]) / worker["workerid"], os.O_CREAT | os.O_WRONLY)  # for the worker's life
    faulthandler.enable(_end)  # as pytest has enabled it, but not lost among the lines of a long session


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter):
  for file in sorted(Path(os.environ[ENDS]).iterdir()):
    told = file.read_text().splitlines()
    if lines := [line for line in told if not re.search(r"/(pluggy|_pytest|xdist|execnet)/", line)]:
      terminalreporter.section(f"how {file.name} ended")
      terminalreporter.write_line("\n".join(lines))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item):
  if _end and not item.get_closest_marker("soak"):
    faulthandler.dump_traceback_later(LONGEST, exit=True, file=_end)
  try:
    return (yield)
  finally:
    faulthandler.cancel_dump_traceback_later()


def pytest_runtest_setup(item: pytest.Item):
  if item.get_closest_marker("gpu"):
    import jax

    if jax.default_backend() != "gpu":
      pytest.skip(f"needs a GPU, JAX runs on {jax.default_backend()}")


MOST_MAPS = 20_000, 40_000  # of memory of one process: after a file of tests, and within one
_looked = 0.0


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None):
  """Forgets compiled programs when there are many, rather between files than within one.

  XLA's programs on a CPU are a few memory maps each. Linux gives a process 65,530, and where they end XLA crashes.
  """
  global _looked
  maps, within = Path("/proc/self/maps"), nextitem is not None and nextitem.path == item.path
  if not maps.exists() or (within and time.monotonic() - _looked < 5):  # seconds: to count takes some ms
    return
  _looked = time.monotonic()
  if maps.read_text().count("\n") > MOST_MAPS[within]:
    import jax

    jax.clear_caches()


@pytest.fixture
def optimized(monkeypatch: pytest.MonkeyPatch):
  """XLA optimizes what the test compiles, in processes that it starts too: for programs that are run often."""
  import jax

  before = jax.config.read("jax_disable_most_optimizations")
  monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "false")
  jax.config.update("jax_disable_most_optimizations", False)
  yield
  jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def not_configured(monkeypatch: pytest.MonkeyPatch):
  """`runtime.configure` sets nothing: what it sets is for a process of its own. test_runtime tests it."""
  from sparse_serve_jax import runtime

  monkeypatch.setattr(runtime, "configure", lambda: None)


@pytest.fixture(scope="session")
def longbench_dir(pytestconfig: pytest.Config) -> Path:
  """The folder that holds LongBench's data/; skips where none is given."""
  folder = pytestconfig.getoption("--longbench_dir")
  if not folder:
    pytest.skip("LongBench: give --longbench_dir or SPARSE_SERVE_LONGBENCH_DIR")
  return Path(folder)
