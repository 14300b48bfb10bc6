"""Attention of one layer of a piece of a prompt."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

import pallas_kernels as kernels
from sparse_serve_jax.memory.eviction import Turn
from sparse_serve_jax.memory.kv_cache import KVCache


class Before(NamedTuple):
  """What comes before a piece of a prompt."""

  blocks: Int32[Array, " N"]  # in the pool; -1 beyond `n_blocks`
  n_blocks: Int32[Array, ""]

  @classmethod
  def of(cls, table: Int32[Array, " N"], n_blocks: Int32[Array, ""]) -> Before:
    """The first blocks of a table."""
    return cls(jnp.where(jnp.arange(table.shape[0]) < n_blocks, table, -1), n_blocks)


def pin(
  cache: KVCache, layer: Int32[Array, ""], lane: Int32[Array, ""], before: Before, turn: Turn, implementation: str
) -> tuple[KVCache, Int32[Array, " Z"], Int32[Array, ""]]:
  """Brings what comes before a piece into slots, as far as there are victims. What is there counts as used.

  Returns:
    The cache, how many of the victims are gone, and how many blocks of this device's heads were read from the pool.
  """
  hot, n_heads, on = cache.hot, cache.pool.shape[0], dict(implementation=implementation)
  here = turn.at(layer, lane[None])
  lists = jnp.broadcast_to(before.blocks, (1, n_heads, *before.blocks.shape))
  length = jnp.full((1, n_heads), before.n_blocks)
  located = kernels.propose(hot.maps, here.victims, layer, lists, length, given=turn.given, **on)
  slots = kernels.load_blocks(cache.pool, hot.slots, layer, located.blocks, located.place, **on)
  never = jnp.full(1, kernels.NEVER)  # prefill selects nothing
  maps = kernels.commit(hot.maps, layer, located, length, hot.stamp(layer), never, **on)
  given = here.by_zone(located.given)
  given = turn.given + (given.sum() if turn.n_zones == 1 else given)
  return cache.replace(hot=hot.replace(slots=slots, maps=maps)), given, (located.place >= 0).sum(dtype=jnp.int32)


def prefill_attention(
  q: Float[Array, "C K G D"],
  k: Float[Array, "C K D"],
  v: Float[Array, "C K D"],
  cache: KVCache,
  layer: Int32[Array, ""],
  before: Before | None,
  implementation: str,
) -> tuple[Float[Array, "C K G D"], Int32[Array, ""]]:
  """Dense causal attention over the piece's own keys and values and all that comes before it.

  Returns:
    The output, and how many blocks of this device's heads were read from the pool because no slot has them.
  """
  if before is None:
    return kernels.prefill_attention(q, k, v, implementation=implementation), jnp.int32(0)
  slot_of = cache.hot.maps.slot_of  # [K, L, M]
  exists = before.blocks >= 0
  slot = jnp.where(exists[None], slot_of[:, layer, before.blocks], -1)  # [K, N]
  blocks = jnp.broadcast_to(before.blocks, slot.shape)
  n_tokens = before.n_blocks * cache.pool.shape[4]
  prefix = kernels.Prefix(cache.pool, cache.hot.slots, layer, blocks, slot, n_tokens)
  o = kernels.prefill_attention(q, k, v, prefix, implementation=implementation)
  has_slots = cache.hot.slots.shape[0] > 0  # otherwise the pool lies in HBM, and nothing misses
  return o, (exists[None] & (slot < 0) & has_slots).sum(dtype=jnp.int32)
