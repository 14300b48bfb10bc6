"""Allocator, prefix index, residency maps and block contents together, driven at random against dictionaries.

The device side is the real one: pool and slots hold a tag in every block, and only the ops of a step move them.
"""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import pallas_kernels as kernels
from pallas_kernels import NEVER, SPARE, Maps
from sparse_serve_jax.memory.allocator import BlockAllocator
from sparse_serve_jax.memory.eviction import Turn
from sparse_serve_jax.memory.kv_cache import Hot, KVCache
from sparse_serve_jax.memory.places import Entering, enter_piece
from sparse_serve_jax.memory.prefix import PrefixIndex

K, L, M, P = 2, 2, 7, 14
B, N = 2, 3  # rows of a decode step, blocks that one selects
LARGEST = 4  # blocks of a request

propose, commit, release = jax.jit(kernels.propose), jax.jit(kernels.commit), jax.jit(kernels.release)
tidy, renew, rest, room_of = map(jax.jit, (kernels.tidy, kernels.renew, kernels.rest, kernels.room))
oldest_first = jax.jit(lambda maps, since: kernels.victims(kernels.ages(maps, since), since))
store, load = jax.jit(kernels.store_blocks), jax.jit(kernels.load_blocks)


@jax.jit
def bring_spare(pool, slots, maps, clock, layer, blocks, victims, room, given):
  """What a prefill does with the blocks of a prompt in one layer; of the rest of a cache it sees the clock alone."""
  tail = np.zeros((K, L, 1, 0), np.float32)
  hot = Hot(slots, None, maps, tail, None, None, clock)  # pyright: ignore[reportArgumentType]
  turn, none = Turn("shared", victims, given), jnp.full((1, 1), -1)
  entering = Entering(none, jnp.zeros(1, jnp.int32), jnp.ones(1, bool), blocks, False, room)
  kv = jnp.zeros((K, 1, 1, *pool.shape[3:]))
  cache, given, brought = enter_piece(KVCache(pool, hot), kv, layer, entering, turn, "xla")
  return cache.hot.slots, cache.hot.maps, given, brought


@functools.cache
def unwritten(*dims: int) -> np.ndarray:
  return np.full((*dims, 2, 1, 1), np.nan, np.float32)


class CacheMachine(RuleBasedStateMachine):
  """Every rule but `finish` is one iteration of the engine: release, then store or decode, then completion.

  A prompt that comes enters spare slots: those that are empty, and those of blocks that nobody owns or that came so.

  Requests begin like others, that run or have ended; slots that hold a block twice are tidied at the end of a step.
  """

  def __init__(self):
    super().__init__()
    self.allocator = BlockAllocator(M)
    self.index = PrefixIndex(self.allocator)
    self.pool, self.slots = unwritten(K, L, M), unwritten(P)
    self.maps = Maps(
      np.full((K, L, M), -1, np.int32),
      *[np.full(P, -1, np.int32)] * 3,
      np.full((K, L, M), NEVER, np.int32),
    )
    self.iteration = 0
    self.completed = 0
    self.tags = itertools.count(1)
    # The model.
    self.requests: dict[int, list[int]] = {}  # id -> blocks
    self.chains: dict[int, list[bytes]] = {}  # of all requests there have been
    self.written: dict[bytes, tuple[int, float]] = {}  # link of a chain -> block, and its tag of head 0, layer 0
    self.steps: dict[int, int] = {}
    self.content: dict[tuple[int, int, int], float] = {}  # (head, layer, block) -> tag
    self.held: dict[int, tuple[int, int, int]] = {}  # slot -> (head, layer, block)
    self.stamp = dict.fromkeys(range(P), -1)
    self.selected: dict[tuple[int, int, int], int] = {}

  def begin(self) -> None:
    freed = self.allocator.take_release()
    self.iteration += 1
    padded = np.full(M, -1, np.int32)
    padded[: len(freed)] = freed
    self.maps = release(self.maps, padded)
    for block in freed.tolist():
      for slot in [slot for slot, key in self.held.items() if key[2] == block]:
        del self.held[slot]
        self.stamp[slot] = -1
      self.selected = {key: step for key, step in self.selected.items() if key[2] != block}
    idle = self.allocator.take_idle()
    assert not {*idle.tolist()} & {*itertools.chain(*self.requests.values())}
    padded = np.full(M, -1, np.int32)
    padded[: len(idle)] = idle
    self.maps = rest(self.maps, padded, np.int32(self.iteration * L))
    for slot, key in self.held.items():
      if key[2] in idle and self.stamp[slot] >= 0:
        self.stamp[slot] += SPARE

  def order(self) -> list[int]:
    """The slots as they are given up."""
    return sorted(range(P), key=lambda p: (self.stamp[p] != -1, self.stamp[p], p))

  def end(self, lag: int) -> None:
    """Results arrive up to one iteration late, as in the engine."""
    while self.completed < self.iteration - lag:
      self.completed += 1
      self.allocator.complete(self.completed)

  @rule(n=st.integers(1, LARGEST), alike=st.integers(0, 20), n_alike=st.integers(1, LARGEST - 1), lag=st.integers(0, 1))
  def start(self, n, alike, n_alike, lag):
    """A request comes, which may begin like the one `alike` did; its own blocks are stored."""
    chain = self.chains.get(sorted(self.chains)[-alike - 1], []) if alike < len(self.chains) else []
    chain = chain[: min(n_alike, n - 1)]
    shared = self.index.find(chain)
    for link, block in zip(chain, shared.tolist(), strict=False):  # it is what was stored for the link, and still there
      assert self.written[link] == (block, self.content[0, 0, block])
    n -= len(shared)
    blocks = self.allocator.allocate(n, shared)
    self.begin()
    if blocks is not None:
      owned = {*itertools.chain(*self.requests.values()), *shared.tolist()}
      assert not owned & set(blocks.tolist())
      chain = [*chain[: len(shared)], *(f"{self.iteration}-{i}".encode() for i in range(n))]
      self.chains[self.iteration] = chain
      source = unwritten(K, L, LARGEST).copy()
      to = np.full(LARGEST, -1, np.int32)
      to[:n] = blocks
      for k, layer, i in np.ndindex(K, L, n):
        tag = next(self.tags)
        source[k, layer, i] = tag
        self.content[k, layer, int(blocks[i])] = tag
      self.pool = store(self.pool, source, np.int32(0), np.arange(LARGEST, dtype=np.int32), to)
      self.requests[self.iteration] = [*shared.tolist(), *blocks.tolist()]
      self.steps[self.iteration] = 0
      entered = self.index.enter(chain, np.array(self.requests[self.iteration], np.int32))
      assert entered.tolist() == blocks.tolist()
      self.written |= {
        link: (block, self.content[0, 0, block])
        for link, block in zip(chain[len(shared) :], blocks.tolist(), strict=True)
      }
      self.enter_spare(self.requests[self.iteration])
    self.end(lag)

  def enter_spare(self, prompt: list[int]) -> None:
    """A prompt's blocks enter spare slots, and nobody else loses one; what is there already stays."""
    since = np.int32(self.iteration * L)
    blocks = np.full(LARGEST, -1, np.int32)
    blocks[: len(prompt)] = prompt
    self.maps = renew(self.maps, blocks, since)
    for slot, key in self.held.items():
      if key[2] in prompt and self.stamp[slot] < -1:
        self.stamp[slot] = int(since) + SPARE
    victims, order = oldest_first(self.maps, since), self.order()
    spare = itertools.takewhile(lambda p: self.stamp[p] == -1 or self.stamp[p] < since + SPARE, order)
    spare, given = {*spare}, np.zeros(1, np.int32)
    rooms = room_of(self.maps, victims, L + 1)
    room = len(spare) // (K * (L + 1))
    assert rooms.tolist() == [room]
    for layer in range(L):
      of_layer = {(k, block): (k, layer, block) in self.held.values() for k in range(K) for block in prompt}
      wanted = [(k, b) for k in range(K) for b in [b for b in prompt if not of_layer[k, b]][:room]]
      self.slots, self.maps, given, brought = bring_spare(
        self.pool, self.slots, self.maps, np.int32(self.iteration), np.int32(layer), blocks, victims, rooms, given
      )
      assert brought.tolist() == [sum(k == head for k, _ in wanted) for head in range(K)]
      slot_of = np.asarray(self.maps.slot_of)
      for k, block in wanted:
        slot = int(slot_of[k, layer, block])
        spare.remove(slot)
        self.held[slot], self.stamp[slot] = (k, layer, block), int(since) + layer + SPARE

  @precondition(lambda self: self.requests)
  @rule(data=st.data(), seed=st.integers(0, 2**32 - 1), lag=st.integers(0, 1))
  def decode(self, data, seed, lag):
    """A step. In every layer: select, look up, read, take note. Attention stops anywhere in the list."""
    chosen = data.draw(st.lists(st.sampled_from(sorted(self.requests)), min_size=1, max_size=B, unique=True))
    self.begin()
    rng = np.random.default_rng(seed)
    steps = np.zeros(B, np.int32)
    for b, request in enumerate(chosen):
      steps[b] = self.steps[request]
      self.steps[request] += 1
    since = self.iteration * L
    order = self.order()
    victims = oldest_first(self.maps, np.int32(since))
    given = np.int32(0)
    for layer in range(L):
      blocks, attended = np.full((B, K, N), -1, np.int32), np.zeros((B, K), np.int32)
      for b, k in np.ndindex(len(chosen), K):
        of_head = rng.permutation(self.requests[chosen[b]])[:N]
        blocks[b, k, : len(of_head)] = of_head
        attended[b, k] = rng.integers(0, len(of_head) + 1)
      length = (blocks >= 0).sum(-1, dtype=np.int32)
      located = propose(self.maps, victims, np.int32(layer), blocks, length, given=given)
      self.check_located(layer, blocks, located, order[given:], since)
      blocks, slot, place = (np.asarray(x) for x in (located.blocks, located.slot, located.place))
      reached, hit = np.arange(N) < attended[..., None], slot >= 0
      given += np.int32((reached & ~hit).sum())
      for b, k, i in zip(*np.nonzero(reached & hit), strict=True):  # what attention reads
        assert (np.asarray(self.slots)[slot[b, k, i]] == self.content[k, layer, blocks[b, k, i]]).all()
      self.slots = load(self.pool, self.slots, np.int32(layer), np.where(reached, blocks, -1), place)
      self.maps = commit(self.maps, np.int32(layer), located, attended, np.int32(since + layer), steps)
      last = np.asarray(self.maps.last_selected)
      for b, k, i in zip(*np.nonzero(reached), strict=True):
        key = (int(k), layer, int(blocks[b, k, i]))
        rows = np.nonzero((reached & (blocks == key[2]))[:, k].any(-1))[0]
        self.selected[key] = int(last[key])  # of rows that share it, any of them
        assert self.selected[key] in steps[rows]
        at = max(int(slot[b, k, i]), int(place[b, k, i]))
        if at >= 0:
          self.held[at] = key
          self.stamp[at] = since + layer
    self.maps, slot_of = tidy(self.maps), np.asarray(self.maps.slot_of)
    for slot, key in list(self.held.items()):
      if slot_of[key] != slot:  # it was brought to two places
        assert self.held[int(slot_of[key])] == key
        del self.held[slot]
        self.stamp[slot] = -1
    self.end(lag)

  def check_located(self, layer, blocks, located, order, since):
    """Hits first, where the dictionary has them; misses to the slots not yet taken, oldest first, in turn."""
    where = {key: p for p, key in self.held.items()}
    wanted = {index: where.get((index[1], layer, blocks[index])) for index in map(tuple, np.argwhere(blocks >= 0))}
    claimed = {slot for slot in wanted.values() if slot is not None}
    total, turn = sum(slot is None for slot in wanted.values()), 0
    for b, k in np.ndindex(B, K):
      ranks = [(b, k, i) for i in range(N) if (b, k, i) in wanted]
      hits = [(blocks[at], wanted[at], -1) for at in ranks if wanted[at] is not None]
      misses = []
      for at in (at for at in ranks if wanted[at] is None):
        free = (p for p in order[turn::total] if p not in claimed and self.stamp[p] < since)
        misses.append((blocks[at], -1, next(free, -1)))
        turn += 1
      actual = list(zip(*(x[b, k].tolist() for x in located[:3]), strict=True))
      assert actual == hits + misses + [(-1, -1, -1)] * (N - len(ranks))
      assert located.n_hits[b, k].tolist() == [len(hits)]

  @precondition(lambda self: self.requests)
  @rule(data=st.data())
  def finish(self, data):
    """A request ends. Its blocks stay, in spare slots too, until their place is wanted; or they are not to be found any
    more, and stay in slots until the next iteration releases them.
    """
    request = data.draw(st.sampled_from(sorted(self.requests)))
    blocks = np.array(self.requests.pop(request), np.int32)
    if data.draw(st.booleans()):
      self.index.leave(blocks)
    self.index.free(self.chains[request], blocks, after=self.iteration)
    del self.steps[request]

  @invariant()
  def residency_is_the_dictionaries(self):
    slot_of, block_of = np.full((K, L, M), -1), np.full(P, -1)
    for slot, (k, layer, block) in self.held.items():
      slot_of[k, layer, block], block_of[slot] = slot, (k * L + layer) * M + block
    np.testing.assert_array_equal(self.maps.slot_of, slot_of)
    np.testing.assert_array_equal(self.maps.block_of, block_of)
    np.testing.assert_array_equal(self.maps.last_used, [self.stamp[p] for p in range(P)])
    selected = np.full((K, L, M), NEVER)
    for key, step in self.selected.items():
      selected[key] = step
    np.testing.assert_array_equal(self.maps.last_selected, selected)

  @invariant()
  def nothing_stale_is_resident(self):
    """A slot holds what the pool has at its block, which is what its owner stored; a free block is in no slot."""
    pool, slots = np.asarray(self.pool), np.asarray(self.slots)
    waiting = {int(b) for blocks, _ in self.allocator._unreleased for b in blocks}
    for slot, (k, layer, block) in self.held.items():
      assert (slots[slot] == pool[k, layer, block]).all()
      assert (slots[slot] == self.content[k, layer, block]).all()
      assert block in waiting or block in self.allocator._idle or any(block in b for b in self.requests.values())

  @invariant()
  def blocks_are_owned_kept_or_on_their_way(self):
    owned = {*itertools.chain(*self.requests.values())}
    assert len(owned) == self.allocator.in_use and not owned & {*self.allocator._idle}

  def teardown(self):
    """When all requests have ended nothing is left."""
    for request, blocks in self.requests.items():
      self.index.free(self.chains[request], np.array(blocks, np.int32), after=self.iteration)
    self.requests.clear()
    self.begin()
    self.end(lag=0)
    everything = self.allocator.allocate(M)  # so that what was kept goes
    assert everything is not None and not len(self.index)
    self.begin()
    self.allocator.free(everything, after=self.iteration)
    self.begin()
    self.end(lag=0)
    assert self.allocator.available == M and self.allocator.in_use == 0 and not self.allocator.release_due
    assert (np.asarray(self.maps.block_of) == -1).all() and (np.asarray(self.maps.slot_of) == -1).all()
    assert (np.asarray(self.maps.last_used) == -1).all() and (np.asarray(self.maps.last_selected) == NEVER).all()


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(stateful_step_count=40)
