"""One session for every test: two virtual CPU devices, strict numerics, no GPU unless asked for with `-m gpu`."""

from __future__ import annotations

import os
import re
from pathlib import Path

import hypothesis
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


def pytest_configure(config: pytest.Config):
  flags = os.environ.get("XLA_FLAGS", "")
  if "xla_force_host_platform_device_count" not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=2".strip()
  if re.search(r"(?<!not )\bgpu\b", config.option.markexpr):
    from sparse_serve_jax import runtime

    runtime.configure()
  else:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

  import jax  # only now: it reads the environment

  jax.config.update("jax_numpy_dtype_promotion", "strict")
  jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_runtest_setup(item: pytest.Item):
  if item.get_closest_marker("gpu"):
    import jax

    if jax.default_backend() != "gpu":
      pytest.skip(f"needs a GPU, JAX runs on {jax.default_backend()}")


MOST_MAPS = 20_000  # of memory of one process


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None):
  """Forgets compiled programs between files when there are many.

  XLA's programs on a CPU are a few memory maps each. Linux gives a process 65,530, and where they end XLA crashes.
  """
  maps = Path("/proc/self/maps")
  if nextitem and nextitem.path != item.path and maps.exists() and maps.read_text().count("\n") > MOST_MAPS:
    import jax

    jax.clear_caches()


@pytest.fixture(scope="session")
def longbench_dir(pytestconfig: pytest.Config) -> Path:
  """The folder that holds LongBench's data/; skips where none is given."""
  folder = pytestconfig.getoption("--longbench_dir")
  if not folder:
    pytest.skip("LongBench: give --longbench_dir or SPARSE_SERVE_LONGBENCH_DIR")
  return Path(folder)
