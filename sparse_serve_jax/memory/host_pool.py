"""Where an offloaded pool lies: the one place that decides it."""

from __future__ import annotations

import jax

PINNED = "pinned_host"  # a memory kind of JAX's


def memory_kind() -> str | None:
  """The memory kind of an offloaded pool; None where host memory is no different (on a CPU)."""
  return PINNED if jax.default_backend() == "gpu" else None


def keep(pool: jax.Array) -> jax.Array:
  """A pool in host memory, typed so after a kernel wrote it.

  A kernel's result is typed as device memory, wherever it lies; the carry of a loop is not.
  """
  return jax.device_put(pool, jax.memory.Space.Host)
