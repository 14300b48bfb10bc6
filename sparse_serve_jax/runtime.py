"""Settings of XLA that must stand in the environment before JAX meets a GPU."""

from __future__ import annotations

import os

# On a decode step over stacked weights, Triton matrix products copy every layer's slice first: 2.6x the time.
_XLA_FLAGS = {"--xla_gpu_enable_triton_gemm": "false"}
_PINNED_LIMIT = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"  # GiB; XLA's own default is 64


def configure() -> None:
  """Sets what the user has not set: XLA flags, and the limit on the pinned host memory that XLA allocates, to the
  machine's memory. (A pool of KV is not of that: `memory.pinned`.)

  Call it before the first JAX computation; later it has no effect. It changes nothing on a CPU.
  """
  flags = os.environ.get("XLA_FLAGS", "")
  if not flags.strip() or flags.lstrip().startswith("-"):  # otherwise it names a file, which is the user's
    given = {flag.partition("=")[0] for flag in flags.split()}
    ours = [f"{name}={value}" for name, value in _XLA_FLAGS.items() if name not in given]
    os.environ["XLA_FLAGS"] = " ".join([*flags.split(), *ours])
  machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")  # bytes
  os.environ.setdefault(_PINNED_LIMIT, str(-(-machine // 2**30)))
