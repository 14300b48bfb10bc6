"""`attend` in jnp: all lists go on together, some blocks of each at a time."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.copy import read_blocks
from pallas_kernels.free import Free
from pallas_kernels.partial import Partial, merge, merge_along, partial_attention
from pallas_kernels.stop import LOG2_E

WITHOUT_TESTS = 16  # blocks that XLA gathers at a time where no stop test limits it


def attend_xla(q, tails, pool, slots, layer, located, taking) -> tuple[Partial, Any, Any, Any, Any]:
  """`attend`; also places, and how many slots have been taken."""
  (stop, free), n = taking, located.blocks.shape[2]
  n_slots, length = slots.shape[0], located.length
  scale = q.shape[-1] ** -0.5

  acc = _attend_tails(q, tails, layer, scale)

  size = min(WITHOUT_TESTS, n) if stop is None else located.group
  whole = ((0, 0), (0, 0), (0, -n % size))
  *lists, places = (jnp.pad(x, whole, constant_values=-1) for x in (located.blocks, located.slot, located.place))

  def step(carry):
    """Attends to the next `size` ranks of every (row, head) that has not stopped."""
    start, acc, known, attended, stopped, slots, places, free = carry
    blocks, slot, place = (jax.lax.dynamic_slice_in_dim(x, start, size, 2) for x in (*lists, places))
    rank = start + jnp.arange(size)[None, None]
    live = (rank < length[..., None]) & ~stopped[..., None]  # [B, K, size]
    if free is not None:
      place, free = _take_xla(free, live & (slot < 0), place)
      places = jax.lax.dynamic_update_slice_in_dim(places, place, start, 2)
    kv = read_blocks(pool, slots, layer, blocks, slot)
    valid = jnp.broadcast_to(live[..., None], kv.shape[:3] + kv.shape[4:5])
    by_block = partial_attention(
      q[:, :, None], kv[..., 0, :, :], kv[..., 1, :, :], valid, scale
    )  # o [B, K, size, G, D]
    acc = merge(acc, merge_along(by_block, 2))
    attended = attended + live.sum(-1, dtype=jnp.int32)
    stopped = stopped | (attended >= length)
    if stop is not None:
      # Masses are kept as logarithms, so that one reference holds for all groups and nothing is rescaled.
      group, left = stop.rule.of_group(by_block.lse * LOG2_E, live), (length - attended)[..., None].astype(jnp.float32)
      enough, known = stop.after(known, group, start, acc.lse * LOG2_E, left, q.shape[2])
      stopped = stopped | enough
    if n_slots:
      slots = slots.at[jnp.where(live & (place >= 0), place, n_slots)].set(kv, mode="drop")
    return start + size, acc, known, attended, stopped, slots, places, free

  def more(carry):
    return ((carry[0] < length) & ~carry[4]).any()

  known = jnp.full(q.shape[:3], jnp.inf)
  zero = jnp.zeros(q.shape[:2], jnp.int32)
  start = jnp.int32(0), acc, known, zero, length <= 0, slots, places, free
  _, acc, _, attended, _, slots, places, free = jax.lax.while_loop(more, step, start)
  return acc, attended, slots, places[..., :n], free and free.taken


def _attend_tails(q, tails, layer, scale) -> Partial:
  head, n_lanes, block_tokens = jnp.arange(q.shape[1])[None], tails.kv.shape[2], tails.kv.shape[4]
  last = tails.kv[head, layer, jnp.clip(tails.lanes, 0, n_lanes - 1)[:, None]]  # [B, K, 2, S, D]
  in_tail = jnp.arange(block_tokens)[None] < tails.tokens[:, None]
  in_tail = jnp.broadcast_to(in_tail[:, None], (*q.shape[:2], block_tokens))
  return partial_attention(q, last[:, :, 0], last[:, :, 1], in_tail, scale)


def _take_xla(free: Free, wanting, place) -> tuple[jax.Array, Free]:
  zone = jnp.zeros(1, jnp.int32) if free.zone is None else free.zone
  taken, free = free.take(wanting, zone[:, None])
  return jnp.where(wanting, taken, place), free
