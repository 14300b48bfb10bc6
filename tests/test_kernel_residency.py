"""Residency against a dictionary of slots and exact LRU by sorting."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from pallas_kernels import residency
from pallas_kernels.residency import NEVER, Maps


class Residency:
  """The maps as a dictionary of slots, and exact LRU by sorting."""

  def __init__(self, K: int, L: int, M: int, P: int):
    self.shape = K, L, M, P
    self.held: dict[int, tuple[int, int, int]] = {}  # slot -> (head, layer, block)
    self.stamp = dict.fromkeys(range(P), -1)
    self.selected: dict[tuple[int, int, int], int] = {}

  def propose(self, layers, blocks):
    """`layers` like `blocks` [B, K, n]."""
    where = {key: slot for slot, key in self.held.items()}
    slots, hits = np.full(blocks.shape, -1, np.int32), np.zeros(blocks.shape, bool)
    for b, k, i in np.ndindex(*blocks.shape):
      slot = where.get((k, layers[b, k, i], blocks[b, k, i]))
      if slot is not None:
        slots[b, k, i], hits[b, k, i] = slot, True
    protected = set(slots[hits].tolist())
    victims = sorted(set(self.stamp) - protected, key=lambda slot: (self.stamp[slot], slot))
    for i in range(blocks.shape[2]):  # critical ranks first
      for b, k in np.ndindex(*blocks.shape[:2]):
        if blocks[b, k, i] >= 0 and not hits[b, k, i] and victims:
          slots[b, k, i] = victims.pop(0)
    return slots, hits

  def commit(self, layers, blocks, slots, hits, used, stamps, steps):
    for b, k, i in np.ndindex(*blocks.shape):
      if i < used[b, k] and blocks[b, k, i] >= 0:
        key = (k, int(layers[b, k, i]), int(blocks[b, k, i]))
        self.selected[key] = int(steps[b])
        slot = int(slots[b, k, i])
        if slot >= 0:
          self.stamp[slot] = int(stamps[b, k, i])
          if not hits[b, k, i]:
            self.held[slot] = key

  def release(self, freed):
    for slot, (_, _, block) in list(self.held.items()):
      if block in freed:
        del self.held[slot]
        self.stamp[slot] = -1
    self.selected = {key: step for key, step in self.selected.items() if key[2] not in freed}

  def maps(self) -> Maps:
    K, L, M, P = self.shape
    slot_of, block_of = np.full((K, L, M), -1, np.int32), np.full(P, -1, np.int32)
    for slot, (k, layer, block) in self.held.items():
      slot_of[k, layer, block], block_of[slot] = slot, (k * L + layer) * M + block
    selected = np.full((K, L, M), NEVER, np.int32)
    for key, step in self.selected.items():
      selected[key] = step
    return Maps(slot_of, block_of, np.array([self.stamp[p] for p in range(P)], np.int32), selected)

  def assert_equal(self, maps: Maps):
    for name, actual, expected in zip(Maps._fields, maps, self.maps(), strict=True):
      np.testing.assert_array_equal(actual, expected, err_msg=name)


propose, commit, release = jax.jit(residency.propose), jax.jit(residency.commit), jax.jit(residency.release)


def empty_maps(K: int, L: int, M: int, P: int) -> Maps:
  maps = Residency(K, L, M, P).maps()
  assert (maps.block_of == -1).all() and (maps.last_used == -1).all()
  return maps


def ids(*rows) -> np.ndarray:
  """Blocks [B, 1, n] of one head."""
  return np.array(rows, np.int32)[:, None]


def fill(maps: Maps, blocks, stamp: int, layer: int = 0) -> Maps:
  """Commits all of `blocks` [B, 1, n]."""
  used = np.full(blocks.shape[:2], blocks.shape[2], np.int32)
  return commit(maps, layer, blocks, propose(maps, layer, blocks), used, stamp, np.zeros(len(blocks), np.int32))


def test_victims_are_the_least_recently_used():
  maps = empty_maps(1, 1, 9, 3)
  for stamp, block in enumerate([5, 6, 7, 5]):  # 6 is now the oldest
    maps = fill(maps, ids([block]), stamp)
  assert maps.slot_of[0, 0, [5, 6, 7]].tolist() == [0, 1, 2]
  assert maps.last_used.tolist() == [3, 1, 2]  # a hit is a use
  proposal = propose(maps, 0, ids([1, 2]))
  assert proposal.slot.tolist() == [[[1, 2]]] and not proposal.hit.any()
  maps = fill(maps, ids([1, 2]), stamp=4)
  assert maps.slot_of[0, 0].tolist() == [-1, 1, 2, -1, -1, 0, -1, -1, -1]  # 6 and 7 are evicted
  assert maps.block_of.tolist() == [5, 1, 2]


def test_ties_and_empty_slots_go_by_the_lowest_slot():
  maps = empty_maps(1, 1, 9, 4)
  assert propose(maps, 0, ids([4, 5, 6])).slot.tolist() == [[[0, 1, 2]]]
  maps = fill(maps, ids([4, 5, 6]), stamp=0)
  assert propose(maps, 0, ids([1, 2])).slot.tolist() == [[[3, 0]]]  # the empty one, then the lowest of three equals
  maps = fill(maps, ids([5, -1]), stamp=3)
  assert propose(maps, 0, ids([1, 2])).slot.tolist() == [[[3, 0]]]
  maps = release(maps, np.array([6, -1], np.int32))
  assert propose(maps, 0, ids([1, 2])).slot.tolist() == [[[2, 3]]]


def test_hits_are_never_victims():
  maps = fill(empty_maps(1, 1, 9, 2), ids([4, 5]), stamp=0)
  proposal = propose(maps, 0, ids([1, 2, 4]))  # slot 0 is as old as slot 1, but holds block 4
  assert proposal.slot.tolist() == [[[1, -1, 0]]]
  assert proposal.hit.tolist() == [[[False, False, True]]]
  everything = propose(maps, 0, ids([4, 5, 6]))
  assert everything.slot.tolist() == [[[0, 1, -1]]]


def test_critical_ranks_of_all_rows_get_victims_first():
  maps = empty_maps(1, 1, 20, 3)
  proposal = propose(maps, 0, ids([1, 2, 3], [4, 5, 6]))
  assert proposal.slot.tolist() == [[[0, 2, -1]], [[1, -1, -1]]]


def test_blocks_never_reached_are_not_taken_for_resident():
  maps, blocks = fill(empty_maps(1, 1, 9, 3), ids([7, 8]), stamp=4), ids([1, 8, 2])
  proposal = propose(maps, 0, blocks)
  assert proposal.slot.tolist() == [[[2, 1, 0]]]
  after = commit(maps, 0, blocks, proposal, np.array([[1]], np.int32), 9, np.array([6], np.int32))
  assert after.slot_of[0, 0].tolist() == [-1, 2, -1, -1, -1, -1, -1, 0, 1]  # 7 keeps its slot, 2 has none
  assert after.last_used.tolist() == [4, 4, 9]  # an unread hit is no use
  assert after.last_selected[0, 0, [1, 8, 2]].tolist() == [6, 0, NEVER]


def test_release_forgets_all_layers_and_heads():
  maps = empty_maps(2, 2, 5, 8)
  every = np.broadcast_to(np.array([[[3], [3]]], np.int32), (1, 2, 1))
  for layer in range(2):
    maps = fill(maps, every, stamp=layer, layer=layer)
  maps = fill(maps, np.array([[[1], [2]]], np.int32), stamp=2)
  after = release(maps, np.array([3, -1], np.int32))
  assert (np.asarray(after.slot_of)[:, :, 3] == -1).all() and (np.asarray(after.last_selected)[:, :, 3] == NEVER).all()
  assert after.block_of.tolist() == [-1, -1, -1, -1, 1, 12, -1, -1]
  assert after.last_used.tolist() == [-1, -1, -1, -1, 2, 2, -1, -1]
  assert after.slot_of[0, 0].tolist() == [-1, 4, -1, -1, -1] and after.slot_of[1, 0].tolist() == [-1, -1, 5, -1, -1]


def test_residency_without_slots():
  maps, blocks = empty_maps(2, 1, 6, 0), np.array([[[1, -1], [4, 2]]], np.int32)
  proposal = propose(maps, 0, blocks)
  assert (np.asarray(proposal.slot) == -1).all() and not proposal.hit.any()
  maps = commit(maps, 0, blocks, proposal, np.array([[2, 1]], np.int32), 3, np.array([8], np.int32))
  assert maps.last_selected[:, 0].tolist() == [[NEVER, 8, *[NEVER] * 4], [*[NEVER] * 4, 8, NEVER]]
  maps = release(maps, np.array([1], np.int32))
  assert maps.last_selected[:, 0, 1].tolist() == [NEVER, NEVER]


@pytest.mark.parametrize("P", [1, 5, 200])
def test_residency_against_a_dictionary(P: int):
  """Steps of one layer, calls over all layers at once (ranks are layers) and releases, in random order."""
  rng = np.random.default_rng(P)
  B, K, L, M, n = 3, 2, 2, 24, 4
  model = Residency(K, L, M, P)
  maps = empty_maps(K, L, M, P)
  seen = dict(hits=0, homeless=0, unreached=0)
  for stamp in range(60):
    steps = rng.integers(0, 99, B).astype(np.int32)
    if stamp % 6 == 5:
      freed = np.where(rng.random(3) < 0.7, rng.permutation(M)[:3], -1).astype(np.int32)
      maps = release(maps, freed)
      model.release(set(freed.tolist()))
    elif stamp % 6 == 4:  # one new block a row, the same in all heads and layers
      layer = np.arange(L, dtype=np.int32)[None, None]
      blocks = np.broadcast_to(rng.permutation(M)[:B, None, None].astype(np.int32), (B, K, L)).copy()
      blocks[rng.random(B) < 0.3] = -1
    else:
      layer = np.int32(rng.integers(L))
      blocks = np.stack([rng.permutation(M)[: B * n].reshape(B, n) for _ in range(K)], 1).astype(np.int32)
      blocks[:, :, :] = np.where(rng.random((B, 1, n)) < 0.8, blocks, -1)
    if stamp % 6 != 5:
      proposal = propose(maps, layer, blocks)
      layers = np.broadcast_to(layer, blocks.shape)
      slots, hits = model.propose(layers, blocks)
      np.testing.assert_array_equal(proposal.slot, slots)
      np.testing.assert_array_equal(proposal.hit, hits)
      used = rng.integers(0, blocks.shape[2] + 1, (B, K)).astype(np.int32)
      stamps = np.int32(stamp) * L + layer
      maps = commit(maps, layer, blocks, proposal, used, stamps, steps)
      model.commit(layers, blocks, slots, hits, used, np.broadcast_to(stamps, blocks.shape), steps)
      seen["hits"] += hits.sum()
      seen["homeless"] += ((blocks >= 0) & (slots < 0)).sum()
      seen["unreached"] += (used < blocks.shape[2]).sum()
    model.assert_equal(maps)
  assert seen["unreached"] and (seen["homeless"] or P > 5) and (seen["hits"] or P == 1)
