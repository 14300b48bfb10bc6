"""The block allocator by hand; `test_prefix.py` has it against a model, with blocks that are kept and without."""

from __future__ import annotations

import numpy as np
import pytest

from sparse_serve_jax.memory.allocator import BlockAllocator


def test_blocks_wait_for_release_and_completion_in_either_order():
  allocator = BlockAllocator(2)
  first, second = allocator.allocate(1), allocator.allocate(1)
  assert first is not None and second is not None
  assert first.dtype == np.int32 and {*first.tolist(), *second.tolist()} == {0, 1}
  assert allocator.allocate(1) is None
  allocator.free(first, after=1)
  assert (allocator.available, allocator.in_use, allocator.release_due) == (0, 1, True)
  assert allocator.take_release().tolist() == first.tolist()
  assert (allocator.available, allocator.release_due) == (0, False)  # iteration 1 still runs
  allocator.complete(1)
  assert allocator.available == 1
  allocator.free(second, after=1)
  assert allocator.available == 1  # completed, but no plan has cleared its residency
  assert allocator.take_release().tolist() == second.tolist()
  assert (allocator.available, allocator.in_use) == (2, 0)
  assert allocator.take_release().tolist() == []


@pytest.mark.parametrize(
  ("blocks", "message"),
  [([5], "outside"), ([-1], "outside"), ([0, 0], "twice"), ([2], "no owner"), ([0, 2], r"\[2\] are freed but have no")],
)
def test_wrong_frees_change_nothing(blocks, message):
  allocator = BlockAllocator(3)
  assert allocator.allocate(2) is not None  # 0 and 1
  with pytest.raises(ValueError, match=message):
    allocator.free(blocks, after=0)
  assert (allocator.in_use, allocator.release_due) == (2, False)


def test_double_free_is_refused_at_every_stage():
  allocator = BlockAllocator(1)
  blocks = allocator.allocate(1)
  assert blocks is not None
  allocator.free(blocks, after=1)
  with pytest.raises(ValueError, match="no owner"):
    allocator.free(blocks, after=1)
  allocator.take_release()
  with pytest.raises(ValueError, match="no owner"):
    allocator.free(blocks, after=1)


def test_other_mistakes():
  with pytest.raises(ValueError, match="n_blocks=0"):
    BlockAllocator(0)
  with pytest.raises(ValueError, match="n=0"):
    BlockAllocator(1).allocate(0)
  with pytest.raises(ValueError, match="iteration 2 completed right after iteration 0"):
    BlockAllocator(1).complete(2)
