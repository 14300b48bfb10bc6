"""What enters slots beside what decode steps read: whose slots it takes, and that it is what the pool has."""

from __future__ import annotations

import functools
import itertools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as kernels
from pallas_kernels import SPARE, Maps
from pallas_kernels.maps import is_spare
from sparse_serve_jax.memory import writer
from sparse_serve_jax.memory.eviction import EVICTIONS, Turn, Zones
from sparse_serve_jax.memory.kv_cache import Hot, KVCache
from sparse_serve_jax.memory.places import Entering, enter_piece
from sparse_serve_jax.serving.engine import Engine
from sparse_serve_jax.serving.request import Request, State
from tests.cases import IMPLEMENTATIONS
from tests.test_exactness import CPU_AND_GPU
from tests.tiny import check_nothing_is_held, config, greedy, new_engine, often, prompt_of, tiny_model, with_slots

K, L, M, R = 2, 4, 24, 3
SINCE = 100  # the first stamp of the program
# Of a block, which is all that it holds.
POOL = np.broadcast_to(np.arange(K * L * M, dtype=np.float32).reshape(K, L, M, 1, 1, 1), (K, L, M, 2, 4, 16))


# ------------------------------------------------------------------------------------------------------ one function


def filled(rng: np.random.Generator, n_slots: int, missing: np.ndarray) -> Maps:
  """Maps of slots of which a third or so is empty, spare, needed; none holds one of the blocks `missing`."""
  others = [(k, layer, m) for k, layer, m in np.ndindex(K, L, M) if m not in missing]
  maps = Maps(*map(np.array, Maps.empty(K, L, M, n_slots)))
  for slot in range(n_slots):
    if kind := rng.integers(3):
      k, layer, m = others.pop(rng.integers(len(others)))
      maps.slot_of[k, layer, m], maps.block_of[slot] = slot, (k * L + layer) * M + m
      maps.last_used[slot] = maps.entered[slot] = SINCE - rng.integers(1, 40) + (SPARE if kind == 2 else 0)
  return Maps(*map(jnp.asarray, maps))


@functools.cache
def programs(zones: Zones, policy: str, pins: bool, implementation: str) -> Any:
  """What a program does when it begins, and in a layer."""

  @jax.jit
  def begin(maps, before):
    since, n_zones = jnp.int32(SINCE), {"shared": 1, "layer": L, "lane": R}[zones]
    maps = (kernels.touch if pins else kernels.renew)(maps, before, since)
    victims = kernels.victims(EVICTIONS[policy](maps, since), since, n_zones)
    room = kernels.room(maps, victims, 2 if zones == "layer" else L + 1)
    return maps, victims, jnp.zeros_like(room) if pins else room

  @jax.jit
  def enter(slots, maps, victims, given, layer, own, lanes, newest, before, room):
    hot: Any = Hot(slots, None, maps, np.zeros((K, L, R, 0)), None, None, jnp.int32(SINCE // L))  # type: ignore[arg-type]
    kv = jnp.take(jnp.asarray(POOL)[:, layer], own.max(0), axis=1)[:, None]
    entering, turn = Entering(own, lanes, newest, before, pins, room), Turn(zones, victims, given)
    cache, given, n_read = enter_piece(KVCache(jnp.asarray(POOL), hot), kv, layer, entering, turn, implementation)
    return cache.hot.slots, cache.hot.maps, given, n_read

  return begin, enter


def zone_of(zones: Zones, layer: int, lane: int) -> int:
  return {"shared": 0, "layer": layer, "lane": lane}[zones]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("pins", [False, True])
@pytest.mark.parametrize(
  ("zones", "policy"), [("shared", "lru"), ("shared", "fifo"), ("layer", "lru"), ("lane", "lru")]
)
def test_a_piece_takes_slots_that_nobody_needs_but_for_its_newest_blocks(
  zones, policy, pins: bool, implementation: str
):
  """Of any maps. It enters as new, what else enters as spare, and slots hold what they are said to."""
  begin, enter = programs(zones, policy, pins, implementation)
  n_zones, n_read, n_kept = {"shared": 1, "layer": L, "lane": R}[zones], 0, 0
  for seed, n_slots in itertools.product(range(8), (12, 24, 60)):
    rng = np.random.default_rng(seed)
    blocks = rng.permutation(M).astype(np.int32)
    own, before = blocks[None, :8], np.where(np.arange(8) < 6, blocks[8:16], -1).astype(np.int32)
    newest, lanes = np.arange(8) >= 8 - rng.integers(0, 4) if not pins else np.ones(8, bool), np.array([1])
    if zones == "lane" and not pins and seed % 2:  # two prompts in one piece
      own, before, lanes = np.where(np.arange(8) // 4 == [[0], [1]], own, -1), before[:0], np.array([2, 0])
    maps, victims, room = begin(filled(rng, n_slots, blocks[:8]), before)
    first, needed = Maps(*map(np.array, maps)), ~np.array(is_spare(maps.last_used, jnp.int32(SINCE)))
    slots = jnp.broadcast_to(first.block_of[:, None, None, None].astype(np.float32), (n_slots, *POOL.shape[3:]))
    given, wanted = jnp.zeros(n_zones, jnp.int32), np.zeros(n_zones, int)
    for layer in range(L):
      was = np.array(maps.slot_of[:, layer])
      slots, maps, given, of_head = enter(slots, maps, victims, given, layer, own, lanes, newest, before, room)
      slot_of, last_used = np.array(maps.slot_of[:, layer]), np.array(maps.last_used)
      for row, lane in zip(own, lanes, strict=True):
        wanted[zone_of(zones, layer, lane)] += K * (row[newest] >= 0).sum()
      came = [(k, m) for k, m in itertools.product(range(K), before) if m >= 0 and slot_of[k, m] >= 0 > was[k, m]]
      assert of_head.tolist() == [sum(head == k for head, _ in came) for k in range(K)]
      stamps = dict.fromkeys(came, 0 if pins else SPARE)
      stamps |= {(k, m): 0 if new else SPARE for m, new in zip(own.max(0), newest, strict=True) for k in range(K)}
      entered = {key: stamp for key, stamp in stamps.items() if slot_of[key] >= 0}
      assert {key: last_used[slot_of[key]] for key in entered} == {k: SINCE + layer + of for k, of in entered.items()}
      n_read, n_kept = n_read + len(came), n_kept + sum(stamp != 0 for stamp in entered.values())
    block_of, slot_of = np.array(maps.block_of), np.array(maps.slot_of).ravel()
    full = np.flatnonzero(block_of >= 0)
    assert np.array(slots)[full, 0, 0, 0].tolist() == block_of[full].tolist()
    assert slot_of[block_of[full]].tolist() == full.tolist() and (slot_of >= 0).sum() == len(full)
    assert (maps.last_selected == first.last_selected).all()
    lost = (needed & (block_of != first.block_of)).reshape(n_zones, -1).sum(1)
    n_spare = (~needed).reshape(n_zones, -1).sum(1)
    if policy == "lru" and not pins:  # first in, first out gives up what is needed too
      assert (lost <= np.maximum(wanted - n_spare, 0)).all()
  assert (n_read or (pins and zones == "lane")) and (n_kept or pins)


# --------------------------------------------------------------------------------------------------- the whole engine

# fmt: off
RUNGS = {
  "hardly a slot": (5, []),
  "few slots": (20, ["cache.load=gather"]),
  "layers": (40, ["cache.zones=layer", "cache.load=per_block", "cache.save=per_block"]),
  "lanes": (48, ["cache.zones=lane"]),
  "fifo": (32, ["cache.eviction=fifo", "sparse.policy=psa", "sparse.threshold=1"]),
  "staged, on two devices": (32, ["cache.save=staged", "cache.load=staged", "tp=2"]),
  "chunked": (32, ["scheduler.prefill=chunked", "scheduler.chunk_tokens=32", "cache.save=staged"]),
}
# fmt: on


def spare_slots(engine: Engine) -> int:
  """How many slots hold a block that nobody needs; and what slots hold is what the pool has at their blocks, unless
  these are on their way back."""
  executor: Any = engine._executor
  executor.wait()
  allocator, cache, maps = engine._scheduler._allocator, executor.cache, executor.cache.hot.maps
  alive = allocator._owners > 0
  alive[[*allocator._idle]] = True
  # By shard: np.asarray of an array on two devices keeps its parts (jax 0.11 on a CPU), and a kept pool moves.
  parts = [[np.asarray(x.data) for x in of.addressable_shards] for of in (cache.pool, cache.hot.slots, maps.block_of)]
  for pool, slots, block_of in zip(*parts, strict=True):
    at = np.flatnonzero((block_of >= 0) & alive[block_of % alive.shape[0]])
    np.testing.assert_array_equal(slots[at], pool.reshape(-1, *pool.shape[3:])[block_of[at]])
  return int((np.asarray(is_spare(maps.last_used, cache.hot.stamp(0))) & (maps.block_of >= 0)).sum())


@CPU_AND_GPU
@pytest.mark.parametrize("rung", often(RUNGS, "layers", "staged, on two devices", "chunked"))
def test_prompts_that_share_come_and_go(device, rung: str, monkeypatch):
  """Begun alike, cancelled while they are brought, preempted; saves land late. Every token is the model's."""
  slots, more = RUNGS[rung]
  conf = config(
    "sparse.policy=dense", "sparse.token_budget=32", "scheduler.max_context=128", "cache.dram_bytes=68KiB",
    "scheduler.reserve=on_demand", "scheduler.max_inject_tokens=64", "scheduler.batch_control=none", *more,
  )  # fmt: skip
  if jax.device_count() < conf.tp:
    pytest.skip(f"needs {conf.tp} devices, there is {jax.device_count()}")
  put = writer._put

  def late(*args):
    time.sleep(0.003)
    put(*args)

  monkeypatch.setattr(writer, "_put", late)
  engine, rng = new_engine(with_slots(conf, slots, tiny_model()), tiny_model()), np.random.default_rng(0)
  stems = [prompt_of(88, seed=i) for i in range(3)]
  prompts = [[*stems[i % 3][:n], i] for i, n in enumerate((88, 88, 70, 88, 40, 88, 88, 16))]
  requests: list[Request] = []
  most_spare = 0
  while len(requests) < 30 or engine.has_work:
    if len(requests) < 30 and rng.random() < 0.4:
      requests.append(engine.add_request(prompts[rng.integers(8)], 38))
    if rng.random() < 0.06 and requests:
      engine.cancel(requests[rng.integers(len(requests))].id)
    engine.step()
    if rng.random() < 0.2:
      most_spare = max(most_spare, spare_slots(engine))
  for request in requests:
    expected = greedy("gqa2", tuple(request.prompt.tolist()), request.max_new_tokens)
    assert request.output_tokens == expected[: len(request.output_tokens)]
    assert request.state is State.CANCELLED or len(request.output_tokens) == len(expected)
  assert sum(request.cached_tokens for request in requests) > 200
  assert sum(request.preemptions for request in requests) and sum(r.state is State.CANCELLED for r in requests)
  assert engine.usage.blocks_loaded and (most_spare or slots == 5)
  check_nothing_is_held(engine)
