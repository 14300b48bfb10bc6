"""The maps: which block is in which slot, when each was used; and who is to go. Of one device:

  slot_of        [K, L, M] int32   slot that holds a block, -1 if none
  block_of       [P] int32         inverse: (k * L + layer) * M + block, -1 if the slot is empty
  last_used      [P] int32         stamp of the slot's last use, -1 if empty
  entered        [P] int32         stamp of when the block came into the slot; of an empty one anything
  last_selected  [K, L, M] int32   the own step number of the request that selected the block last

Stamps ascend through the layers of a step and through steps. They wrap around, and only differences count.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Int32

NEVER = -(1 << 30)  # last_selected of a block nobody selected; NEVER + w does not overflow
OLDEST = -(1 << 30)  # the age that a slot is kept at
SPARE = -(1 << 29)  # what comes into a slot that nobody needs is stamped so much earlier: the slot is the next to go


class Maps(NamedTuple):
  """Which block is in which slot, when each was used: of one device, -1 where there is none."""

  slot_of: Int32[Array, "K L M"]
  block_of: Int32[Array, " P"]
  last_used: Int32[Array, " P"]
  entered: Int32[Array, " P"]
  last_selected: Int32[Array, "K L M"]

  @classmethod
  def empty(cls, n_heads: int, n_layers: int, n_pool: int, n_slots: int) -> Maps:
    """Of K = `n_heads`, L = `n_layers`, M = `n_pool` and P = `n_slots`: nothing is in a slot or has been selected."""
    of_block = functools.partial(jnp.full, (n_heads, n_layers, n_pool), dtype=jnp.int32)
    of_slot = functools.partial(jnp.full, n_slots, dtype=jnp.int32)
    return cls(of_block(-1), of_slot(-1), of_slot(-1), of_slot(-1), of_block(NEVER))


class Victims(NamedTuple):
  """The slots in the order in which they are given up, zone by zone: a block that misses may only take one of its zone.

  Of Z zones the z-th has the slots z * P / Z to (z + 1) * P / Z.
  """

  slots: Int32[Array, "Z of_zone"]
  since: Int32[Array, ""]  # the first stamp of the step: a slot used since then is no victim any more
  zone: Int32[Array, " rows"] | None = None  # of a call, if there are several: that of each row [B], or of all [1]


def saturate(maps: Maps, since: Int32[Array, ""]) -> Maps:
  """Maps in which no slot's stamps are more than 2^30 before `since`, the first stamp of a step.

  A stamp that is 2^31 old would look new. With this done at the beginning of every step none gets so old.
  """

  def kept(stamp):
    idle = (maps.last_used != -1) & (stamp - since < OLDEST)
    return jnp.where(idle, since + OLDEST, stamp)

  return maps._replace(last_used=kept(maps.last_used), entered=kept(maps.entered))


def tidy(maps: Maps) -> Maps:
  """Maps in which no slot holds a block that is not found there: it is empty.

  Rows of a step that share a block and miss it bring it to a place each, and the last of them counts.
  """
  n_slots = maps.last_used.shape[0]
  found = maps.slot_of.ravel().at[maps.block_of].get(mode="fill", fill_value=-1) == jnp.arange(n_slots)
  lost = (maps.block_of >= 0) & ~found
  block_of, last_used = (jnp.where(lost, -1, x) for x in (maps.block_of, maps.last_used))
  return maps._replace(block_of=block_of, last_used=last_used)


def ages(maps: Maps, since: Int32[Array, ""]) -> Int32[Array, " P"]:
  """The key by which the least recently used slot is the first victim: an empty one, then the oldest stamp.

  `since` is the first stamp of the step.
  """
  return jnp.where(maps.last_used == -1, jnp.iinfo(jnp.int32).min, maps.last_used - since)


def since_entry(maps: Maps, since: Int32[Array, ""]) -> Int32[Array, " P"]:
  """The key by which the slot whose block came first is the first victim, empty ones before all. As `ages`."""
  return jnp.where(maps.block_of < 0, jnp.iinfo(jnp.int32).min, maps.entered - since)


def victims(key: Int32[Array, " P"], since: Int32[Array, ""], n_zones: int = 1) -> Victims:
  """The order of a step whose stamps begin at `since`: the smallest `key` first in each of
  `n_zones` equal parts of the slots, ties to the lowest slot."""
  ids = jnp.arange(key.shape[0], dtype=jnp.int32)
  if n_zones > 1:
    key, ids = (x.reshape(n_zones, -1) for x in (key, ids))
  slots = jax.lax.sort((key, ids), num_keys=1, is_stable=True)[1]
  return Victims(slots.reshape(n_zones, -1), since)


def release(maps: Maps, freed: Int32[Array, " n"]) -> Maps:
  """Forgets the freed DRAM blocks (-1: nothing) in all layers and heads; their slots become empty."""
  n_pool = maps.slot_of.shape[2]
  slots, freed = _slots_of(maps, freed), only(freed >= 0, freed, n_pool)
  return Maps(
    maps.slot_of.at[:, :, freed].set(-1, mode="drop"),
    maps.block_of.at[slots].set(-1, mode="drop"),
    maps.last_used.at[slots].set(-1, mode="drop"),
    maps.entered,
    maps.last_selected.at[:, :, freed].set(NEVER, mode="drop"),
  )


def touch(maps: Maps, blocks: Int32[Array, " n"], stamp: Int32[Array, ""]) -> Maps:
  """Counts as used at `stamp` what slots hold of the DRAM blocks (-1: nothing) in all layers and heads."""
  return maps._replace(last_used=maps.last_used.at[_slots_of(maps, blocks)].set(stamp, mode="drop"))


def renew(maps: Maps, blocks: Int32[Array, " n"], since: Int32[Array, ""]) -> Maps:
  """Of the DRAM blocks (-1: nothing), those that lie in spare slots, in all layers and heads, as if they came now, in
  the step that begins with `since`."""
  slots = _slots_of(maps, blocks)
  spare = is_spare(maps.last_used.at[slots].get(mode="clip"), since)
  slots = only(spare, slots, maps.last_used.shape[0])
  last_used, entered = (x.at[slots].set(since + SPARE, mode="drop") for x in (maps.last_used, maps.entered))
  return maps._replace(last_used=last_used, entered=entered)


def rest(maps: Maps, blocks: Int32[Array, " n"], since: Int32[Array, ""]) -> Maps:
  """Nobody needs the slots of the DRAM blocks (-1: nothing) any more: they are spare, in the order there was.

  `since` is the first stamp of the step: slots that are spare then stay as they are.
  """
  held = jnp.zeros(maps.last_used.shape, bool).at[_slots_of(maps, blocks)].set(True, mode="drop")
  rests = jnp.where(held & ~is_spare(maps.last_used, since), SPARE, 0)
  return maps._replace(last_used=maps.last_used + rests, entered=maps.entered + rests)


def _slots_of(maps: Maps, blocks: Int32[Array, " n"]) -> jax.Array:
  """Slots of DRAM blocks (-1: nothing) in all layers and heads, P where there is none."""
  slots = maps.slot_of.at[:, :, only(blocks >= 0, blocks, maps.slot_of.shape[2])].get(mode="fill", fill_value=-1)
  return only(slots >= 0, slots, maps.last_used.shape[0]).ravel()


def room(maps: Maps, victims: Victims, shares: Int32[Array, ""] | int) -> Int32[Array, " Z"]:
  """Slots that nobody needs, for each head and each of equal shares: the first victims of a zone, those apart that came
  or were renewed in this step."""
  stamp = maps.last_used[victims.slots]
  needed = ~is_spare(stamp, victims.since) | (stamp - victims.since >= SPARE) & (stamp != -1)
  return (jnp.cumsum(needed, 1) == 0).sum(1, dtype=jnp.int32) // (maps.slot_of.shape[0] * shares)


def is_spare(last_used: jax.Array, since: jax.Array) -> jax.Array:
  """Whether nobody needs a slot: it is empty, or its block was stamped by SPARE and has not been used since."""
  return (last_used == -1) | (last_used - since < SPARE // 2)


def unused(last_used: jax.Array, since: jax.Array) -> jax.Array:
  """Whether a slot has not been used since then. Of stamps that wrap around the difference tells."""
  return (last_used == -1) | (last_used - since < 0)


def only(keep: jax.Array, index: jax.Array, size: int) -> jax.Array:
  """`index` where `keep`, else out of range: scatters drop it, gathers fill it."""
  return jnp.where(keep, index, size)


def by_rank(x: jax.Array | int) -> jax.Array:
  """A scalar or [n] against lists [B, K, n]."""
  return jnp.reshape(x, (1, 1, -1))


def total(ref: Any, wanted: Callable[[jax.Array], jax.Array] | None = None) -> jax.Array:
  """The sum of the values [n] of a kernel's ref, or of those whose index is `wanted`."""
  n = ref.shape[0]
  i = jnp.arange(pl.next_power_of_2(n))
  return jnp.sum(jnp.where((i < n) if wanted is None else wanted(i), ref[jnp.minimum(i, n - 1)], 0))
