"""Which blocks of the pool belong to whom. Plain Python and numpy."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


class BlockAllocator:
  """Hands out blocks 0 .. n_blocks - 1 and takes them back. A block may have several owners, each of which frees it.

  The device runs behind the host, so a freed block passes two gates before it is given out again: every iteration whose
  plan could still hold it in a table has completed, and a plan has told the device to clear its residency. The two may
  happen in either order.
  """

  def __init__(self, n_blocks: int, completed: int = 0):
    """Makes an allocator to which iterations up to `completed` do not matter."""
    if n_blocks < 1:
      raise ValueError(f"a pool needs at least one block, got {n_blocks=}")
    self._free = list(range(n_blocks - 1, -1, -1))  # the last one is given out first
    self._owners = np.zeros(n_blocks, np.int32)
    self._in_use = 0  # blocks with an owner
    self._unreleased: list[tuple[np.ndarray, int]] = []  # freed, in no plan's release yet
    self._released: list[tuple[np.ndarray, int]] = []  # in a plan's release, but iteration `after` still runs
    self._completed = completed

  @property
  def available(self) -> int:
    """Blocks that `allocate` could give now."""
    return len(self._free)

  @property
  def in_use(self) -> int:
    """Blocks that have an owner; freed ones on their way back are counted neither here nor in `available`."""
    return self._in_use

  @property
  def release_due(self) -> bool:
    """Whether `take_release` has something to give."""
    return bool(self._unreleased)

  def allocate(self, n: int) -> np.ndarray | None:
    """Returns n blocks, int32 [n], or None if fewer are available: the caller waits."""
    if n < 1:
      raise ValueError(f"at least one block has to be asked for, got {n=}")
    if n > len(self._free):
      return None
    blocks = np.array(self._free[: -n - 1 : -1], np.int32)
    del self._free[-n:]
    self._owners[blocks] = 1
    self._in_use += n
    return blocks

  def share(self, blocks: np.ndarray) -> None:
    """Gives blocks that have an owner, [n] and distinct, one more."""
    if not (self._owners[blocks] > 0).all():
      raise ValueError(f"blocks {blocks[self._owners[blocks] == 0].tolist()} are shared but have no owner")
    self._owners[blocks] += 1

  def free(self, blocks: Iterable[int], after: int) -> None:
    """Takes blocks back from one owner. `after` is the last dispatched iteration; no later plan of it may hold them.

    Raises:
      ValueError: a block is named twice, is outside the pool or has no owner. Nothing is freed then.
    """
    blocks = np.array(blocks if isinstance(blocks, np.ndarray) else list(blocks), np.int32)
    outside = blocks[(blocks < 0) | (blocks >= len(self._owners))]
    if outside.size:
      raise ValueError(f"blocks {outside.tolist()} are outside the pool of {len(self._owners)} blocks")
    if len(set(blocks.tolist())) < len(blocks):
      raise ValueError(f"a block is freed twice in one call: {blocks.tolist()}")
    if not self._owners[blocks].all():
      raise ValueError(f"blocks {blocks[self._owners[blocks] == 0].tolist()} are freed but have no owner")
    self._owners[blocks] -= 1
    if (left := blocks[self._owners[blocks] == 0]).size:
      self._in_use -= len(left)
      self._unreleased.append((left, after))

  def take_release(self) -> np.ndarray:
    """Returns the blocks freed since the last call, int32: the caller's next plan releases them, each exactly once."""
    taken, self._unreleased = self._unreleased, []
    self._released += taken
    self._recycle()
    return np.concatenate([blocks for blocks, _ in taken]) if taken else np.zeros(0, np.int32)

  def complete(self, iteration: int) -> None:
    """Notes that `iteration` and all before it have run. Iterations complete in order, one by one."""
    if iteration != self._completed + 1:
      raise ValueError(f"iteration {iteration} completed right after iteration {self._completed}")
    self._completed = iteration
    self._recycle()

  def _recycle(self) -> None:
    if not self._released:
      return
    running = []
    for blocks, after in self._released:
      if after <= self._completed:
        self._free += blocks.tolist()
      else:
        running.append((blocks, after))
    self._released = running
