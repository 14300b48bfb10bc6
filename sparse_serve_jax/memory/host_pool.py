"""Where an offloaded pool lies: the one place that decides it, and that knows its address."""

from __future__ import annotations

import ctypes
import itertools
import os
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from sparse_serve_jax.memory.pinned import pinned_array

PINNED = "pinned_host"  # a memory kind of JAX's
THREADS = ThreadPoolExecutor(min(16, os.cpu_count() or 1), "pool")  # that copy blocks on the host
ROWS = 64  # blocks that a thread copies at least
_NUMBERS = itertools.count()
_PARTS: weakref.WeakValueDictionary[int, HostPool] = weakref.WeakValueDictionary()


def memory_kind() -> str | None:
  """The memory kind of an offloaded pool; None where host memory is no different (on a CPU)."""
  return PINNED if jax.default_backend() == "gpu" else None


def keep(pool: jax.Array) -> jax.Array:
  """A pool in host memory, typed so after a kernel wrote it.

  A kernel's result is typed as device memory, wherever it lies; the carry of a loop is not.
  """
  return jax.device_put(pool, jax.memory.Space.Host)


class HostPool:
  """A pool's memory, for code that runs on the host. It keeps the pool's address, not the pool.

  Programs are shared by the caches of equal setups. So a program knows a part of a pool, of one device, by a number
  among its operands (`Hot.pool_id`).
  """

  def __init__(self, n_parts: int):
    self.numbers = np.array([next(_NUMBERS) for _ in range(n_parts)], np.int32)
    self._addresses: list[int] = []
    self._rows: list[np.ndarray] = []
    self._staging: dict[tuple[int, int], tuple[np.ndarray, Any]] = {}
    self._devices: list[Any] = []
    _PARTS.update({int(number): self for number in self.numbers})

  def follow(self, pool: jax.Array) -> None:
    """Notes where a pool lies when it is first seen. Every program writes it in place, which is checked from then on.

    Raises:
      RuntimeError: it lies elsewhere now.
    """
    parts = [shard.data for shard in sorted(pool.addressable_shards, key=lambda shard: shard.index[0].start or 0)]
    addresses = [part.unsafe_buffer_pointer() for part in parts]
    if not self._rows:
      self._addresses, self._devices = addresses, [next(iter(part.devices())) for part in parts]
      self._rows = [
        _bytes_at(address, part.nbytes).reshape(*part.shape[:3], -1)
        for address, part in zip(addresses, parts, strict=True)
      ]
    elif addresses != self._addresses:
      raise RuntimeError(f"the pool has moved in memory, from {self._addresses} to {addresses}")

  def rows(self, part: int) -> np.ndarray:
    """A part's memory, uint8 [K, L, M, bytes of a block]."""
    return self._rows[part]

  def gather(self, part: int, ids: np.ndarray, n: int) -> np.ndarray:
    """Blocks of a part, `ids` of [K, L, M], at the beginning of a buffer [n, bytes of a block], which the next call
    overwrites."""
    rows, out = self._rows[part], self._buffer(part, n)
    rows = rows.reshape(-1, rows.shape[-1])

    def copy(start: int) -> None:
      some = ids[start : start + step]
      np.take(rows, some, axis=0, out=out[start : start + len(some)], mode="clip")

    step = max(ROWS, -(-len(ids) // THREADS._max_workers))
    list(THREADS.map(copy, range(0, len(ids), step))) if len(ids) > step else copy(0)
    return out

  def _buffer(self, part: int, n: int) -> np.ndarray:
    if (part, n) not in self._staging:
      shape, device, owner = (n, self._rows[part].shape[-1]), self._devices[part], None
      if memory_kind() == PINNED:  # which a device copies from twice as fast
        owner = pinned_array(shape, "uint8", device)
        buffer = _bytes_at(owner.unsafe_buffer_pointer(), owner.nbytes).reshape(shape)
      else:
        buffer = np.empty(shape, np.uint8)
      self._staging[part, n] = buffer, owner
    return self._staging[part, n][0]


def gather(number: int, ids: np.ndarray, n: int) -> np.ndarray:
  """`HostPool.gather` of the part of that number."""
  pool = _PARTS[number]
  return pool.gather(number - int(pool.numbers[0]), ids, n)


def _bytes_at(address: int, n: int) -> np.ndarray:
  return np.ctypeslib.as_array((ctypes.c_uint8 * n).from_address(address))
