"""How finished blocks leave for the pool, and how the newest of them enter slots.

A save is one function `(pool, new, implementation) -> pool` that writes `NewBlocks` to the pool. What goes with every
save is here once: places in slots, their maps, and the digests that selection reads. A piece of a prompt has its
digests before its attention, which may select by them.
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
from sparse_serve_jax.memory.places import Entering, enter


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
  """Tails go directly. Blocks of a piece of a prompt do not come here: a slab of them leaves the program, and threads
  of the host place them in the pool (`memory.writer`)."""
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
  staged: bool  # whether blocks of a piece of a prompt go to the pool beside the program


def save_tails(
  saving: Saving,
  cache: KVCache,
  lanes: Int32[Array, " B"],
  blocks: Int32[Array, " B"],
  steps: Int32[Array, " B"],
  turn: Turn,
) -> KVCache:
  """Saves the tails that have filled, in all layers at once; all of them enter slots.

  Args:
    saving: how.
    cache: this device's.
    lanes: R and beyond is padding.
    blocks: where in the pool a lane's tail goes; -1: it has not filled.
    steps: the requests' own step numbers.
    turn: what is left of the step's victims.
  """
  hot = cache.hot
  n_heads, n_layers, n_lanes = hot.tail.shape[:3]
  lists = jnp.broadcast_to(blocks[:, None, None], (blocks.shape[0], n_heads, n_layers))  # a rank is a layer
  at, on = jnp.arange(n_layers), saving.implementation
  maps, place = enter(hot, lists, at, lanes, turn, hot.stamp(at), steps, implementation=on)[:2]
  new = NewBlocks(hot.tail, 0, jnp.minimum(lanes, n_lanes - 1), blocks)
  pool, hot = saving.save(cache.pool, new, saving.implementation), save_digests(saving, hot, new)
  return KVCache(pool, _write(saving, hot, new, maps, jnp.moveaxis(place, 0, 2)))


def save_piece(
  saving: Saving,
  cache: KVCache,
  new: NewBlocks,
  entering: Entering,
  lanes: Int32[Array, " B"],
  turn: Turn,
) -> tuple[KVCache, Int32[Array, "*any"]]:
  """Saves one layer's blocks of a piece of a prompt, unless they are staged; some enter slots, the last ones first.
  Their digests are there.

  Args:
    saving: how.
    cache: this device's.
    new: all of the source, of one layer; -1 where one is not full.
    entering: those of them that enter slots.
    lanes: whose the rows are, R for padding; anybody's, unless slots are of lanes.
    turn: what is left of the step's victims.

  Returns:
    The cache, and how many of the victims are gone.
  """
  n_rows, n = entering.blocks.shape
  lists = jnp.broadcast_to(entering.blocks[:, None, ::-1], (n_rows, new.kv.shape[0], n))
  at, stamps = jnp.asarray(new.layer), entering.stamps(cache.hot, new.layer)[::-1]
  maps, place, given = enter(cache.hot, lists, at, lanes, turn, stamps, implementation=saving.implementation)
  pool = cache.pool
  if not saving.staged:
    pool = saving.save(pool, new, saving.implementation)
    pool = host_pool.keep(pool) if saving.host_pool else pool
  return KVCache(pool, _write(saving, cache.hot, new, maps, place.max(0)[:, None, ::-1])), given


def _write(saving: Saving, hot: Hot, new: NewBlocks, maps: kernels.Maps, place: Int32[Array, "K Ls n"]) -> Hot:
  """Writes new blocks to their places in slots."""
  slots = kernels.place_blocks(hot.slots, new.kv, new.ids, place, implementation=saving.implementation)
  return hot.replace(slots=slots, maps=maps)


def save_digests(saving: Saving, hot: Hot, new: NewBlocks) -> Hot:
  """Makes the digests of new blocks."""
  digest = kernels.store_digests(
    hot.digest, new.kv, new.layer, new.ids, new.blocks, rule=saving.summarize, implementation=saving.summarized_by
  )
  return hot.replace(digest=digest)
