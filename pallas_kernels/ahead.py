"""Blocks that are copied before attention reads its lists, and copies of one block each.

Copies one after the other are the slow way to move blocks, which the papers measure others against. Each is a launch of
the kernel that otherwise copies a whole list, and only blocks that are wanted take one.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.copy import load_blocks, store_blocks
from pallas_kernels.residency import Located

A_TURN = 16  # copies of one turn of a loop


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
  by_layer = pool.reshape(1, n_heads * n_layers, *shape)
  of_head = jnp.broadcast_to(jnp.arange(n_heads, dtype=jnp.int32)[None, :, None] * n_layers + layer, blocks.shape)
  at, count = compact(((blocks >= 0) & (slot >= 0)).ravel())
  copies = jnp.stack([of_head, blocks, slot], -1).reshape(-1, 3).at[at].get(mode="fill", fill_value=-1)

  def copy(slots, of, block, to):
    block, to = (x.reshape(1, 1, 1) for x in (block, to))
    return load_blocks(by_layer, slots, of, block, to, implementation=implementation)

  return _one_by_one(copy, copies, count, slots)


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
  by_layer = pool.reshape(1, n_heads * n_layers, *pool.shape[2:])
  one_list = source.reshape(1, 1, -1, *source.shape[3:])
  head, j = jnp.arange(n_heads, dtype=jnp.int32)[:, None], jnp.arange(of_source, dtype=jnp.int32)
  at, count = compact(blocks >= 0)
  id, block = (x.at[at].get(mode="fill", fill_value=-1)[:, None, None] for x in (source_ids, blocks))  # [n, 1, 1]
  of, start = head * n_layers + layer + j[None], (head * of_source + j[None]) * n_source  # [K, Ls]
  copies = jnp.stack(jnp.broadcast_arrays(of[None], start[None] + id, block), -1).reshape(-1, 3)

  def copy(pool, of, id, block):
    return store_blocks(pool, one_list, of, id[None], block[None], implementation=implementation)

  return _one_by_one(copy, copies, count * n_heads * of_source, by_layer).reshape(pool.shape)


def _one_by_one(
  copy: Callable[..., jax.Array], copies: Int32[Array, "n 3"], count: Int32[Array, ""], out: jax.Array
) -> jax.Array:
  """`out` after copy(out, *copies[i]) for each i below count; the last turn also takes some of what follows them.

  On a GPU a loop whose length is not known looks at its counter on the host, which waits for the device. With a copy a
  turn a block took 40 us on an H200, ten times what the copy takes.
  """
  n_turns = -(-copies.shape[0] // A_TURN)
  turns = jnp.pad(copies, ((0, n_turns * A_TURN - copies.shape[0]), (0, 0)), constant_values=-1)
  turns = turns.reshape(n_turns, A_TURN, 3)

  def turn(i, before):
    after = before
    for each in turns[i]:
      after = copy(after, *each)
    # A kernel's result is typed as device memory, wherever it lies; the carry of a loop keeps its type.
    space = jax.typeof(before).memory_space
    return after if jax.typeof(after).memory_space == space else jax.device_put(after, space)

  return jax.lax.fori_loop(0, (count + A_TURN - 1) // A_TURN, turn, out) if n_turns else out
