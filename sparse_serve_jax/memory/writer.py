"""How the KV of pieces of prompts comes to the pool beside the programs (FlashD2H: SparseServe, section 3.2).

A slab, the KV of some layers of a piece, leaves the device by one asynchronous copy, which runs under what the device
computes next. Threads of the host then place its blocks in the pool. All that begins when the tokens of its iteration
have been handed out, or when another slab follows: else a first token would wait for Python's lock and the link to the
host.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import math
import threading
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from sparse_serve_jax.memory import host_pool
from sparse_serve_jax.memory.host_pool import HostPool
from sparse_serve_jax.memory.pinned import copy_rows, pinned_buffer

_LONGEST_HELD = 1.0  # seconds: of a step whose tokens nobody hands out
_BUFFER = threading.Lock()  # of the process's pinned buffers, which writers of several pools share


class _Job(NamedTuple):
  iteration: int
  n_bytes: int
  begin: threading.Event
  placed: Future


class Writer:
  """Places slabs in the order in which they are given. Failures come to whoever asks next what has landed."""

  def __init__(self, host: HostPool, slab_bytes: int):
    """Makes a writer to a pool, of slabs of at most so many bytes. Two such are on their way at a time."""
    self._host, self._slab_bytes = host, slab_bytes
    self._jobs: deque[_Job] = deque()  # not known to have landed
    self._thread = ThreadPoolExecutor(1, "save")
    self._pool_is_lost = False

  def make_room(self, n_bytes: int) -> None:
    """Waits until a slab of so many bytes may be on its way too. All others are, from now on."""
    self.start()
    while self._jobs and sum(job.n_bytes for job in self._jobs) + n_bytes > 2 * self._slab_bytes:
      self._finish_oldest()

  def save(self, iteration: int, slab: jax.Array, layers: range, blocks: np.ndarray, alive: Any) -> None:
    """Will bring the first blocks of a slab to the pool: from `start` on, or when somebody waits for it.

    Args:
      iteration: the slab is a result of it.
      slab: [K, Ls, n, 2, S, D], which may hold more layers and blocks than are meant.
      layers: those that it begins with.
      blocks: where its first blocks go in the pool, int32 [at most n]; -1: nowhere.
      alive: is not forgotten before they are there: the owner of the pool.
    """
    begin = threading.Event()
    placed = self._thread.submit(self._place, begin, slab, layers, blocks, alive)
    self._jobs.append(_Job(iteration, slab.nbytes, begin, placed))

  def landed(self, iteration: int, wait: bool = False) -> int:
    """The last iteration up to `iteration` of which, and of all before, the blocks are in the pool.

    Starts them and waits for them all if so asked, else starts nothing. Raises what failed.
    """
    if wait:
      self.start(iteration)
    while self._jobs and self._jobs[0].iteration <= iteration and (wait or self._jobs[0].placed.done()):
      self._finish_oldest()
    return min(iteration, self._jobs[0].iteration - 1) if self._jobs else iteration

  def start(self, iteration: float = math.inf) -> None:
    """Starts the saves of all iterations up to this one."""
    for job in self._jobs:
      if job.iteration <= iteration:
        job.begin.set()

  def drain(self) -> None:
    """Waits until nothing is written any more; what failed is left to `landed`. Also for a job that is in no list, as
    whoever gave it was interrupted.
    """
    self.start()
    with contextlib.suppress(RuntimeError):  # Python ends, and has waited for the thread
      self._thread.submit(lambda: None).result()

  def forget(self) -> None:
    """Drains, and forgets what failed."""
    self.drain()
    self._jobs.clear()
    self._pool_is_lost = False

  def lose_pool(self) -> None:
    """Places nothing until `forget`: the pool's memory may be another's from now on."""
    self._pool_is_lost = True

  def _finish_oldest(self) -> None:
    """Waits for the oldest job. It stays if that is interrupted, and if it has failed."""
    self._jobs[0].placed.result()
    self._jobs.popleft()

  def _place(self, begin: threading.Event, slab: jax.Array, layers: range, blocks: np.ndarray, alive: Any) -> None:
    del alive
    begin.wait(_LONGEST_HELD)
    if self._pool_is_lost:
      return
    there = blocks >= 0
    kept = slice(len(blocks)) if there.all() else np.flatnonzero(there)
    shards = sorted(slab.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    for part, shard in enumerate(shards):
      pool, (n_heads, n_layers, n) = self._host.rows[part], shard.data.shape[:3]
      head, i = np.divmod(np.arange(n_heads * n_layers), n_layers)
      to = ((head * pool.shape[1] + layers.start + i) * pool.shape[2])[:, None] + blocks[there]  # of the whole pool
      to[i >= len(layers)] = -1
      with _BUFFER:
        source = self._buffer(shard.data, len(shards)).reshape(n_heads * n_layers, n, -1)
        placing: list[Future] = []
        try:
          # Large parts: many small ones would take Python's lock from the thread that plans the next iteration.
          for rows in self._coming(shard.data, source):
            some = slice(rows.start, rows.stop)
            placing.append(host_pool.THREADS.submit(_put, pool, to[some], source[some], kept))
        finally:
          concurrent.futures.wait(placing)  # they read the buffer
      for placed in placing:
        placed.result()

  def _buffer(self, part: jax.Array, n_parts: int) -> np.ndarray:
    """Where the bytes of one of the parts of a slab come, which the next call of any writer overwrites."""
    if host_pool.memory_kind() is None:
      return np.asarray(part).view(np.uint8)
    (device,) = part.devices()
    return pinned_buffer((self._slab_bytes // n_parts,), device)[: part.nbytes]

  def _coming(self, part: jax.Array, source: np.ndarray) -> Iterable[range]:
    """The rows of a part's buffer, as they come."""
    if host_pool.memory_kind() is None:
      return (range(len(source)),)
    return copy_rows(part, source.reshape(len(source), -1))


def _put(pool: np.ndarray, to: np.ndarray, source: np.ndarray, kept: slice | np.ndarray) -> None:
  """Writes blocks of `source` [rows, n, bytes], those of `kept` in each row, to places of the pool [rows, kept]; a row
  of -1 is left out."""
  real = slice(None) if (to >= 0).all() else np.flatnonzero((to >= 0).any(1))
  pool.reshape(-1, pool.shape[-1])[to[real]] = source[real][:, kept]
