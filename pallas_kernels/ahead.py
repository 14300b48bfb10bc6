"""Blocks that are copied before attention reads its lists, and copies of one block each.

Copies one after the other are the slow way to move blocks, which the papers measure others against. Each is a launch of
the kernel that otherwise copies a whole list, and only blocks that are wanted take one.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.copy import load_blocks, store_blocks
from pallas_kernels.residency import Located


def arrived(located: Located, slot: Int32[Array, "B K n"]) -> Located:
  """The lists `located` when blocks have been copied to `slot`, -1: this one was not.

  Of each group hits come first, then what was copied, then misses.

  A miss without a place may stand before one with a place: which places are taken decides.
  """
  slot, group = jnp.maximum(located.slot, slot), jnp.arange(slot.shape[-1], dtype=jnp.int32) // located.group
  key = 2 * group[None, None] + (slot < 0).astype(jnp.int32)
  lists = key, located.blocks, slot, located.place
  _, blocks, slot, place = jax.lax.sort(lists, num_keys=1, is_stable=True)
  n_hits = jnp.zeros_like(located.n_hits).at[..., group].add((slot >= 0).astype(jnp.int32))
  return Located(blocks, slot, place, n_hits, located.length)


def compact(wanted: Bool[Array, " n"]) -> tuple[Int32[Array, " n"], Int32[Array, ""]]:
  """The indices of what is wanted, in order, then n; and how many they are."""
  n = wanted.shape[0]
  to = jnp.where(wanted, jnp.cumsum(wanted.astype(jnp.int32)) - 1, n)
  at = jnp.full(n, n, jnp.int32).at[to].set(jnp.arange(n, dtype=jnp.int32), mode="drop")
  return at, wanted.sum(dtype=jnp.int32)


def load_each(
  pool: Float[Array, "K L M 2 S D"],
  slots: Float[Array, "P 2 S D"],
  layer: Int32[Array, ""] | int,
  blocks: Int32[Array, "B K n"],
  slot: Int32[Array, "B K n"],
  *,
  implementation: str = "xla",
) -> Float[Array, "P 2 S D"]:
  """What `load_blocks` does, by one copy a block."""
  (n_heads, n_layers), shape = pool.shape[:2], pool.shape[2:]
  of_head = jnp.broadcast_to(jnp.arange(n_heads, dtype=jnp.int32)[None, :, None] * n_layers + layer, blocks.shape)
  at, count = compact(((blocks >= 0) & (slot >= 0)).ravel())
  entries = jnp.stack([of_head, blocks, slot], -1).reshape(-1, 3).at[at].get(mode="clip")
  by_layer = pool.reshape(1, n_heads * n_layers, *shape)

  def copy(i, slots):
    of, block, to = jnp.reshape(entries[i], (3, 1, 1, 1))
    return load_blocks(by_layer, slots, of.ravel()[0], block, to, implementation=implementation)

  return jax.lax.fori_loop(0, count, copy, slots)


def store_each(
  pool: Float[Array, "K L M 2 S D"],
  source: Float[Array, "K Ls n_source 2 S D"],
  layer: Int32[Array, ""] | int,
  source_ids: Int32[Array, " n"],
  blocks: Int32[Array, " n"],
  *,
  implementation: str = "xla",
) -> Float[Array, "K L M 2 S D"]:
  """What `store_blocks` does, by one copy a block."""
  (n_heads, n_layers), (of_source, n_source) = pool.shape[:2], source.shape[1:3]
  at, count = compact(blocks >= 0)
  copies = n_heads * of_source  # of each block id
  one_list = source.reshape(1, 1, -1, *source.shape[3:])

  def copy(i, pool):
    which, head, j = at[i // copies], i % copies // of_source, i % of_source
    of, id = head * n_layers + layer + j, (head * of_source + j) * n_source + source_ids[which]
    wrote = store_blocks(pool, one_list, of, id[None], blocks[which][None], implementation=implementation)
    return _typed_as(pool, wrote)

  by_layer = pool.reshape(1, n_heads * n_layers, *pool.shape[2:])
  return jax.lax.fori_loop(0, count * copies, copy, by_layer).reshape(pool.shape)


def _typed_as(like: jax.Array, array: jax.Array) -> jax.Array:
  """A kernel's result is typed as device memory, wherever it lies; the carry of a loop keeps its type."""
  space = jax.typeof(like).memory_space
  return array if jax.typeof(array).memory_space == space else jax.device_put(array, space)
