"""Which block is in which slot: `propose` looks selected blocks up and finds slots for those that miss, `commit` makes
true what attention then did. Exact least-recently-used; ties to the lowest slot.

Maps, of one device:
  slot_of        [K, L, M] int32   slot that holds a block, -1 if none
  block_of       [P] int32         inverse: (k * L + layer) * M + block, -1 if the slot is empty
  last_used      [P] int32         stamp of the slot's last use, -1 if empty
  last_selected  [K, L, M] int32   the owning request's own step number when it last selected the block

The blocks of one call are distinct. `layer` is a scalar or broadcasts against `blocks` [B, K, n], so that one call can
serve one layer or all.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

NEVER = -(1 << 30)  # last_selected of a block nobody selected; NEVER + w does not overflow
_PROTECTED = jnp.iinfo(jnp.int32).max


class Maps(NamedTuple):
  slot_of: jax.Array
  block_of: jax.Array
  last_used: jax.Array
  last_selected: jax.Array


class Proposal(NamedTuple):
  """`slot` int32: where the block is (hit) or may go (miss); -1: attend from the pool without caching it."""

  slot: jax.Array
  hit: jax.Array


def propose(maps: Maps, layer: jax.Array, blocks: jax.Array) -> Proposal:
  """Slots for `blocks` [B, K, n] (-1: nothing), most critical first along n.

  Misses get the least recently used slots, none of which holds a block of this call. When slots run out the critical
  ranks of all rows go first, then lower rows.
  """
  n_slots = maps.last_used.shape[0]
  k = jnp.arange(maps.slot_of.shape[0])[None, :, None]
  slot = jnp.where(blocks >= 0, maps.slot_of[k, layer, blocks], -1)
  hit = slot >= 0
  if n_slots == 0:
    return Proposal(slot, hit)
  age = maps.last_used.at[jnp.where(hit, slot, n_slots)].set(_PROTECTED, mode="drop")
  n_victims = min(n_slots, blocks.size)
  youth, victims = jax.lax.top_k(-age, n_victims)  # stable: ties to the lowest slot
  victims = jnp.where(youth == -_PROTECTED, -1, victims.astype(jnp.int32))
  miss = (blocks >= 0) & ~hit
  by_rank = jnp.moveaxis(miss, 2, 0)  # [n, B, K]
  turn = jnp.moveaxis((jnp.cumsum(by_rank.ravel()) - 1).reshape(by_rank.shape), 0, 2)
  victim = jnp.where(turn < n_victims, victims[jnp.clip(turn, 0, n_victims - 1)], -1)
  return Proposal(jnp.where(miss, victim, slot), hit)


def commit(
  maps: Maps,
  layer: jax.Array,
  blocks: jax.Array,
  proposal: Proposal,
  used: jax.Array,
  stamp: jax.Array,
  step: jax.Array,
) -> Maps:
  """Maps after attention used the first `used` [B, K] of `blocks` [B, K, n].

  A block beyond `used` was neither read nor copied, so its slot still holds what it held. `stamp` is like `layer`;
  `step` [B] is each request's own step number.
  """
  n_heads, n_layers, n_pool = maps.slot_of.shape
  n_slots = maps.last_used.shape[0]
  k = jnp.arange(n_heads)[None, :, None]
  reached = (jnp.arange(blocks.shape[2])[None, None] < used[..., None]) & (blocks >= 0)
  out_of_range = lambda keep, index, size: jnp.where(keep, index, size)  # noqa: E731  scatters drop what lies outside
  selected = out_of_range(reached, blocks, n_pool)
  step = jnp.broadcast_to(step[:, None, None], blocks.shape)
  last_selected = maps.last_selected.at[k, layer, selected].set(step, mode="drop")
  if n_slots == 0:
    return maps._replace(last_selected=last_selected)

  enters = reached & ~proposal.hit & (proposal.slot >= 0)
  slot = out_of_range(enters, proposal.slot, n_slots)
  old = jnp.where(enters, maps.block_of.at[slot].get(mode="fill", fill_value=-1), -1)
  head, rest = old // (n_layers * n_pool), old % (n_layers * n_pool)
  head = out_of_range(old >= 0, head, n_heads)
  slot_of = maps.slot_of.at[head, rest // n_pool, rest % n_pool].set(-1, mode="drop")
  slot_of = slot_of.at[k, layer, out_of_range(enters, blocks, n_pool)].set(proposal.slot, mode="drop")
  block_of = maps.block_of.at[slot].set((k * n_layers + layer) * n_pool + blocks, mode="drop")
  touched = out_of_range(reached & (proposal.slot >= 0), proposal.slot, n_slots)
  last_used = maps.last_used.at[touched].set(jnp.broadcast_to(stamp, blocks.shape), mode="drop")
  return Maps(slot_of, block_of, last_used, last_selected)


def release(maps: Maps, freed: jax.Array) -> Maps:
  """Forgets the freed DRAM blocks [F] int32 (-1: nothing) in all layers and heads; their slots become empty."""
  n_pool = maps.slot_of.shape[2]
  n_slots = maps.last_used.shape[0]
  freed = jnp.where(freed >= 0, freed, n_pool)
  slots = maps.slot_of.at[:, :, freed].get(mode="fill", fill_value=-1)  # [K, L, F]
  slots = jnp.where(slots >= 0, slots, n_slots).ravel()
  return Maps(
    maps.slot_of.at[:, :, freed].set(-1, mode="drop"),
    maps.block_of.at[slots].set(-1, mode="drop"),
    maps.last_used.at[slots].set(-1, mode="drop"),
    maps.last_selected.at[:, :, freed].set(NEVER, mode="drop"),
  )
