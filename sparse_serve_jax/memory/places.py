"""Which blocks enter slots beside those that decode steps read: new ones, and what comes before a piece of a prompt.

What the next steps are expected to read takes the place of whatever has been used longest ago. What later prompts may
share takes spare slots alone: those that are empty, or hold a block that came as a spare one and that no decode step
has read since. Stamped by SPARE, it is the next to go, before all that a decode step has used.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

import pallas_kernels as kernels
from sparse_serve_jax.memory.eviction import Turn
from sparse_serve_jax.memory.kv_cache import Hot, KVCache


class Entering(NamedTuple):
  """Blocks of one layer of a piece of a prompt that enter slots."""

  blocks: Int32[Array, "B n"]  # in the pool, each in one of the rows; -1 elsewhere
  spare: Bool[Array, " n"]

  @classmethod
  def of(cls, rows: Int32[Array, "B n"], newest: Bool[Array, " n"], room: Int32[Array, " B"]) -> Entering:
    """The newest of the blocks `rows`; and of others the first, which prompts share most, as far as there is `room`."""
    others = (rows >= 0) & ~newest[None]
    kept = others & (jnp.cumsum(others, 1) <= room[:, None])
    return cls(jnp.where(newest[None] | kept, rows, -1), kept.any(0))

  def stamps(self, hot: Hot, layer: Int32[Array, ""] | int) -> Int32[Array, " n"]:
    return hot.stamp(layer) + jnp.where(self.spare, kernels.SPARE, 0)


def room_of_layer(maps: kernels.Maps, turn: Turn, n_layers: Int32[Array, ""] | int) -> Int32[Array, " Z"]:
  """How many blocks of every head a layer may put into spare slots, of each zone, if `n_layers` share them equally.

  One more share stays, for the misses of the first layer of a decode step: those of progressive lists take what is
  empty when it begins.
  """
  sharing = 1 if turn.zones == "layer" else n_layers
  return kernels.n_spare(maps, turn.victims) // (maps.slot_of.shape[0] * (sharing + 1))


def bring(
  cache: KVCache,
  layer: Int32[Array, ""],
  lane: Int32[Array, ""],
  blocks: Int32[Array, " N"],
  turn: Turn,
  room: Int32[Array, ""] | None,
  *,
  implementation: str,
) -> tuple[KVCache, Int32[Array, "*any"], Int32[Array, " K"]]:
  """Brings what comes before a piece of a prompt from the pool into slots, the first blocks first.

  Args:
    cache: this device's.
    layer: of it.
    lane: whose it is.
    blocks: in the pool; -1: nothing.
    turn: what is left of the step's victims.
    room: how many blocks of every head may enter, and as spare ones. None: all, as far as there are victims.
    implementation: of the kernels.

  Returns:
    The cache, how many of the victims are gone, and how many blocks of each head have been brought.
  """
  hot, on = cache.hot, dict(implementation=implementation)
  missing = (blocks >= 0)[None] & (hot.maps.slot_of[:, layer, blocks] < 0)
  if room is not None:
    missing &= jnp.cumsum(missing, -1) <= room
  stamp = hot.stamp(layer) + (0 if room is None else kernels.SPARE)
  lists = jnp.where(missing, blocks, -1)[None]
  maps, place, given = enter(hot, lists, layer, lane[None], turn, stamp, **on)
  slots = kernels.load_blocks(cache.pool, hot.slots, layer, lists, place, **on)
  return cache.replace(hot=hot.replace(slots=slots, maps=maps)), given, (place[0] >= 0).sum(-1, dtype=jnp.int32)


def enter(
  hot: Hot,
  lists: Int32[Array, "B K n"],
  layers: Int32[Array, "*n"],
  lanes: Int32[Array, " B"],
  turn: Turn,
  stamps: Int32[Array, "*n"],
  steps: Int32[Array, " B"] | None = None,
  *,
  implementation: str,
) -> tuple[kernels.Maps, Int32[Array, "B K n"], Int32[Array, "*any"]]:
  """Places for blocks `lists` that are in no slot (-1: nothing); `layers` and `stamps` are of all or of each rank.

  `steps` are the rows' own step numbers, which have selected the blocks; None: nobody has.

  Returns:
    The maps that have them there, their places (-1: none), and how many of the victims are gone.
  """
  options, new = dict(implementation=implementation), lists >= 0
  nowhere, length = jnp.full_like(lists, -1), jnp.full(lists.shape[:2], lists.shape[2])
  if hot.slots.shape[0] == 0:
    place, maps, given = nowhere, hot.maps, jnp.ravel(turn.given)
  else:
    zone = turn.zone(layers, lanes)
    free = turn.free or kernels.Free.nothing(turn.victims, turn.given, lists.size)
    count = new.astype(jnp.int32)
    if turn.n_zones == 1:
      wanted = count
    else:
      wanted = jnp.zeros(turn.n_zones, jnp.int32).at[jnp.broadcast_to(zone[:, None], lists.shape)].add(count)
    maps, free = kernels.evict(hot.maps, turn.victims, free, wanted, **options)
    place, given = free.take(new, zone)[0], free.seen
  slot = nowhere
  if steps is None:  # a block that nobody has read enters as one that a load has copied
    slot, length, steps = place, jnp.zeros_like(length), jnp.zeros(lists.shape[0], jnp.int32)
  located = kernels.Located(lists, slot, place, jnp.zeros((*lists.shape[:2], 1), jnp.int32), length)
  return kernels.commit(maps, layers, located, length, stamps, steps, **options), place, given
