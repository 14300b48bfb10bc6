"""Which blocks of the pool belong to whom. Plain Python and numpy."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable

import numpy as np

_NONE = np.zeros(0, np.int32)


class BlockAllocator:
  """Hands out blocks 0 .. n_blocks - 1 and takes them back. A block may have several owners, each of which frees it.

  The device runs behind the host, so a freed block passes two gates before it is given out again: every iteration whose
  plan could still hold it in a table has completed, and a plan has told the device to clear its residency. The two may
  happen in either order.

  A block that is to be kept stays as it is when its last owner leaves: idle, in the order of last use, and who knows
  what it holds may `share` it. `allocate` takes idle blocks where free ones do not suffice, the least recently used
  first. They pass the same gates: the first they have passed, the second they pass with the plan that holds them
  again, which releases them before it does anything else.
  """

  def __init__(self, n_blocks: int, completed: int = 0):
    """Makes an allocator to which iterations up to `completed` do not matter."""
    if n_blocks < 1:
      raise ValueError(f"a pool needs at least one block, got {n_blocks=}")
    self.on_evict: Callable[[list[int]], None] = lambda blocks: None  # is told of idle blocks that are given out anew
    self._free = list(range(n_blocks - 1, -1, -1))  # the last one is given out first
    self._owners = np.zeros(n_blocks, np.int32)
    self._in_use = 0  # blocks with an owner
    self._kept = np.zeros(n_blocks, bool)
    # Kept blocks without an owner, and the iteration after which they are nobody's, which ascends.
    self._idle: OrderedDict[int, int] = OrderedDict()
    self._rested: dict[int, None] = {}  # that have become idle since the last `take_idle`
    self._unreleased: list[tuple[np.ndarray, int]] = []  # freed, in no plan's release yet
    self._released: list[tuple[np.ndarray, int]] = []  # in a plan's release, but iteration `after` still runs
    self._reused: list[np.ndarray] = []  # given out while they were idle, in no plan's release yet
    self._completed = completed

  @property
  def available(self) -> int:
    """Blocks that `allocate` could give now."""
    return len(self._free) + self._ready(_NONE)

  @property
  def in_use(self) -> int:
    """Blocks that have an owner; idle ones and those on their way back are not counted."""
    return self._in_use

  @property
  def returning(self) -> int:
    """Blocks that `allocate` will be able to give without anybody freeing one, and cannot now."""
    gone = sum(len(blocks) for blocks, _ in (*self._unreleased, *self._released))
    return gone + len(self._idle) - self._ready(_NONE)

  @property
  def idle(self) -> int:
    """Blocks that are kept and have no owner."""
    return len(self._idle)

  @property
  def release_due(self) -> bool:
    """Whether `take_release` has something to give."""
    return bool(self._unreleased or self._reused)

  def allocate(self, n: int, shared: np.ndarray = _NONE, left: int = 0) -> np.ndarray | None:
    """Returns n blocks, int32 [n], and shares others with their new owner; or None if fewer are available and `left`
    more, and nothing has changed: the caller waits. The plan that first holds them is to have the next `take_release`.
    """
    if n < 1:
      raise ValueError(f"at least one block has to be asked for, got {n=}")
    if n + left > len(self._free) + self._ready(shared):
      return None
    self.share(shared)
    n_free = min(n, len(self._free))
    blocks = self._free[: -n_free - 1 : -1]
    del self._free[len(self._free) - n_free :]
    if n_free < n:
      evicted = [self._idle.popitem(last=False)[0] for _ in range(n - n_free)]
      self.on_evict(evicted)
      self._kept[evicted] = False
      self._reused.append(np.array(evicted, np.int32))
      blocks += evicted
    made = np.array(blocks, np.int32)
    self._owners[made] = 1
    self._in_use += n
    return made

  def _ready(self, besides: np.ndarray) -> int:
    """Idle blocks, others than these, that no iteration still runs with."""
    n = len(self._idle)
    if not n:
      return 0
    for after in reversed(self._idle.values()):
      if after <= self._completed:
        break
      n -= 1
    return n - sum(self._idle.get(block, self._completed + 1) <= self._completed for block in besides.tolist())

  def share(self, blocks: np.ndarray) -> None:
    """Gives blocks that have an owner or are idle, [n] and distinct, one more."""
    unowned = blocks[self._owners[blocks] == 0].tolist()
    if lost := [block for block in unowned if block not in self._idle]:
      raise ValueError(f"blocks {lost} are shared but have no owner and are not kept")
    for block in unowned:
      del self._idle[block]
    self._in_use += len(unowned)
    self._owners[blocks] += 1

  def keep(self, blocks: np.ndarray) -> None:
    """Blocks with an owner, int32 [n], are to stay when the last one leaves."""
    if not self._owners[blocks].all():
      raise ValueError(f"blocks {blocks[self._owners[blocks] == 0].tolist()} are to be kept but have no owner")
    self._kept[blocks] = True

  def drop(self, blocks: np.ndarray) -> None:
    """Blocks, int32 [n], are not to be kept any more; idle ones are on their way back."""
    self._kept[blocks] = False
    for block in blocks.tolist():
      if (after := self._idle.pop(block, None)) is not None:
        self._unreleased.append((np.array([block], np.int32), after))

  def touch(self, blocks: np.ndarray, after: int) -> None:
    """Idle ones of these blocks have been used until iteration `after`, the last one dispatched, the last block first:
    it is given out before the others.
    """
    for block in blocks[::-1].tolist():
      if block in self._idle:
        self._idle[block] = after
        self._idle.move_to_end(block)

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
    left = blocks[self._owners[blocks] == 0]
    self._in_use -= len(left)
    kept = self._kept[left]
    self._idle.update(dict.fromkeys(left[kept].tolist(), after))
    self._rested.update(dict.fromkeys(left[kept].tolist()))
    if (gone := left[~kept]).size:
      self._unreleased.append((gone, after))

  def take_idle(self) -> np.ndarray:
    """Returns the blocks that have become idle since the last call and still are, int32."""
    rested, self._rested = self._rested, {}
    return np.array([block for block in rested if block in self._idle], np.int32)

  def take_release(self) -> np.ndarray:
    """Returns the blocks freed since the last call, and those given out while idle, int32: the caller's next plan
    releases them, each exactly once.
    """
    taken, self._unreleased = self._unreleased, []
    reused, self._reused = self._reused, []
    self._released += taken
    self._recycle()
    released = [*reused, *(blocks for blocks, _ in taken)]
    return np.concatenate(released) if released else np.zeros(0, np.int32)

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
