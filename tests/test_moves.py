"""Loads and saves: what each promises, and that tokens depend on none of them.

The same cases run on a GPU with `-m gpu`, there by the Triton kernels with the pool in pinned host memory.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as kernels
from sparse_serve_jax.config import EngineConfig
from sparse_serve_jax.memory import host_pool, loads
from sparse_serve_jax.memory.create import empty_hot
from sparse_serve_jax.memory.host_pool import HostPool
from sparse_serve_jax.memory.loads import LOADS
from sparse_serve_jax.memory.saves import SAVES, NewBlocks
from sparse_serve_jax.memory.shape import CacheShape
from tests.cases import DTYPES, IMPLEMENTATIONS, assert_same_bits
from tests.tiny import config, greedy, prompt_of, serve, tiny_model, with_slots

K, L, M, P, S, D = 2, 3, 40, 30, 8, 16
AHEAD = sorted(set(LOADS) - {"fused"})
CPU_AND_GPU = pytest.mark.parametrize("device", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])


def in_host_memory(array: np.ndarray) -> jax.Array:
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind=host_pool.memory_kind())
  return jax.device_put(array, sharding)


def lists(n: int, group: int, seed: int, share: float = 0.5) -> kernels.Located:
  """Lists as `propose` makes them, but that a miss without a place may stand anywhere among the misses."""
  rng = np.random.default_rng(seed)
  blocks, slot, place = (np.full((2, K, n), -1, np.int32) for _ in range(3))
  n_hits, length = np.zeros((2, K, -(-n // group)), np.int32), np.array([[n, max(n - 3, 1)], [n, 0]], np.int32)
  places = iter(rng.permutation(P))
  for b, k in np.ndindex(2, K):
    blocks[b, k, : length[b, k]] = rng.permutation(M)[: length[b, k]]
    for g, start in enumerate(range(0, length[b, k], group)):
      end = min(start + group, length[b, k])
      n_hits[b, k, g] = hits = rng.integers(0, end - start + 1) if share < 1 else 0
      for i in range(start, end):
        if i < start + hits:
          slot[b, k, i] = 10**6  # of no load's concern
        elif rng.random() < share:
          place[b, k, i] = next(places)
  return kernels.Located(*map(jnp.asarray, (blocks, slot, place, n_hits, length)))


@functools.cache
def hot_of(dtype: str):
  shape = CacheShape(K=K, L=L, M=M, P=P, R=1, S=S, D=D, E=1, dtype=dtype, offload=True, max_context=S, slab_tokens=S)
  return empty_hot(shape)


@pytest.mark.parametrize("name", AHEAD)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
  ("n", "group", "dtype"), [(7, 7, "float32"), (10, 4, "bfloat16"), (1, 1, "float32")], ids=lambda x: str(x)
)
def test_what_a_load_copies_becomes_hits_in_order(name, implementation, n, group, dtype, monkeypatch):
  """Of each group hits, then what was copied, then misses; each in the order in which they stood."""
  monkeypatch.setattr(loads, "STAGED", (8, 2))  # several rounds of several sizes
  rng, layer = np.random.default_rng(0), 1
  values = rng.normal(size=(K, L, M, 2, S, D)).astype(DTYPES[dtype])
  pool, host = in_host_memory(values), HostPool(1)
  host.follow(pool)
  before = rng.normal(size=(P, 2, S, D)).astype(DTYPES[dtype])
  hot = hot_of(dtype).replace(slots=jnp.asarray(before), pool_id=jnp.asarray(host.numbers))
  load = jax.jit(lambda pool, hot, located: LOADS[name](pool, hot, jnp.int32(layer), located, implementation))
  for seed, share in enumerate((0.5, 0.0, 0.99)):
    located = lists(n, group, seed, share)
    slots, found, copied = load(pool, hot, located)
    expected = before.copy()
    blocks, slot, place, n_hits, length = map(np.array, located)
    for b, k in np.ndindex(2, K):
      arrives = (slot[b, k] < 0) & (place[b, k] >= 0)
      assert int(copied[b, k]) == arrives.sum()
      expected[place[b, k][arrives]] = values[k, layer][blocks[b, k][arrives]]
      slot[b, k][arrives] = place[b, k][arrives]
      order = []
      for g, start in enumerate(range(0, n, group)):
        ranks = range(start, min(start + group, n))
        order += sorted(ranks, key=lambda i: 2 - arrives[i] if i >= start + n_hits[b, k, g] else 0)
        n_hits[b, k, g] += arrives[start : start + group].sum()
      for x in (blocks, slot, place):
        x[b, k] = x[b, k][order]
    assert_same_bits(slots, expected)
    for actual, wanted in zip(found, (blocks, slot, place, n_hits, length), strict=True):
      assert_same_bits(actual, wanted)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", sorted(SAVES))
def test_a_save_writes_the_blocks_and_no_others(name, implementation):
  rng = np.random.default_rng(1)
  before = rng.normal(size=(K, L, M, 2, S, D)).astype(np.float32)
  source = rng.normal(size=(K, 2, 5, 2, S, D)).astype(np.float32)
  ids, blocks = np.array([4, 0, 2, 1], np.int32), np.array([7, -1, 39, 0], np.int32)
  new = functools.partial(NewBlocks, layer=jnp.int32(1), ids=jnp.asarray(ids), blocks=jnp.asarray(blocks))
  save = jax.jit(lambda pool, kv: SAVES[name](pool, new(kv), implementation))
  expected = before.copy()
  for i in (0, 2, 3):
    expected[:, 1:, blocks[i]] = source[:, :, ids[i]]
  assert_same_bits(save(in_host_memory(before), source), expected)


def test_the_host_knows_a_pool_that_moves():
  pool, host = in_host_memory(np.zeros((K, L, M, 2, S, D), np.float32)), HostPool(1)
  host.follow(pool)
  host.follow(pool)
  with pytest.raises(RuntimeError, match="has moved in memory"):
    host.follow(in_host_memory(np.ones((K, L, M, 2, S, D), np.float32)))


N = 12
PROMPTS = [prompt_of(n, seed=n) for n in (50, 17, 40, 7)]
PREFILLS = ("scheduler.max_inject_tokens=128", "scheduler.max_inject_tokens=24", "scheduler.prefill=chunked")


def small(*assignments: str) -> EngineConfig:
  """Slots for less than an eighth of the KV, and pieces of prompts in few sizes."""
  conf = config("scheduler.batch_control=none", "scheduler.max_context=64", "scheduler.chunk_tokens=24", *assignments)
  return with_slots(conf, 6, tiny_model())


@CPU_AND_GPU
@pytest.mark.parametrize("save", sorted(SAVES))
@pytest.mark.parametrize("load", sorted(LOADS))
def test_tokens_depend_on_no_load_and_no_save(device, load, save):
  """Whole layers, pieces within a layer and pieces through all layers, with a budget of the whole prompt."""
  blocks = 4 * sum(len(prompt) // S for prompt in PROMPTS)
  for prefill in PREFILLS:
    conf = small(f"cache.load={load}", f"cache.save={save}", prefill)
    tokens, engine = serve(conf, tiny_model(), PROMPTS, N)
    assert tokens == [greedy("gqa2", tuple(prompt), N) for prompt in PROMPTS]
    assert engine.usage.blocks_loaded >= engine.usage.blocks_missed > blocks >= 8 * 6
    assert engine._scheduler.pool_blocks_in_use == 0
