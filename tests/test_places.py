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
from tests.tiny import check_nothing_is_held, config, greedy, new_engine, prompt_of, tiny_model, with_slots

K, L, M, R = 2, 2, 24, 3
CLOCK = 50


# ------------------------------------------------------------------------------------------------------ one function


def filled(rng: np.random.Generator, n_slots: int, missing: np.ndarray) -> tuple[Maps, np.ndarray]:
  """Maps of slots of which some are empty, spare or needed, none of them of blocks `missing`; the content of slots."""
  others = [(k, layer, m) for k, layer, m in np.ndindex(K, L, M) if m not in missing]
  maps = Maps.empty(K, L, M, n_slots)
  slot_of, block_of, last_used, entered, selected = map(np.array, maps)
  for slot in range(n_slots):
    kind = rng.integers(3)
    if kind:
      k, layer, m = others.pop(rng.integers(len(others)))
      slot_of[k, layer, m], block_of[slot] = slot, (k * L + layer) * M + m
      last_used[slot] = CLOCK * L - rng.integers(1, 40) + (SPARE if kind == 2 else 0)
      entered[slot] = last_used[slot]
  return Maps(slot_of, block_of, last_used, entered, selected), np.where(block_of >= 0, block_of, -9)


@functools.cache
def layer_of(zones: Zones, pins: bool, implementation: str) -> Any:
  def run(pool, kv, slots, maps, victims, given, layer, own, lanes, newest, before, room):
    hot: Any = Hot(slots, None, maps, np.zeros((K, L, R, 0)), None, None, jnp.int32(CLOCK))  # type: ignore[arg-type]
    entering = Entering(own, lanes, newest, before, pins, room)
    turn = Turn(zones, victims, given)
    cache, given, n_read = enter_piece(KVCache(pool, hot), kv, layer, entering, turn, implementation)
    return cache.hot.slots, cache.hot.maps, given, n_read

  return jax.jit(run)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("pins", [False, True])
@pytest.mark.parametrize(
  ("zones", "policy"), [("shared", "lru"), ("shared", "fifo"), ("layer", "lru"), ("lane", "lru")]
)
def test_a_piece_takes_slots_that_nobody_needs_but_for_its_newest_blocks(
  zones, policy, pins: bool, implementation: str
):
  n_zones = {"shared": 1, "layer": L, "lane": R}[zones]
  number = np.arange(K * L * M, dtype=np.float32).reshape(K, L, M, 1, 1, 1)  # of a block, which is all it holds
  pool = np.broadcast_to(number, (K, L, M, 2, 4, 16))
  most_read = 0
  for seed, n_slots in itertools.product(range(6), (6, 24, 60)):
    rng = np.random.default_rng(seed)
    blocks = rng.permutation(M).astype(np.int32)
    own, before = blocks[:8], blocks[8:16]
    newest = np.arange(8) >= 8 - rng.integers(0, 4) if not pins else np.ones(8, bool)
    packed = zones == "lane" and not pins and seed % 2  # two prompts in one piece
    if packed:
      before = before[:0]
    else:
      before = np.where(np.arange(8) < 6, before, -1).astype(np.int32)
    rows = np.where(np.arange(8)[None] // 4 == np.arange(2)[:, None], own, -1) if packed else own[None]
    lanes = np.array([2, 0] if packed else [1], np.int32)
    maps, held = filled(rng, n_slots, own)
    since = jnp.int32(CLOCK * L)
    maps = (kernels.touch if pins else kernels.renew)(Maps(*map(jnp.asarray, maps)), jnp.asarray(before), since)
    victims = kernels.victims(EVICTIONS[policy](maps, since), since, n_zones)
    room = kernels.room(maps, victims, 2 if zones == "layer" else L + 1)
    room = np.zeros(n_zones, np.int32) if pins else room
    needed = {p for p in range(n_slots) if not is_spare(maps.last_used[p], since)}
    found = np.asarray(maps.slot_of)
    slots, given = (
      jnp.broadcast_to(held[:, None, None, None].astype(np.float32), (n_slots, 2, 4, 16)),
      np.zeros_like(room),
    )
    n_newest = newest.sum() * K * L
    for layer in range(L):
      kv = pool[:, layer, own][:, None]
      slots, maps, given, n_read = layer_of(zones, pins, implementation)(
        pool, kv, slots, maps, victims, given, np.int32(layer), rows, lanes, newest, before, room
      )
      after = np.asarray(maps.slot_of)
      came = (after[:, layer, before[before >= 0]] >= 0) & (found[:, layer, before[before >= 0]] < 0)
      assert n_read.tolist() == came.sum(1).tolist()
      most_read = max(most_read, int(came.sum()))
      for k, m in itertools.product(range(K), own[newest].tolist()):
        if (p := after[k, layer, m]) >= 0:
          assert maps.last_used[p] == since + layer
      for k, m in np.argwhere(came):
        assert maps.last_used[after[k, layer, before[m]]] == since + layer + (0 if pins else SPARE)
      for k, m in itertools.product(range(K), own[~newest].tolist()):
        if (p := after[k, layer, m]) >= 0:
          assert maps.last_used[p] == since + layer + SPARE
    block_of = np.asarray(maps.block_of)
    full = block_of >= 0
    np.testing.assert_array_equal(np.asarray(slots)[full, 0, 0, 0], block_of[full])
    at = np.asarray(maps.slot_of).ravel()
    assert all(at[block_of[p]] == p for p in np.flatnonzero(full)) and (at >= 0).sum() == full.sum()
    lost = [p for p in needed if block_of[p] != held[p]]
    assert pins or len(lost) <= n_newest  # and none for the sake of others
    if not pins and not n_newest:
      assert not lost
  assert most_read


# --------------------------------------------------------------------------------------------------- the whole engine

# fmt: off
RUNGS = {
  "hardly a slot": (5, []),
  "few slots": (24, ["cache.load=gather"]),
  "layers": (96, ["cache.zones=layer", "cache.load=per_block", "cache.save=per_block"]),
  "lanes": (96, ["cache.zones=lane"]),
  "fifo": (64, ["cache.eviction=fifo", "sparse.policy=psa", "sparse.threshold=1"]),
  "staged": (64, ["cache.save=staged", "cache.load=staged"]),
  "staged, on two devices": (64, ["cache.save=staged", "tp=2"]),
  "chunked": (64, ["scheduler.prefill=chunked", "scheduler.chunk_tokens=32", "cache.save=staged"]),
}
# fmt: on


def spare_slots(engine: Engine) -> int:
  """How many slots hold a block that nobody needs; and what slots hold is what the pool has at their blocks, unless
  these are on their way back."""
  executor: Any = engine._executor
  executor.wait()
  allocator, cache, tp = engine._scheduler._allocator, executor.cache, engine.config.tp
  alive = allocator._owners > 0
  alive[[*allocator._idle]] = True
  parts = (np.split(np.asarray(x), tp) for x in (cache.pool, cache.hot.slots, cache.hot.maps.block_of))
  for pool, slots, block_of in zip(*parts, strict=True):
    at = np.flatnonzero((block_of >= 0) & alive[block_of % alive.shape[0]])
    np.testing.assert_array_equal(slots[at], pool.reshape(-1, *pool.shape[3:])[block_of[at]])
  maps = cache.hot.maps
  return int((np.asarray(is_spare(maps.last_used, cache.hot.stamp(0))) & (maps.block_of >= 0)).sum())


@CPU_AND_GPU
@pytest.mark.parametrize("rung", RUNGS)
def test_prompts_that_share_come_and_go(device, rung: str, monkeypatch):
  """Begun alike, cancelled while they are brought, preempted; saves land late. Every token is the model's."""
  slots, more = RUNGS[rung]
  conf = config(
    "sparse.policy=dense", "sparse.token_budget=32", "scheduler.max_context=128", "cache.dram_bytes=152KiB",
    "scheduler.reserve=on_demand", "scheduler.max_inject_tokens=64", *more,
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
  while len(requests) < 40 or engine.has_work:
    if len(requests) < 40 and rng.random() < 0.4:
      requests.append(engine.add_request(prompts[rng.integers(8)], int(rng.integers(1, 20))))
    if rng.random() < 0.06 and requests:
      engine.cancel(requests[rng.integers(len(requests))].id)
    engine.step()
    if rng.random() < 0.2:
      most_spare = max(most_spare, spare_slots(engine))
  for request in requests:
    expected = greedy("gqa2", tuple(request.prompt.tolist()), request.max_new_tokens)
    assert request.output_tokens == expected[: len(request.output_tokens)]
    assert request.state is State.CANCELLED or len(request.output_tokens) == len(expected)
  assert sum(request.cached_tokens for request in requests) > 500
  assert sum(request.preemptions for request in requests) and sum(r.state is State.CANCELLED for r in requests)
  assert engine.usage.blocks_loaded and (most_spare or slots == 5)
  check_nothing_is_held(engine)
