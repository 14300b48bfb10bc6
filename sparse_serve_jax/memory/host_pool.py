"""Where an offloaded pool lies: the one place that decides it, and that knows its address."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import os
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from sparse_serve_jax.config import EngineConfig

PINNED = "pinned_host"  # a memory kind of JAX's
THREADS = ThreadPoolExecutor(min(16, os.cpu_count() or 1), "pool")  # that copy blocks on the host
ROWS = 64  # blocks that a thread copies at least
_NUMBERS = itertools.count()
_PARTS: weakref.WeakValueDictionary[int, HostPool] = weakref.WeakValueDictionary()


def memory_kind(platform: str | None = None) -> str | None:
  """The memory kind of an offloaded pool; None where host memory is no different (on a CPU). `platform` is JAX's name
  of the devices, by default of those here.
  """
  return PINNED if (platform or jax.default_backend()) == "gpu" else None


def chosen(config: EngineConfig, platform: str | None = None) -> EngineConfig:
  """The configuration, whose `cache.save` is not left open: staged where the pool lies in memory of its own kind
  and in one process: when a save has landed is told by a process's own clock. `platform` is as of `memory_kind`.
  """
  if config.cache.save != "auto":
    return config
  beside = config.cache.offload and memory_kind(platform) is not None and jax.process_count() == 1
  return dataclasses.replace(config, cache=dataclasses.replace(config.cache, save="staged" if beside else "direct"))


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

  def __init__(self, n_parts: int, buffer: Callable[[tuple[int, int], Any], np.ndarray] | None = None):
    """Makes one of so many parts; `buffer(shape, device)`, uint8, is memory from which the device copies fast."""
    self._make_buffer = buffer or (lambda shape, device: np.empty(shape, np.uint8))
    self.numbers = np.array([next(_NUMBERS) for _ in range(n_parts)], np.int32)
    self._addresses: list[int] = []
    self.rows: list[np.ndarray] = []  # the memory of each part, uint8 [K, L, M, bytes of a block]
    self._buffers: dict[tuple[int, int], np.ndarray] = {}
    self._devices: list[Any] = []
    _PARTS.update({int(number): self for number in self.numbers})

  def follow(self, pool: jax.Array) -> None:
    """Notes where a pool lies when it is first seen. Every program writes it in place, which is checked from then on.

    Raises:
      RuntimeError: it lies elsewhere now.
    """
    parts = [shard.data for shard in sorted(pool.addressable_shards, key=lambda shard: shard.index[0].start or 0)]
    addresses = [part.unsafe_buffer_pointer() for part in parts]
    if not self.rows:
      self._addresses, self._devices = addresses, [next(iter(part.devices())) for part in parts]
      memory = [bytes_at(address, part.nbytes) for address, part in zip(addresses, parts, strict=True)]
      self.rows = [rows.reshape(*part.shape[:3], -1) for rows, part in zip(memory, parts, strict=True)]
    elif addresses != self._addresses:
      raise RuntimeError(f"the pool has moved in memory, from {self._addresses} to {addresses}")

  def gather(self, part: int, ids: np.ndarray, n: int) -> np.ndarray:
    """Blocks of a part, `ids` of [K, L, M], at the beginning of a buffer [n, bytes of a block], which the next call
    overwrites."""
    rows = self.rows[part].reshape(-1, self.rows[part].shape[-1])
    if (part, n) not in self._buffers:
      self._buffers[part, n] = self._make_buffer((n, rows.shape[1]), self._devices[part])
    out = self._buffers[part, n]

    def copy(start: int) -> None:
      some = ids[start : start + step]
      np.take(rows, some, axis=0, out=out[start : start + len(some)], mode="clip")

    step = max(ROWS, -(-len(ids) // THREADS._max_workers))
    list(THREADS.map(copy, range(0, len(ids), step))) if len(ids) > step else copy(0)
    return out


def gather(number: int, ids: np.ndarray, n: int) -> np.ndarray:
  """`HostPool.gather` of the part of that number."""
  pool = _PARTS[number]
  return pool.gather(number - int(pool.numbers[0]), ids, n)


def bytes_at(address: int, n: int) -> np.ndarray:
  """Memory as an array, uint8 [n]. Whose it is must keep it."""
  return np.ctypeslib.as_array((ctypes.c_uint8 * n).from_address(address))
