"""How finished blocks leave for the pool.

A save is one function `(pool, new, implementation) -> pool` that writes `NewBlocks` to the pool. What goes with every
save is here once: the digests that selection reads, and of tails their places in slots. A piece of a prompt has its
digests before its attention, which may select by them, and its places too (`memory.places`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

import pallas_kernels as kernels
from sparse_serve_jax.memory import host_pool
from sparse_serve_jax.memory.eviction import Turn
from sparse_serve_jax.memory.kv_cache import Hot, KVCache
from sparse_serve_jax.memory.places import enter


class NewBlocks(NamedTuple):
  """Blocks that have just filled: n in each of Ls layers."""

  kv: Float[Array, "K Ls n_source 2 S D"]
  layer: Int32[Array, ""] | int  # the first of the Ls
  ids: Int32[Array, " n"]  # which of the source's
  blocks: Int32[Array, " n"]  # where they go in the pool; -1: nowhere


Save = Callable[[jax.Array, NewBlocks, str], jax.Array]


def direct(pool: Float[Array, "K L M 2 S D"], new: NewBlocks, implementation: str) -> Float[Array, "K L M 2 S D"]:
  """A kernel writes the blocks to the pool, over PCIe if it lies there: simple, and it takes SMs from the step."""
  return kernels.store_blocks(pool, new.kv, new.layer, new.ids, new.blocks, implementation=implementation)


def per_block(pool: Float[Array, "K L M 2 S D"], new: NewBlocks, implementation: str) -> Float[Array, "K L M 2 S D"]:
  """One copy a block, one after the other, as the papers' baselines do."""
  return kernels.store_each(pool, new.kv, new.layer, new.ids, new.blocks, implementation=implementation)


def staged(pool: Float[Array, "K L M 2 S D"], new: NewBlocks, implementation: str) -> Float[Array, "K L M 2 S D"]:
  """Directly, what comes here: tails, and pieces of a prompt that the next piece reads. Of other pieces a slab leaves
  the program, and threads of the host place its blocks in the pool (`memory.writer`)."""
  return direct(pool, new, implementation)


SAVES: dict[str, Save] = {"direct": direct, "per_block": per_block, "staged": staged}


@dataclasses.dataclass(frozen=True)
class Saving:
  """What is fixed of saves when a program is compiled."""

  save: Save
  summarize: Callable[[jax.Array], jax.Array]  # keys of blocks to digests
  summarized_by: str  # the implementation that runs it
  implementation: str
  host_pool: bool  # whether the pool lies in memory that is not the device's own


def save_tails(
  saving: Saving,
  cache: KVCache,
  lanes: Int32[Array, " B"],
  blocks: Int32[Array, " B"],
  steps: Int32[Array, " B"],
  turn: Turn,
) -> KVCache:
  """Saves the tails that have filled, in all layers at once; all of them enter slots.

  Of each lane (R and beyond is padding) `blocks` says where in the pool its tail goes (-1: it has not filled), `steps`
  is its request's own step number."""
  hot = cache.hot
  n_heads, n_layers, n_lanes = hot.tail.shape[:3]
  lists = jnp.broadcast_to(blocks[:, None, None], (blocks.shape[0], n_heads, n_layers))  # a rank is a layer
  at, on = jnp.arange(n_layers), saving.implementation
  maps, place = enter(hot, lists, at, lanes, turn, hot.stamp(at), steps, on)[:2]
  new = NewBlocks(hot.tail, 0, jnp.minimum(lanes, n_lanes - 1), blocks)
  pool, hot = saving.save(cache.pool, new, on), save_digests(saving, hot, new)
  slots = kernels.place_blocks(hot.slots, new.kv, new.ids, jnp.moveaxis(place, 0, 2), implementation=on)
  return KVCache(pool, hot.replace(slots=slots, maps=maps))


def save_piece(saving: Saving, pool: Float[Array, "K L M 2 S D"], new: NewBlocks) -> Float[Array, "K L M 2 S D"]:
  """Saves one layer's blocks of a piece of a prompt."""
  pool = saving.save(pool, new, saving.implementation)
  return host_pool.keep(pool) if saving.host_pool else pool


def save_digests(saving: Saving, hot: Hot, new: NewBlocks) -> Hot:
  """Makes the digests of new blocks."""
  digest = kernels.store_digests(
    hot.digest, new.kv, new.layer, new.ids, new.blocks, rule=saving.summarize, implementation=saving.summarized_by
  )
  return hot.replace(digest=digest)
