"""Progressive lists against least-recently-used in numpy, call by call; and that blocks stay in their zone."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as kernels
from sparse_serve_jax.config import override
from sparse_serve_jax.memory.eviction import Turn
from sparse_serve_jax.memory.shape import CacheShape
from tests.tiny import config, greedy, new_engine, prompt_of, tiny_model, with_slots

K, L, B, N, S, D = 2, 3, 3, 12, 8, 16  # every row lists its N blocks, in an order that drifts
STOP = kernels.Stop(0.6, untested=2)
N_ZONES = {"shared": 1, "layer": L, "lane": B}
LANES = np.array([2, 0, 1], np.int32)


@functools.cache
def programs(zones: str, implementation: str):
  """The beginning of a step, and a layer of it."""
  on = dict(implementation=implementation)

  def begin(maps, since):
    n_zones = N_ZONES[zones]
    victims = kernels.victims(kernels.ages(maps, since), since, n_zones)
    return victims, kernels.Free.at_first(maps, victims, jnp.zeros(n_zones, jnp.int32))

  def layer(maps, victims, free, blocks, q, pool, slots, i):
    here = Turn(zones, victims, jnp.zeros(victims.slots.shape[0], jnp.int32), free).at(i, jnp.asarray(LANES))
    found = kernels.find(maps, i, blocks, jnp.full((B, K), N), group=2, **on)
    tails = kernels.Tails(jnp.zeros((K, L, B, 2, S, D)), jnp.asarray(LANES), jnp.zeros(B, jnp.int32))
    taking = kernels.Taking(STOP, here.free)
    _, attended, slots, located, free = kernels.attend_and_take(q, tails, pool, slots, i, found, taking, **on)
    maps = kernels.commit(maps, i, located, attended, victims.since + i, jnp.zeros(B, jnp.int32), **on)
    maps, free = kernels.evict(maps, victims, free, here.by_zone(found.missed(attended)), **on)
    return maps, free._replace(zone=None), slots, located, attended

  return jax.jit(begin), jax.jit(layer)


def held(maps) -> dict[tuple[int, int, int], int]:
  """Slots of blocks (head, layer, block)."""
  slot_of = np.asarray(maps.slot_of)
  found = {tuple(key): int(slot_of[tuple(key)]) for key in np.argwhere(slot_of >= 0).tolist()}
  assert len(set(found.values())) == len(found) == (np.asarray(maps.block_of) >= 0).sum()
  return found


class Recent:
  """When each resident block was last used, and what exact least-recently-used allows to happen to it."""

  def __init__(self, of_zone: int):
    self.used: dict[tuple[int, int, int], int] = {}
    self.of_zone = of_zone

  def call(self, zone_of, after, read: list, since: int, stamp: int) -> int:
    """Checks a call that has read these blocks; returns how many of them missed."""
    missed = [key for key in read if key not in self.used]
    zones = {zone_of(key) for key in read}
    for zone in zones:
      mine = {key for key in self.used if zone_of(key) == zone}
      new = [key for key in missed if zone_of(key) == zone]
      kept = [key for key in new if key in after]
      empty = self.of_zone - len(mine)
      assert len(kept) == min(len(new), empty)
      for key in {*kept, *(key for key in read if key in mine)}:
        self.used[key] = stamp
      idle = {key for key in mine if self.used[key] < since}
      gone = {key for key in self.used if zone_of(key) == zone and key not in after}
      assert gone <= idle
      assert len(gone) == min(max(0, len(new) - (empty - len(kept))), len(idle))
      oldest = sorted(self.used[key] for key in idle)
      assert sorted(self.used[key] for key in gone) == oldest[: len(gone)]  # exactly, but for ties of a call
      for key in gone:
        del self.used[key]
    assert self.used.keys() == after.keys()
    return len(missed)


def of_each() -> Iterator:
  """Zones, slots of each and implementations; on a CPU every two of these together, and all three with the soak."""
  for (i, zones), (j, per_zone) in itertools.product(enumerate(N_ZONES), enumerate((4, 12, 40))):
    for n, implementation in enumerate(("xla", "interpret")):
      yield pytest.param(zones, per_zone, implementation, marks=[] if (i + j) % 2 == n else [pytest.mark.soak])
    yield pytest.param(zones, per_zone, "triton", marks=pytest.mark.gpu)


@pytest.mark.parametrize(("zones", "per_zone", "implementation"), list(of_each()))
def test_progressive_lists_evict_the_least_recently_used(zones: str, per_zone: int, implementation: str):
  """Though every block is listed in every step. The slots hold what the pool has, whoever came first."""
  rng = np.random.default_rng(per_zone)
  n_zones = N_ZONES[zones]
  P, M = per_zone * n_zones, B * N
  begin, layer = programs(zones, implementation)
  pool = rng.normal(size=(K, L, M, 2, S, D)).astype(np.float32)
  maps, slots, recent = kernels.Maps.empty(K, L, M, P), np.full((P, 2, S, D), np.nan, np.float32), Recent(per_zone)
  scores = rng.normal(size=(L, B, K, N))
  zone_of = {
    "shared": lambda key: 0,
    "layer": lambda key: key[1],
    "lane": lambda key: int(LANES[key[2] // N]),
  }[zones]
  hits = misses = stopped = evicted = 0
  for step in range(12):
    since = step * L
    victims, free = begin(maps, np.int32(since))
    scores = 0.9 * scores + 0.4 * rng.normal(size=scores.shape)
    for i in range(L):
      blocks = (np.argsort(-scores[i], -1) + N * np.arange(B)[:, None, None]).astype(np.int32)
      q = 3 * rng.normal(size=(B, K, 1, D)).astype(np.float32)
      before = held(maps)
      maps, free, slots, located, attended = layer(maps, victims, free, blocks, q, pool, slots, np.int32(i))
      read = [(k, i, int(located.blocks[b, k, j])) for b, k in np.ndindex(B, K) for j in range(int(attended[b, k]))]
      after = held(maps)
      missed = recent.call(zone_of, after, read, since, since + i)
      hits, misses, stopped = hits + len(read) - missed, misses + missed, stopped + (attended < N).sum()
      evicted += len(before.keys() - after.keys())
      for key, slot in after.items():
        assert slot // per_zone == zone_of(key)
        np.testing.assert_array_equal(slots[slot], pool[key])
  assert misses and stopped and (hits or per_zone < 12) and evicted


@pytest.mark.parametrize("policy", ["topk", "psa"])
@pytest.mark.parametrize("zones", ["shared", "layer", "lane"])
def test_blocks_stay_in_their_zone(zones: str, policy: str):
  """After every iteration of an engine, prompts and finished tails included; tokens do not depend on zones."""
  prompts = [prompt_of(n, seed=n) for n in (90, 61, 40, 30)]
  conf = config(f"cache.zones={zones}", f"sparse.policy={policy}", "sparse.threshold=1.0", "cache.lanes=3")
  engine = new_engine(with_slots(conf, 90, tiny_model()), tiny_model())
  requests = [engine.add_request(prompt, 20) for prompt in prompts]
  seen = set()
  while engine.has_work:
    engine.step()
    hot = engine._executor.cache.hot
    owner = {int(block): lane for lane, table in enumerate(np.asarray(hot.tables)) for block in table if block >= 0}
    per_zone = 90 // {"shared": 1, "layer": 2, "lane": 3}[zones]
    for (_, layer, block), slot in held(hot.maps).items():
      if block in owner:
        assert slot // per_zone == {"shared": 0, "layer": layer, "lane": owner[block]}[zones]
        seen.add(slot // per_zone)
  assert seen == set(range({"shared": 1, "layer": 2, "lane": 3}[zones]))
  assert [r.output_tokens for r in requests] == [greedy("gqa2", tuple(prompt), 20) for prompt in prompts]


@pytest.mark.parametrize(("zones", "n_zones"), [("shared", 1), ("layer", 2), ("lane", 6)])
@pytest.mark.parametrize("tp", [1, 2])
def test_zones_are_equal_and_have_a_slot_each(zones: str, n_zones: int, tp: int):
  conf, model = config(f"cache.zones={zones}", f"tp={tp}"), tiny_model().config
  shape = CacheShape.of(model, conf, 2)
  assert shape.P > 0 and shape.P % (n_zones * tp) == 0
  least = shape.fixed_bytes + n_zones * tp * shape.slot_bytes
  assert n_zones * tp == CacheShape.of(model, override(conf, [f"cache.hbm_bytes={least}"]), 2).P
  with pytest.raises(ValueError, match=f"below the minimum of {least} bytes"):
    CacheShape.of(model, override(conf, [f"cache.hbm_bytes={least - 1}"]), 2)


def test_a_lanes_zone_holds_its_longest_request_where_hbm_does():
  """More slots than the pool has blocks, since every lane has its own: 32 blocks of 2 layers x 2 heads."""
  conf, model = config("cache.zones=lane", "cache.hbm_bytes=64MiB", "cache.dram_bytes=256KiB"), tiny_model().config
  shape = CacheShape.of(model, conf, 2)
  assert shape.P == shape.R * shape.N * shape.L * shape.K == 6 * 32 * 2 * 2 > shape.M * shape.L * shape.K
