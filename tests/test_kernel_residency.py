"""Residency against a dictionary of slots and least-recently-used by sorting, call by call."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as kernels
from pallas_kernels import SPARE, Located, Maps, Victims
from pallas_kernels.maps import NEVER
from pallas_kernels.residency import LOOKS
from tests.cases import IMPLEMENTATIONS


class Residency:
  """The maps as a dictionary of slots."""

  def __init__(self, K: int, L: int, M: int, P: int):
    self.shape = K, L, M, P
    self.held: dict[int, tuple[int, int, int]] = {}  # slot -> (head, layer, block)
    self.stamp, self.entered = dict.fromkeys(range(P), -1), dict.fromkeys(range(P), -1)
    self.selected: dict[tuple[int, int, int], int] = {}

  def victims(self) -> list[int]:
    return sorted(self.stamp, key=lambda slot: (self.stamp[slot], slot))

  def propose(self, victims, since, layer, blocks, given):
    """Returns blocks, slots, places, and the hits of each list."""
    B, K, n = blocks.shape
    where = {key: slot for slot, key in self.held.items()}
    slots, places = np.full(blocks.shape, -1, np.int32), np.full(blocks.shape, -1, np.int32)
    for b, k, i in np.ndindex(*blocks.shape):
      slots[b, k, i] = where.get((k, layer, blocks[b, k, i]), -1)
    hit = slots >= 0
    claimed = set(slots[hit].tolist())
    is_left = lambda slot: slot not in claimed and self.stamp[slot] < since  # noqa: E731
    turn, total = 0, ((blocks >= 0) & ~hit).sum()
    for b, k, i in np.ndindex(B, K, n):
      if blocks[b, k, i] >= 0 and not hit[b, k, i]:
        places[b, k, i] = next(filter(is_left, victims[given + turn :: total][:LOOKS]), -1)
        turn += 1
    order = np.argsort(~hit, -1, kind="stable")
    blocks, slots, places = (np.take_along_axis(x, order, -1) for x in (blocks, slots, places))
    return blocks, slots, places, hit.sum(-1, keepdims=True)

  def commit(self, layers, blocks, slots, places, attended, stamps, steps):
    for b, k, i in np.ndindex(*blocks.shape):
      if i < attended[b, k] and blocks[b, k, i] >= 0:
        key = (k, int(layers[b, k, i]), int(blocks[b, k, i]))
        self.selected[key] = int(steps[b])
        at = max(int(slots[b, k, i]), int(places[b, k, i]))
        if at >= 0:
          self.stamp[at] = int(stamps[b, k, i])
          if places[b, k, i] >= 0:
            self.entered[at] = self.stamp[at]
          self.held[at] = key

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
    stamps = (np.array([of[p] for p in range(P)], np.int32) for of in (self.stamp, self.entered))
    return Maps(slot_of, block_of, *stamps, selected)

  def assert_equal(self, maps: Maps):
    for name, actual, expected in zip(Maps._fields, maps, self.maps(), strict=True):
      np.testing.assert_array_equal(actual, expected, err_msg=name)


@functools.cache
def programs(implementation: str):
  options = dict(implementation=implementation)
  return (
    jax.jit(lambda maps, since: kernels.victims(kernels.ages(maps, since), since)),
    jax.jit(functools.partial(kernels.propose, **options)),
    jax.jit(functools.partial(kernels.commit, **options)),
  )


release = jax.jit(kernels.release)


def empty_maps(K: int, L: int, M: int, P: int) -> Maps:
  maps = Residency(K, L, M, P).maps()
  assert (maps.block_of == -1).all() and (maps.last_used == -1).all()
  return maps


def ids(*rows) -> np.ndarray:
  """Blocks [B, 1, n] of one head."""
  return np.array(rows, np.int32)[:, None]


def lengths(blocks: np.ndarray) -> np.ndarray:
  return np.full(blocks.shape[:2], blocks.shape[2], np.int32)


def propose(maps: Maps, blocks, stamp: int, implementation: str) -> Located:
  """The only call, in layer 0, of a step whose stamps begin at `stamp`."""
  oldest_first, propose, _ = programs(implementation)
  return propose(maps, oldest_first(maps, np.int32(stamp)), np.int32(0), blocks, lengths(blocks))


def fill(maps: Maps, blocks, stamp: int, implementation: str, layer: int = 0) -> Maps:
  """A step that uses all of `blocks` [B, 1, n] in one layer."""
  oldest_first, propose, commit = programs(implementation)
  located = propose(maps, oldest_first(maps, np.int32(stamp)), np.int32(layer), blocks, lengths(blocks))
  return commit(maps, np.int32(layer), located, lengths(blocks), np.int32(stamp), np.zeros(len(blocks), np.int32))


every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


@every_implementation
def test_victims_are_the_least_recently_used(implementation: str):
  maps = empty_maps(1, 1, 9, 3)
  for stamp, block in enumerate([5, 6, 7, 5]):  # 6 is now the oldest
    maps = fill(maps, ids([block]), stamp, implementation)
  assert maps.slot_of[0, 0, [5, 6, 7]].tolist() == [0, 1, 2]
  assert maps.last_used.tolist() == [3, 1, 2]  # a hit is a use
  located = propose(maps, ids([1, 2]), 4, implementation)
  assert located.place.tolist() == [[[1, 2]]] and not located.hit.any()
  maps = fill(maps, ids([1, 2]), 4, implementation)
  assert maps.slot_of[0, 0].tolist() == [-1, 1, 2, -1, -1, 0, -1, -1, -1]  # 6 and 7 are evicted
  assert maps.block_of.tolist() == [5, 1, 2]


@every_implementation
def test_ties_and_empty_slots_go_by_the_lowest_slot(implementation: str):
  maps = empty_maps(1, 1, 9, 4)
  assert propose(maps, ids([4, 5, 6]), 0, implementation).place.tolist() == [[[0, 1, 2]]]
  maps = fill(maps, ids([4, 5, 6]), 0, implementation)
  assert propose(maps, ids([1, 2]), 1, implementation).place.tolist() == [
    [[3, 0]]
  ]  # empty, then lowest of three equals
  maps = fill(maps, ids([5, -1]), 3, implementation)
  assert propose(maps, ids([1, 2]), 4, implementation).place.tolist() == [[[3, 0]]]
  maps = release(maps, np.array([6, -1], np.int32))
  assert propose(maps, ids([1, 2]), 4, implementation).place.tolist() == [[[2, 3]]]


@every_implementation
def test_hits_come_first_and_are_never_victims(implementation: str):
  maps = fill(empty_maps(1, 1, 9, 2), ids([4, 5]), 0, implementation)
  located = propose(maps, ids([1, 2, 4]), 1, implementation)  # slot 0 is the first victim in turn, but holds block 4
  assert located.blocks.tolist() == [[[4, 1, 2]]]
  assert located.slot.tolist() == [[[0, -1, -1]]] and located.place.tolist() == [[[-1, -1, 1]]]
  assert located.n_hits.tolist() == [[[1]]] and located.hit.tolist() == [[[True, False, False]]]
  located = propose(maps, ids([1, 4]), 1, implementation)
  assert located.slot.tolist() == [[[0, -1]]] and located.place.tolist() == [[[-1, 1]]]  # slot 0 is passed over
  everything = propose(maps, ids([4, 5, 6]), 1, implementation)
  assert everything.slot.tolist() == [[[0, 1, -1]]] and everything.place.tolist() == [[[-1, -1, -1]]]


@every_implementation
def test_hits_come_first_within_their_group(implementation: str):
  maps = fill(empty_maps(1, 1, 20, 9), ids([4, 5, 6]), 0, implementation)
  blocks = ids([1, 4, 2, 3, 7, 5, 6, 8, 9])
  options = dict(implementation=implementation)
  maps, blocks, length = jax.tree.map(jnp.asarray, (maps, blocks, lengths(blocks)))
  find = functools.partial(kernels.find, maps, 0, blocks, length, **options)
  located = find(group=4)
  assert (np.asarray(located.place) == -1).all()
  assert located.blocks.tolist() == [[[4, 1, 2, 3, 5, 6, 7, 8, 9]]]
  assert located.n_hits.tolist() == [[[1, 2, 0]]] and located.group == 4
  located = find(group=1)
  assert located.blocks.tolist() == [[[1, 4, 2, 3, 7, 5, 6, 8, 9]]]
  assert located.n_hits.tolist() == [[[0, 1, 0, 0, 0, 1, 1, 0, 0]]]


@every_implementation
def test_a_slot_used_since_the_program_began_is_no_victim(implementation: str):
  oldest_first, propose, commit = programs(implementation)
  maps = fill(empty_maps(1, 2, 9, 4), ids([4, 5]), 0, implementation)  # slots 2 and 3 stay empty
  victims = oldest_first(maps, np.int32(2))
  assert victims.slots.tolist() == [[2, 3, 0, 1]]
  zero, one = np.int32(0), np.int32(1)
  two, three = np.full((1, 1), 2, np.int32), np.full((1, 1), 3, np.int32)
  first = propose(maps, victims, zero, ids([5, 1]), two)
  assert first.blocks.tolist() == [[[5, 1]]]
  assert first.slot.tolist() == [[[1, -1]]] and first.place.tolist() == [[[-1, 2]]]
  maps = commit(maps, zero, first, two, np.int32(2), np.zeros(1, np.int32))
  second = propose(maps, victims, one, ids([1, 2, 3]), three, given=np.ones((1, 1), np.int32))  # 1 has been hit
  assert second.place.tolist() == [[[3, 0, -1]]]
  again = propose(maps, victims, one, ids([1, 2]), two)  # 2 is given; the second miss looks at the fourth place next
  assert again.place.tolist() == [[[0, 3]]]


@every_implementation
def test_blocks_never_reached_are_not_taken_for_resident(implementation: str):
  maps, blocks = fill(empty_maps(1, 1, 9, 3), ids([7, 8]), 4, implementation), ids([1, 8, 2])
  located = propose(maps, blocks, 9, implementation)
  assert located.slot.tolist() == [[[1, -1, -1]]] and located.place.tolist() == [[[-1, 2, 0]]]
  commit = programs(implementation)[2]
  after = commit(maps, np.int32(0), located, np.array([[2]], np.int32), np.int32(9), np.array([6], np.int32))
  assert after.slot_of[0, 0].tolist() == [-1, 2, -1, -1, -1, -1, -1, 0, 1]  # 7 keeps its slot, 2 has none
  assert after.last_used.tolist() == [4, 9, 9] and after.entered.tolist() == [4, 4, 9]
  assert after.last_selected[0, 0, [1, 8, 2]].tolist() == [6, 6, NEVER]
  after = commit(maps, np.int32(0), located, np.array([[0]], np.int32), np.int32(9), np.array([6], np.int32))
  assert after.last_used.tolist() == [4, 4, -1]  # an unread hit is no use


@every_implementation
def test_a_block_that_two_rows_miss_keeps_one_slot(implementation: str):
  maps = fill(empty_maps(1, 1, 9, 6), ids([7]), 4, implementation)
  blocks, two = np.array([[[4, 1]], [[4, 2]]], np.int32), np.full((2, 1), 2, np.int32)
  located = propose(maps, blocks, 9, implementation)
  places = np.asarray(located.place)[:, 0, 0].tolist()
  assert len({*places, -1}) == 3
  maps = programs(implementation)[2](maps, np.int32(0), located, two, np.int32(9), np.array([6, 6], np.int32))
  assert [int(maps.block_of[place]) for place in places] == [4, 4]
  kept = int(maps.slot_of[0, 0, 4])
  (lost,) = {*places} - {kept}
  after = jax.jit(kernels.tidy)(maps)
  assert after.block_of[lost] == after.last_used[lost] == -1 and after.last_used[kept] == 9
  assert sorted(np.asarray(after.block_of)[np.asarray(after.block_of) >= 0]) == [1, 2, 4, 7]
  np.testing.assert_array_equal(after.slot_of, maps.slot_of)
  again = propose(after, blocks, 10, implementation)
  assert (np.asarray(again.slot)[:, 0, 0] == kept).all() and (np.asarray(again.slot) >= 0).all()


def test_empty_maps():
  maps = Maps.empty(2, 3, 5, 4)
  Residency(2, 3, 5, 4).assert_equal(maps)
  assert all(x.dtype == np.int32 and not x.weak_type for x in maps)


def test_release_forgets_all_layers_and_heads():
  maps = empty_maps(2, 2, 5, 8)
  every = np.broadcast_to(np.array([[[3], [3]]], np.int32), (1, 2, 1))
  for layer in range(2):
    maps = fill(maps, every, layer, "xla", layer)
  maps = fill(maps, np.array([[[1], [2]]], np.int32), 2, "xla")
  after = release(maps, np.array([3, -1], np.int32))
  assert (np.asarray(after.slot_of)[:, :, 3] == -1).all() and (np.asarray(after.last_selected)[:, :, 3] == NEVER).all()
  assert after.block_of.tolist() == [-1, -1, -1, -1, 1, 12, -1, -1]
  assert after.last_used.tolist() == [-1, -1, -1, -1, 2, 2, -1, -1]
  assert after.slot_of[0, 0].tolist() == [-1, 4, -1, -1, -1] and after.slot_of[1, 0].tolist() == [-1, -1, 5, -1, -1]


def test_touch_uses_all_layers_and_heads():
  maps = empty_maps(2, 2, 5, 6)
  every = np.broadcast_to(np.array([[[3], [3]]], np.int32), (1, 2, 1))
  for layer in range(2):
    maps = fill(maps, every, layer, "xla", layer)
  maps = fill(maps, np.array([[[1], [2]]], np.int32), 2, "xla")
  after = jax.jit(kernels.touch)(maps, np.array([3, -1, 4], np.int32), np.int32(9))
  assert after.last_used.tolist() == [9, 9, 9, 9, 2, 2]
  for x, y in zip(after._replace(last_used=maps.last_used), maps, strict=True):
    np.testing.assert_array_equal(x, y)


def test_spare_slots_are_those_that_nobody_needs():
  """The first victims, empty or stamped by SPARE; wherever stamps wrap, and until a step uses one."""
  for since in (1000, np.iinfo(np.int32).min + 3):
    ages = np.array([-3, SPARE - 6, 0, SPARE - 4, -1], np.int64)
    stamps = np.where(ages == 0, -1, (since + ages).astype(np.uint32).astype(np.int32)).astype(np.int32)
    slot_of = np.array([[[-1, -1, -1, -1, 0, 1, 3, 4, -1]]], np.int32)
    block_of = np.array([4, 5, -1, 6, 7], np.int32)
    maps = empty_maps(1, 1, 9, 5)._replace(last_used=stamps, slot_of=slot_of, block_of=block_of)
    clock, after = np.int32(since), lambda f, *blocks: jax.jit(f)(maps, np.array(blocks, np.int32), np.int32(since))  # noqa: B023
    assert spare_of(maps, clock) == ([2, 1, 3, 0, 4], 3)
    assert spare_of(after(kernels.renew, 5, 4, -1), clock) == ([2, 3, 1, 0, 4], 2)
    assert spare_of(after(kernels.rest, 7, 5, -1), clock) == ([2, 1, 3, 4, 0], 4)
    assert (after(kernels.rest, 7, 5, 7).last_used == after(kernels.rest, 7, 5, -1).last_used).all()
    assert spare_of(after(kernels.touch, 5, -1), clock) == ([2, 3, 0, 4, 1], 2)
    assert spare_of(empty_maps(1, 1, 9, 3), clock) == ([0, 1, 2], 3)


def spare_of(maps: Maps, since) -> tuple[list[int], int]:
  victims = programs("xla")[0](maps, since)
  return victims.slots[0].tolist(), int(jax.jit(kernels.room)(maps, victims, 1)[0])


@every_implementation
def test_residency_without_slots(implementation: str):
  maps, blocks = empty_maps(2, 1, 6, 0), np.array([[[1, -1], [4, 2]]], np.int32)
  located = propose(maps, blocks, 0, implementation)
  assert (np.asarray(located.slot) == -1).all() and (np.asarray(located.place) == -1).all()
  commit = programs(implementation)[2]
  maps = commit(maps, np.int32(0), located, np.array([[2, 1]], np.int32), np.int32(3), np.array([8], np.int32))
  assert maps.last_selected[:, 0].tolist() == [[NEVER, 8, *[NEVER] * 4], [*[NEVER] * 4, 8, NEVER]]
  maps = release(maps, np.array([1], np.int32))
  assert maps.last_selected[:, 0, 1].tolist() == [NEVER, NEVER]
  assert jax.jit(kernels.rest)(maps, np.array([1, -1], np.int32), np.int32(4)).last_used.shape == (0,)


@every_implementation
def test_a_search_ends(implementation: str):
  """One miss among many slots that the program has used already."""
  maps = empty_maps(1, 1, 9, 3 * LOOKS)
  order = programs(implementation)[0](maps, np.int32(1))
  for free, slot in ((LOOKS - 1, LOOKS - 1), (LOOKS, -1)):
    used = maps._replace(last_used=np.where(np.arange(3 * LOOKS) == free, -1, 1).astype(np.int32))
    located = programs(implementation)[1](used, order, np.int32(0), ids([4]), np.ones((1, 1), np.int32))
    assert located.place.tolist() == [[[slot]]]


@every_implementation
def test_stamps_wrap_around(implementation: str):
  """Slots of stamps from before the wrap are older than those from after it, and than the program."""
  top, bottom = np.iinfo(np.int32).max, np.iinfo(np.int32).min
  maps = empty_maps(1, 1, 9, 4)._replace(last_used=np.array([bottom + 3, top, -1, top - 2], np.int32))
  located = propose(maps, ids([1, 2, 3, 4]), bottom + 9, implementation)
  assert located.place.tolist() == [[[2, 3, 1, 0]]]
  located = propose(maps, ids([1, 2, 3, 4]), bottom + 2, implementation)  # slot 0 has been used in this program
  assert located.place.tolist() == [[[2, 3, 1, -1]]]


def test_a_slot_idle_for_long_never_looks_new():
  """Beyond 2^31 stamps, and wherever the wrap comes: slot 0 is used once, slot 1 in every step."""
  for start in (0, np.iinfo(np.int32).max - 3, -(1 << 30)):
    maps, since = empty_maps(1, 1, 9, 2), start
    maps = maps._replace(last_used=np.full(2, start, np.int32), block_of=np.arange(2, dtype=np.int32))
    for _ in range(9):
      since = int(np.int32(np.uint32((since + (1 << 29)) & 0xFFFFFFFF)))
      maps = jax.jit(kernels.saturate)(maps, np.int32(since))
      victims = programs("xla")[0](maps, np.int32(since))
      assert victims.slots.tolist() == [[0, 1]]
      maps = maps._replace(last_used=np.array([maps.last_used[0], since], np.int32))
  kept = np.array([-1, 7, 5 - (1 << 30), 4 - (1 << 30)], np.int32)
  saturated = jax.jit(kernels.saturate)(empty_maps(1, 1, 9, 4)._replace(last_used=kept), np.int32(5)).last_used
  assert saturated.tolist() == [-1, 7, 5 - (1 << 30), 5 - (1 << 30)]  # an empty slot stays one


def test_groups_are_powers_of_two():
  with pytest.raises(ValueError, match="group=3 is not a power of two"):
    kernels.find(Maps.empty(1, 1, 9, 3), 0, jnp.arange(4)[None, None], jnp.full((1, 1), 4), group=3)


@every_implementation
def test_lists_have_blocks(implementation: str):
  with pytest.raises(ValueError, match="lists of 0 blocks"):
    propose(empty_maps(1, 1, 9, 3), ids([]), 0, implementation)


@every_implementation
@pytest.mark.parametrize("P", [1, 5, 40, 200])
def test_residency_against_a_dictionary(P: int, implementation: str):
  """Programs of two calls, a layer each."""
  rng = np.random.default_rng(P)
  B, K, L, M, n = 3, 2, 2, 40, 6
  model, maps = Residency(K, L, M, P), empty_maps(K, L, M, P)
  oldest_first, propose, commit = programs(implementation)
  seen = dict(hits=0, homeless=0, unreached=0)
  for clock in range(25):
    freed = rng.integers(-1, M // 2, 2).astype(np.int32)
    maps = release(maps, freed)
    model.release(set(freed.tolist()))
    order, since = model.victims(), clock * L
    victims: Victims = oldest_first(maps, np.int32(since))
    np.testing.assert_array_equal(victims.slots, [order])
    steps = rng.integers(0, 99, B).astype(np.int32)
    given = np.zeros((B, K), np.int32)
    for layer in range(L):
      blocks = np.stack([rng.permutation(M // 2)[: B * n].reshape(B, n) for _ in range(K)], 1).astype(np.int32)
      blocks[:, :, :] = np.where(rng.random((B, 1, n)) < 0.8, blocks, -1)
      length = lengths(blocks)
      located = propose(maps, victims, np.int32(layer), blocks, length, given=given)
      layers = np.broadcast_to(layer, blocks.shape)
      expected = Located(*model.propose(order, since, layer, blocks, given.sum()), length)
      for name, x, y in zip(Located._fields, located, expected, strict=True):
        np.testing.assert_array_equal(x, y, err_msg=name)
      blocks, slots, places, _, _ = expected
      attended = rng.integers(0, blocks.shape[2] + 1, (B, K)).astype(np.int32)
      stamp = np.int32(since + layer)
      maps = commit(maps, np.int32(layer), located, attended, stamp, steps)
      model.commit(layers, blocks, slots, places, attended, np.broadcast_to(stamp, blocks.shape), steps)
      model.assert_equal(maps)
      given += ((np.arange(blocks.shape[2]) < attended[..., None]) & (slots < 0)).sum(-1, dtype=np.int32)
      seen["hits"] += (slots >= 0).sum()
      seen["homeless"] += ((blocks >= 0) & (slots < 0) & (places < 0)).sum()
      seen["unreached"] += (attended < blocks.shape[2]).sum()
  assert seen["unreached"] and (seen["homeless"] or P > 40) and (seen["hits"] or P == 1)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_a_load_copied_is_resident_also_where_attention_never_came(implementation):
  """A hit with a place is what a load copied. Blocks 1, 2 and 3 are listed, the last two copied, and one is read."""
  blocks = jnp.array([[[1, 2, 3, -1]]])
  places = jnp.array([[[-1, 0, 1, -1]]])
  maps = kernels.Maps.empty(1, 1, 9, 4)
  maps = maps._replace(slot_of=maps.slot_of.at[0, 0, 7].set(0), block_of=maps.block_of.at[0].set(7))
  located = Located(blocks, places, places, jnp.array([[[4]]]), jnp.array([[3]]))
  one, zero = jnp.array([[1]]), jnp.int32(0)
  made = kernels.commit(maps, zero, located, one, jnp.int32(5), jnp.array([6]), implementation=implementation)
  assert made.slot_of[0, 0].tolist() == [-1, -1, 0, 1, -1, -1, -1, -1, -1]
  assert made.block_of.tolist() == [2, 3, -1, -1] and made.last_used.tolist() == [5, 5, -1, -1]
  assert (made.last_selected[0, 0] == 6).tolist() == [i == 1 for i in range(9)]
