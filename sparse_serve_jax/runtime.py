"""Settings of JAX and XLA that must stand before the first computation."""

from __future__ import annotations

import logging
import os
import pathlib
import platform
import sys
import zlib

# On a decode step over stacked weights, Triton matrix products copy every layer's slice first: 2.6x the time.
_XLA_FLAGS = {"--xla_gpu_enable_triton_gemm": "false"}
_CACHE_DIR, _CACHE_FROM = "JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
_CACHED_FROM = "0.2"  # seconds that a program takes to compile; JAX's own default of 1 leaves out most of a prefill's
_PINNED_LIMIT = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"  # GiB; XLA's own default is 64


def configure() -> None:
  """Sets what the user has not set.

  - XLA flags.
  - The limit on the pinned host memory that XLA allocates: the machine's memory. (A pool of KV is not of that:
    `memory.pinned`.)
  - JAX_COMPILATION_CACHE_DIR: compiled programs are kept in `compiled_folder`, so that a second process need not
    compile them again. The log names it. An empty value keeps none.

  Call it before the first JAX computation; later it has no effect. On a CPU only the last one matters.
  """
  _keep_compiled()
  flags = os.environ.get("XLA_FLAGS", "")
  if not flags.strip() or flags.lstrip().startswith("-"):  # otherwise it names a file, which is the user's
    given = {flag.partition("=")[0] for flag in flags.split()}
    ours = [f"{name}={value}" for name, value in _XLA_FLAGS.items() if name not in given]
    os.environ["XLA_FLAGS"] = " ".join([*flags.split(), *ours])
  machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")  # bytes
  os.environ.setdefault(_PINNED_LIMIT, str(-(-machine // 2**30)))


def compiled_folder() -> pathlib.Path:
  """Where compiled programs are kept: in the user's cache folder, by the CPU, which some of them are compiled for."""
  info = pathlib.Path("/proc/cpuinfo")
  lines = info.read_text().splitlines() if info.exists() else []
  can = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
  cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
  return cache / "sparse_serve_jax" / f"compiled-{platform.machine()}-{zlib.crc32(can.encode()):08x}"


def _keep_compiled() -> None:
  if _CACHE_DIR in os.environ:
    return
  log = logging.getLogger(__name__)
  try:
    folder = str(compiled_folder())
    os.makedirs(folder, exist_ok=True)
  except (OSError, RuntimeError) as error:  # the latter of who has no home
    log.warning("compiled programs are not kept: %s", error)
    return
  os.environ[_CACHE_DIR] = folder  # of processes that this one starts, too
  os.environ.setdefault(_CACHE_FROM, _CACHED_FROM)
  if jax := sys.modules.get("jax"):  # it has read the environment
    if jax.config.jax_compilation_cache_dir is not None:
      return
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", float(os.environ[_CACHE_FROM]))
  log.info("compiled programs are kept in %s", folder)
