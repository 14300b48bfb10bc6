"""Which block is in which slot: `propose` looks listed blocks up and finds slots for those that miss, `commit` makes
true what attention then did. Least recently used goes first, in the order that stood when the step began. A step is one
jitted call that runs layers, of a decode batch or of a piece of a prompt.

That order, `victims`, is one sort of the slots a step, not one a layer. Everything a step touches becomes
younger than everything it has not, so the order of what is untouched stays exact; what has been touched is passed over.
Each call of a step (its layers) goes on where the calls before it have come to, and gives a slot up once at most.

Maps, of one device:
  slot_of        [K, L, M] int32   slot that holds a block, -1 if none
  block_of       [P] int32         inverse: (k * L + layer) * M + block, -1 if the slot is empty
  last_used      [P] int32         stamp of the slot's last use, -1 if empty
  last_selected  [K, L, M] int32   the owning request's own step number when it last selected the block

The blocks of one call are distinct. `layer` and `stamp` are scalars, or [n], one for each rank of the list.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import triton

NEVER = -(1 << 30)  # last_selected of a block nobody selected; NEVER + w does not overflow
CHUNK = 64  # ranks that take their victims together, before the next ranks of any row
LOOKS = 32  # places that a miss looks at for a slot; where nearly all are in use, a walk over them would take long


class Maps(NamedTuple):
  slot_of: jax.Array
  block_of: jax.Array
  last_used: jax.Array
  last_selected: jax.Array

  @classmethod
  def empty(cls, n_heads: int, n_layers: int, n_pool: int, n_slots: int) -> Maps:
    """Of K, L, M and P: nothing is in a slot, nothing has been selected."""
    of_block = functools.partial(jnp.full, (n_heads, n_layers, n_pool), dtype=jnp.int32)
    of_slot = functools.partial(jnp.full, n_slots, dtype=jnp.int32)
    return cls(of_block(-1), of_slot(-1), of_slot(-1), of_block(NEVER))


class Victims(NamedTuple):
  """The slots in the order in which they are given up."""

  slots: jax.Array  # [P] int32
  since: jax.Array  # int32, the first stamp of the step: a slot used since then is no victim any more


class Located(NamedTuple):
  """Blocks in the order in which attention reads them: group by group, and in a group those in slots first."""

  blocks: jax.Array  # [B, K, n] int32, -1: nothing
  slot: jax.Array  # [B, K, n] int32, where the block is; -1: a miss
  place: jax.Array  # [B, K, n] int32, the slot that a miss may go to; -1: it is read but not kept, or it is a hit
  n_hits: jax.Array  # [B, K, n / group] int32, the first blocks of each group that are in their slots
  length: jax.Array  # [B, K] int32, blocks of the list

  @property
  def group(self) -> int:
    """Blocks of a group: a power of two, of which the last group may have fewer, or the whole list."""
    n, groups = self.blocks.shape[-1], self.n_hits.shape[-1]
    return n if groups == 1 else pl.next_power_of_2(-(-n // groups))

  @property
  def hit(self) -> jax.Array:
    """[B, K, n] bool: whether the block is in its slot."""
    return self.slot >= 0

  def missed(self, attended: jax.Array) -> jax.Array:
    """Of the first `attended` [B, K] blocks, whole groups or all of them, those that are in no slot: [B, K] int32."""
    begun = jnp.arange(self.n_hits.shape[-1])[None, None] * self.group < attended[..., None]
    return attended - jnp.where(begun, self.n_hits, 0).sum(-1)


def ages(maps: Maps, since: jax.Array) -> jax.Array:
  """The key [P] int32 by which the least recently used slot is the first victim: an empty one, then the oldest stamp.

  `since` is the first stamp of the step.
  """
  return jnp.where(maps.last_used == -1, jnp.iinfo(jnp.int32).min, maps.last_used - since)


def victims(key: jax.Array, since: jax.Array) -> Victims:
  """The order of a step whose stamps begin at `since`: the smallest `key` [P] int32 first, ties to the lowest slot."""
  ids = jnp.arange(key.shape[0], dtype=jnp.int32)
  return Victims(jax.lax.sort((key, ids), num_keys=1, is_stable=True)[1], since)


def _unused(last_used: jax.Array, since: jax.Array) -> jax.Array:
  """Whether a slot has not been used since then. Stamps wrap around; their differences do not."""
  return (last_used == -1) | (last_used - since < 0)


def propose(
  maps: Maps,
  victims: Victims,
  layer: jax.Array,
  blocks: jax.Array,
  length: jax.Array,
  *,
  given: jax.Array | int = 0,
  group: int | None = None,
  implementation: str = "xla",
) -> Located:
  """Where the listed blocks are, and slots for those that miss.

  Misses get the first victims that the step has not given away yet, in order of rank by chunks of ranks. A slot that
  holds a block of the call, or has been used since the step began, is passed over: of m misses, the t-th looks at
  places t, t + m, t + 2m ... from `given` on, LOOKS of them. A miss that finds none there is read but not kept.

  Args:
    maps: of one device.
    victims: made at the beginning of the step.
    layer: scalar int32, or [n].
    blocks: [B, K, n] int32, most critical first along n; -1: nothing. Beyond the end of a shorter list all are -1: hits
      change places, so that anything else there can come before the list's own blocks.
    length: [B, K] int32, blocks of each list; carried along.
    given: int32 of any shape; its sum is how many misses the step has given slots before.
    group: blocks that may change places, so that hits come first; a power of two, or None for the whole list.
    implementation: "xla", "triton" or "interpret".

  Raises:
    ValueError: `group` is not a power of two, or lists have no blocks.
  """
  triton.check(implementation)
  n = blocks.shape[-1]
  if n == 0:
    raise ValueError("lists of 0 blocks")
  group = n if group is None else min(group, n)
  if group < 1 or (group != n and group & (group - 1)):
    raise ValueError(f"{group=} is not a power of two")
  chunk = pl.next_power_of_2(n) if group == n else max(CHUNK, group)
  if maps.last_used.shape[0] == 0:
    nowhere = jnp.full_like(blocks, -1)
    return Located(blocks, nowhere, nowhere, jnp.zeros((*blocks.shape[:2], -(-n // group)), jnp.int32), length)
  given = jnp.asarray(given)
  if implementation == "xla":
    return Located(*_propose_xla(maps, victims, layer, blocks, given, group, chunk), length)
  return Located(*_propose_kernels(maps, victims, layer, blocks, given, group, chunk, implementation), length)


def commit(
  maps: Maps,
  layer: jax.Array,
  located: Located,
  attended: jax.Array,
  stamp: jax.Array,
  step: jax.Array,
  *,
  implementation: str = "xla",
) -> Maps:
  """Maps after attention read the first `attended` [B, K] blocks of the lists; in place when donated.

  A block beyond `attended` was neither read nor copied, so its slot still holds what it held. `stamp` is like `layer`;
  `step` [B] int32 is each request's own step number.
  """
  triton.check(implementation)
  if implementation == "xla":
    return _commit_xla(maps, layer, located, attended, stamp, step)
  return _commit_kernel(maps, layer, located, attended, stamp, step, implementation)


def release(maps: Maps, freed: jax.Array) -> Maps:
  """Forgets the freed DRAM blocks [n] int32 (-1: nothing) in all layers and heads; their slots become empty."""
  n_pool = maps.slot_of.shape[2]
  n_slots = maps.last_used.shape[0]
  freed = jnp.where(freed >= 0, freed, n_pool)
  slots = maps.slot_of.at[:, :, freed].get(mode="fill", fill_value=-1)  # [K, L, n]
  slots = jnp.where(slots >= 0, slots, n_slots).ravel()
  return Maps(
    maps.slot_of.at[:, :, freed].set(-1, mode="drop"),
    maps.block_of.at[slots].set(-1, mode="drop"),
    maps.last_used.at[slots].set(-1, mode="drop"),
    maps.last_selected.at[:, :, freed].set(NEVER, mode="drop"),
  )


# ------------------------------------------------------------------------------------------------------------------ XLA


def _only(keep: jax.Array, index: jax.Array, size: int) -> jax.Array:
  """`index` where `keep`, else out of range: scatters drop it, gathers fill it."""
  return jnp.where(keep, index, size)


def _propose_xla(maps, victims, layer, blocks, given, group, chunk) -> tuple[jax.Array, ...]:
  n_rows, n_heads, n = blocks.shape
  n_slots = maps.last_used.shape[0]
  k = jnp.arange(n_heads)[None, :, None]
  slot = jnp.where(blocks >= 0, maps.slot_of[k, _by_rank(layer), blocks], -1)
  hit = slot >= 0
  claimed = jnp.zeros(n_slots, bool).at[_only(hit, slot, n_slots)].set(True, mode="drop")
  miss = (blocks >= 0) & ~hit

  padded = jnp.pad(miss, ((0, 0), (0, 0), (0, -n % chunk)))
  by_chunk = jnp.moveaxis(padded.reshape(n_rows, n_heads, -1, chunk), 2, 0)  # [n / chunk, B, K, chunk]
  turn = (jnp.cumsum(by_chunk.ravel()) - 1).reshape(by_chunk.shape)
  turn = jnp.moveaxis(turn, 0, 2).reshape(padded.shape)[..., :n]

  def look_further(state):
    look, index, place, wanting = state
    victim = victims.slots.at[_only(wanting, index, n_slots)].get(mode="fill", fill_value=-1)
    found = (victim >= 0) & _unused(maps.last_used[victim], victims.since) & ~claimed[victim]
    index += miss.sum()
    return look + 1, index, jnp.where(found, victim, place), wanting & ~found & (index < n_slots)

  more = lambda state: (state[0] < LOOKS) & state[3].any()  # noqa: E731
  start = jnp.int32(0), given.sum() + turn, jnp.full_like(slot, -1), miss
  place = jax.lax.while_loop(more, look_further, start)[2]

  grouped = lambda x, fill: jnp.pad(x, ((0, 0), (0, 0), (0, -n % group)), constant_values=fill).reshape(  # noqa: E731
    n_rows, n_heads, -1, group
  )
  hits = grouped(hit, False)
  order = jnp.argsort(~hits, axis=-1, stable=True)
  ordered = lambda x: jnp.take_along_axis(grouped(x, -1), order, -1).reshape(n_rows, n_heads, -1)[..., :n]  # noqa: E731
  return ordered(blocks), ordered(slot), ordered(place), hits.sum(-1, dtype=jnp.int32)


def _commit_xla(maps, layer, located, attended, stamp, step) -> Maps:
  n_heads, n_layers, n_pool = maps.slot_of.shape
  n_slots = maps.last_used.shape[0]
  blocks, layer = located.blocks, _by_rank(layer)
  k = jnp.arange(n_heads)[None, :, None]
  reached = (jnp.arange(blocks.shape[2])[None, None] < attended[..., None]) & (blocks >= 0)
  step = jnp.broadcast_to(step[:, None, None], blocks.shape)
  last_selected = maps.last_selected.at[k, layer, _only(reached, blocks, n_pool)].set(step, mode="drop")
  if n_slots == 0:
    return maps._replace(last_selected=last_selected)

  enters = reached & (located.place >= 0)
  into = _only(enters, located.place, n_slots)
  old = jnp.where(enters, maps.block_of.at[into].get(mode="fill", fill_value=-1), -1)
  head, rest = old // (n_layers * n_pool), old % (n_layers * n_pool)
  head = _only(old >= 0, head, n_heads)
  slot_of = maps.slot_of.at[head, rest // n_pool, rest % n_pool].set(-1, mode="drop")
  slot_of = slot_of.at[k, layer, _only(enters, blocks, n_pool)].set(located.place, mode="drop")
  block_of = maps.block_of.at[into].set((k * n_layers + layer) * n_pool + blocks, mode="drop")
  touched = jnp.where(reached & located.hit, located.slot, into)
  last_used = maps.last_used.at[touched].set(jnp.broadcast_to(_by_rank(stamp), blocks.shape), mode="drop")
  return Maps(slot_of, block_of, last_used, last_selected)


def _by_rank(x: jax.Array) -> jax.Array:
  """A scalar or [n] against lists [B, K, n]."""
  return jnp.reshape(x, (1, 1, -1))


# -------------------------------------------------------------------------------------------------------------- kernels


def _propose_kernels(maps, victims, layer, blocks, given, group, chunk, implementation) -> tuple[jax.Array, ...]:
  """Two kernels of one program for each list and chunk of ranks: the second needs the misses of all lists."""
  n_rows, n_heads, n = blocks.shape
  n_slots, n_lists, n_chunks, n_groups = maps.last_used.shape[0], n_rows * n_heads, -(-n // chunk), -(-n // group)
  layer = jnp.reshape(layer, -1).astype(jnp.int32)
  call = functools.partial(
    triton.call, grid=(n_chunks, n_lists), implementation=implementation, num_warps=1 if chunk <= 64 else 4
  )
  int32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)  # noqa: E731

  def at():
    c, i = pl.program_id(0), pl.program_id(1)
    return c, i, jax.lax.div(i, n_heads), jax.lax.rem(i, n_heads), c * chunk + jnp.arange(chunk)

  def look_up(layer_ref, blocks_ref, slot_of_ref, _, slot_ref, misses_ref, claimed_ref):
    c, i, b, k, rank = at()
    block = jnp.where(rank < n, blocks_ref[b, k, jnp.minimum(rank, n - 1)], -1)
    of_layer = layer_ref[0] if layer.shape[0] == 1 else layer_ref[jnp.minimum(rank, n - 1)]
    slot = jnp.where(block >= 0, slot_of_ref[k, of_layer, jnp.maximum(block, 0)], -1)
    triton.store(slot_ref.at[b, k, rank], slot, mask=rank < n)
    triton.store(claimed_ref.at[_only(slot >= 0, slot, n_slots)], jnp.ones((chunk,), jnp.int8), mask=slot >= 0)
    misses_ref[c, i] = jnp.sum(((block >= 0) & (slot < 0)).astype(jnp.int32))

  slot, misses, claimed = call(
    look_up,
    out_shape=(int32(n_rows, n_heads, n), int32(n_chunks, n_lists), jax.ShapeDtypeStruct((n_slots,), jnp.int8)),
    input_output_aliases={3: 2},
    name="look_up",
  )(layer, blocks, maps.slot_of, jnp.zeros(n_slots, jnp.int8))

  n_counts, n_given = n_chunks * n_lists, given.size

  def total(ref, n, mask=None):
    i = jnp.arange(pl.next_power_of_2(n))
    return jnp.sum(jnp.where(i < n if mask is None else mask(i), ref[jnp.minimum(i, n - 1)], 0))

  def assign(
    given_ref, since_ref, blocks_ref, slot_in_ref, misses_ref, victims_ref, last_used_ref, claimed_ref, *out_refs
  ):
    c, i, b, k, rank = at()
    blocks_out_ref, slot_ref, place_ref, hits_ref = out_refs
    exists, rank = rank < n, jnp.minimum(rank, n - 1)
    block, slot = jnp.where(exists, blocks_ref[b, k, rank], -1), jnp.where(exists, slot_in_ref[b, k, rank], -1)
    hit = slot >= 0
    miss = (block >= 0) & ~hit

    before = total(given_ref, n_given) + total(misses_ref, n_counts, lambda other: other < c * n_lists + i)
    stride = total(misses_ref, n_counts)

    def look_further(state):
      look, index, place, wanting = state
      wanting = (wanting == 1) & (index < n_slots)
      victim = victims_ref[jnp.where(wanting, index, 0)]
      free = _unused(last_used_ref[victim], since_ref[0]) & (claimed_ref[victim].astype(jnp.int32) == 0)
      place = jnp.where(wanting & free, victim, place)
      return look + 1, index + stride, place, (wanting & ~free).astype(jnp.int32)

    more = lambda state: (state[0] < LOOKS) & (jnp.max(state[3]) > 0)  # noqa: E731
    nowhere, wanting = jnp.full((chunk,), -1, jnp.int32), miss.astype(jnp.int32)
    start = jnp.int32(0), before + jnp.cumsum(wanting) - 1, nowhere, wanting
    look, index, place, wanting = jax.lax.while_loop(more, look_further, start)
    # Never so, but every result of a loop must be used: Triton's compiler fails otherwise.
    place = jnp.where((wanting == 1) & (index < 0) & (look < 0), -1, place)

    width = chunk if group == n else group
    hit_in = jnp.reshape(hit.astype(jnp.int32), (chunk // width, width))
    hits, before = jnp.sum(hit_in, 1), jnp.cumsum(hit_in, 1)  # of a group, and up to and with each
    to = jnp.arange(width)[None]
    to = jnp.where(hit_in == 1, before - 1, hits[:, None] + to - before)
    to = c * chunk + jnp.reshape(jnp.arange(chunk // width)[:, None] * width + to, (chunk,))
    triton.store(blocks_out_ref.at[b, k, to], block, mask=exists)
    triton.store(slot_ref.at[b, k, to], slot, mask=exists)
    triton.store(place_ref.at[b, k, to], place, mask=exists)
    of_group = c * (chunk // width) + jnp.arange(chunk // width)
    triton.store(hits_ref.at[b, k, of_group], hits, mask=of_group < n_groups)

  of_list = int32(n_rows, n_heads, n)
  f = call(assign, out_shape=(of_list, of_list, of_list, int32(n_rows, n_heads, n_groups)), name="assign")
  since = jnp.reshape(victims.since, 1)
  return f(given.ravel(), since, blocks, slot, misses.ravel(), victims.slots, maps.last_used, claimed)


def _commit_kernel(maps, layer, located, attended, stamp, step, implementation) -> Maps:
  n_heads, n_layers, n_pool = maps.slot_of.shape
  n_rows, _, n = located.blocks.shape
  n_slots = maps.last_used.shape[0]
  chunk, has_slots = min(CHUNK, pl.next_power_of_2(n)), n_slots > 0
  layer, stamp = (jnp.reshape(x, -1).astype(jnp.int32) for x in (layer, stamp))
  maps_in = maps if has_slots else maps._replace(block_of=jnp.zeros(1, jnp.int32), last_used=jnp.zeros(1, jnp.int32))

  def kernel(layer_ref, stamp_ref, step_ref, attended_ref, blocks_ref, slot_ref, place_ref, *refs):
    slot_of_ref, block_of_ref, last_used_ref, last_selected_ref = refs[4:]
    b, k = jax.lax.div(pl.program_id(1), n_heads), jax.lax.rem(pl.program_id(1), n_heads)
    rank = pl.program_id(0) * chunk + jnp.arange(chunk)
    live = rank < jnp.minimum(attended_ref[b, k], n)
    rank = jnp.minimum(rank, n - 1)
    block, slot, place = blocks_ref[b, k, rank], slot_ref[b, k, rank], place_ref[b, k, rank]
    of_layer = layer_ref[0] if layer.shape[0] == 1 else layer_ref[rank]
    now = stamp_ref[0] if stamp.shape[0] == 1 else stamp_ref[rank]
    now, of_layer = (jnp.broadcast_to(x, (chunk,)) for x in (now, of_layer))

    reached = live & (block >= 0)
    to = _only(reached, block, n_pool)
    triton.store(last_selected_ref.at[k, of_layer, to], jnp.full((chunk,), step_ref[b]), mask=reached)
    if has_slots:
      enters = reached & (place >= 0)
      into = _only(enters, place, n_slots)
      old = jnp.where(enters, block_of_ref[jnp.where(enters, place, 0)], -1)
      evicted, old = old >= 0, jnp.maximum(old, 0)
      head = jax.lax.div(old, jnp.full_like(old, n_layers * n_pool))
      rest = old - head * (n_layers * n_pool)
      old_layer = jax.lax.div(rest, jnp.full_like(rest, n_pool))
      gone = jnp.full((chunk,), -1, jnp.int32)
      old_block = _only(evicted, rest - old_layer * n_pool, n_pool)
      triton.store(slot_of_ref.at[head, old_layer, old_block], gone, mask=evicted)
      triton.store(slot_of_ref.at[k, of_layer, _only(enters, block, n_pool)], place, mask=enters)
      triton.store(block_of_ref.at[into], (k * n_layers + of_layer) * n_pool + block, mask=enters)
      touched = enters | (reached & (slot >= 0))
      at = jnp.where(touched, jnp.maximum(slot, place), n_slots)
      triton.store(last_used_ref.at[at], now, mask=touched)

  out = triton.call(
    kernel,
    out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in maps_in],
    grid=(-(-n // chunk), n_rows * n_heads),
    input_output_aliases={7 + i: i for i in range(4)},
    implementation=implementation,
    num_warps=1,
    name="commit",
  )(layer, stamp, step, attended, located.blocks, located.slot, located.place, *maps_in)
  return Maps(*out) if has_slots else maps._replace(last_selected=out[3])
