"""The block allocator against a dictionary model."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sparse_serve_jax.memory.allocator import BlockAllocator

N_BLOCKS = 7


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


class AllocatorMachine(RuleBasedStateMachine):
  """The model: each block is free, owned, or on its way back with the two gates it has passed."""

  def __init__(self):
    super().__init__()
    self.allocator = BlockAllocator(N_BLOCKS)
    self.state: dict[int, object] = dict.fromkeys(range(N_BLOCKS), "free")  # "free", owner number, or dict of gates
    self.owners: dict[int, list[int]] = {}
    self.dispatched = self.completed = self.counter = 0

  def free_blocks(self) -> set[int]:
    return {
      block
      for block, state in self.state.items()
      if state == "free" or (isinstance(state, dict) and state["released"] and state["after"] <= self.completed)
    }

  @rule(n=st.integers(1, N_BLOCKS + 1))
  def allocate(self, n):
    free = self.free_blocks()
    blocks = self.allocator.allocate(n)
    if n > len(free):
      assert blocks is None
      return
    assert blocks is not None
    assert len(set(blocks.tolist())) == n and set(blocks.tolist()) <= free
    self.counter += 1
    self.owners[self.counter] = blocks.tolist()
    for block in blocks.tolist():
      self.state[block] = self.counter

  @precondition(lambda self: self.owners)
  @rule(data=st.data())
  def free(self, data):
    owner = data.draw(st.sampled_from(sorted(self.owners)))
    blocks = self.owners.pop(owner)
    assert all(self.state[block] == owner for block in blocks)
    self.allocator.free(blocks, after=self.dispatched)
    for block in blocks:
      self.state[block] = {"after": self.dispatched, "released": False}

  @rule()
  def dispatch(self):
    due = {block for block, state in self.state.items() if isinstance(state, dict) and not state["released"]}
    taken = self.allocator.take_release().tolist()
    assert len(taken) == len(due) and set(taken) == due
    for block in taken:
      self.state[block] = {**self.state[block], "released": True}  # type: ignore[dict-item]
    self.dispatched += 1

  @precondition(lambda self: self.completed < self.dispatched)
  @rule()
  def complete(self):
    self.completed += 1
    self.allocator.complete(self.completed)

  @invariant()
  def counters_agree(self):
    assert self.allocator.available == len(self.free_blocks())
    assert self.allocator.in_use == sum(isinstance(state, int) for state in self.state.values())

  def teardown(self):
    for owner in list(self.owners):
      self.allocator.free(self.owners.pop(owner), after=self.dispatched)
    self.allocator.take_release()
    while self.completed < self.dispatched:
      self.completed += 1
      self.allocator.complete(self.completed)
    assert self.allocator.available == N_BLOCKS


TestAllocatorMachine = AllocatorMachine.TestCase
