"""Which blocks enter slots beside those that decode steps read: new ones, and what comes before a piece of a prompt.

What the next steps are expected to read takes the place of whatever has been used longest ago. What later prompts may
share takes spare slots alone: those that are empty, or hold a block that came as a spare one, or has no owner any more,
and that no decode step has read since. Stamped by SPARE, it is the next to go, before all that a step has used.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

import pallas_kernels as kernels
from sparse_serve_jax.memory.eviction import Turn
from sparse_serve_jax.memory.kv_cache import Hot, KVCache


class Entering(NamedTuple):
  """What of a piece of a prompt may enter slots, in each layer."""

  own: Int32[Array, "B n"]  # its full blocks in the pool, each in one of the rows, -1 elsewhere
  lanes: Int32[Array, " B"]  # of the rows; anybody's, unless slots are of lanes
  newest: Bool[Array, " n"]  # of its own: they enter in any case
  before: Int32[Array, " N"]  # what comes before it, in the pool, -1 beyond; some of it may be in slots
  pins: bool  # whether all before it enters too
  room: Int32[Array, " Z"]  # of each zone: how many blocks of a layer and a head enter where they take spare slots


def enter_piece(
  cache: KVCache,
  kv: Float[Array, "K 1 n 2 S D"],
  layer: Int32[Array, ""],
  entering: Entering,
  turn: Turn,
  implementation: str,
) -> tuple[KVCache, Int32[Array, " Z"], Int32[Array, " K"]]:
  """One layer's blocks of a piece, `kv`, enter slots, and copies of those before it that are in none. Where the newest
  leave room, those before it come first, and then the first others of the piece, which prompts share most. What they
  drive out attention may want: it reads from the pool what is in no slot.

  Returns:
    The cache, how many of the victims are gone, and how many blocks of each head were read from the pool.
  """
  (own, lanes, newest, before, pins, room), hot, on = entering, cache.hot, dict(implementation=implementation)
  newest = (own >= 0) & newest[None]
  left = room[turn.zone(layer, lanes)[:, 0]] - newest.sum(1, dtype=jnp.int32)  # [B]
  missing = (before >= 0)[None] & (hot.maps.slot_of[:, layer, before] < 0)  # [K, N]
  missing = missing if pins else missing & (jnp.cumsum(missing, 1) <= left[0])
  others = (own >= 0) & ~newest
  others &= jnp.cumsum(others, 1) <= (left - missing.sum(1).max())[:, None]
  (n_rows, n), (n_heads, n_before) = own.shape, missing.shape
  mine = jnp.where(newest | others, own, -1)[:, None, ::-1]  # the last ones first
  theirs = jnp.broadcast_to(jnp.where(missing, before[None], -1)[None], (n_rows, n_heads, n_before))
  lists = jnp.concatenate([theirs, jnp.broadcast_to(mine, (n_rows, n_heads, n))], 2)
  spare = jnp.concatenate([jnp.full(n_before, not pins), others.any(0)[::-1]])
  stamps = hot.stamp(layer) + jnp.where(spare, kernels.SPARE, 0)
  maps, place, given = enter(hot, lists, layer, lanes, turn, stamps, None, implementation)
  slots = kernels.place_blocks(hot.slots, kv, jnp.arange(n), place.max(0)[:, None, n_before:][..., ::-1], **on)
  if n_before:  # of one prompt
    slots = kernels.load_blocks(cache.pool, slots, layer, theirs, place[..., :n_before], **on)
  n_read = (place[..., :n_before] >= 0).sum((0, 2), dtype=jnp.int32)
  return cache.replace(hot=hot.replace(slots=slots, maps=maps)), given, n_read


def enter(
  hot: Hot,
  lists: Int32[Array, "B K n"],
  layers: Int32[Array, "*n"],
  lanes: Int32[Array, " B"],
  turn: Turn,
  stamps: Int32[Array, "*n"],
  steps: Int32[Array, " B"] | None,
  implementation: str,
) -> tuple[kernels.Maps, Int32[Array, "B K n"], Int32[Array, " Z"]]:
  """Blocks `lists` (-1: nothing) that are in no slot enter some; `layers` and `stamps` are of all or of each rank. They
  count as selected in `steps` of the rows, if any. Returns maps, slots (-1: none), and how many victims are gone."""
  on, (n_rows, n_heads, n) = dict(implementation=implementation), lists.shape
  free = turn.free or kernels.Free.nothing(turn.victims, turn.given, lists.size)
  maps, place, free = kernels.vacate(hot.maps, turn.victims, free, lists >= 0, turn.zone(layers, lanes), **on)
  length = jnp.full((n_rows, n_heads), 0 if steps is None else n)  # what has a place enters all the same
  located = kernels.Located(lists, place, place, jnp.zeros((n_rows, n_heads, 1), jnp.int32), length)
  steps = jnp.zeros(n_rows, jnp.int32) if steps is None else steps
  return kernels.commit(maps, layers, located, length, stamps, steps, **on), place, free.seen
